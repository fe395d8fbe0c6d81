"""Forms: what sites are lowered to once their mode is known.

Imports ``graph``. Hands on :func:`compile_modes.forms.lower.lower`, which chooses and applies the form of every site.
"""
