"""Compile the kernels of EDM's blocks for an H100 or H200 (compute capability 9.0). Needs no GPU.

    python -m tests.compile_kernels

Prints a line of JSON for each kernel, dtype and size of a group: bytes of machine code, seconds and,
if the driver's tools are there, registers and bytes of stack.
"""

import json
import re
import subprocess
import tempfile
import time
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harness.networks import triton_ops

TARGET = GPUTarget("cuda", 90, 32)
IMAGES = {"x", "y", "h", "dx", "dy"}
REALS = {"eps", "scale", "gain", "silu"}
INTEGERS = {"padding", "TILES"}  # not multiples of 16
MULTIPLES = {"N", "S", "C", "G", "R", "H", "W", "OUT_H", "OUT_W"}
MULTIPLES |= {"x_row", "dy_row", "h_row", "shift_row", "modulation_row"}


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack": int(found[2])} if found else {}


def compile_kernel(kernel, dtype: str, constants: dict) -> None:
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
            continue
        if name in REALS:
            signature[name] = "fp32"
        elif name in INTEGERS | MULTIPLES:
            signature[name] = "i32"
        else:
            signature[name] = f"*{dtype}" if name in IMAGES else "*fp32"
        if name not in REALS | INTEGERS:
            attributes[(i,)] = [["tt.divisibility", 16]]
    started = time.perf_counter()
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": triton_ops.WARPS, "enable_fp_fusion": True}
    cubin = triton.compile(source, target=TARGET, options=options).asm["cubin"]
    row = {"kernel": kernel.__name__, "dtype": dtype, "group": constants.get("SIZE")}
    row |= {"bytes": len(cubin), "seconds": round(time.perf_counter() - started, 2)}
    print(json.dumps(row | resources(cubin)), flush=True)


def main() -> None:
    norms = triton_ops._norm_forward, triton_ops._norm_backward
    tile = {"ROWS": triton_ops.TILE // triton_ops.WIDTH, "WIDTH": triton_ops.WIDTH}
    tile["ACC"] = tl.float32
    # Groups of 4, 6, 8 and 12 channels; 6 and 12 are padded.
    for dtype, widths in (("bf16", (128, 192, 256, 384)), ("fp32", (256,))):
        for channels in widths:
            constants = triton_ops.group_tiles(channels, 32) | {"ACC": tl.float32}
            for kernel in norms:
                compile_kernel(kernel, dtype, constants)
        compile_kernel(triton_ops._residual_forward, dtype, tile)
        compile_kernel(triton_ops._residual_backward, dtype, tile)
        for taps in (2, 4) if dtype == "bf16" else ():
            for up in (False, True):
                compile_kernel(triton_ops._resample, dtype, tile | {"TAPS": taps, "UP": up})


if __name__ == "__main__":
    main()
