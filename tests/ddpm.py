"""Tiny DDPM pipelines with random weights, for images of 1 x 8 x 8."""

from __future__ import annotations

import torch


def ddpm(
    classes: int = 0, prediction: str = "epsilon", learned_variance: bool = False, **scheduler
):
    """A `DDPMPipeline` with the odd arguments of published ones."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2 if learned_variance else 1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=classes or None,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )
    scheduler = DDPMScheduler(prediction_type=prediction, **scheduler)
    return DDPMPipeline(unet.eval(), scheduler)
