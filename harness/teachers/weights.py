"""Weights under another name or format than the one that is read."""

import re
from pathlib import Path

VARIANT = re.compile(r"(?P<name>[^.]+)\.(?P<variant>[^.]+)\.safetensors")  # model.fp16.safetensors


def weights_hint(folder: Path) -> str:
    """What to add to "no weights in this folder" if it has weights of a variant such as fp16, or
    pickles; "" otherwise."""
    names = sorted(path.name for path in folder.glob("*"))
    variants = [match for match in map(VARIANT.fullmatch, names) if match]
    if len(variants) == 1 and f"{variants[0]['name']}.safetensors" not in names:
        name = variants[0]
        return f"; it has {name[0]}: rename it to {name['name']}.safetensors"
    pickles = [name for name in names if name.endswith(".bin")]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        remedy = "download the safetensors, or load the pipeline with diffusers and save it again"
        return f"; {pickles[0]} is a pickle, which is not read: {remedy}"
    return ""
