"""Modes compiled before they are needed: here and now, or in a child process that fills the same cache.

``warmup`` runs each mode once in this process. With ``background=True``, ``background`` starts a child and watches it,
``travel`` takes the module there, ``child`` runs the same warm-up in it, and ``publishing`` moves what it has compiled
into the cache of this process.
"""
