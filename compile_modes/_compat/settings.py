"""What torch's caches of compiled code depend on besides the graph: settings, to be made the same in another process.

Checked on torch 2.14.1 and 2.15.0.
"""

import contextlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
from torch._dynamo import config as dynamo_config
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.fx.experimental import _config as shapes_config

from compile_modes._compat import finding

_CONFIGS: dict[str, Any] = {
    "dynamo": dynamo_config,
    "inductor": inductor_config,
    "functorch": torch._functorch.config,
    "shapes": shapes_config,
    "compiler": torch.compiler.config,
}
_NOT_TAKEN = ("compile_threads", "worker_start_method", "_cache_config_ignore_prefix", "_save_config_ignore")
_TRITON = "triton"  # the folder of Triton's own cache

#: The switches of torch that change what is compiled, with what sets them.
_SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "device": (torch.get_default_device, torch.set_default_device),
    "matmul": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
}


def cache_directory() -> str:
    """The folder in which Inductor and AOTAutograd keep what this process compiles."""
    return cache_dir()


def belongs_to_triton(path: str) -> bool:
    """Whether a file, by its path below :func:`cache_directory`, is of Triton's cache.

    Its files name each other by absolute paths. Inductor keeps the kernels in its own entries too, and unpacks them.
    """
    return path.split("/")[0] == _TRITON


def is_temporary(name: str) -> bool:
    """Whether a file of the cache is a lock, or one that torch was writing."""
    return name.endswith((".lock", ".tmp")) or name.startswith(".")


def caches() -> bool:
    """Whether torch keeps what it compiles for other processes."""
    inductor: Any = inductor_config
    return bool(inductor.fx_graph_cache and not inductor.force_disable_caches)


def settings() -> dict[str, Any]:
    """Everything of the kind in this process and thread; what can't be pickled is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading a deprecated setting warns
        configs = {name: dict(_picklable(config.get_config_copy())) for name, config in _CONFIGS.items()}
    switches = {name: get() for name, (get, _) in _SWITCHES.items()}
    return {"configs": configs, "switches": switches, "autocast": _autocast(), "finders": finding.finders()}


def _picklable(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        with contextlib.suppress(Exception):  # a pass that is a closure, say; pickle raises many kinds
            pickle.dumps(value)
            if key not in _NOT_TAKEN:
                yield key, value


def apply(found: dict[str, Any]) -> None:
    """Makes this process like the one that :func:`settings` has described, autocast apart."""
    for name, (get, put) in _SWITCHES.items():
        if get() != found["switches"][name]:  # to set the precision to what it is by default isn't to leave it alone
            put(found["switches"][name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in _CONFIGS.items():
            own = config.get_config_copy()
            config.load_config({k: v for k, v in found["configs"][name].items() if k in own and own[k] != v})
    finding.find_in(found["finders"])


def _autocast() -> list[tuple[str, torch.dtype, bool]]:
    devices = {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}
    cached = torch.is_autocast_cache_enabled()
    return [(d, torch.get_autocast_dtype(d), cached) for d in sorted(devices) if torch.is_autocast_enabled(d)]


def autocast(found: dict[str, Any]) -> contextlib.ExitStack:
    """The autocast that was on where :func:`settings` was called."""
    stack = contextlib.ExitStack()
    for device, dtype, cached in found["autocast"]:
        stack.enter_context(torch.autocast(device, dtype, cache_enabled=cached))
    return stack
