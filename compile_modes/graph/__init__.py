"""What a mode-dependent graph is, and changing it: the table of ops, sites and their owners, the rewrite.

Imports only the base (messages, errors, console, logs) and ``_compat``. Hands on sites, and edits of single nodes.
"""
