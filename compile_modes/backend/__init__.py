"""Under torch.compile: capture, which modes were asked for, rewrite, forms, Inductor.

Imports ``forms`` and ``graph``. Hands on the backend, the pass of stock Inductor, and ``warmup``.
"""

from compile_modes.backend.entry import pt2e_modes as pt2e_modes
