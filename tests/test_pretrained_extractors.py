"""open-clip, DINOv2 and EfficientNet-Lite: loading and outputs with small random weights, and
LAION's heads with their published weights. CLIP's and DINOv2's published weights are not tested."""

from pathlib import Path

import numpy as np
import pytest
import torch

from harness.config.jobs import FeatureJob
from harness.data.datasets import Dataset, Images
from harness.data.registry import Prompts
from harness.errors import ConfigError, UserError
from harness.evaluation.feature_set import FeatureSet
from harness.evaluation.references import Reference
from harness.evaluation.registry import METRICS
from harness.features import aesthetic, openclip
from harness.features import timm_backbones as backbones
from harness.features.aesthetic import AestheticHead, laion_head
from harness.features.base import (
    load_extractor,
    make_features,
    new_extractor,
    parse_settings,
    provides,
    reading_weights,
)
from harness.features.openclip import OpenCLIPExtractor
from harness.features.timm_extractors import DINOv2Extractor
from harness.io.artifacts import sha256_file
from harness.io.records import FeatureRecord
from harness.validation import parse_experiment
from tests.conftest import ROOT

ASSETS = ROOT.parent / "shared" / "assets"
CLIP = "vit-b-32-quickgelu-openai"
MODEL = {"type": "open-clip", "model": "ViT-B-32-quickgelu"}
NAMES = ("zero", "one", "two")


def images(n: int = 3, channels: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator).to(torch.uint8)


@pytest.fixture
def dataset() -> Dataset:
    train = Images(images(6), torch.arange(6) % 3)
    return Dataset("x", train, train, NAMES, "")


def tiny_clip(*_, **__):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    return CLIP(16, vision, CLIPTextCfg(context_length=77, width=32, heads=2, layers=1), True)


@pytest.fixture
def clip_weights(monkeypatch, tmp_path) -> Path:
    """A tiny CLIP instead of open_clip's networks, and a file of its weights."""
    import open_clip
    from safetensors.torch import save_file

    monkeypatch.setattr(open_clip, "create_model", tiny_clip)
    torch.manual_seed(0)
    save_file(tiny_clip().state_dict(), tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """A function that runs the `features` stage for some settings; it returns the record and the
    folder."""
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path / "cache"))

    def run(settings: dict, name: str = "network") -> tuple[FeatureRecord, Path]:
        folder = tmp_path / "features"
        job = FeatureJob(
            name=name,
            settings=parse_settings(settings),
            folder=folder,
            data=tmp_path,
            training=None,
            device="cpu",
            exclusive=False,
            fingerprint={},
        )
        return make_features(job), folder

    return run


# -- CLIP ---------------------------------------------------------------------------------------


@pytest.mark.contract
def test_clip_outputs_equal_open_clips_own_calls(fetch, clip_weights, dataset):
    import open_clip
    from torch.nn.functional import normalize

    record, folder = fetch(MODEL | {"weights": str(clip_weights)}, CLIP)
    assert record.sha256 == sha256_file(clip_weights)
    extractor = load_extractor(folder, dataset)
    labels = torch.tensor([2, 0, 1])
    outputs = extractor.extract(images(), labels)
    assert set(outputs) == {"features", "text_similarity", "prefixed_similarity"}
    assert set(extractor.extract(images())) == {"features"}
    tokens = open_clip.get_tokenizer(MODEL["model"])
    with torch.no_grad():
        image = normalize(extractor.network.encode_image(extractor.inputs(images())))
        torch.testing.assert_close(outputs["features"], image)
        for output, prefix in (("text_similarity", ""), ("prefixed_similarity", openclip.PREFIX)):
            text = tokens([f"{prefix}a photo of a {name}" for name in NAMES])
            text = normalize(extractor.network.encode_text(text))[labels]
            torch.testing.assert_close(outputs[output], (image * text).sum(dim=1))
    assert extractor.pretraining == ("clip-openai",)
    assert extractor.details == {
        **{"model": MODEL["model"], "pretrained": "openai", "caption": "a photo of a {}"},
        **{"truncated_captions": "0 of 3", "truncated_after_prefix": "0 of 3"},
    }


def test_clip_compares_images_with_prompts_or_with_nothing(fetch, clip_weights, dataset):
    _, folder = fetch(MODEL | {"weights": str(clip_weights)})
    images_only = Dataset("x", dataset.train, dataset.train, ("0", "1"), "")  # numbered classes
    extractor = load_extractor(folder, images_only)
    assert set(extractor.extract(images(), torch.zeros(3, dtype=torch.int64))) == {"features"}
    texts = Prompts(("a red square", "a blue sea"), "")
    prompted = Dataset("x", dataset.train, dataset.train, (), "", None, texts, texts)
    extractor = load_extractor(folder, prompted)
    assert extractor.details["caption"] == "the prompt"
    assert list(extractor.captions) == list(texts.texts)


def test_captions_longer_than_the_context_are_counted():
    import open_clip

    extractor = OpenCLIPExtractor("x", parse_settings(MODEL))
    extractor.captions = ["short", "word " * 72, "word " * 75, "word " * 76]
    extractor.tokenizer = open_clip.get_tokenizer(MODEL["model"])
    assert extractor.truncated() == 1 and extractor.truncated(openclip.PREFIX) == 2
    # A cut caption keeps the token that ends it, at which CLIP reads the embedding.
    long, whole = extractor.tokenizer(["word " * 300, "word " * 75])
    assert torch.equal(long, whole) and len(long) == 77 and int(long[-1]) == 49407


def test_images_are_resized_and_normalised_as_in_open_clip():
    from open_clip.transform import image_transform
    from PIL import Image

    extractor = OpenCLIPExtractor("x", parse_settings(MODEL))
    extractor.network = tiny_clip()
    pixels = images(1, size=40)
    expected = image_transform(16, is_train=False, interpolation="bicubic")
    difference = extractor.inputs(pixels)[0] - expected(
        Image.fromarray(pixels[0].movedim(0, -1).numpy())
    )
    assert difference.abs().max() < 1.01 / 255 / 0.26  # one level of 8 bits


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_half_precision_state_dicts_are_read_and_other_files_are_refused(clip_weights, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(clip_weights)
    path = tmp_path / "clip.pt"
    half = {key: value.half() for key, value in weights.items()}
    torch.save({"state_dict": half}, path)
    extractor = OpenCLIPExtractor("x", parse_settings(MODEL))
    network = extractor.load_network(path)
    parallel = {f"module.{key}": value for key, value in half.items()}  # on several GPUs
    torch.save({"state_dict": parallel, "epoch": 3, "optimizer": {}}, tmp_path / "parallel.pt")
    again = extractor.load_network(tmp_path / "parallel.pt").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in network.state_dict().items())
    assert network.visual.proj.dtype == torch.float32
    torch.testing.assert_close(network.visual.proj.data, weights["visual.proj"], atol=1e-3, rtol=0)
    missing = tmp_path / "missing.safetensors"
    save_file({k: v for k, v in weights.items() if k != "visual.proj"}, missing)
    archive = tmp_path / "archive.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(archive)  # as OpenAI's own
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    (tmp_path / "empty.pt").write_bytes(b"")
    for file in (missing, archive, tmp_path / "bad.pt", tmp_path / "empty.pt"):
        with pytest.raises(UserError) as error, reading_weights(file, "open-clip"):
            extractor.load_network(file)
        assert error.value.code == "weights" and "\n" not in str(error.value)
    for file, reason in ((missing, r"visual\.proj"), (archive, "TorchScript archive")):
        with pytest.raises(UserError, match=reason), reading_weights(file, "open-clip"):
            extractor.load_network(file)


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


def test_missing_weights_are_recorded_and_not_an_error(fetch, dataset, no_hub):
    record, folder = fetch(MODEL, CLIP)
    assert record.unavailable == "no weights" and record.sha256 is None
    assert openclip.OPENAI[MODEL["model"]] in record.reason
    extractor = load_extractor(folder, dataset)
    assert extractor.unavailable == "no weights" and extractor.sha256 == "unknown"
    assert {"fd", "image-text", "text_similarity"} <= extractor.provided


def test_openai_weights_come_from_the_hub(fetch, clip_weights, dataset, monkeypatch):
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(clip_weights)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    record, folder = fetch(MODEL, CLIP)
    assert asked == [("timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")]
    assert record.sha256 == sha256_file(clip_weights)
    assert load_extractor(folder, dataset).extract(images())["features"].shape == (3, 16)


def test_own_weights_with_another_hash_are_an_error(fetch, clip_weights):
    with pytest.raises(UserError, match=r"has sha256 .*, expected 0000"):
        fetch(MODEL | {"weights": str(clip_weights), "sha256": "0" * 64})


# -- aesthetic heads ----------------------------------------------------------------------------

RATINGS = {
    "v1": (-2.458, -0.138, 1.895, 3.585, 5.100, 6.470, 7.787, 9.048, 10.226, 11.304),
    "v2": (1.655, 2.359, 3.070, 3.672, 4.238, 4.701, 5.073, 5.365, 5.577, 5.747),
}


@pytest.mark.skipif(not ASSETS.is_dir(), reason=f"{ASSETS} does not exist")
@pytest.mark.parametrize("version", RATINGS)
def test_laions_heads_rate_laions_embeddings(version, monkeypatch):
    address, sha256 = aesthetic.LAION_HEADS[version]
    file = str(ASSETS / address.rsplit("/", 1)[-1])
    monkeypatch.setitem(aesthetic.LAION_HEADS, version, (file, sha256))
    folder = ASSETS / "laion_rating_embeddings"
    embeddings = np.concatenate([np.load(folder / f"rating{r}.npy") for r in range(10)])
    head = laion_head(version)
    ratings = head(torch.from_numpy(embeddings))
    np.testing.assert_allclose(ratings, RATINGS[version], atol=6e-4)
    torch.testing.assert_close(head(3 * torch.from_numpy(embeddings)), ratings)
    outputs = {"features": torch.zeros(10, 2), f"aesthetic_{version}": ratings}
    estimate = METRICS[f"aesthetic-{version}"].estimate(FeatureSet(outputs, Reference(None)))
    assert estimate.value == pytest.approx(np.mean(RATINGS[version]), abs=1e-3)


def test_missing_head_leaves_the_other_outputs(fetch, clip_weights, dataset, monkeypatch):
    torch.manual_seed(0)
    head = AestheticHead(torch.nn.Linear(16, 1)).requires_grad_(False)

    def published(version):
        if version == "v2":
            raise UserError("could not download")
        return head

    monkeypatch.setattr(openclip, "laion_head", published)
    settings = {"type": "open-clip", "model": "ViT-L-14-quickgelu", "aesthetic": ["v1", "v2"]}
    record, folder = fetch(settings | {"weights": str(clip_weights)})
    assert record.missing == {"aesthetic_v2": "no weights"} and record.unavailable is None
    extractor = load_extractor(folder, dataset)
    assert {"aesthetic_v1", "aesthetic_v2"} <= extractor.provided
    outputs = extractor.extract(images())
    assert set(outputs) == {"features", "aesthetic_v1"}
    torch.testing.assert_close(outputs["aesthetic_v1"], head(outputs["features"]))


# -- networks without texts ---------------------------------------------------------------------


@pytest.mark.contract
def test_dinov2_reads_metas_file_of_another_size(fetch, dataset, monkeypatch, tmp_path):
    import timm

    create = timm.create_model

    def small(name, **options):
        return create(name, embed_dim=32, depth=1, num_heads=2, **options)

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.setattr(DINOv2Extractor, "size", 28)
    torch.manual_seed(0)
    source = small("vit_base_patch14_dinov2", img_size=42, num_classes=0)
    path = tmp_path / "dinov2.pth"
    # Meta's file has a mask token; timm drops it.
    torch.save(source.state_dict() | {"mask_token": torch.zeros(1, 32)}, path)
    settings = {"type": "dinov2", "model": "vitb14", "weights": str(path)}
    record, folder = fetch(settings | {"sha256": sha256_file(path)})
    assert record.sha256 == sha256_file(path)
    extractor = load_extractor(folder, dataset)
    features = extractor.extract(images())["features"]
    tokens = extractor.network.forward_features(extractor.inputs(images()))
    assert features.shape == (3, 32)
    torch.testing.assert_close(features, tokens[:, 0])
    assert "imagenet-1k" in extractor.pretraining


@pytest.mark.contract
@pytest.mark.skipif(backbones._packaged(backbones.LITE0) is None, reason="Lite0 is not installed")
def test_efficientnet_lite_equals_timms_network(fetch, dataset):
    record, folder = fetch({"type": "efficientnet-lite", "model": "lite0"})
    assert record.sha256 == backbones.PACKAGED[backbones.LITE0][1]
    extractor = load_extractor(folder, dataset)
    assert extractor.alias == "timm/tf_efficientnet_lite0"
    assert extractor.pretraining == ("imagenet-1k",)
    outputs = extractor.extract(images())
    assert outputs["features"].shape == (3, 1280) and outputs["probabilities"].shape == (3, 1000)
    whole = backbones.load_weights(backbones.LITE0, backbones.weights_file(backbones.LITE0))
    with torch.no_grad():
        logits = whole(extractor.inputs(images()))
    expected = logits.softmax(dim=1)
    torch.testing.assert_close(outputs["probabilities"], expected, rtol=1e-3, atol=1e-6)


# -- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "key", "code"),
    [
        ("clip", {}, "features.clip", "name"),
        ("vit-b-32-quickgelu-x", {"pretrained": "x"}, ".weights", "missing-key"),
        (CLIP, {"weights": "https://a.b/c.pt"}, ".sha256", "missing-key"),
        (CLIP, {"weights": "none.pt"}, ".weights", "missing-file"),
        (CLIP, {"model": "ViT-B-32"}, ".model", "invalid-value"),
        (CLIP, {"aesthetic": ["v1"]}, ".aesthetic", "unsupported"),
        (CLIP, {"width": 3}, ".width", "unknown-key"),
        (CLIP, {"type": "open-clp"}, ".type", "unknown-name"),
    ],
)
def test_errors_in_a_clip_section_are_reported(tiny, name, settings, key, code):
    tiny["features"][name] = MODEL | settings
    with pytest.raises(ConfigError) as error:
        parse_experiment(tiny, "x.yaml")
    key = f"features.{name}{key}" if key.startswith(".") else key
    assert (key, code) in {(problem.key, problem.code) for problem in error.value.problems}


@pytest.mark.parametrize(
    ("kind", "width", "valid"),
    [("resnet", 4, True), ("resnet", 6, False), ("clip", 8, True), ("clip", 12, True),
     ("clip", 4, False), ("clip", 9, False), ("clip", 26, False), ("cnn", 3, True)],
)  # fmt: skip
def test_widths_that_cannot_be_built_are_refused(dataset, kind, width, valid):
    extractor = new_extractor("x", parse_settings({"type": kind, "images": 128, "width": width}))
    problems = list(extractor.check(None, True))
    assert [p.key for p in problems] == ([] if valid else ["features.x.width"])
    if valid:
        extractor.build(dataset).features(torch.zeros(1, 3, 16, 16))
    else:
        with pytest.raises((ValueError, AssertionError)):
            extractor.build(dataset).features(torch.zeros(1, 3, 16, 16))


def test_training_a_network_needs_labelled_images(tiny):
    tiny["data"] = {"name": "shapes", "image_shape": [1, 8, 8], "num_classes": 10}
    with pytest.raises(ConfigError) as error:
        parse_experiment(tiny, "x.yaml")
    problems = {problem.key: problem.code for problem in error.value.problems}
    assert problems["features.tiny-cnn"] == "needs-images"


@pytest.mark.parametrize(
    ("settings", "distance"),
    [
        ({"type": "inception"}, "fid-edm"),
        ({"type": "inception", "resize": "patch"}, "fid-patch"),
        (MODEL, "fd"),
        ({"type": "cnn", "images": 1}, "fd"),
        ({"type": "efficientnet-lite"}, "fd"),
    ],
)
def test_every_extractor_provides_one_frechet_distance(settings, distance):
    names = provides(parse_settings(settings))
    assert {n for n in names if n.startswith(("fd", "fid-"))} == {distance} and "features" in names
