"""What two programs differ in: their sites' modes and literals, and their weights.

``diff`` is the whole; ``sites`` pairs sites and ``weights`` compares tensors, neither of which writes anything;
``report`` is what is handed back.
"""
