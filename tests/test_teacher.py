"""Teachers that are trained here: what their loss sees, and what retrains them."""

import pytest
import torch

from harness.config.schema import TrainedTeacher
from harness.context import Context, TrainingData
from harness.teachers.train import teacher_phase
from harness.validation import parse_experiment
from tests.test_config import mistakes, put


class Recorder(torch.nn.Module):
    """A "denoiser" that keeps what it was given."""

    def forward(self, x, sigma, condition=None, **extras):
        self.x, self.extras = x, extras
        return torch.zeros_like(x)


def seen(**settings) -> tuple[Recorder, Context]:
    network, pixels = Recorder(), torch.arange(200, dtype=torch.uint8).view(4, 2, 5, 5)
    sources = TrainingData((2, 5, 5), 10, 0.0, pixels, torch.arange(4))
    context = Context({"teacher": network}, sources, 0, 0, range(64))
    section = TrainedTeacher(network={}, images=64, **settings)
    assert teacher_phase(section).loss(context).isfinite()
    return network, context


def test_a_teacher_learns_what_was_done_to_its_images():
    plain, _ = seen()
    assert plain.extras == {}
    augmented, _ = seen(augment=0.12)
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
def test_keys_that_came_later_retrain_only_where_they_are_used(tiny, key, value):
    before = parse_experiment(tiny, "tiny").teacher_spec("edm")
    tiny["teachers"]["edm"][key] = value
    after = parse_experiment(tiny, "tiny").teacher_spec("edm")
    assert after["teacher"] == before["teacher"] | {key: value}


def test_a_network_without_augmentation_labels(workspace):
    config = workspace.config()
    config["teachers"]["edm"]["augment"] = 0.1
    workspace.write_config(config)
    done = workspace.stage("teacher", "edm")
    assert done.returncode == 2
    assert "error: teachers.edm.augment: the network takes 0 augmentation labels" in done.stderr


def test_adam_is_the_one_asked_for(tiny):
    section = TrainedTeacher(**tiny["teachers"]["edm"] | {"lr": 0.02, "betas": [0.5, 0.99]})
    optimizer = teacher_phase(section).optimizer
    assert (optimizer.lr, optimizer.betas) == (0.02, (0.5, 0.99))


def test_impossible_settings_are_told(tiny):
    put(tiny, "teachers.edm.betas", [0.9, 1.0])
    assert "teachers.edm.betas" in str(mistakes(tiny))
    put(tiny, "teachers.edm.precision", "fp16")
    assert "teachers.edm.precision" in str(mistakes(tiny))
