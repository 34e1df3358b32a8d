"""Training of teachers: augmentation, fingerprints, optimiser settings and checks."""

import pytest
import torch

from harness.config.schema import TrainedTeacher
from harness.context import Context, TrainingData
from harness.teachers.stage import teacher_phase
from harness.validation import parse_experiment
from tests.test_config import mistakes, problems, put


class Recorder(torch.nn.Module):
    """A denoiser that records its inputs."""

    def forward(self, x, sigma, condition=None, **extras):
        self.x, self.extras = x, extras
        return torch.zeros_like(x)


def evaluate_loss(**settings) -> tuple[Recorder, Context]:
    network, pixels = Recorder(), torch.arange(200, dtype=torch.uint8).view(4, 2, 5, 5)
    sources = TrainingData((2, 5, 5), 10, 0.0, pixels, torch.arange(4))
    context = Context({"teacher": network}, sources, 0, 0, range(64))
    section = TrainedTeacher(network={}, images=64, **settings)
    assert teacher_phase(section).loss(context).isfinite()
    return network, context


def test_augmentation_labels_describe_the_augmented_images():
    plain, _ = evaluate_loss()
    assert plain.extras == {}
    augmented, _ = evaluate_loss(augment=0.12)
    labels = augmented.extras["augment_labels"]
    assert labels.shape == (64, 9)
    untouched = (labels == 0).all(dim=1)
    assert 0 < untouched.sum() < 64
    changed = (augmented.x - plain.x).abs().flatten(1).amax(dim=1) > 1e-4
    assert torch.equal(changed, ~untouched)


@pytest.mark.parametrize(
    ("key", "value"),
    [("augment", 0.1), ("precision", "bf16"), ("channels_last", True), ("betas", (0.9, 0.99))],
)
def test_fingerprint_contains_the_settings_but_not_the_sampler(tiny, key, value):
    before = parse_experiment(tiny, "tiny").teacher_fingerprint("edm")
    tiny["teachers"]["edm"][key] = value
    tiny["teachers"]["edm"]["sampler"] = {"steps": 99}
    after = parse_experiment(tiny, "tiny", check=False).teacher_fingerprint("edm")
    assert after["teacher"] == before["teacher"] | {key: value}


def test_augmentation_needs_a_network_with_augmentation_labels(tiny):
    tiny["teachers"]["edm"]["augment"] = 0.1
    (found,) = problems(tiny)
    assert (found.key, found.code) == ("teachers.edm.augment", "augment-labels")


def test_optimizer_uses_the_section_s_settings(tiny):
    section = TrainedTeacher(**tiny["teachers"]["edm"] | {"lr": 0.02, "betas": [0.5, 0.99]})
    optimizer = teacher_phase(section).optimizer
    assert (optimizer.lr, optimizer.betas) == (0.02, (0.5, 0.99))


def test_invalid_settings_are_rejected(tiny):
    put(tiny, "teachers.edm.betas", [0.9, 1.0])
    assert "teachers.edm.betas" in str(mistakes(tiny))
    put(tiny, "teachers.edm.precision", "fp16")
    assert "teachers.edm.precision" in str(mistakes(tiny))
