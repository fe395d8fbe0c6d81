"""Fine-tuning a program without its source: low-rank adapters, another head, freezing by glob, statistics of norms.

Imports ``exported`` and below. Finds layers in the graph, plans, and edits both the module and the programs that
``save`` stores for it, all or nothing. Hands on the functions of its files.
"""
