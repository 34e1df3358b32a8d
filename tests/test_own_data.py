"""From a folder of photographs to an experiment: the template, docs/data.md, and memory."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from harness.cli import main
from harness.config.loading import merge, read_experiment
from harness.config.schema import DataSection
from harness.data import datasets
from harness.data.image_sources import ImageSource
from harness.data.registry import Images, Prompts, data_source
from harness.errors import UserError
from harness.evaluation.stage import requested_labels
from harness.validation import load_experiment, parse_experiment

CONFIGS = Path(__file__).parent.parent / "configs"
PAGE = CONFIGS.parent / "docs" / "data.md"


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL))
def test_experiments_of_the_page_are_valid(block):
    """All checks run, except that the files need not exist."""
    raw = yaml.safe_load(block)
    base = read_experiment(CONFIGS / raw.pop("extends"))
    experiment = parse_experiment(merge(base, raw), "docs/data.md", files=False)
    assert experiment.students and experiment.data.resize.size == 32


def test_photographs_are_prepared_by_the_template(tmp_path, monkeypatch):
    """JPEG files of several sizes in class folders; `plan` and the checks know their size."""
    monkeypatch.chdir(tmp_path)
    for i in range(60):
        path = Path("photos", ("tall grass", "dog")[i % 2], f"{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 50), (4 * i, 0, 0)).save(path)
    Path("photos/Thumbs.db").touch()
    config = f"extends: {CONFIGS / 'photos.yaml'}\nname: mine\ndata: {{source: photos}}\n"
    Path("mine.yaml").write_text(config)
    assert main(["data", "--configfile", "mine.yaml"]) == 0
    experiment = load_experiment(Path("mine.yaml"))
    data = datasets.load(experiment.paths.data)
    assert data.class_names == ("dog", "tall grass") and data.image_shape == (3, 32, 32)
    assert (len(data.train), len(data.held_out)) == (48, 12)
    assert data.label_counts == (24, 24) and data.resize.startswith("centred square")
    assert data_source(experiment.data).image_shape == (3, 32, 32)


def test_images_are_in_memory_once(tmp_path):
    """Both parts are decoded into their places: no second copy for the split or the order."""
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", pixels, np.arange(3000) % 3)
    section = DataSection(name="x", source=str(tmp_path / "x.npz"), held_out=0.2)
    tracemalloc.start()
    train, held_out, _ = data_source(section).read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert train.pixels.nbytes + held_out.pixels.nbytes == pixels.nbytes
    assert peak < 1.3 * pixels.nbytes


def test_labels_of_scored_images_are_classes_or_prompts(tmp_path):
    """Folders are classes by name, whatever their order; with prompts, they may be anything."""

    def requested(data: datasets.Dataset, folders: list[str]) -> list[int] | None:
        root = tmp_path / "-".join(folders)
        for i, name in enumerate(folders):
            (root / name).mkdir(parents=True)
            Image.new("RGB", (4, 4), (i, 0, 0)).save(root / name / "x.png")
        labels = requested_labels(data, ImageSource(root))
        return None if labels is None else labels.tolist()

    images = Images(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    classes = datasets.Dataset("x", images, images, ("dog", "cat"), "")
    assert requested(classes, ["cat", "dog"]) == [1, 0]
    assert requested(classes, ["dog"]) == [0]  # one class of several
    with pytest.raises(UserError, match="bird") as error:
        requested(classes, ["bird", "cat"])
    assert error.value.code == "unknown-class"
    assert requested(datasets.Dataset("x", images, images, (), ""), ["a", "b"]) == [0, 0]
    prompts = Prompts(("a cat", "a dog"), "")
    prompted = datasets.Dataset("x", images, images, (), "", evaluation_prompts=prompts)
    assert requested(prompted, ["a dog", "a cat"]) == [0, 1]
    assert requested(prompted, ["00", "01"]) is None
