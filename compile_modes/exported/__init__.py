"""What an exported program becomes: bound, baked, paired with its other mode, saved, and a program again.

Imports ``graph`` and ``archive``. Hands on modules whose ``train()`` and ``eval()`` work.
"""
