"""Tiny text-to-image pipelines with random weights, of the classes that the real ones have."""

from __future__ import annotations

import torch

WIDTH = 32  # of the text encoders


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _clip():
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = [*_alphabet(), *(c + "</w>" for c in _alphabet()), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    return tokenizer, CLIPTextModel(config).eval()


def _t5():
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -3.0) for c in map(chr, range(33, 127))]
    tokenizer = T5Tokenizer(pieces, extra_ids=0, model_max_length=120)
    config = T5Config(
        vocab_size=len(pieces), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=4
    )
    return tokenizer, T5EncoderModel(config).eval()


def _vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()


def stable_diffusion(prediction: str = "epsilon", seed: int = 0):
    """A `StableDiffusionPipeline` for images of 16 x 16 pixels, latents 4 x 8 x 8."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    tokenizer, text_encoder = _clip()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type=prediction,
    )
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixart(sample_size: int = 8, seed: int = 0):
    """A `PixArtAlphaPipeline`; one with `sample_size` 128 takes micro-conditions."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(seed)
    tokenizer, text_encoder = _t5()
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        patch_size=2 if sample_size < 128 else 16,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        cross_attention_dim=24,
        in_channels=4,
        out_channels=8,
    )
    # A fresh one has zeros where nothing would show what its conditions do.
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return PixArtAlphaPipeline(
        vae=_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.0001, beta_end=0.02, clip_sample=False, set_alpha_to_one=True
        ),
    )
