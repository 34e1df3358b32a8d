"""Inception: its network with random weights, its protocols, and scoring with and without it.

The published weights are not available here, so no number is an FID.
"""

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from harness.cli import main
from harness.errors import UserError
from harness.evaluation import references
from harness.evaluation.accumulator import FeatureAccumulator
from harness.evaluation.feature_set import FeatureSet
from harness.evaluation.frechet import frechet_distance, gaussian_statistics
from harness.evaluation.references import Reference
from harness.evaluation.registry import METRICS
from harness.evaluation.scorer import Scorer
from harness.features import base, inception
from harness.features.base import parse_settings
from harness.features.classifiers import PlainCNN
from harness.features.inception import InceptionExtractor
from harness.io.artifacts import save_tensors
from harness.io.records import FeatureRecord, ScoreRow
from harness.validation import parse_experiment

NOWHERE = "http://127.0.0.1:9/weights-inception.pth"


def images(n: int, channels: int = 3, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator).to(torch.uint8)


def extractor(network: nn.Module | None = None, resize: str = "edm") -> InceptionExtractor:
    settings = parse_settings({"type": "inception", "resize": resize})
    extractor = InceptionExtractor("inception", settings)
    extractor.network = network
    return extractor


# -- the network --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class RandomInception(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """Keep the random weights."""

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(RandomInception("random", ["2048"], str(path)).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def network(weights) -> nn.Module:
    return extractor().load_network(weights)


def test_features_and_probabilities(network):
    outputs = extractor(network).extract(images(3))
    assert outputs["features"].shape == (3, 2048) and outputs["probabilities"].shape == (3, 1008)
    assert all(output.dtype == torch.float32 for output in outputs.values())
    torch.testing.assert_close(outputs["probabilities"].sum(dim=1), torch.ones(3))
    grey = images(2, channels=1)
    one, two = (extractor(network).extract(x) for x in (grey, grey.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(one["features"], two["features"])


def test_outputs_do_not_depend_on_blocks(network, monkeypatch):
    pixels, labels = images(5), torch.zeros(5, dtype=torch.int64)
    accumulator = FeatureAccumulator([extractor(network)])
    for part in ((0, 1), (1, 5)):
        accumulator.add(pixels[slice(*part)], labels[slice(*part)])
    streamed = accumulator.feature_set("inception", Reference(torch.zeros(2, 2048)), 3).outputs
    monkeypatch.setattr(base, "BLOCK", 2)
    whole = extractor(network).extract(pixels)
    for name, output in whole.items():
        torch.testing.assert_close(streamed[name], output, rtol=1e-4, atol=1e-5)


@pytest.mark.contract
def test_outputs_equal_torch_fidelitys(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    library = FeatureExtractorInceptionV3("library", ["2048", "logits_unbiased"], str(weights))
    network = extractor().load_network(weights)
    pixels = images(2, size=40)
    features, logits = library(pixels)
    outputs = extractor(network).extract(pixels)
    assert torch.equal(outputs["features"], features)
    assert torch.equal(outputs["probabilities"], logits.softmax(dim=1))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(b"other weights")
    settings = parse_settings({"type": "inception", "weights": str(path)})
    with pytest.raises(UserError, match=inception.SHA256):
        InceptionExtractor("inception", settings).fetch()
    with pytest.raises(UserError) as error, base.reading_weights(path, "inception"):
        extractor().load_network(path)
    assert error.value.code == "weights" and "\n" not in str(error.value)


# -- resizes ------------------------------------------------------------------------------------


@pytest.mark.contract
def test_clean_resize_equals_clean_fid(network):
    from cleanfid.resize import build_resizer

    pixels = images(2, size=20)
    resized = extractor(network, "clean").inputs(pixels)
    expected = build_resizer("clean")(pixels[1].movedim(0, -1).numpy())
    assert torch.equal(resized[1], torch.from_numpy(expected).movedim(-1, 0))
    edm, legacy, clean = (
        extractor(network, resize).extract(pixels)["features"]
        for resize in ("edm", "legacy-tensorflow", "clean")
    )
    assert torch.equal(legacy, edm) and not torch.allclose(clean, edm)


def test_coco_protocol_is_lanczos_then_clean_fid(network):
    from cleanfid.resize import build_resizer
    from PIL import Image

    pixels = images(2, size=512)
    for image, output in zip(pixels, extractor(network, "coco").inputs(pixels), strict=True):
        small = Image.fromarray(image.movedim(0, -1).numpy()).resize((256, 256), Image.LANCZOS)
        expected = torch.from_numpy(build_resizer("clean")(np.asarray(small))).movedim(-1, 0)
        assert torch.equal(output, expected)
    # COCO's photographs have this size already.
    small = pixels[:, :, :256, :256]
    coco, clean = (extractor(network, resize).inputs(small) for resize in ("coco", "clean"))
    assert torch.equal(coco, clean)


def test_patches_are_the_unchanged_centre(network):
    pixels = torch.arange(400 * 301).view(1, 1, 400, 301).expand(1, 3, -1, -1).to(torch.uint8)
    patch = extractor(network, "patch")
    assert torch.equal(patch.inputs(pixels), pixels[:, :, 50:349, 1:300].float())
    with pytest.raises(UserError) as error:
        patch.inputs(pixels[:, :, :256, :256])
    assert error.value.code == "image-size"


# -- scoring ------------------------------------------------------------------------------------


# Metrics of every extractor if images are held out.
SHARED = {"kd", "precision", "recall", "density", "coverage", "memorisation", "diversity"}


class Stub(nn.Module):
    """A small network with Inception's outputs: a projection of the pixels."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(192, 6, generator=generator))

    def forward(self, pixels):
        features = pixels.flatten(1) / 255 @ self.weight
        return features, features


@pytest.fixture
def scored(tiny, tmp_path, monkeypatch):
    """A function that prepares the tiny experiment's data, a random tiny-cnn and Inception, and
    returns the experiment, whose extractors are these two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "WEIGHTS", NOWHERE)
    tiny["features"]["inception"] = {"type": "inception"}
    tiny["evaluation"]["extractors"] = ["tiny-cnn", "inception"]

    def make(**evaluation):
        tiny["evaluation"] |= evaluation
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
        experiment = parse_experiment(tiny, "x.yaml")
        networks = [name for name in tiny["evaluation"]["extractors"] if name != "tiny-cnn"]
        for stage in (["data"], *(["features", name] for name in networks)):
            assert main([*stage, "--configfile", "x.yaml"]) == 0
        settings, folder = experiment.features["tiny-cnn"], experiment.paths.features("tiny-cnn")
        torch.manual_seed(0)
        cnn = PlainCNN((1, 8, 8), 10, settings.width)
        sha256 = save_tensors(folder / "features.safetensors", cnn.state_dict())
        record = FeatureRecord(name="tiny-cnn", settings=settings.model_dump(), sha256=sha256)
        record.write(folder / "features.json")
        return experiment

    return make


@pytest.fixture
def available(scored, monkeypatch, tmp_path):
    """The same with weights for Inception: those of a small network."""
    monkeypatch.setattr(InceptionExtractor, "fetch", lambda self: tmp_path / "x.yaml")
    monkeypatch.setattr(InceptionExtractor, "load_network", lambda *arguments: Stub())
    monkeypatch.setattr(
        InceptionExtractor, "inputs", lambda self, pixels: pixels.expand(-1, 3, -1, -1).float()
    )
    monkeypatch.setattr(references, "DIM", 6)
    return scored


def features_of(pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return Stub()(pixels.expand(-1, 3, -1, -1).float())[0]


def rows_of(scorer: Scorer, counts: list[int], **options) -> dict[tuple[str, str, int], ScoreRow]:
    held_out = scorer.dataset.held_out
    rows = scorer.score([(held_out.pixels, held_out.labels)], counts, **options).rows
    keys = [(row.metric, row.extractor, row.num_samples) for row in rows]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, rows, strict=True))


def test_only_inceptions_distance_is_called_fid(available):
    scorer = Scorer(available().scoring())
    rows = rows_of(scorer, [359])
    pairs = {(metric, extractor) for metric, extractor, _ in rows}
    assert {m for m, e in pairs if e == "tiny-cnn"} == {"fd", "accuracy", "class-score", *SHARED}
    assert {m for m, e in pairs if e == "inception"} == {
        *("fid-edm", "fd-inf", "inception-score"),  # 359 samples are enough for 6 features
        *SHARED,
    }
    assert all(row.status is None for row in rows.values())
    row = rows["fid-edm", "inception", 359]
    parts = (scorer.dataset.held_out, scorer.dataset.train)
    held_out, train = (gaussian_statistics(features_of(part.pixels)) for part in parts)
    assert row.value == pytest.approx(frechet_distance(*held_out, *train), rel=1e-6)
    protocol = scorer.protocols[row.protocol]
    assert protocol["extractor_sha256"] == {"weights": inception.SHA256}
    assert "x * 127.5 + 128" in protocol["quantisation"] and "299" in protocol["resize"]
    assert "torch-fidelity" in protocol["library"]
    assert protocol["reference"] == "digits-train1438"
    other = scorer.protocols[rows["fd", "tiny-cnn", 359].protocol]
    assert other["resize"] == "none" and "torch-fidelity" not in other["library"]


def test_fid_and_frechet_distance_are_one_function():
    x, y = torch.randn(200, 5), torch.randn(300, 5) + 0.2
    fid, fd = (
        METRICS[name].estimate(FeatureSet({"features": x}, Reference(y)))
        for name in ("fid-edm", "fd")
    )
    assert fid == fd


@pytest.mark.parametrize("resize", ["clean", "legacy-tensorflow"])
def test_each_resize_has_its_own_column(tiny, available, resize):
    tiny["features"]["resized"] = {"type": "inception", "resize": resize}
    tiny["evaluation"]["extractors"] = ["resized", "tiny-cnn"]
    scorer = Scorer(available().scoring())
    rows = rows_of(scorer, [359])
    metrics = {metric for metric, name, _ in rows if name == "resized"}
    assert {f"fid-{resize}", "inception-score"} <= metrics
    assert not {"fid-edm", "fd"} & metrics
    protocol = scorer.protocols[rows[f"fid-{resize}", "resized", 359].protocol]
    assert "clean-fid" in protocol["resize"] and "torch-fidelity" in protocol["library"]


def test_missing_weights_leave_rows_without_values(scored):
    experiment = scored()
    record = FeatureRecord.read(experiment.paths.features("inception") / "features.json")
    assert record.unavailable == "no weights" and record.sha256 is None and NOWHERE in record.reason
    scorer = Scorer(experiment.scoring())
    rows = rows_of(scorer, [359])
    for (_, name, _), row in rows.items():
        missing = name == "inception"
        assert (row.value is None) == missing
        assert row.status == ("unavailable (no weights)" if missing else None)
    metrics = {metric for metric, name, _ in rows if name == "inception"}
    assert metrics == {"fid-edm", "fd-inf", "inception-score", *SHARED}
    protocol = scorer.protocols[rows["fid-edm", "inception", 359].protocol]
    assert protocol["extractor_sha256"] == {"weights": inception.SHA256}
