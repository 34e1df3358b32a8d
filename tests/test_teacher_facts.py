"""Settings that a teacher cannot serve, denoiser.json, and the check that an imported network
denoises."""

import inspect
import json

import pytest
import torch
import yaml

from harness.config.schema import (
    DataSection,
    ImportedTeacher,
    Sampler,
    TrainedTeacher,
)
from harness.data.registry import Images
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.io.artifacts import read_json, write_json
from harness.networks import BACKBONES, build_denoiser, load_denoiser, save_denoiser
from harness.networks.arguments import UNKNOWN, defaults
from harness.networks.vp import VPDenoiser
from harness.teachers import sources
from harness.teachers.denoising_check import (
    denoising_errors,
    image_warnings,
    sample_warnings,
)
from harness.teachers.facts import teacher_facts
from harness.validation import load_experiment, load_snapshot, parse_experiment
from tests.ddpm import ddpm
from tests.test_config import problems, put
from tests.test_denoiser import tiny_denoiser

SONG = {"type": "SongUNet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
DIGITS = DataSection(name="digits")


# -- defaults from the teacher --------------------------------------------------------------------


@pytest.fixture
def imported(tiny, tmp_path):
    """The tiny experiment with SiD alone, its defaults, and an imported teacher."""
    ddpm(10).save_pretrained(tmp_path / "ddpm")
    tiny["teachers"] = {"ddpm": {"source": str(tmp_path / "ddpm")}}
    tiny["students"] = {"sid": {"method": "sid"}}
    del tiny["training"]["settings"]
    tiny["training"]["settings"] = {"batch": 16}
    return tiny


def test_defaults_become_what_the_teacher_has(imported, tmp_path):
    experiment = parse_experiment(imported, "x", tmp_path)
    student = experiment.students["sid"]
    names = ("augment", "dropout", "generator_dropout")
    assert [getattr(student.settings, name) for name in names] == [0, 0, 0]
    assert set(student.adapted) == {*names}
    again = load_snapshot(experiment.write_snapshot(), tmp_path)
    assert again.students["sid"].adapted == student.adapted
    assert again.run_fingerprint("sid", 0) == experiment.run_fingerprint("sid", 0)
    assert again.teachers["ddpm"].sampler == experiment.teachers["ddpm"].sampler


def test_defaults_are_those_of_the_method_if_the_teacher_has_everything(imported, tmp_path):
    save_denoiser(build_denoiser(SONG | {"augment_dim": 9}, (1, 8, 8), 10), tmp_path / "song")
    imported["teachers"] = {"song": {"source": str(tmp_path / "song")}}
    student = parse_experiment(imported, "x").students["sid"]
    assert (student.settings.augment, student.settings.dropout) == (0.12, 0.13)
    assert not student.adapted
    put(imported, "teachers", {"song": {"network": SONG, "images": 640}})  # augment_dim: 0
    student = parse_experiment(imported, "x").students["sid"]
    assert (student.settings.augment, student.settings.dropout) == (0, 0.13)


@pytest.mark.parametrize("where", ["students.sid", "training"])
def test_explicit_setting_that_cannot_be_served_is_an_error(imported, where):
    put(imported, f"{where}.settings", {"batch": 16, "augment": 0.1, "dropout": 0.1})
    (found,) = problems(imported)
    assert (found.key, found.code) == (f"{where}.settings.augment", "unsupported")
    assert "UNet2DModel has no augmentation labels" in found.message
    put(imported, f"{where}.settings", {"batch": 16, "dropout": 0.1})  # there are such layers
    student = parse_experiment(imported, "x").students["sid"]
    assert student.settings.dropout == 0.1 and "dropout" not in student.adapted


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"teacher_guidance": 2.0}, "teacher_guidance"), ({"fake_dropout": 0.1}, "fake_dropout")],
)
def test_guidance_needs_an_unconditional_score(imported, tmp_path, settings, key):
    put(imported, "students.sid.settings", settings)
    put(imported, "teachers.ddpm.sampler", {"guidance": 2.0})
    assert {p.key for p in problems(imported)} == {
        f"students.sid.settings.{key}",
        "teachers.ddpm.sampler.guidance",
    }
    ddpm(11).save_pretrained(tmp_path / "ddpm")  # a row more than classes
    parse_experiment(imported, "x")


def test_facts_of_networks():
    def facts(**network):
        return teacher_facts(TrainedTeacher(network=network, images=64), DIGITS)

    assert facts(type="UNet2DModel").dropout and not facts(type="UNet2DModel").augment_labels
    assert facts(**SONG | {"augment_dim": 9}).augment_labels
    assert not facts(**SONG | {"augment_dim": 6}).augment_labels
    pixart = ImportedTeacher(source="none", network={"type": "PixArtTransformer2DModel"})
    found = teacher_facts(pixart, None)
    assert found.own_dropout == 0 and found.unconditional and not found.augment_labels
    unknown = teacher_facts(ImportedTeacher(source="https://x.org/a.pkl"), DIGITS)
    assert unknown.augment_labels and unknown.own_dropout is None


# -- arguments of networks ------------------------------------------------------------------------


@pytest.mark.contract
def test_arguments_of_networks_are_those_of_their_classes():
    """diffusers' source is parsed, because its import takes seconds."""
    for name in ("UNet2DModel", "UNet2DConditionModel", "PixArtTransformer2DModel", "SongUNet"):
        signature = inspect.signature(BACKBONES[name].model_class().__init__).parameters
        parsed = dict(defaults(name))
        assert parsed.pop("self") is UNKNOWN
        assert parsed == {n: p.default for n, p in signature.items() if n in parsed}
        assert parsed.keys() == signature.keys() - {"self"}


@pytest.mark.parametrize(
    ("network", "argument", "code", "named"),
    [
        ({"type": "UNet2DModel"}, {"norm_eps": "small"}, "invalid-value", "such as 1e-05"),
        ({"type": "UNet2DModel"}, {"norm_ep": 1e-6}, "unknown-key", "did you mean 'norm_eps'?"),
        ({"type": "UNet2DModel"}, {"act_fn": 3}, "invalid-value", "such as 'silu'"),
        ({"type": "UNet2DModel"}, {"add_attention": "nein"}, "invalid-value", "true or false"),
        (SONG, {"dropout": "none"}, "invalid-value", "a number"),
        (SONG, {"channel_mult": "1, 2"}, "invalid-value", "a list"),
    ],
)
def test_argument_of_a_network_is_checked_when_it_is_read(tiny, network, argument, code, named):
    put(tiny, "teachers.edm.network", network | argument)
    (found,) = problems(tiny)
    (key,) = argument
    assert (found.key, found.code) == (f"teachers.edm.network.{key}", code)
    assert named in found.message


def test_exponents_in_a_network_are_numbers(tiny, tmp_path):
    path = tmp_path / "x.yaml"
    tiny["teachers"]["edm"]["network"]["norm_eps"] = "NUMBER"
    path.write_text(yaml.safe_dump(tiny).replace("NUMBER", "1e-6"))
    network = load_experiment(path).teachers["edm"].network
    assert network["norm_eps"] == 1e-6
    denoiser = build_denoiser(network, (1, 8, 8), 10)
    assert denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1)).shape == (1, 1, 8, 8)


# -- denoiser.json --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"preconditioning": "ve"}, "unknown-name", "unknown preconditioning 've'"),
        ({"preconditioning": None}, "unknown-name", "known: edm, vp"),
        ({"sigma_dta": 0.5}, "unknown-key", "did you mean 'sigma_data'?"),
        ({"sigma_data": None}, "missing-key", "'sigma_data' is missing: a positive number"),
        ({"num_classes": "10"}, "invalid-value", "num_classes: expected an integer"),
        ({"epsilon": -1.0}, "invalid-value", "epsilon"),
        ({"num_classes": 7}, "shape", "num_class_embeds must be num_classes + 1"),
    ],
)
def test_denoiser_json_is_checked_when_it_is_read(tmp_path, change, code, named):
    save_denoiser(tiny_denoiser(), tmp_path)
    path = tmp_path / "denoiser.json"
    record = read_json(path) | change
    write_json(path, {key: value for key, value in record.items() if value is not None})
    with pytest.raises(UserError) as error:
        load_denoiser(tmp_path)
    assert error.value.code == code and named in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_variance_preserving_denoiser_json_is_checked(tmp_path, imported):
    folder = tmp_path / "vp"
    experiment = parse_experiment(imported, "x").teachers["ddpm"]
    save_denoiser(sources.open_folder(experiment).denoiser(10), folder)
    path = folder / "denoiser.json"
    record = read_json(path)
    put(imported, "teachers", {"vp": {"source": str(folder)}})
    assert parse_experiment(imported, "x").teachers["vp"].sampler.sigma_max > 100
    for change in ({"prediction": "eps"}, {"schedule": {"beta_strat": 1}}):
        path.write_text(json.dumps(record | change))
        (found,) = problems(imported)
        assert (found.key, found.code) == ("teachers.vp.source", "invalid-value")


# -- the check that a network denoises ------------------------------------------------------------


class Known(Denoiser):
    """A denoiser that is a function of the noisy image."""

    image_shape, num_classes, text_width = (1, 8, 8), 0, 0

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, sigma, condition=None):
        return self.function(x, sigma.view(-1, 1, 1, 1))


def halves() -> Images:
    """Images of which half the pixels are -1 and the others 1: mean 0, standard deviation 1."""
    rows = torch.arange(8) % 2 * 255
    return Images(rows.view(1, 1, 8, 1).expand(16, 1, 8, 8).byte(), torch.zeros(16).long())


def test_error_of_the_linear_denoiser_is_exact():
    """s² σ² / (s² + σ²), which the noise image (σ²) and the mean (s²) exceed."""
    clean = torch.tensor([-0.5, 0.5]).repeat(8).view(1, 1, 4, 4).expand(4096, 1, 4, 4) + 0.1
    for sigma in (0.2, 1.0, 5.0):
        zero, linear = denoising_errors(Known(lambda x, s: 0 * x), clean, None, sigma)
        assert linear == pytest.approx(0.25 * sigma**2 / (0.25 + sigma**2), rel=0.02)
        assert zero == pytest.approx(0.26)
        identity, _ = denoising_errors(Known(lambda x, s: x), clean, None, sigma)
        assert identity == pytest.approx(sigma**2, rel=0.02)


def test_network_that_denoises_has_no_warning():
    """The exact denoiser of pixels that are -1 or 1."""
    exact = Known(lambda x, s: torch.tanh(x / s**2))
    warnings, (mean, std) = image_warnings(exact, halves(), "cpu")
    assert warnings == [] and (mean, std) == (0.0, 1.0)
    assert sample_warnings(exact, Sampler(), 0.0, 1.0, "cpu") == []


@pytest.mark.parametrize(
    ("function", "errors"),
    [
        (
            lambda x, s: x,
            "error 0.996 at sigma 1 (linear: 0.519), 24.9 at sigma 5 (linear: 0.976);",
        ),  # σ² of this noise
        (
            lambda x, s: 0 * x,
            "error 1 at sigma 0.2 (linear: 0.0389), 1 at sigma 1 (linear: 0.519);",
        ),
        (lambda x, s: x / 0 * 0, "nan at sigma 0.2"),
    ],
)
def test_network_that_does_not_denoise_is_reported_with_numbers(function, errors):
    (warning,), _ = image_warnings(Known(function), halves(), "cpu")
    assert errors in warning and "\n" not in warning


def test_sample_unlike_the_images_is_reported():
    for function in (lambda x, s: x, lambda x, s: 0 * x + 7, lambda x, s: x / 0 * 0):
        (warning,) = sample_warnings(Known(function), Sampler(), 0.0, 0.5, "cpu")
        assert "real images have 0 and 0.5" in warning


def test_levels_outside_of_the_schedule_are_not_checked(tmp_path):
    class Narrow(Known):
        within = VPDenoiser.within
        _levels = (0.5, 2.0)

    (warning,), _ = image_warnings(Narrow(lambda x, s: 0 * x), halves(), "cpu")
    assert "sigma 1 " in warning and "sigma 0.2" not in warning and "sigma 5" not in warning
