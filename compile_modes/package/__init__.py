"""Ahead of time: packages of AOTInductor code for several modes over one set of weights."""
