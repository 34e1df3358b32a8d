"""Inception: its plumbing on random weights, its metric's name, and how tables say it is missing.

The published weights are downloaded, so no number here is an FID.
"""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from harness.evaluation.extractors import Extractor, Observer
from harness.evaluation.score import Scorer, Source

from harness.cli import main
from harness.errors import UserError
from harness.evaluation import score
from harness.evaluation.agreement import write_images
from harness.evaluation.feature_set import FeatureSet, Reference
from harness.evaluation.folder import score_folder
from harness.evaluation.frechet import frechet_distance, gaussian_statistics, load_statistics
from harness.evaluation.registry import METRICS
from harness.features import inception
from harness.features.classifiers import CLASSIFIERS
from harness.io.artifacts import digest, save_tensors, write_json
from harness.reporting.collect import collect
from harness.validation import parse_experiment

NOWHERE = "http://127.0.0.1:9/weights-inception.pth"


def images(n: int, channels: int = 3, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator).to(torch.uint8)


# -- the network --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> inception.Inception:
    torch.manual_seed(0)
    return inception.Inception(inception._untrained())


def test_features_and_probabilities(network):
    pixels = images(3)
    features, probabilities = network(pixels)
    assert features.shape == (3, 2048) and probabilities.shape == (3, 1008)
    assert features.dtype == probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))
    grey = images(2, channels=1)
    torch.testing.assert_close(network(grey)[0], network(grey.repeat(1, 3, 1, 1))[0])
    with pytest.raises(Exception, match="uint8"):
        network(pixels.float())


def test_blocks_change_nothing(network, monkeypatch):
    """What an image gives depends on no other image, whatever the blocks of a stream."""
    pixels, labels = images(5), torch.zeros(5, dtype=torch.int64)
    extractor = Extractor("inception", "inception", network, inception.SHA256)
    observer = Observer([extractor])
    for part in ((0, 1), (1, 5)):
        observer.add(pixels[slice(*part)], labels[slice(*part)])
    streamed = observer.views("inception", Reference(torch.zeros(2, 2048)), 3)
    monkeypatch.setattr(inception, "BLOCK", 2)
    whole = extractor.see(pixels, labels)
    torch.testing.assert_close(streamed.features, whole["features"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(streamed.outputs["probabilities"], whole["probabilities"])


def test_weights_are_read_as_the_library_reads_them(network, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path / "weights.pth"
    torch.save(network.network.state_dict(), path)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], str(path))
    pixels = images(1)
    assert torch.equal(inception.load_inception(path)(pixels)[0], theirs(pixels)[0])
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"weights\.pth holds no weights of Inception: it is dam"):
        inception.load_inception(path)


def test_no_file_but_the_published_one_is_taken(tmp_path):
    (tmp_path / "mine.pth").write_bytes(b"other weights")
    with pytest.raises(UserError, match=f"not {inception.SHA256}"):
        inception.fetch_weights(str(tmp_path / "mine.pth"))


# -- experiments --------------------------------------------------------------------------------


# The metrics of every extractor, where there are held-out images.
SHARED = {"kd", "precision", "recall", "density", "coverage", "memorisation", "diversity"}


class Stub(torch.nn.Module):
    """Inception's contract with few features: a projection of the pixels."""

    see = inception.Inception.see

    def forward(self, pixels):
        generator = torch.Generator().manual_seed(1)
        flat = pixels.float().flatten(1) / 255
        features = flat @ torch.randn(flat.shape[1], 6, generator=generator)
        return features, features.softmax(dim=1)


@pytest.fixture
def scored(tiny, tmp_path, monkeypatch):
    """A function that leaves the tiny experiment's data, a random tiny-cnn and Inception's record
    as the stages do, and returns the experiment, which is scored by both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "WEIGHTS", NOWHERE)
    tiny["features"]["inception"] = {"type": "inception"}
    tiny["evaluation"]["extractors"] = ["tiny-cnn", "inception"]

    def make():
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
        experiment = parse_experiment(tiny, "x.yaml")
        for stage in (["data"], ["features", "inception"]):
            assert main([*stage, "--configfile", "x.yaml"]) == 0
        section, folder = experiment.features["tiny-cnn"], experiment.features_dir("tiny-cnn")
        torch.manual_seed(0)
        cnn = CLASSIFIERS["cnn"]((1, 8, 8), 10, section.width)
        sha256 = save_tensors(folder / "features.safetensors", cnn.state_dict())
        record = {"architecture": section.model_dump(), "sha256": sha256}
        write_json(folder / "features.json", record)
        return experiment

    return make


@pytest.fixture
def available(scored, monkeypatch):
    """The same, where the weights can be had."""
    monkeypatch.setattr(inception, "fetch_weights", lambda source=None: source)
    monkeypatch.setattr(inception, "load_inception", lambda path, resize: Stub())
    monkeypatch.setattr(inception, "DIM", 6)
    return scored


def rows_of(scorer: Scorer, counts: list[int]) -> dict[tuple[str, str, int], dict]:
    held = scorer.dataset.held_out
    rows = scorer.score(iter([(held.pixels, held.labels)]), counts)
    keys = [(row["metric"], row["extractor"], row["num_samples"]) for row in rows]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, rows, strict=True))


def test_only_inceptions_distance_is_called_fid(available):
    scorer = Scorer(available())
    rows = rows_of(scorer, [359])
    both = {(metric, extractor) for metric, extractor, _ in rows}
    assert {m for m, e in both if e == "tiny-cnn"} == {"fd", "accuracy", "class-score", *SHARED}
    assert {m for m, e in both if e == "inception"} == {
        *("fid-edm", "fd-inf", "inception-score"),  # 359 samples of the stub's 6 features are many
        *SHARED,
    }
    assert all(row.get("status", "ok") == "ok" for row in rows.values())
    row = rows["fid-edm", "inception", 359]
    held, train = (
        Stub()(part.pixels)[0] for part in (scorer.dataset.held_out, scorer.dataset.train)
    )
    expected = frechet_distance(*gaussian_statistics(held), *gaussian_statistics(train))
    assert row["value"] == pytest.approx(expected, rel=1e-6)
    protocol = scorer.protocols[row["protocol"]]
    assert protocol["extractor_sha256"] == {"weights": inception.SHA256}
    assert "x * 127.5 + 128" in protocol["quantisation"] and "299" in protocol["resize"]
    assert "torch-fidelity" in protocol["library"]
    assert protocol["reference"] == "digits-train1438"
    other = scorer.protocols[rows["fd", "tiny-cnn", 359]["protocol"]]
    assert other["resize"] == "none" and "torch-fidelity" not in other["library"]


def test_the_fid_and_its_error_are_those_of_the_frechet_distance():
    x, y = torch.randn(200, 5), torch.randn(300, 5) + 0.2
    fid, fd = (
        METRICS[name].estimate(FeatureSet({"features": x}, Reference(y)))
        for name in ("fid-edm", "fd")
    )
    assert fid == pytest.approx(fd, rel=1e-9)


def test_a_large_reference_is_summed_and_a_draw_of_it_kept(available, monkeypatch):
    """The limit of metrics of all pairs: a draw of the reference, all subsets of the samples."""
    whole = rows_of(Scorer(available()), [359])
    monkeypatch.setattr(score, "PAIRWISE_LIMIT", 100)
    for name in SHARED:
        monkeypatch.setitem(METRICS._entries, name, replace(METRICS[name], limit=100))
    scorer = Scorer(available())
    assert len(scorer._reference["inception"].features) == 100
    rows = rows_of(scorer, [359, 120])
    assert {n for m, _, n in rows if m in SHARED} == {100}
    for key in (("fd", "tiny-cnn", 359), ("fid-edm", "inception", 359)):
        assert rows[key]["value"] == pytest.approx(whole[key]["value"], rel=1e-6)
        assert "reference_draw" not in scorer.protocols[rows[key]["protocol"]]
    limited = scorer.protocols[rows["kd", "inception", 100]["protocol"]]
    assert limited["reference_draw"] == "100 images, always the same"


def test_a_folder_of_too_few_images_is_told(available, tmp_path):
    experiment = available()
    write_images(images(9, 1, 8), tmp_path / "few")
    entries = [[f"{i:06d}.png", 0] for i in range(9)]
    (tmp_path / "few" / "dataset.json").write_text(json.dumps({"labels": entries}))
    with pytest.raises(UserError, match=r"few: 9 images; the metrics need 10 or more$"):
        score_folder(experiment, tmp_path / "few")


def test_published_statistics_are_the_reference_of_an_fid_alone(available, tmp_path):
    experiment = available()
    training = rows_of(Scorer(experiment), [359])
    path = tmp_path / "statistics.npz"
    mu, sigma = np.ones(6), np.eye(6, dtype=np.float32)
    np.savez(path, mu=mu, sigma=sigma)
    update = {"statistics": str(path)}
    experiment.evaluation = experiment.evaluation.model_copy(update=update)
    scorer = Scorer(experiment)
    rows = rows_of(scorer, [359])
    for key, row in rows.items():
        compared = key[0] in ("fid-edm", "fd-inf") and key[1] == "inception"
        assert (row == training[key]) == (not compared)
    held = gaussian_statistics(Stub()(scorer.dataset.held_out.pixels)[0])
    expected = frechet_distance(*held, *load_statistics(path))
    row = rows["fid-edm", "inception", 359]
    assert row["value"] == pytest.approx(expected, rel=1e-6)
    protocol = scorer.protocols[row["protocol"]]
    assert protocol["reference"] == "digits-statistics"
    assert protocol["reference_sha256"] == score.sha256_file(path)


# -- without the weights ------------------------------------------------------------------------


def test_missing_weights_are_told_in_every_row_and_stop_nothing(scored, capsys):
    experiment = scored()
    assert "inception is unavailable: http://127.0.0.1:9" in capsys.readouterr().err
    record = json.loads((experiment.features_dir("inception") / "features.json").read_text())
    assert record["unavailable"] == "no weights" and "sha256" not in record
    scorer = Scorer(experiment)
    rows = rows_of(scorer, [359])
    for (_, extractor, _), row in rows.items():
        if extractor == "inception":
            assert row["value"] is None and row["stderr"] is None
            assert row["status"] == "unavailable (no weights)"
        else:
            assert row["value"] is not None and "status" not in row
    would = {"fid-edm", "fd-inf", "inception-score", *SHARED}
    assert {m for m, e, _ in rows if e == "inception"} == would

    # The tables, from a teacher's scores.
    entry = {"snapshot": "", "final": True, "grid": [], "student": "teacher", "nfe": 7}
    entry |= dict.fromkeys(("ema", "images", "flops", "seconds"))
    made = {"fingerprint": digest(experiment.teacher_spec("edm")), "sha256": "", "parameters": 1}
    write_json(experiment.teacher_dir("edm") / "teacher.json", made)
    scores = {"teacher": "edm", "method": None, "seed": None, "weights": ""}
    scores |= {"spec": digest(experiment.reference_score_spec("edm"))}
    path = experiment.reference_score_path("edm")
    pixels = {"pixels": images(10, 1, 8), "labels": torch.arange(10)}
    scores["entries"] = [entry | {"rows": list(rows.values())}]
    score._finish(path, scores, scorer, pixels)
    table, _ = collect(experiment, partial=True)
    teacher = table[table.student == "teacher"]
    assert set(teacher[teacher.extractor == "inception"].column) == {
        f"{metric}_n359_inception" for metric in would
    }
    assert main(["report", "--partial", "--configfile", "x.yaml"]) == 0
    csv = pd.read_csv(experiment.root / "tables" / "metrics.csv")
    fid = csv[csv.metric == "fid-edm"]
    assert fid.value.isna().all() and set(fid.status) == {"unavailable (no weights)"}
    assert csv[csv.metric == "fd"].value.notna().all()
    comparison = pd.read_csv(experiment.root / "tables" / "comparison.csv").set_index("student")
    assert comparison.status["teacher"] == "ok"
    assert comparison["fid-edm_n359_inception_status"]["teacher"] == "unavailable (no weights)"
    markdown = (experiment.root / "tables" / "comparison.md").read_text()
    note = next(line for line in markdown.splitlines() if "inception is unavailable" in line)
    assert NOWHERE in note and note.endswith(
        f"; then delete {experiment.features_dir('inception')}."
    )


# -- files of statistics ------------------------------------------------------------------------


def test_statistics_are_read_with_their_mistakes_told(tmp_path):
    path = tmp_path / "s.npz"

    def write(**arrays):
        np.savez(path, **arrays)
        return path

    mean, covariance = load_statistics(write(mu=np.zeros(3), sigma=np.eye(3, dtype=np.float32)), 3)
    assert mean.dtype == covariance.dtype == torch.float64 and covariance.shape == (3, 3)
    bad = np.eye(3)
    bad[0, 0] = np.nan
    for arrays, dim, message in (
        ({"mu": np.zeros(3)}, None, "reference statistics hold mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, None, r"mu \(3,\) and sigma \(2, 2\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, 2048, "of 3 features; the extractor has 2048"),
        ({"mu": np.zeros(3), "sigma": bad}, None, "finite"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, None, "negative eigenvalues"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 2], [2, 1]])}, None, "negative eigenvalues"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, None, "is no .npz file of numbers"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_statistics(write(**arrays), dim)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    # Fewer samples than features, dead features, and single precision are no mistakes.
    few = np.cov(np.random.default_rng(0).standard_normal((9, 40)), rowvar=False)
    few[3] = few[:, 3] = 0
    for sigma in (few.astype(np.float32), np.zeros((40, 40))):
        load_statistics(write(mu=np.zeros(40), sigma=sigma))
    path.write_bytes(b"text")
    with pytest.raises(UserError, match=r"is no \.npz file"):
        load_statistics(path)
    np.save(tmp_path / "one.npy", np.eye(3))
    with pytest.raises(UserError, match=r"is no \.npz file"):
        load_statistics(tmp_path / "one.npy")
    with pytest.raises(UserError, match="does not exist"):
        load_statistics(tmp_path / "none.npz")


def test_a_student_trained_on_imagenet_features_is_flagged(available):
    """GDD's lead in Inception's features vanishes in CLIP's: a column that shares the pretraining
    of a student's discriminator says so."""
    scorer = Scorer(available())
    held = scorer.dataset.held_out
    blocks = iter([(held.pixels, held.labels)])
    rows = scorer.score(blocks, [359], ["timm/tf_efficientnet_lite0"], ["imagenet-1k"])
    flags = {row["extractor"]: row["flag"] for row in rows}
    assert flags.pop("inception") == "shares-pretraining"
    assert set(flags.values()) == {""}


# -- bad numbers --------------------------------------------------------------------------------


def test_bad_numbers_are_one_line(available, monkeypatch, capsys):
    scorer = Scorer(available())
    held = scorer.dataset.held_out
    scorer.score(iter([(held.pixels[:5], held.labels[:5])]), [5])
    scorer.score(iter([(held.pixels[:5], held.labels[:5])]), [5])
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines[-1] == (
        "warning: 5 samples are no more than the 6 features of inception; their Fréchet distance "
        "is mostly bias; compare with the floor, n 359"
    )
    assert len(set(lines)) == len(lines) == 2
    nan = Source(lambda z, *_: z * torch.nan, (1, 8, 8), torch.nn.Identity(), None)
    broken = scorer.generated(nan, 0)
    with pytest.raises(UserError, match="256 of 256 generated images hold NaN or infinity"):
        next(broken)
    see = Extractor.see
    monkeypatch.setattr(Extractor, "see", lambda *a: {k: v / 0 for k, v in see(*a).items()})
    with pytest.raises(UserError, match="tiny-cnn: the features of 5 of 5 images are no finite"):
        scorer.score(iter([(held.pixels[:5], held.labels[:5])]), [5])


# -- clean-fid's resizes ------------------------------------------------------------------------


def test_clean_resize_is_clean_fids(network):
    from cleanfid.resize import build_resizer

    pixels = images(2, size=20)
    resized = inception.clean_resize(pixels.float())
    theirs = build_resizer("clean")(pixels[1].movedim(0, -1).numpy())
    assert torch.equal(resized[1], torch.from_numpy(theirs).movedim(-1, 0))
    edm = network(pixels)[0]
    seen = []
    handle = network.network.Conv2d_1a_3x3.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    clean = inception.Inception(network.network, "clean")(pixels)[0]
    handle.remove()
    torch.testing.assert_close(seen[0], (resized - 128) / 128)  # as clean-fid's network does
    assert not torch.allclose(clean, edm)
    legacy = inception.Inception(network.network, "legacy-tensorflow")(pixels)[0]
    assert torch.equal(legacy, edm)


@pytest.mark.parametrize("resize", ["clean", "legacy-tensorflow"])
def test_a_resize_is_a_column_of_its_own(tiny, available, resize):
    tiny["features"]["resized"] = {"type": "inception", "resize": resize}
    tiny["evaluation"]["extractors"] = ["resized", "tiny-cnn"]
    experiment = available()
    folder = experiment.features_dir("resized")
    write_json(folder / "features.json", {"type": "inception", "sha256": inception.SHA256})
    scorer = Scorer(experiment)
    rows = rows_of(scorer, [359])
    mine = {metric for metric, extractor, _ in rows if extractor == "resized"}
    assert f"fid-{resize}" in mine and "inception-score" in mine
    assert not {"fid-edm", "fd"} & mine
    protocol = scorer.protocols[rows[f"fid-{resize}", "resized", 359]["protocol"]]
    assert "clean-fid" in protocol["resize"] and "torch-fidelity" in protocol["library"]


# -- text-to-image papers -----------------------------------------------------------------------


class Mirror(torch.nn.Module):
    """In the network's place: shows what reaches its first layer."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(1, 1)

    def forward(self, images):
        from torch_fidelity import feature_extractor_inceptionv3 as library

        resize = library.interpolate_bilinear_2d_like_tensorflow1x
        return resize(images.float(), size=(299, 299), align_corners=False), torch.zeros(1, 2)


def test_coco_s_protocol_is_lanczos_and_then_clean_fid_s():
    from cleanfid.resize import build_resizer
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 512, 512), generator=random, dtype=torch.uint8)
    seen, _ = inception.Inception(Mirror(), "coco")(pixels)
    resize = build_resizer("clean")
    for image, mine in zip(pixels, seen, strict=True):
        small = Image.fromarray(image.movedim(0, -1).numpy()).resize((256, 256), Image.LANCZOS)
        theirs = torch.from_numpy(resize(np.asarray(small))).movedim(-1, 0)
        assert torch.equal(mine, theirs)
    # COCO's photographs are of that size already.
    small = pixels[:, :, :256, :256]
    assert torch.equal(inception.lanczos(small, 256), small)


def test_patches_are_the_middle_as_it_is():
    pixels = torch.arange(400 * 301).view(1, 1, 400, 301).expand(1, 3, -1, -1).to(torch.uint8)
    seen, _ = inception.Inception(Mirror(), "patch")(pixels)
    assert torch.equal(seen, pixels[:, :, 50:349, 1:300].float())
    with pytest.raises(UserError, match="looks at 299 x 299 pixels, and images are 256 x 256"):
        inception.Inception(Mirror(), "patch")(pixels[:, :, :256, :256])
