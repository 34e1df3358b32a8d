"""The numeric mode of a process: whether float32 means float32 on a GPU.

By default, cuDNN's convolutions use TensorFloat-32 (10 bits of mantissa). NVIDIA's containers set
TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which allows it in matrix products, too. Every stage that
computes therefore starts with `set_precision`.
"""

import contextlib
import os
from collections.abc import Iterator

from torch import backends

from harness.errors import UserError

LIBRARIES = "NVIDIA_TF32_OVERRIDE"  # read by NVIDIA's libraries, which then ignore PyTorch's flags


def _set_flags(products: bool, convolutions: bool, benchmark: bool) -> None:
    """Allow TF32 in matrix products and in convolutions (and recurrent layers); let cuDNN time its
    algorithms for each new shape."""
    # PyTorch has two generations of flags, and reading them fails if they disagree. The older ones
    # set the newer ones, too, but without TF32 convolutions inherit from more general flags.
    backends.cuda.matmul.allow_tf32 = products
    backends.cudnn.allow_tf32 = convolutions
    for operation in (backends.cudnn.conv, backends.cudnn.rnn):
        operation.fp32_precision = "tf32" if convolutions else "ieee"
    backends.cudnn.benchmark = benchmark


def set_precision(device: str, tf32: bool = False, static_shapes: bool = False) -> None:
    """Set how this process computes in float32: in full precision, or with TF32 in convolutions and
    matrix products. The flags of PyTorch replace TORCH_ALLOW_TF32_CUBLAS_OVERRIDE.

    static_shapes: most batches have the same shape, so cuDNN may measure which algorithm is fastest
    for each. A `UserError` if the environment forces another mode on a GPU.
    """
    value = os.environ.get(LIBRARIES)
    if device.startswith("cuda") and value is not None and (tf32 or value != "0"):
        message = f"{LIBRARIES}={value} in the environment overrides the keys tf32; unset it"
        raise UserError(message, "environment")
    _set_flags(tf32, tf32, static_shapes)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """A context, or with parentheses a decorator, without TF32: for numbers that must not depend on
    the GPU or on settings. Batches may vary in shape."""
    precisions = (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)
    before = (*(precision == "tf32" for precision in precisions), backends.cudnn.benchmark)
    _set_flags(False, False, False)
    try:
        yield
    finally:
        _set_flags(*before)
