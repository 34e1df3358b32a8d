"""Agreement with the libraries: on a stub network, and in the finished tiny experiment."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from harness.evaluation import agreement
from harness.evaluation.agreement import ImagePair, compare_with_libraries, write_images
from harness.features.classifiers import ClassifierExtractor


class Projection(torch.nn.Module):
    """A classifier: float images -> few features -> logits."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def features(self, x):
        generator = torch.Generator().manual_seed(1)
        flat = x.flatten(1)
        return self.scale * flat @ torch.randn(flat.shape[1], 6, generator=generator)

    def logits(self, features):
        return features[:, :4]


def images(n: int, seed: int, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(60 * seed, 256, (n, channels, 4, 4), generator=generator)
    return pixels.to(torch.uint8)


def stub(folder: Path, channels: int = 1) -> tuple[ImagePair, list[Path]]:
    """The arguments of `compare_with_libraries`."""
    sets = [images(120, seed, channels) for seed in (0, 1)]
    folders = [folder / "generated", folder / "real"]
    for part, place in zip(sets, folders, strict=True):
        write_images(part, place)
    settings = ClassifierExtractor.Settings(type="cnn", images=1)
    extractor = ClassifierExtractor("stub", settings)
    extractor.network = Projection()
    return ImagePair(extractor, *sets, 3), folders


@pytest.mark.parametrize("channels", [1, 3])
def test_all_quantities_agree_and_wrong_ones_are_detected(channels, tmp_path):
    pair, folders = stub(tmp_path, channels)
    rows = compare_with_libraries(pair, folders)
    table = pd.DataFrame(rows, columns=agreement.COLUMNS)
    assert list(table.quantity[table.library == "torch-fidelity"]) == [
        *("fd", "kd", "precision", "recall", "class-score")
    ]
    assert list(table.quantity[table.library == "clean-fid"]) == ["fd", "kd"]
    assert set(table.agrees) == {"yes"} and table.relative_difference.max() < 1e-5
    pair.values = dict.fromkeys(pair.values, 0.5)
    wrong = pd.DataFrame(compare_with_libraries(pair, folders), columns=agreement.COLUMNS)
    assert "no" in set(wrong.agrees)


def test_table_of_the_experiment(finished):
    table = pd.read_csv(finished.results / "tables" / "agreement.csv")
    assert list(table.columns) == list(agreement.COLUMNS)
    assert set(table.agrees) == {"yes"}
    assert set(table.extractor) == {"tiny-cnn", "tiny-clip"}
    assert set(table.library) == {"torch-fidelity", "clean-fid"}
    assert {"fd", "kd", "precision", "recall", "class-score", "cmmd"} == set(table.quantity)
    text = (finished.results / "tables" / "agreement.md").read_text()
    assert "400 samples of teacher edm against 400 training images" in text
