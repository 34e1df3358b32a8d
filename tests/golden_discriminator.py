"""Numbers that the authors of GDD computed with their discriminator, compared with this project's.

`tests/data/gdd_discriminator.json` has names, shapes and initialisation of every tensor of the four
published discriminators. Numbers come from a file of arrays with two sets of quantities: `maps`
(stored maps of the trunks as input) and `images` (images as input, convolutions as trunks). Weights
are not stored: each tensor follows from its name.
"""

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from harness.discriminators.projected import (
    ProjectedDiscriminator,
    ProjectedFeatures,
    SpectralConv2d,
)
from methods.gdd import discriminator_loss, generator_loss, r1_penalty

DATA = Path(__file__).parent / "data"
DEIT = "deit_base_distilled_patch16_224"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATION = {DEIT: IMAGENET, "vgg16_bn": IMAGENET}  # the other trunk's: 0.5
STRIDES = {"vgg16_bn": (2, 2, 2, 2), "tf_efficientnet_lite0": (4, 2, 2, 2)}  # of each convolution


@cache
def facts() -> dict:
    return json.loads((DATA / "gdd_discriminator.json").read_text())["discriminators"]


class ConvolutionTrunk(nn.Module):
    """Convolutions instead of a pretrained network, with the channels and strides of its maps: in
    sequence for a CNN, and four of the image for a transformer."""

    def __init__(self, name: str, channels: tuple[int, ...]):
        super().__init__()
        self.is_transformer = name == DEIT
        self.native_channels = channels
        if self.is_transformer:
            shapes = [(3, c, 16) for c in channels]
            self.native_stride = 16
        else:
            inputs = (3, *channels[:-1])
            shapes = [*zip(inputs, channels, STRIDES[name], strict=True)]
            self.native_stride = int(np.prod(STRIDES[name]))
        self.layers = nn.ModuleList(nn.Conv2d(a, b, k, stride=k) for a, b, k in shapes)
        for key, value in zip(("mean", "std"), NORMALISATION.get(name, (0.5, 0.5)), strict=True):
            self.register_buffer(key, torch.tensor(value).expand(3).view(3, 1, 1))

    def set_input_size(self, resolution: int) -> None:
        pass

    def normalise(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2 - self.mean) / self.std

    def native_maps(self, x: Tensor) -> list[Tensor]:
        if self.is_transformer:
            return [layer(x) for layer in self.layers]
        maps = []
        for layer in self.layers:
            maps.append(x := layer(x))
        return maps


def convolution_trunks(name: str) -> list[ConvolutionTrunk]:
    """Trunks with the map sizes of an official discriminator."""
    maps = {t: fact["maps"] for t, fact in facts()[name]["trunks"].items()}
    channels = {t: tuple(channels for _, channels, _ in maps[t]) for t in maps}
    if DEIT in channels:
        channels[DEIT] = (768,) * 4  # of the tokens, before the reassembly
    return [ConvolutionTrunk(t, channels[t]) for t in facts()[name]["backbones"]]


def fill(name: str, shape: tuple[int, ...], kind: str, init: str) -> Tensor:
    """The value of a tensor, by its official name and initialisation."""
    if kind == "buffer" and init in ("ones", "zeros"):
        return torch.ones(shape) if init == "ones" else torch.zeros(shape)
    r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("bias"):
        return 0.1 * r
    if init == "conv":
        return r / np.prod(shape[1:]) ** 0.5
    scale = {"conv-transpose": shape[0] ** -0.5 if shape else 0, "spectral-weight": 0.1}
    if init == "spectral-vector":
        return r / r.norm()
    return 1 + 0.1 * r if init == "ones" else scale.get(init, 1.0) * r


def own_name(official: str, trunks: list[str]) -> str:
    """The name of an official tensor in `ProjectedFeatures` or `ProjectedDiscriminator`."""
    network, trunk, *parts = official.split(".")
    number, leaf = trunks.index(trunk), parts[-1]
    if network == "discriminators":
        head = f"heads.{4 * number + int(parts[1])}"
        leaf = {"weight_orig": "weight", "weight_u": "u", "weight_v": "v"}.get(leaf, leaf)
        if len(parts) == 7:
            return f"{head}.blocks.{parts[3]}.{('conv', 'norm')[int(parts[5])]}.{leaf}"
        if parts[2] in ("main", "cls"):  # of an unconditional and a conditional head
            return f"{head}.output.{leaf}"
        return f"{head}.classes.{'table' if parts[2] == 'embed' else leaf}"
    own = f"projections.0.{number}"
    if parts[0] == "scratch":
        stage, mixing = parts[1].removeprefix("layer").split("_")
        return f"{own}.across_{'channels' if mixing == 'ccm' else 'scales'}.{stage}.{leaf}"
    if parts[1] == "model":
        return f"trunks.{number}.layers.{parts[3]}.{leaf}"
    if len(parts) == 3:
        return f"trunks.{number}.layers.{parts[1].removeprefix('layer')}.{leaf}"
    stage = int(parts[1].removeprefix("layer")) - 1
    return f"{own}.reassembly.{stage}.{int(parts[2]) - 3}.{leaf}"


class Golden:
    """One official discriminator with its inputs and reference numbers. Every quantity starts from
    freshly filled tensors (`fresh`)."""

    def __init__(self, arrays, name: str, inputs: str):
        self.arrays, self.name, self.inputs = arrays, name, inputs
        self.facts = facts()[name]
        self.trunks = self.facts["backbones"]
        self.features = ProjectedFeatures(convolution_trunks(name))
        table = torch.zeros(1000, 320) if self.facts["conditional"] else None
        self.discriminator = ProjectedDiscriminator(self.features, self.facts["classes"], table)
        self.labels, self.initial = None, None
        if table is not None:
            self.labels = torch.from_numpy(arrays[f"labels/{name}"])
        official = [tuple(t) for t in self.facts["feature_network"]["tensors"]]
        self.fill(self.features, [*official, *self.trunk_tensors()])

    def trunk_tensors(self):
        for number, trunk in enumerate(self.trunks):
            stem = f"feature_networks.{trunk}.pretrained"
            stem += ".model.taps." if trunk == DEIT else ".layer"
            for k, layer in enumerate(self.features.trunks[number].layers):
                for leaf, value in layer.named_parameters():
                    yield f"{stem}{k}.{leaf}", value.shape, "float32", "parameter", False, "conv"

    def fill(self, network: nn.Module, tensors) -> None:
        values = {}
        for name, shape, _, kind, _, init in tensors:
            values[own_name(name, self.trunks)] = fill(name, tuple(shape), kind, init)
        own = network.state_dict()
        buffers = {k for k in own if k.endswith((".mean", ".std"))}
        assert own.keys() - buffers == values.keys()
        network.load_state_dict(own | values)

    def fresh(self) -> ProjectedDiscriminator:
        """The discriminator with its initial tensors, in train mode, without gradients."""
        if self.initial is None:
            self.fill(self.discriminator, self.facts["discriminator"]["tensors"])
            self.initial = {k: v.clone() for k, v in self.discriminator.state_dict().items()}
        self.discriminator.load_state_dict(self.initial)
        self.discriminator.requires_grad_(True).zero_grad(set_to_none=True)
        return self.discriminator.train()

    def expected(self, quantity: str) -> np.ndarray:
        return self.arrays[f"{self.inputs}/{self.name}/{quantity}"]

    def maps(self, trunk: str, real: bool) -> list[Tensor]:
        maps = [
            torch.from_numpy(self.arrays[f"input/maps/{trunk}/{k}"]).float() / 2 for k in range(4)
        ]
        return [m.flip(3) * 0.75 + 0.25 for m in maps] if real else maps

    def leaves(self, real: bool) -> list[Tensor]:
        """The tensors that gradients are computed for: the images, or all maps of all trunks."""
        if self.inputs == "images":
            array = self.arrays[
                f"input/images{self.facts['image_resolution']}/{('fake', 'real')[real]}"
            ]
            return [torch.from_numpy(array).float() / 127.5 - 1]
        return [m for trunk in self.trunks for m in self.maps(trunk, real)]

    def projected(self, leaves: list[Tensor]) -> list[Tensor]:
        """The inputs of the heads."""
        if self.inputs == "images":
            return self.features(leaves[0])
        return [
            m
            for number in range(len(self.trunks))
            for m in self.features.projections[0][number](leaves[4 * number : 4 * number + 4])
        ]

    def logits(self, leaves: list[Tensor]) -> list[Tensor]:
        return self.discriminator(self.projected(leaves), self.labels)

    def by_trunk(self, stage: str, logits: list[Tensor]):
        """Logits `(B, heads, K)` of each trunk, by their names in the file."""
        for i, trunk in enumerate(self.trunks):
            yield f"{stage}/{trunk}", torch.stack(logits[4 * i : 4 * i + 4], dim=1)

    def converge(self) -> None:
        """Set the vectors of the spectral norms to the first singular vectors."""
        for layer in self.convolutions():
            matrix = layer.weight.detach().flatten(1).double()
            left = torch.linalg.eigh(matrix @ matrix.t()).eigenvectors[:, -1]
            layer.u.copy_(left)
            layer.v.copy_(normalize(matrix.t() @ left, dim=0))

    def convolutions(self) -> list[SpectralConv2d]:
        return [m for m in self.discriminator.modules() if isinstance(m, SpectralConv2d)]

    def sigmas(self) -> Tensor:
        """The spectral norms of the last forward pass."""
        with torch.no_grad():
            return torch.stack([c.u @ (c.weight.flatten(1) @ c.v) for c in self.convolutions()])

    def parameter_gradients(self) -> np.ndarray:
        """Sum and length of each trainable tensor's gradient, in the official order."""
        rows, parameters = [], dict(self.discriminator.named_parameters())
        for name, *_, trainable, _ in self.facts["discriminator"]["tensors"]:
            if trainable:
                grad = parameters[own_name(name, self.trunks)].grad
                rows.append([0, 0] if grad is None else [grad.double().sum(), grad.double().norm()])
        return np.array(rows, dtype=float)


def thinned(x: Tensor) -> Tensor:
    steps = [slice(None, None, max(1, size // 8)) for size in x.shape[1:]]
    return x[(slice(None), *steps)]


# -- quantities -----------------------------------------------------------------------------------


def fill_quantities(golden: Golden):
    """First value and sum of each filled tensor, in the official order."""
    golden.fresh()
    for part, network in (
        ("feature_network", golden.features),
        ("discriminator", golden.discriminator),
    ):
        own = network.state_dict()
        tensors = [own[own_name(name, golden.trunks)] for name, *_ in golden.facts[part]["tensors"]]
        rows = [[t.flatten()[0].double(), t.double().sum()] for t in tensors]
        yield f"maps/{golden.name}/fill/{part}", torch.tensor(rows)


def feature_quantities(golden: Golden):
    """Maps within and after the random projection, by their names in the file."""
    with torch.no_grad():
        if golden.inputs == "images":
            for i, m in enumerate(golden.projected(golden.leaves(real=False))):
                yield f"images/{golden.name}/projected/{golden.trunks[i // 4]}/{i % 4}", thinned(m)
            return
        for number, trunk in enumerate(golden.trunks):
            maps, projection = (
                golden.maps(trunk, real=False),
                golden.features.projections[0][number],
            )
            for k, m in enumerate(projection(maps)):
                moments = torch.stack([m.mean((0, 2, 3)), m.square().mean((0, 2, 3)).sqrt()])
                yield f"maps/projected/{trunk}/{k}", thinned(m)
                yield f"maps/projected_moments/{trunk}/{k}", moments
            for k, m in enumerate(maps):
                if projection.reassembly:
                    m = projection.reassembly[k](m)
                    yield f"maps/reassembled/{trunk}/{k}", thinned(m)
                yield f"maps/channel_mixed/{trunk}/{k}", thinned(projection.across_channels[k](m))


def generator_stage(golden: Golden):
    """The authors sum over the n images and average over a trunk's joined logits."""
    golden.fresh().requires_grad_(False)
    fake = golden.leaves(real=False)
    inputs = [x.clone().requires_grad_() for x in fake]
    logits = golden.logits(inputs)
    yield from golden.by_trunk("logits_fake", logits)
    loss = len(fake[0]) / 4 * generator_loss(logits)
    yield "generator_loss", loss
    if golden.inputs == "images":
        (gradient,) = torch.autograd.grad(loss, inputs)
        yield "generator_loss_gradient", gradient[:1]
        yield "generator_loss_gradient_squares", gradient.square().sum((1, 2, 3))
    golden.discriminator.eval()
    with torch.no_grad():
        yield from golden.by_trunk("logits_eval", golden.logits(fake))


def discriminator_stage(golden: Golden):
    golden.fresh()
    fake, real = golden.leaves(real=False), golden.leaves(real=True)
    fake_logits, sigmas = golden.logits(fake), golden.sigmas()
    real_logits = golden.logits(real)
    yield from golden.by_trunk("logits_real_second", real_logits)
    yield "sigma", torch.stack([sigmas, golden.sigmas()])
    loss = len(fake[0]) / 4 * discriminator_loss(real_logits, fake_logits)
    loss.backward()
    yield "discriminator_loss", loss
    yield "parameter_gradients_discriminator", golden.parameter_gradients()


def r1_stage(golden: Golden):
    golden.fresh()
    inputs = [x.clone().requires_grad_() for x in golden.leaves(real=True)]
    logits = golden.logits(inputs)
    yield from golden.by_trunk("logits_real", logits)
    total = sum(head.sum() for head in logits)
    gradients = torch.autograd.grad(total, inputs, retain_graph=True)
    if golden.inputs == "images":
        yield "sum_gradient", gradients[0][:1]
    else:
        yield (
            "sum_gradient_squares",
            torch.stack([g.square().sum((1, 2, 3)) for g in gradients], dim=1),
        )
        for i, g in enumerate(gradients):
            yield f"sum_gradient/{golden.trunks[i // 4]}/{i % 4}", thinned(g)
    penalty = sum(r1_penalty(logits, x, 2.0) for x in inputs)
    loss = penalty.mean() * float(golden.arrays["gamma"]) / 2 * int(golden.arrays["r1_every"])
    loss.backward()
    yield "r1_penalty", penalty
    yield "r1_loss", loss
    yield "parameter_gradients_r1", golden.parameter_gradients()


def converged_stage(golden: Golden):
    if golden.labels is not None:
        golden.fresh()
        golden.converge()
        with torch.no_grad():
            logits = golden.logits(golden.leaves(real=True))
        yield from golden.by_trunk("logits_real_converged", logits)


STAGES = (generator_stage, discriminator_stage, r1_stage, converged_stage)


def error(quantity: str, value, expected: np.ndarray) -> float:
    """The error of a quantity in units of its tolerance, which is at least three times what the
    authors' code in another precision deviates by."""
    if isinstance(value, Tensor):
        value = value.detach().double().numpy()
    assert value.shape == expected.shape, quantity
    difference = np.abs(value - expected)
    relative = float(difference.max() / np.abs(expected).max())
    if quantity in ("sum_gradient", "generator_loss_gradient"):
        return np.linalg.norm(difference) / np.linalg.norm(expected) / 1e-2
    if quantity.startswith("parameter_gradients"):
        sums, lengths = (difference / np.abs(expected).max(axis=0)).max(axis=0)
        return max(sums / 3e-3, lengths / 1e-3)
    if quantity in ("generator_loss", "discriminator_loss"):
        return relative / 1e-5
    if quantity.startswith("r1_") or quantity.endswith("_squares"):
        return relative / 1e-3
    return relative / 2e-5
