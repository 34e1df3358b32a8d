"""LoRA (Hu et al. 2021, arXiv 2106.09685), by peft: train `W + (alpha / rank) B A` in attention and
feed-forward layers, with B = 0 at initialisation. The networks of an experiment share the teacher's
tensors W, so that they fit on one GPU."""

import copy

from torch import nn

from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.io.packages import require

# Projections in diffusers' transformer blocks: linear layers, some of them 1 x 1 convolutions.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")


def add_adapters(denoiser: Denoiser, teacher: Denoiser, rank: int, alpha: float) -> None:
    """Give a clone of the teacher the teacher's own tensors, and adapters that train alone."""
    require("peft", "lora")
    from peft import LoraConfig, inject_adapter_in_model

    owners = dict(teacher.backbone.named_modules())
    for name, module in denoiser.backbone.named_modules():
        for key in module._parameters:
            module._parameters[key] = owners[name]._parameters[key]
    denoiser.requires_grad_(False)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS))
    try:
        inject_adapter_in_model(settings, denoiser.backbone)
    except ValueError:
        network = f"{type(denoiser.backbone).__name__} has no attention layers to adapt"
        raise UserError(f"lora: {network} ({', '.join(TARGETS)})", "lora-targets") from None


def parameter_count(network: nn.Module) -> int:
    """Parameters of a network, after its adapters have been merged into its weights."""
    return sum(p.numel() for name, p in network.named_parameters() if ".lora_" not in name)


def is_adapted(network: nn.Module) -> bool:
    return any(name.endswith("lora_A") for name, _ in network.named_modules())


def merged(network: nn.Module) -> nn.Module:
    """A copy of a network with its adapters merged into its weights and removed; a network without
    adapters itself."""
    if not is_adapted(network):
        return network
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Merging changes weights, and these are the teacher's.
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            owner, _, key = name.rpartition(".")
            setattr(network.get_submodule(owner), key, module.get_base_layer())
    return network.requires_grad_(False)
