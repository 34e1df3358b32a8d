"""Every method in methods/ on a tiny denoiser: registry, contract, costs, freezing."""

from pathlib import Path

import pytest
import torch

import methods.sid
from harness.cli import main
from harness.context import Context, TrainingData
from harness.denoiser import clone_denoiser, one_step, to_pixels
from harness.errors import UserError
from harness.fake_score import FakeScoreMethod, ScoreConfig
from harness.features.base import FeatureMaps
from harness.features.classifiers import ResNet
from harness.freezing import freeze
from harness.method import METHODS, MethodConfig, TeacherFacts, method_source
from harness.networks import build_denoiser
from harness.registry import load_plugin
from harness.schedules import edm_weight, karras_sigma
from harness.streams import PAIR_NOISE
from harness.training.loop import train
from harness.training.run import TrainingRun
from methods._template import Template
from tests.test_denoiser import tiny_denoiser

PLAIN = {"augment": 0.0, "dropout": 0.0, "generator_dropout": 0.0}
SETTINGS = {
    "dmd": {"pairs": 32, "regression": "l2"},
    "sid": PLAIN,
    "sim": PLAIN,
    "gdd": {"discriminator": "features", "features": "critic", "r1_every": 2},
    "regression": {"pairs": 32},
}


@pytest.mark.parametrize(("name", "scale"), [("sid", 3 * 64), ("sim", 3 * 64), ("dmd", 1)])
def test_fake_score_loss_has_the_authors_scale(name, scale):
    """SiD's code sums over pixels, DMD's averages; Adam's eps depends on the scale."""
    kind, teacher = METHODS[name], tiny_denoiser(channels=3)
    method = kind(kind.Config(**SETTINGS[name]), teacher)
    phase = next(phase for phase in method.phases() if phase.network == "fake_score")
    networks = {"student": clone_denoiser(teacher), **method.networks()}
    context = Context(networks, TrainingData((3, 8, 8), 10, 2.5), 0, 0, range(4))
    context.enter("fake_score", 0, with_graph=False)
    loss, images, sigma = phase.loss(context), context.generated(), method.fake_sigma(context)
    noised = context.noised(images.x, sigma)
    residual = method.fake_score(noised, sigma, images.condition) - images.x
    weight = edm_weight(sigma, teacher.sigma_data)
    expected = scale * (weight * residual.square().mean(dim=(1, 2, 3))).mean()
    torch.testing.assert_close(loss, expected)


def run_method(
    name: str, folder, iterations=3, freezing="none", critic=None, channels=1, **settings
):
    """Train a tiny denoiser on random images. `critic`: the features of GDD's discriminator."""
    method_class = METHODS[name]
    config = method_class.Config(**({"batch": 8} | SETTINGS.get(name, {}) | settings))
    teacher = tiny_denoiser(channels=channels)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if critic is None and name == "gdd":
            critic = FeatureMaps(ResNet((channels, 8, 8), 10, 4))
        required = critic if isinstance(critic, dict) else {"features": critic}
        method = method_class(config, teacher, required)
    student = clone_denoiser(teacher)
    method.prepare_student(student)
    freeze(student, freezing)
    z = PAIR_NOISE.normal(torch.arange(32), (channels, 8, 8))
    condition = torch.arange(32) % 10
    with torch.no_grad():
        pairs = {"x": one_step(teacher, z, condition, 80.0), "condition": condition}
    run = TrainingRun(
        name=name,
        folder=folder,
        run_id="k",
        seed=0,
        networks={"student": student, **method.networks()},
        frozen=method.frozen_networks(),
        main="student",
        phases=method.phases(),
        data=TrainingData((channels, 8, 8), 10, config.sigma_init, to_pixels(z), condition, pairs),
        batch=config.batch,
        budget=[{"unit": "images", "amount": config.batch * iterations}],
        export=lambda ema, to: "",
    )
    return train(run), run, teacher


@pytest.mark.contract
@pytest.mark.parametrize("name", sorted(METHODS))
def test_method_trains_its_networks_and_not_the_teacher(name, tmp_path):
    teacher = tiny_denoiser()
    outcome, run, used = run_method(name, tmp_path)
    assert all(n == 0 for n in outcome.nonfinite.values())
    for a, b in zip(teacher.parameters(), used.parameters(), strict=True):
        assert torch.equal(a, b)
    student = dict(run.networks["student"].named_parameters())
    moved = [n for n, p in teacher.named_parameters() if not torch.equal(p, student[n])]
    # The loss does not reach a few parameters, such as unused heads.
    assert len(moved) > 0.9 * len(student)
    for kind, network in run.networks.items():
        for parameter in network.parameters():
            assert parameter.isfinite().all(), kind


# Passes per image and iteration of each network, as [forward, backward].
@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("dmd", {}, {"student": [2, 2], "teacher": [1, 0], "fake_score": [2, 1]}),
        ("dmd", {"regression": "none"}, {"student": [1, 1], "teacher": [1, 0], "fake_score": [2, 1]}),
        ("dmd", {"distribution_matching": False}, {"student": [1, 1]}),
        ("dmd", {"weighting": "sigma/alpha"}, {"student": [2, 2], "teacher": [1, 0], "fake_score": [2, 1]}),
        # The fake score has images of its own.
        ("sid", {}, {"student": [2, 1], "teacher": [1, 1], "fake_score": [2, 2]}),
        ("sid", {"share_images": True}, {"student": [1, 1], "teacher": [1, 1], "fake_score": [2, 2]}),
        ("sim", {}, {"student": [2, 1], "teacher": [1, 1], "fake_score": [2, 2]}),
        ("regression", {}, {"student": [1, 1]}),
        ("gdd", {"r1_gamma": 0.0}, {"student": [2, 1], "features": [3, 1], "discriminator": [3, 3]}),
    ],
)  # fmt: skip
def test_passes_per_iteration(name, settings, expected, tmp_path):
    ledger = run_method(name, tmp_path, **settings)[0].ledger
    assert ledger.passes == {k: [24 * f, 24 * b] for k, (f, b) in expected.items()}
    assert ledger.images == 24
    assert ledger.generated == 24 * expected["student"][0]


def test_r1_is_an_update_of_its_own(tmp_path):
    outcome, run, _ = run_method("gdd", tmp_path, iterations=5)
    costs, phases = outcome.ledger.costs, {phase.name: phase for phase in run.phases}
    # R1 runs in iterations 2 and 4 of 0 .. 4, and not in 0.
    assert [i for i in range(5) if phases["r1"].due(i)] == [2, 4]
    plain, regularised = "with generator+discriminator", "with generator+discriminator+r1"
    expected = sum(
        count * costs[f"{phase}/{due}"].flops
        for count, due, names in (
            (3, plain, ("generator", "discriminator")),
            (2, regularised, ("generator", "discriminator", "r1")),
        )
        for phase in names
    )
    assert outcome.ledger.flops == expected
    assert phases["r1"].optimizer == phases["discriminator"].optimizer


@pytest.mark.parametrize("name", ["gdd", "sid"])
def test_only_trainable_parameters_change(name, tmp_path):
    _, run, teacher = run_method(name, tmp_path, freezing="innate")
    for n, p in teacher.named_parameters():
        own = dict(run.networks["student"].named_parameters())[n]
        assert torch.equal(p, own) == (not own.requires_grad) or "class_embedding" in n, n


def test_innate_preset_freezes_convolutions_and_attention_outputs():
    network = build_denoiser(
        {
            "type": "UNet2DModel",
            "block_out_channels": [8, 16],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        (1, 8, 8),
        10,
        0.5,
    )
    share = freeze(network, "innate")
    frozen = {n for n, p in network.named_parameters() if not p.requires_grad}
    b = "backbone."
    for name in (
        "down_blocks.0.resnets.0.conv1.weight",
        "down_blocks.1.attentions.0.to_out.0.bias",
        "down_blocks.0.downsamplers.0.conv.weight",
        "up_blocks.0.upsamplers.0.conv.bias",
        "mid_block.resnets.1.conv2.weight",
        "mid_block.attentions.0.to_out.0.weight",
    ):
        assert b + name in frozen, name
    for name in (
        "conv_in.weight",
        "conv_out.weight",
        "up_blocks.0.resnets.0.conv_shortcut.weight",
        "down_blocks.0.resnets.0.norm1.weight",
        "down_blocks.0.resnets.0.time_emb_proj.weight",
        "down_blocks.1.attentions.0.to_q.weight",
        "time_embedding.linear_1.weight",
        "class_embedding.weight",
        "mid_block.attentions.0.group_norm.weight",
    ):
        assert b + name in dict(network.named_parameters()) and b + name not in frozen, name
    total = sum(p.numel() for p in network.parameters())
    assert share == sum(p.numel() for p in network.parameters() if not p.requires_grad) / total
    assert 0.5 < share < 0.95
    assert freeze(network, "none") == 0
    with pytest.raises(UserError, match="freezes nothing"):
        freeze(torch.nn.Linear(2, 2), "innate")


def test_dmd_draws_noise_levels_uniformly_over_bins():
    """Karras levels 20 to 979 of 0 to 999."""
    dmd = METHODS["dmd"]
    method = dmd(dmd.Config(regression="none"), tiny_denoiser())
    u = (torch.arange(960 * 8) + 0.5) / (960 * 8)
    levels = method._bin(torch.cat([u, torch.tensor([0.0, 1.0])]), 0.02, 0.98)
    bins, counts = levels[: len(u)].unique(return_counts=True)
    assert len(bins) == 960 and set(counts.tolist()) == {8}
    ends = karras_sigma(torch.tensor([20 / 999, 979 / 999]))
    torch.testing.assert_close(levels[-2:], ends)
    torch.testing.assert_close(torch.stack([bins[0], bins[-1]]), ends)


PLUGIN = """
from harness.method import METHODS
from methods.sid import SiD, sid_loss

@METHODS.register("sid-plugin")
class Plugin(SiD):
    paper = "a difference of SiD"
"""


def test_methods_come_from_files_and_plugins(tmp_path):
    assert {"dmd", "sid"} <= set(METHODS) and "_template" not in METHODS
    (path := tmp_path / "plugin.py").write_text(PLUGIN)
    load_plugin(path)
    assert "sid-plugin" in METHODS and METHODS["sid-plugin"].__name__ == "Plugin"
    sid = Path(methods.sid.__file__)
    assert method_source("sid-plugin") == (path, sid) and method_source("sid") == (sid,)
    with pytest.raises(ValueError, match="already registered"):
        METHODS.register("sid")(METHODS["sid-plugin"])
    with pytest.raises(UserError) as error:
        METHODS["sidd"]
    assert error.value.code == "unknown-name"


def test_template_trains(tmp_path):
    METHODS.register("template")(Template)
    outcome, _, _ = run_method("template", tmp_path)
    assert outcome.ledger.images == 24 and not any(outcome.nonfinite.values())


def test_guidance_needs_an_unconditional_score():
    config, method = METHODS["sid"].Config(teacher_guidance=2.0), METHODS["sid"]
    ((setting, code, _),) = method.check(config, TeacherFacts(unconditional=False))
    assert (setting, code) == ("teacher_guidance", "unsupported")
    assert not method.check(config, TeacherFacts())
    assert not method.check(method.Config(), TeacherFacts(unconditional=False))
    with pytest.raises(TypeError, match="ScoreConfig"):
        type("Wrong", (FakeScoreMethod,), {"Config": MethodConfig})
    assert issubclass(method.Config, ScoreConfig)


def test_page_of_a_method_has_its_equations_settings_and_ranges(capsys):
    assert main(["methods", "sid"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("sid: Zhou et al. 2024, arXiv 2404.04057; needs no real images")
    assert "score identity distillation" in text and "Deviations:" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for name in METHODS["sid"].Config.model_fields:
        assert name in rows
    assert " ".join(rows["t_max"].split()) == (
        "t_max 0.8 float, above 0, at most 1 code: tmax 800 of 1000, sigma up to about 24"
    )
    assert "data | uniform" in rows["labels"] and "[0.0, 0.999]" in rows["betas"]
    assert main(["methods", "gdd"]) == 0
    assert "a multiple of 32" in capsys.readouterr().out


def test_list_of_methods_names_all_of_them(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name}: " in f"\n{text}" for name in METHODS)


def test_unknown_method_gets_a_suggestion(capsys):
    assert main(["methods", "dmdd"]) == 2
    assert "unknown method 'dmdd'; did you mean 'dmd'?" in capsys.readouterr().err
