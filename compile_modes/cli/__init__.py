"""The command line: ``compile-modes`` demo, explain and bake.

Imports every other folder; nothing imports it.
"""
