"""Parameters that a student does not train. Zheng and Yang 2024 (GDD-I): a diffusion model is
nearly a one-step generator, and its convolutions need no further training."""

import re
from typing import Literal

from torch import nn

from harness.errors import UserError

# diffusers UNets: convolutions and attention output projections in the encoder, middle and decoder
# blocks, including resampling. Input and output convolutions (`conv_in`, `conv_out`), skips
# (`conv_shortcut`), norms, embeddings, `time_emb_proj` and QKV stay trainable.
_DIFFUSERS_UNET = re.compile(
    r"(^|\.)(down_blocks|mid_block|up_blocks)\.\d*.*\b(conv1|conv2|to_out\.\d+|(down|up)samplers\.\d+\.(conv|Conv2d_0))\."
)
# EDM's networks: GDD's rule (names with conv or proj inside the blocks). Norms, `affine`, `skip`,
# `qkv`, the mapping network, and input and output convolutions stay trainable.
_EDM_UNET = re.compile(r"(^|\.)(enc|dec)\.\d+x\d+_(block\d+|up|down|in[01])\.(conv[01]|proj)\.")
# diffusers transformers: attention output projections and the MLPs' weights.
_DIFFUSERS_TRANSFORMER = re.compile(
    r"(^|\.)transformer_blocks\.\d+\.(attn\d?\.to_out\.\d+\.|ff\.net\..*weight$)"
)
_INNATE = (_DIFFUSERS_UNET, _EDM_UNET, _DIFFUSERS_TRANSFORMER)


def freeze(network: nn.Module, preset: Literal["none", "innate"]) -> float:
    """Set `requires_grad` by `preset`; returns the fraction that is frozen."""
    frozen = total = 0
    for name, parameter in network.named_parameters():
        matches = any(pattern.search(name) for pattern in _INNATE)
        parameter.requires_grad_(preset == "none" or not matches)
        frozen += 0 if parameter.requires_grad else parameter.numel()
        total += parameter.numel()
    if preset != "none" and frozen == 0:
        name = type(getattr(network, "backbone", network)).__name__
        raise UserError(f"preset {preset!r} freezes nothing in {name}", "no-effect")
    return frozen / total
