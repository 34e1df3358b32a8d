"""Which parameters of a student stay as the teacher left them.

Zheng and Yang 2024 (GDD-I): a diffusion model can nearly generate in one step; its convolutions
need no further training, so most layers may be frozen.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

# diffusers UNets: convolutions and attention output projections inside the encoder, middle and
# decoder blocks, resampling ones included. Input and output convolutions (`conv_in`, `conv_out`),
# skips (`conv_shortcut`), norms, embeddings, `time_emb_proj` and QKV stay trainable.
_DIFFUSERS_UNET = re.compile(
    r"(^|\.)(down_blocks|mid_block|up_blocks)\.\d*.*\b(conv1|conv2|to_out\.\d+|(down|up)samplers\.\d+\.(conv|Conv2d_0))\."
)
# EDM's networks: GDD's rule (names that contain conv or proj, inside the blocks); norms, `affine`,
# `skip`, `qkv`, the mapping network, input and output convolutions stay trainable.
_EDM_UNET = re.compile(r"(^|\.)(enc|dec)\.\d+x\d+_(block\d+|up|down|in[01])\.(conv[01]|proj)\.")
# diffusers transformers: attention output projections and the MLPs' weights.
_DIFFUSERS_TRANSFORMER = re.compile(
    r"(^|\.)transformer_blocks\.\d+\.(attn\d?\.to_out\.\d+\.|ff\.net\..*weight$)"
)


def _innate(name: str) -> bool:
    return any(p.search(name) for p in (_DIFFUSERS_UNET, _EDM_UNET, _DIFFUSERS_TRANSFORMER))


PRESETS: dict[str, Callable[[str], bool]] = {"none": lambda name: False, "innate": _innate}


def freeze(network: nn.Module, preset: str) -> float:
    """Set `requires_grad` by `preset` ("none", "innate"); returns the share frozen."""
    frozen = total = 0
    for name, parameter in network.named_parameters():
        hold = PRESETS[preset](name)
        parameter.requires_grad_(not hold)
        frozen += parameter.numel() if hold else 0
        total += parameter.numel()
    if preset != "none" and frozen == 0:
        raise ValueError(f"preset {preset!r} freezes nothing in {type(network).__name__}")
    return frozen / total
