"""GDD's discriminator against the authors' numbers, and its parts."""

import copy
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate, normalize

from harness.discriminators import projected
from harness.discriminators.projected import (
    GhostBatchNorm2d,
    ProjectedDiscriminator,
    ProjectedFeatures,
    RandomProjection,
    SpectralConv2d,
)
from harness.errors import UserError
from harness.features.timm_backbones import Backbone
from harness.streams import seeded
from methods.gdd import r1_penalty
from tests.golden_discriminator import (
    DATA,
    DEIT,
    STAGES,
    ConvolutionTrunk,
    Golden,
    convolution_trunks,
    discriminator_stage,
    error,
    facts,
    feature_quantities,
    fill_quantities,
    generator_stage,
    own_name,
    r1_stage,
)

# All quantities of one discriminator per set; the complete file is not part of the repository.
THINNED = DATA / "gdd_discriminator.npz"
COMPLETE = Path(__file__).parents[2] / "shared" / "golden" / "gdd_discriminator.npz"


def compared(golden: Golden, quantities) -> set[str]:
    """Compare quantities with the authors' numbers; returns their names."""
    names = set()
    for name, value in quantities:
        assert error(name.split("/")[0], value, golden.expected(name)) < 1, name
        names.add(f"{golden.inputs}/{golden.name}/{name}")
    return names


def compared_features(golden: Golden, quantities) -> set[str]:
    """The same for quantities with the names of the file."""
    values = dict(quantities)
    for name, value in values.items():
        if name in golden.arrays:  # some are stored once for two discriminators
            assert error("map", value, golden.arrays[name]) < 1, name
    return values.keys()


@pytest.fixture(scope="module")
def thinned():
    with np.load(THINNED) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def imagenet(thinned):
    """The conditional discriminator with a transformer and a CNN, on stored maps."""
    return Golden(thinned, "imagenet-cond", "maps")


@pytest.mark.parametrize("stage", [generator_stage, discriminator_stage, r1_stage])
def test_maps_logits_losses_and_gradients_equal_the_authors(imagenet, stage):
    assert compared(imagenet, stage(imagenet))


def test_random_projection_equals_the_authors(imagenet):
    assert len(compared_features(imagenet, fill_quantities(imagenet))) == 2
    assert len(compared_features(imagenet, feature_quantities(imagenet))) == 2 * 3 * 4 + 4


def test_images_pass_through_the_authors_pipeline(thinned):
    golden = Golden(thinned, "cifar10-uncond", "images")
    assert len(compared_features(golden, feature_quantities(golden))) == 8
    compared(golden, generator_stage(golden))


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["maps", "images"])
@pytest.mark.parametrize("name", ["cifar10-uncond", "cifar10-cond", "ffhq-uncond", "imagenet-cond"])
def test_every_number_of_the_authors_is_reproduced(name, inputs):
    file = COMPLETE if COMPLETE.exists() else THINNED
    with zipfile.ZipFile(file) as archive:
        names = {member.removesuffix(".npy") for member in archive.namelist()}
    own = {n for n in names if n.startswith(f"{inputs}/{name}/")}
    if not own:
        pytest.skip(f"the numbers of {inputs}/{name} are not part of the repository")
    golden = Golden(np.load(file), name, inputs)
    covered = set(compared_features(golden, feature_quantities(golden)))
    if inputs == "maps":
        covered |= compared_features(golden, fill_quantities(golden))
        # Quantities of the trunks, which the discriminators share.
        shared = ("maps/projected", "maps/channel_mixed", "maps/reassembled")
        own |= {n for n in names if n.startswith(shared) and n.split("/")[2] in golden.trunks}
    for stage in STAGES:
        covered |= compared(golden, stage(golden))
    assert own <= covered


# -- deviations that the numbers detect -----------------------------------------------------------


def group_norm(golden, monkeypatch):
    def forward(self, x, groups=1):
        return nn.functional.group_norm(x, self.num_features // 16, self.weight, self.bias)

    monkeypatch.setattr(GhostBatchNorm2d, "forward", forward)


def batch_norm_in_evaluation_mode(golden, monkeypatch):
    for module in golden.discriminator.modules():
        if isinstance(module, GhostBatchNorm2d):
            module.eval()


def corners_not_aligned(golden, monkeypatch):
    def resample(x, *args, align_corners=None, **options):
        return interpolate(x, *args, **options)

    monkeypatch.setattr(projected, "interpolate", resample)


def class_vector_without_root_two(golden, monkeypatch):
    forward = projected.ClassVector.forward
    monkeypatch.setattr(
        projected.ClassVector, "forward", lambda self, labels: forward(self, labels) / 2**0.5
    )


def u_before_v(golden, monkeypatch):
    def sigma(self, iterate):
        matrix = self.weight.flatten(1).detach()
        u = normalize(matrix @ self.v, dim=0)
        return u @ (matrix @ normalize(matrix.t() @ u, dim=0))

    monkeypatch.setattr(SpectralConv2d, "sigma", sigma)


@pytest.mark.parametrize(
    ("deviation", "size"),
    [
        (group_norm, 1e-1),
        (batch_norm_in_evaluation_mode, 1e-1),
        (corners_not_aligned, 1e-1),
        (class_vector_without_root_two, 1e-1),
        (u_before_v, 1e-3),
    ],
)
def test_deviations_from_the_authors_change_the_logits(imagenet, monkeypatch, deviation, size):
    imagenet.fresh()
    deviation(imagenet, monkeypatch)
    with torch.no_grad():
        logits = imagenet.logits(imagenet.leaves(real=False))
    found = dict(imagenet.by_trunk("logits_fake", logits))
    assert max(error("logits", v, imagenet.expected(k)) * 2e-5 for k, v in found.items()) > size


# -- names, shapes and initialisation -------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10-uncond", "cifar10-cond", "ffhq-uncond", "imagenet-cond"])
def test_tensors_have_the_authors_shapes_and_initialisation(name):
    fact = facts()[name]
    trunks = fact["backbones"]
    with seeded(0):
        table = torch.randn(1000, 320)
        features = ProjectedFeatures(convolution_trunks(name))
        discriminator = ProjectedDiscriminator(features, fact["classes"], table)
    trained = sum(p.numel() for p in discriminator.parameters())
    assert trained == fact["discriminator"]["trainable_parameters"]
    for part, network in (("feature_network", features), ("discriminator", discriminator)):
        own, parameters = network.state_dict(), dict(network.named_parameters())
        names = [own_name(t[0], trunks) for t in fact[part]["tensors"]]
        prefix = "projections." if part == "feature_network" else ""
        assert sorted(names) == sorted(k for k in own if k.startswith(prefix))
        weights = dict(zip(names, fact[part]["tensors"], strict=True))
        for key, (official, shape, dtype, kind, trainable, init) in weights.items():
            tensor = own[key]
            assert list(tensor.shape) == shape and str(tensor.dtype) == f"torch.{dtype}", official
            assert (key in parameters) == (kind == "parameter"), official
            assert (key in parameters and parameters[key].requires_grad) == trainable, official
            weight = weights.get(key.removesuffix("bias") + "weight")
            check_initialisation(tensor, init, (weight or [0, shape])[1], weight, table)
    norms = [m for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum, m.affine) for m in norms} == {(1e-5, 0.1, True)}
    assert len(norms) == len(fact["discriminator"]["batch_norms"])


def check_initialisation(tensor, init, weight_shape, weight, table) -> None:
    if init in ("ones", "zeros"):
        assert (tensor == (init == "ones")).all()
    elif init == "class-table":
        assert torch.equal(tensor, table) and tensor is not table
    elif init == "spectral-vector":
        torch.testing.assert_close(tensor.norm(), torch.tensor(1.0))
    elif init == "equalised":
        assert tensor.std() == pytest.approx(1, rel=0.03)
    else:  # uniform
        fan = np.prod(weight_shape[1:])
        if "conv-transpose" in (init, weight and weight[-1]):
            fan = weight_shape[1] * np.prod(weight_shape[2:])
        bound = fan**-0.5
        assert 0.8 * bound < tensor.abs().max() <= bound
        if tensor.numel() > 4096:
            assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_without_a_table_heads_start_from_separate_normal_rows():
    class Features:
        map_channels = projected.OUTPUT_CHANNELS

    with seeded(0):
        discriminator = ProjectedDiscriminator(Features, 10)
    tables = [head.classes.table for head in discriminator.heads]
    assert all(t.shape == (10, 320) for t in tables)
    assert torch.stack(tables).std().item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(tables[0], tables[1])


# -- trunks ---------------------------------------------------------------------------------------


def backbone(name: str) -> Backbone:
    """A backbone with random weights, without timm's slow initialisation of VGG's classifier."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False)
    trunk = Backbone(name, network)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for key, tensor in network.state_dict().items():
        if tensor.dim() > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.fill_(key.endswith(("weight", "var", "gamma")))
    return trunk


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vgg16_bn", [f"features.{i}" for i in (12, 22, 32, 42)]),
        ("tf_efficientnet_lite0", [f"blocks.{i}" for i in (1, 2, 4, 6)]),
    ],
)
def test_native_maps_of_a_cnn_are_those_that_the_authors_read(name, layers):
    trunk, outputs = backbone(name), {}
    for layer in layers:

        def keep(module, args, output, layer=layer):
            outputs[layer] = output.clone()  # a later layer may change it

        trunk.network.get_submodule(layer).register_forward_hook(keep)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = trunk.native_maps(x)
    for found, layer in zip(maps, layers, strict=True):
        assert torch.equal(found, outputs[layer])
    published = facts()["cifar10-uncond"]["trunks"][name]["maps"]
    channels, strides = zip(*((c, s) for _, c, s in published), strict=True)
    assert tuple(m.shape[1] for m in maps) == channels == trunk.native_channels
    assert tuple(64 // m.shape[2] for m in maps) == strides
    assert (trunk.native_stride, trunk.is_transformer) == (strides[-1], False)


@torch.no_grad()
def test_native_maps_of_a_transformer_are_its_tokens_without_class_tokens():
    trunk, tokens = backbone("deit_tiny_distilled_patch16_224"), []
    for block in (2, 5, 8, 11):
        trunk.network.blocks[block].register_forward_hook(lambda *args: tokens.append(args[2]))
    maps = trunk.native_maps(torch.randn(1, 3, 224, 224))
    for found, expected in zip(maps, tokens, strict=True):
        assert torch.equal(found, expected[:, 2:].transpose(1, 2).unflatten(2, (14, 14)))


def test_deit_has_the_published_blocks_and_channels():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        trunk = Backbone(DEIT, timm.create_model(DEIT, pretrained=False))
        projection = RandomProjection(trunk.native_channels, trunk.is_transformer)
    assert (trunk.native_levels, trunk.native_channels) == ([2, 5, 8, 11], (768,) * 4)
    assert (trunk.native_stride, trunk.is_transformer) == (16, True)
    published = facts()["ffhq-uncond"]["trunks"][DEIT]["maps"]
    assert [layers[-1].out_channels for layers in projection.reassembly] == [
        channels for _, channels, _ in published
    ]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet18", [64, 32, 16, 8]),
        ("convnext_atto", [64, 32, 16, 8]),
        ("vit_tiny_patch16_224", [64, 32, 16, 8]),
    ],
)
def test_other_networks_serve_as_trunks(name, sizes):
    trunk = backbone(name)
    with seeded(1):
        features = ProjectedFeatures([trunk], resolution=128)
    maps = features(torch.randn(2, 1, 32, 32))
    assert [m.shape[1] for m in maps] == [64, 64, 128, 256] == [*features.map_channels]
    assert [m.shape[2] for m in maps] == sizes


@torch.no_grad()
def test_images_are_normalised_per_trunk_and_grey_images_are_repeated():
    trunk = backbone("resnet18")
    pixels = torch.rand(2, 1, 32, 32)
    config = trunk.network.pretrained_cfg
    mean, std = (torch.tensor(config[k]).view(3, 1, 1) for k in ("mean", "std"))
    found = trunk.normalise(2 * pixels - 1)
    torch.testing.assert_close(found, (pixels.expand(-1, 3, -1, -1) - mean) / std)


@pytest.mark.parametrize(
    ("name", "resolution"), [("resnet18", 96), ("vit_tiny_patch16_224", 144), ("resnet18", 140)]
)
def test_resolutions_without_four_maps_are_rejected(name, resolution):
    with pytest.raises(UserError, match=f"resolution: {resolution}.* multiple of 32") as raised:
        ProjectedFeatures([backbone(name)], resolution=resolution)
    assert raised.value.code == "resolution"


# -- projections, ghost batches, spectral norms ---------------------------------------------------


class SmallTrunk(ConvolutionTrunk):
    def __init__(self):
        super().__init__("tf_efficientnet_lite0", (4, 6, 8, 10))


def small(projections: int = 1, classes: int = 0, trunks: int = 1):
    with seeded(0):
        trunks = [SmallTrunk() for _ in range(trunks)]
        features = ProjectedFeatures(trunks, projections, resolution=128)
        return features, ProjectedDiscriminator(features, classes)


@torch.no_grad()
def test_groups_of_a_batch_pass_through_their_projections():
    features, _ = small(projections=3, trunks=2)
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    together = features(x, projections=(2, 0, 2))
    separate = [features(part, (k,)) for part, k in zip(x.chunk(3), (2, 0, 2), strict=True)]
    for found, *parts in zip(together, *separate, strict=True):
        torch.testing.assert_close(found, torch.cat(parts))
    for a, b in zip(features(x, (0,)), features(x, (1,)), strict=True):
        assert not torch.allclose(a, b, rtol=0.1)
    for a, b in zip(features(x), features(x, (0,)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="6 cannot be split into 4"):
        features(x, (0, 1, 2, 0))


def test_features_stay_frozen_and_in_evaluation_mode():
    features, _ = small()
    features.train()
    assert not any(module.training for module in features.modules())
    assert not any(p.requires_grad for p in features.parameters())


def test_groups_have_separate_statistics_and_share_one_power_iteration():
    features, discriminator = small(classes=5)
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[3:] = 2 * x[3:] + 1
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    maps = [m.detach() for m in features(x)]
    copies = [copy.deepcopy(discriminator) for _ in range(2)]
    together = discriminator(maps, labels, groups=2)
    separate = [
        copies[k]([m.chunk(2)[k] for m in maps], labels.chunk(2)[k], groups=1) for k in range(2)
    ]
    for found, *parts in zip(together, *separate, strict=True):
        torch.testing.assert_close(found, torch.cat(parts), rtol=1e-4, atol=1e-5)
    for key, value in copies[0].state_dict().items():
        torch.testing.assert_close(discriminator.state_dict()[key], value, msg=key)
    with pytest.raises(ValueError, match="6 cannot be split into 4"):
        discriminator(maps, labels, groups=4)
    # Gradients are the sum of the groups' gradients.
    sum(head.square().sum() for head in together).backward()
    for parts in separate:
        sum(head.square().sum() for head in parts).backward()
    gradients = (dict(d.named_parameters()) for d in (discriminator, *copies))
    whole, *parts = ({k: p.grad for k, p in named.items()} for named in gradients)
    for key, value in whole.items():
        torch.testing.assert_close(value, sum(p[key] for p in parts), rtol=1e-3, atol=1e-4)


def test_other_images_of_a_group_change_a_logit_and_other_groups_do_not():
    features, discriminator = small()
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    other = torch.cat([x[:3], -x[3:]])
    with torch.no_grad():
        found = [
            copy.deepcopy(discriminator)(features(images), None, groups=2) for images in (x, other)
        ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a[:2], b[:2])
        assert not torch.allclose(a[2], b[2], rtol=1e-3)


def test_spectral_norm_equals_the_deprecated_one_of_torch():
    with seeded(0):
        own = SpectralConv2d(5, 7, 4)
        theirs = nn.utils.spectral_norm(nn.Conv2d(5, 7, 4))
    theirs.load_state_dict(
        {"bias": own.bias, "weight_orig": own.weight, "weight_u": own.u, "weight_v": own.v}
    )
    generator = torch.Generator().manual_seed(0)
    for training in (True, True, False):
        x = torch.randn(2, 5, 6, 6, generator=generator)
        outputs = [layer.train(training)(x) for layer in (own, theirs)]
        torch.testing.assert_close(*outputs)
        gradients = []
        for output, weight in zip(outputs, (own.weight, theirs.weight_orig), strict=True):
            (gradient,) = torch.autograd.grad(output.square().sum(), weight)
            gradients.append(gradient)
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(own.u, theirs.weight_u)
    torch.testing.assert_close(own.v, theirs.weight_v)


def test_earlier_forward_passes_keep_their_spectral_norms():
    """Generated and real images pass before one backward pass."""
    with seeded(0):
        layer = SpectralConv2d(3, 4, 2)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alone = copy.deepcopy(layer)
    (expected,) = torch.autograd.grad(alone(x).square().sum(), alone.weight)
    output = layer(x)
    layer(-x)
    (found,) = torch.autograd.grad(output.square().sum(), layer.weight)
    assert torch.equal(found, expected)


def test_discriminator_is_copied_saved_and_restored_after_a_forward_pass():
    features, discriminator = small(classes=3)
    maps = features(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    labels = torch.tensor([0, 2])
    discriminator(maps, labels)
    restored = small(classes=3)[1]
    restored.load_state_dict(discriminator.state_dict())
    expected = copy.deepcopy(discriminator)(maps, labels)
    for a, b in zip(restored(maps, labels), expected, strict=True):
        assert torch.equal(a, b)


def test_weights_are_normalised_in_full_precision_under_autocast():
    features, discriminator = small()
    layer = discriminator.heads[0].blocks[0].conv
    exact = copy.deepcopy(layer).sigma()
    maps = features(torch.randn(2, 3, 16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(maps[0]).dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(layer.u @ (layer.weight.flatten(1) @ layer.v), exact)


@pytest.mark.contract
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_r1_passes_through_trunk_projection_and_heads(name):
    with seeded(0):
        features = ProjectedFeatures([backbone(name)], 2, resolution=128)
        discriminator = ProjectedDiscriminator(features, 3)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    logits = discriminator(features(x, (0, 1)), torch.tensor([0, 1, 2, 0]), groups=2)
    penalty = r1_penalty(logits, x, 1.0)
    assert (penalty > 0).all() and penalty.isfinite().all()
    penalty.sum().backward()
    weights = [p for p in discriminator.parameters() if p.dim() == 4]
    assert all(p.grad.norm() > 0 for p in weights)
    assert all(p.grad is None for p in features.parameters())


def test_more_classes_than_rows_are_rejected():
    features, _ = small()
    with pytest.raises(UserError, match="class_table: 3 rows for 4 classes") as raised:
        ProjectedDiscriminator(features, 4, torch.zeros(3, 320))
    assert raised.value.code == "class-table"
    ProjectedDiscriminator(features, 0, torch.zeros(3, 320))
