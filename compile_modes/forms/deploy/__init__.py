"""The deploy form: eval without gradients on folded and packed constants, which are computed again after each write.

- ``eligible.py``: which graphs it is for
- ``recipe.py``: how constants follow from weights, recorded while Inductor folds them
- ``norms.py``: batch norms that convolutions compute
- ``writes.py``, ``snapshot.py``: whether weights have been written to
- ``graphs.py``: one graph; ``sets.py``: one of its parameter sets; ``running.py``: a call
"""
