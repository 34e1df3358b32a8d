"""Where Triton kernels run in place of the PyTorch operations that they are equal to.

A module of kernels keeps the PyTorch operations as its plain path. The plain path runs on CPU, and
wherever somebody needs to see or to differentiate these operations: see `usable`. On the first use
in a process, `agrees` compares the kernels with the plain path on the device. The environment
variable HARNESS_KERNELS=0 turns all kernels off.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from harness.precision import full_precision

logger = logging.getLogger(__name__)

SWITCH = "HARNESS_KERNELS"
_mode = (
    "off" if os.environ.get(SWITCH) in ("0", "off", "false") else "gpu"
)  # "gpu", "off", or for tests "always"
_agreement: dict[str, bool] = {}  # by the name of a module of kernels


@contextlib.contextmanager
def kernels(mode: str) -> Iterator[None]:
    """Use kernels on a GPU ("gpu"), nowhere ("off"), or also on CPU ("always"), for tests with
    Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported)."""
    global _mode
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def usable(tensor: Tensor) -> bool:
    """Whether kernels may compute on this tensor: on a GPU, but not while a dispatch mode observes
    the operations (to count them, or with fake tensors), under forward-mode derivatives and other
    transforms of `torch.func`, or while `torch.compile` traces."""
    if torch.compiler.is_compiling():  # the compiler cannot trace the rest
        return False
    on_device = tensor.is_cuda if _mode == "gpu" else _mode == "always" and not tensor.is_meta
    return on_device and not torch._C._len_torch_dispatch_stack() and not transformed()


def has_fused_pass(network: nn.Module) -> bool:
    """Whether modules of a network have a fused pass, for weights in channels-last memory, and this
    process has kernels for it. The plain pass is slower in this memory on a GPU."""
    if _mode == "off" or find_spec("triton") is None:
        return False
    return any(getattr(module, "has_fused_pass", False) for module in network.modules())


def transformed() -> bool:
    """Whether the operations run under forward-mode derivatives or a transform of `torch.func`."""
    return forward_ad._current_level >= 0 or bool(torch._C._functorch.maybe_current_level())


def agrees(name: str, check: Callable[[], None]) -> bool:
    """Whether `check` passes; it is called once per process. It raises an exception if the kernels
    `name` fail or differ from the plain path, which then runs with a warning."""
    if name not in _agreement:
        try:
            # The first use may be under `no_grad` or autocast, or with TF32 in the plain path.
            autocast = torch.autocast("cuda", enabled=False)
            with torch.inference_mode(False), torch.enable_grad(), autocast, full_precision():
                check()
        except Exception as error:  # compilers and drivers may fail in any way
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            logger.warning("%s: Triton kernels are off, PyTorch runs instead (%s)", name, reason)
            _agreement[name] = False
        else:
            _agreement[name] = True
    return _agreement[name]
