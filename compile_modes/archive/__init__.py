"""One ``.pt2`` file for one or two programs, each weight once: container, storages, programs.

Imports the base and ``_compat`` only: it knows of programs and tensors, and nothing of modes.
"""
