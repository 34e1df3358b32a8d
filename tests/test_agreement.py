"""The agreement with the libraries: on a stub network, and on the finished tiny experiment."""

import pandas as pd
import pytest
import torch

from harness.data import Images
from harness.evaluation import agreement
from harness.evaluation.agreement import compare, write_images
from harness.evaluation.extractors import Extractor


class Projection(torch.nn.Module):
    """A classifier's contract: float images -> few features -> logits."""

    def features(self, x):
        generator = torch.Generator().manual_seed(1)
        flat = x.flatten(1)
        return flat @ torch.randn(flat.shape[1], 6, generator=generator)

    def logits(self, features):
        return features[:, :4]


def images(n: int, seed: int, channels: int = 1) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(60 * seed, 256, (n, channels, 4, 4), generator=generator)
    return Images(pixels.to(torch.uint8), torch.zeros(n, dtype=torch.int64))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_number_agrees_and_a_wrong_one_does_not(channels, tmp_path, monkeypatch):
    sets = [images(120, seed, channels) for seed in (0, 1)]
    folders = [tmp_path / "generated", tmp_path / "real"]
    for each, folder in zip(sets, folders, strict=True):
        write_images(each.pixels, folder)

    class Evaluation:
        neighbours = 3

    class Experiment:
        evaluation = Evaluation

    extractor = Extractor("stub", "cnn", Projection(), "")
    rows = compare(extractor, *sets, folders, Experiment)
    table = pd.DataFrame(rows)
    assert list(table.quantity[table.library == "torch-fidelity"]) == [
        *("fd", "kd", "precision", "recall", "class-score")
    ]
    assert list(table.quantity[table.library == "clean-fid"]) == ["fd", "kd"]
    assert set(table.agrees) == {"yes"} and table.relative_difference.max() < 1e-5
    monkeypatch.setattr(
        agreement.Scored,
        "values",
        lambda self: dict.fromkeys(("fd", "kd", "precision", "recall", "class-score"), 0.5),
    )
    wrong = pd.DataFrame(compare(extractor, *sets, folders, Experiment))
    assert "no" in set(wrong.agrees)


def test_the_experiments_table(finished):
    table = pd.read_csv(finished.results / "tables" / "agreement.csv")
    assert list(table.columns) == list(agreement.COLUMNS)
    assert set(table.agrees) == {"yes"}
    assert set(table.extractor) == {"tiny-cnn", "tiny-clip"}
    assert set(table.library) == {"torch-fidelity", "clean-fid"}
    assert {"fd", "kd", "precision", "recall", "class-score", "cmmd"} == set(table.quantity)
    text = (finished.results / "tables" / "agreement.md").read_text()
    assert "400 samples of teacher edm against 400 training images" in text
