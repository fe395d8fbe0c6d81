"""The command line: ``compile-modes`` demo, explain, bake, diff, package and inspect.

Imports every other folder; nothing imports it.
"""
