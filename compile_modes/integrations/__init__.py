"""Where people train: callbacks that compile in place, warm up both modes and count what was compiled.

``transformers`` is for Hugging Face's ``Trainer``, ``lightning`` for Lightning's; each imports its library. What both
do stands in ``compiling`` (what is compiled, and how it is warmed up) and ``phases`` (graphs and stalls of each loop).
"""
