"""One graph for what Python decides: programs of several modes, merged into one with switches.

Programs become traces of ops (``traces``), are aligned (``aligning``) and merged step by step (``merging``, ``trees``,
``standing``). Who decides is found (``deciders``) and judged (``verdicts``), the result compared with two more exports
(``checking``) and written into a graph (``emitting``). ``switches`` is the way through. Imports ``graph`` and
``exported/pairing.py``, which is asked first.
"""
