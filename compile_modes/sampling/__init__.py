"""Stochastic passes: what does not depend on random numbers runs once, the rest for many repetitions at a time.

``finding`` tells which modules draw random numbers in train, ``capturing`` makes a graph in which those are in train
and all else is in eval, ``splitting`` parts it where the first random number is drawn, ``batching`` runs the second
part for many repetitions at once, by ``torch.func.vmap``, and ``plans`` keeps all of it for the next call. ``looping``
is for modules that no graph can be made of.
"""
