"""`harness verify-data` with a small network instead of Inception; the resizes are the real ones.

Inception's published weights are not available here, so no distance is one of FIDs.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from harness.cli import main
from harness.evaluation import references
from harness.evaluation.agreement import write_images
from harness.evaluation.frechet import gaussian_statistics
from harness.evaluation.verify_data import TOLERANCE
from harness.features.base import parse_settings
from harness.features.inception import InceptionExtractor

DIM = 6


def slow(*values):
    """A case that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


class StandIn(nn.Module):
    """Inception's outputs from a projection of every tenth pixel. The trace of the features'
    covariance is about 170, as of Inception's features of real images."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(2700, DIM, generator=generator) * 1.21)

    def forward(self, x: Tensor):
        features = x[:, :, ::10, ::10].flatten(1) / 255 @ self.weight
        return features, features


def images(seed: int, count: int = 120) -> Tensor:
    """Images of smooth noise, uint8 `(N, 3, 16, 16)`."""
    generator = torch.Generator().manual_seed(seed)
    noise = nn.functional.avg_pool2d(torch.rand(count, 3, 18, 18, generator=generator), 3, 1)
    return (noise * 255).byte()


@pytest.fixture
def project(tiny, tmp_path, monkeypatch):
    """A function that prepares an experiment on 120 images with statistics in the features of a
    resize of Inception, and runs a command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(InceptionExtractor, "fetch", lambda self: tmp_path / "x.yaml")
    monkeypatch.setattr(InceptionExtractor, "load_network", lambda *arguments: StandIn())
    monkeypatch.setattr(references, "DIM", DIM)
    write_images(images(0), tmp_path / "images")
    labels = [[f"{i:06d}.png", i % 2] for i in range(120)]
    (tmp_path / "images" / "dataset.json").write_text(json.dumps({"labels": labels}))
    tiny["data"] = {"name": "noise", "source": "images", "held_out": 0}
    tiny["features"]["inception"] = {"type": "inception"}
    tiny["evaluation"] |= {"extractors": ["tiny-cnn", "inception"], "statistics": "s.npz"}

    def write(pixels: Tensor, resize: str = "edm") -> None:
        settings = parse_settings({"type": "inception", "resize": resize})
        extractor = InceptionExtractor("inception", settings)
        extractor.network = StandIn()
        mean, covariance = gaussian_statistics(extractor.extract(pixels)["features"])
        np.savez("s.npz", mu=mean.numpy(), sigma=covariance.numpy())

    def run(*command: str) -> int:
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
        return main([*command, "--configfile", "x.yaml"])

    return tiny, write, run


def prepare(run) -> None:
    assert run("data") == run("features", "inception") == 0


def test_images_of_the_statistics_pass(project, capsys):
    _, write, run = project
    write(images(0))
    prepare(run)
    assert run("verify-data") == 0
    line = capsys.readouterr().out
    assert "of the 120 training images of noise in inception from s.npz, within" in line
    assert abs(float(line.split()[2])) < 1e-6


@pytest.mark.parametrize("fault", [slow("resize"), slow("statistics"), "images"])
def test_every_mismatch_fails_in_one_line(project, capsys, fault):
    """Statistics of another resize, of other images, and of a part of the images."""
    config, write, run = project
    if fault == "resize":
        write(images(0))
        config["features"]["inception"]["resize"] = "clean"
    elif fault == "statistics":
        write(images(1))
    else:
        write(images(0))
        config["data"]["held_out"] = 0.3
    prepare(run)
    capsys.readouterr()
    assert run("verify-data") == 2
    output = capsys.readouterr()
    (line,) = (line for line in output.err.splitlines() if line.startswith("error: "))
    assert "detector or resize mismatch" in line and "s.npz" in line and not output.out
    assert float(line.split()[3]) > 2 * TOLERANCE
    assert ("are held out" in line) == (fault == "images")


DATA = "python -m harness data --configfile x.yaml"
FEATURES = "python -m harness features inception --configfile x.yaml"


@pytest.mark.parametrize(
    ("key", "value", "commands"),
    [
        ("held_out", 0.3, DATA),
        slow("source", "more", DATA),  # the same images in another place must be read again
        slow("resize", "clean", FEATURES),
        slow("both", None, f"{DATA} && {FEATURES}"),
    ],
)
def test_outdated_data_and_networks_are_refused(project, capsys, key, value, commands):
    """The prepared data and features.json stay those of the earlier settings until a stage runs."""
    config, write, run = project
    write(images(0))
    prepare(run)
    shutil.copytree("images", "more")
    if key in ("resize", "both"):
        config["features"]["inception"]["resize"] = value or "clean"
    if key != "resize":
        config["data"] |= {"held_out": 0.3} if key == "both" else {key: value}
    assert run("verify-data") == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    assert line.endswith(f"make it again: {commands}")
    for command in commands.split(" && "):
        assert run(*command.split()[3:-2]) == 0
    capsys.readouterr()
    run("verify-data")
    assert "make it again" not in capsys.readouterr().err


def test_images_that_are_newer_than_the_prepared_data_are_refused(project, capsys):
    _, write, run = project
    write(images(0))
    prepare(run)
    labels = Path("images/dataset.json")
    later = Path("results/tiny/data/data.json").stat().st_mtime + 9
    os.utime(labels, (later, later))
    assert run("verify-data") == 2
    assert DATA in capsys.readouterr().err


def test_missing_inputs_are_named(project, capsys):
    config, write, run = project
    write(images(0))
    assert run("verify-data") == 2
    command = (
        "snakemake --cores 8 results/tiny/features/inception/features.json --configfile x.yaml"
    )
    assert command in capsys.readouterr().err
    prepare(run)
    path = Path("results/tiny/features/inception/features.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"unavailable": "no weights", "reason": "x"}))
    assert run("verify-data") == 2
    assert "features.inception: inception is unavailable" in capsys.readouterr().err
    del config["evaluation"]["statistics"]
    assert run("verify-data") == 2
    assert "evaluation.statistics: missing" in capsys.readouterr().err
