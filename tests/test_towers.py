"""CLIP, DINOv2 and EfficientNet-Lite: their plumbing on small stand-in weights, real heads on real
embeddings. The published weights are not here, so no number of theirs is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from harness.evaluation.extractors import load_extractor
from harness.evaluation.score import Scorer

from harness.cli import main
from harness.errors import UserError
from harness.evaluation.feature_set import FeatureSet, Reference
from harness.evaluation.registry import METRICS
from harness.features import aesthetic, towers
from harness.features import timm_backbones as backbones
from harness.features.aesthetic import LaionHead
from harness.io.artifacts import sha256_file
from harness.validation import parse_experiment
from tests.conftest import ROOT

ASSETS = ROOT.parent / "shared" / "assets"
NOWHERE = "http://127.0.0.1:9/"
CLIP = "vit-b-32-quickgelu-openai"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit's of itself


def images(n: int = 3, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, 16, 16), generator=generator).to(torch.uint8)


def tiny_clip(*_, **__):
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16)
    return CLIP(16, vision, CLIPTextCfg(context_length=77, width=32, heads=2, layers=1), True)


@pytest.fixture
def clip_weights(monkeypatch, tmp_path) -> Path:
    """A tiny CLIP in the place of open_clip's, and a file of its weights."""
    import open_clip
    from safetensors.torch import save_file

    monkeypatch.setattr(open_clip, "create_model", tiny_clip)
    torch.manual_seed(0)
    save_file(tiny_clip().state_dict(), tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


@pytest.fixture
def experiment(tiny, tmp_path, monkeypatch):
    """A function that runs the stages before scoring for an experiment with another extractor."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path / "cache"))

    def make(name: str, section: dict):
        tiny["features"] = {name: section, "lite0": {"type": "efficientnet-lite"}}
        tiny["features"]["tiny-critic"] = {"type": "resnet", "images": 1280}
        tiny["evaluation"] |= {"extractors": [name, "lite0"], "main_metric": "fd"}
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
        made = parse_experiment(tiny, "x.yaml")
        for stage in (["data"], ["features", name]):
            assert main([*stage, "--configfile", "x.yaml"]) == 0
        made.evaluation = made.evaluation.model_copy(update={"extractors": [name]})
        return made

    return make


# -- CLIP ---------------------------------------------------------------------------------------


def test_clip_is_scored_with_its_captions(experiment, clip_weights):
    section = {"type": "open-clip", "model": "ViT-B-32-quickgelu", "weights": str(clip_weights)}
    scorer = Scorer(experiment(CLIP, section))
    held = scorer.dataset.held_out
    blocks = iter([(held.pixels, held.labels)])
    rows = {r["metric"]: r for r in scorer.score(blocks, [359], (), ["clip-openai"])}
    assert {"fd", "kd", "cmmd", "clip-score-100-plain", "clip-score-2.5-depicts"} <= set(rows)
    assert not {"clip-score", "aesthetic", "aesthetic-v1", "accuracy"} & set(rows)
    protocol = scorer.protocols[rows["clip-score-100-plain"]["protocol"]]
    assert protocol["extractor_sha256"] == {"weights": sha256_file(clip_weights)}
    assert protocol["model"] == "ViT-B-32-quickgelu" and protocol["pretrained"] == "openai"
    assert protocol["truncated_captions"] == protocol["truncated_after_prefix"] == "0 of 10"
    assert protocol["settings"] == {"scale": "100 max(cos, 0)", "prefix": "none"}
    assert {row["flag"] for row in rows.values()} == {"shares-pretraining"}

    # The value, from open_clip's own calls.
    import open_clip

    tower = scorer.extractors[0].network
    tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    x = tower.inputs(held.pixels)
    with torch.no_grad():
        image = torch.nn.functional.normalize(tower.network.encode_image(x))
        for metric, prefix, scale in (("100-plain", "", 100), ("2.5-depicts", towers.PREFIX, 2.5)):
            text = [f"{prefix}a photo of a {name}" for name in scorer.dataset.class_names]
            text = torch.nn.functional.normalize(tower.network.encode_text(tokens(text)))
            cosine = (image * text[held.labels]).sum(dim=1).clamp_min(0)
            expected = scale * cosine.mean().item()
            assert rows[f"clip-score-{metric}"]["value"] == pytest.approx(expected, rel=1e-4)


def test_captions_too_long_are_counted(clip_weights):
    import open_clip

    captions = ["short", "word " * 72, "word " * 75, "word " * 76]
    tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    tower = towers.ClipTower(tiny_clip(), captions, tokenizer, {})
    assert tower.truncated() == 1 and tower.truncated(towers.PREFIX) == 2  # of three words


def test_images_are_resized_and_normalised_as_open_clip_does(clip_weights):
    from open_clip.transform import image_transform
    from PIL import Image

    tower = towers.ClipTower(tiny_clip(), [], None, {})
    pixels = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    theirs = image_transform(16, is_train=False, interpolation="bicubic")
    picture = Image.fromarray(pixels[0].movedim(0, -1).numpy())
    difference = tower.inputs(pixels)[0] - theirs(picture)
    assert difference.abs().max() < 1.01 / 255 / 0.26  # a level of 8 bits


def test_openais_archive_and_state_dicts_are_read(clip_weights, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(clip_weights)
    torch.save({"state_dict": weights}, tmp_path / "clip.pt")
    read = towers.read_weights(tmp_path / "clip.pt")
    assert all(torch.equal(read[key], weights[key]) for key in weights)
    network = tiny_clip()
    half = {k: v.half() for k, v in weights.items()} | {"context_length": torch.tensor(77)}
    towers.fill(network, half, clip_weights, towers.NO_WEIGHTS)
    assert network.visual.proj.dtype == torch.float32
    del half["visual.proj"]
    with pytest.raises(UserError, match=r"another network.*visual\.proj"):
        towers.fill(network, half, clip_weights, towers.NO_WEIGHTS)
    for content in (b"no weights", b""):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.pt holds no weights: it is damaged or"):
            towers.read_weights(tmp_path / "bad.pt")


def test_missing_clip_weights_give_cells_that_say_so(experiment, monkeypatch, capsys):
    monkeypatch.setattr(towers, "OPENAI_ADDRESS", NOWHERE)
    made = experiment(CLIP, {"type": "open-clip", "model": "ViT-B-32-quickgelu"})
    assert f"{CLIP} is unavailable: {NOWHERE}40d36571" in capsys.readouterr().err
    scorer = Scorer(made)
    held = scorer.dataset.held_out
    rows = scorer.score(iter([(held.pixels, held.labels)]), [359])
    assert {"cmmd", "fd", "clip-score-100-plain"} <= {row["metric"] for row in rows}
    assert all(row["value"] is None for row in rows)
    assert {row["status"] for row in rows} == {"unavailable (no weights)"}


def test_weights_of_another_hash_are_refused(experiment, clip_weights, capsys):
    section = {"type": "open-clip", "model": "ViT-B-32-quickgelu", "weights": str(clip_weights)}
    made = experiment(CLIP, section | {"sha256": "0" * 64})
    record = json.loads((made.features_dir(CLIP) / "features.json").read_text())
    assert record["unavailable"] == "no weights" and "has sha256" in record["why"]


# -- aesthetic heads ----------------------------------------------------------------------------

RATINGS = {
    "v1": (-2.458, -0.138, 1.895, 3.585, 5.100, 6.470, 7.787, 9.048, 10.226, 11.304),
    "v2": (1.655, 2.359, 3.070, 3.672, 4.238, 4.701, 5.073, 5.365, 5.577, 5.747),
}


@pytest.mark.skipif(not ASSETS.is_dir(), reason=f"{ASSETS} is not there")
@pytest.mark.parametrize("version", RATINGS)
def test_laions_heads_rate_laions_embeddings(version, monkeypatch):
    address, sha256 = aesthetic.LAION_HEADS[version]
    file = str(ASSETS / address.rsplit("/", 1)[-1])
    monkeypatch.setitem(aesthetic.LAION_HEADS, version, (file, sha256))
    folder = ASSETS / "laion_rating_embeddings"
    embeddings = np.concatenate([np.load(folder / f"rating{r}.npy") for r in range(10)])
    head = LaionHead.published(version)
    ratings = head(torch.from_numpy(embeddings))
    np.testing.assert_allclose(ratings, RATINGS[version], atol=6e-4)
    torch.testing.assert_close(head(3 * torch.from_numpy(embeddings)), ratings)
    features = FeatureSet({f"aesthetic_{version}": ratings}, Reference(None))
    value = METRICS[f"aesthetic-{version}"].estimate(features).value
    assert value == pytest.approx(np.mean(RATINGS[version]), abs=1e-3)


def test_a_missing_head_leaves_the_rest_of_clip(experiment, clip_weights, monkeypatch):
    torch.manual_seed(0)
    head = LaionHead({"weight": torch.randn(1, 16), "bias": torch.zeros(1)})

    def published(version):
        if version == "v2":
            raise UserError("not to be had")
        return head

    monkeypatch.setattr(LaionHead, "published", published)
    section = {"type": "open-clip", "model": "ViT-L-14-quickgelu", "weights": str(clip_weights)}
    scorer = Scorer(experiment("vit-l-14-quickgelu-openai", section | {"aesthetic": ["v1", "v2"]}))
    held = scorer.dataset.held_out
    rows = {r["metric"]: r for r in scorer.score(iter([(held.pixels, held.labels)]), [359])}
    assert rows["aesthetic-v2"]["status"] == "unavailable (no weights)"
    assert rows["aesthetic-v2"]["value"] is None
    assert rows["aesthetic-v1"]["value"] is not None and "status" not in rows["aesthetic-v1"]
    assert rows["fd"]["value"] is not None


# -- networks of images alone -------------------------------------------------------------------


def test_dinov2_reads_metas_file_for_another_size(experiment, monkeypatch, tmp_path):
    import timm
    from timm.models.vision_transformer import VisionTransformer

    def small(*_, img_size=28, **__):
        sizes = {"patch_size": 14, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
        network = VisionTransformer(img_size=img_size, init_values=1.0, **sizes)
        network.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
        return network

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.setattr(towers.Dino, "SIZE", 28)
    torch.manual_seed(0)
    theirs = small(img_size=42)
    path = tmp_path / "dinov2.pth"
    torch.save(theirs.state_dict() | {"mask_token": torch.zeros(1, 32)}, path)
    section = {"type": "dinov2", "model": "vitb14", "weights": str(path)}
    made = experiment("dinov2", section | {"sha256": sha256_file(path)})
    extractor = load_extractor(made, "dinov2", Scorer(made).dataset)
    features = extractor.see(images(), torch.zeros(3, dtype=torch.int64))["features"]
    assert features.shape == (3, 32)
    held = Scorer(made).dataset.held_out
    blocks = iter([(held.pixels[:10], held.labels[:10])])
    rows = Scorer(made).score(blocks, [10], pretraining=["imagenet-1k"])
    assert {row["flag"] for row in rows} == {"shares-pretraining"}
    own = extractor.network
    tokens = own.network.forward_features(own.inputs(images()))
    torch.testing.assert_close(features, tokens[:, 0])
    with pytest.raises(UserError, match="a download is checked by its hash"):
        experiment("dinov2", section | {"weights": "http://127.0.0.1:9/x.pth"})


@pytest.mark.skipif(backbones._packaged(backbones.LITE0) is None, reason="Lite0 is not installed")
def test_efficientnet_lite_scores_and_is_known_from_a_discriminator(experiment):
    made = experiment("lite", {"type": "efficientnet-lite", "model": "lite0"})
    scorer = Scorer.__new__(Scorer)  # without the reference: 1,438 images of 224 x 224
    dataset = Scorer.__init__.__globals__["datasets"].load(made.data_dir())
    extractor = load_extractor(made, "lite", dataset)
    scorer.experiment, scorer.dataset, scorer.extractors = made, dataset, [extractor]
    scorer.statistics, scorer.protocols, scorer.dimensions = None, {}, {}
    scorer.first = True
    scorer._reference = {"lite": Reference(None)}
    part = slice(0, 20)
    blocks = [(dataset.held_out.pixels[part], dataset.held_out.labels[part])]
    against = ["timm/tf_efficientnet_lite0"]
    rows = {r["metric"]: r for r in scorer.score(iter(blocks), [20], against, ["imagenet-1k"])}
    assert set(rows) == {"class-score", "diversity"}
    assert {row["flag"] for row in rows.values()} == {"trained-on-extractor"}
    seen = extractor.see(blocks[0][0], blocks[0][1])
    assert seen["features"].shape == (20, 1280) and seen["probabilities"].shape == (20, 1000)
    torch.testing.assert_close(seen["probabilities"].sum(dim=1), torch.ones(20))
    whole, _ = backbones.pretrained_network("tf_efficientnet_lite0")
    with torch.no_grad():
        logits = whole(extractor.network.inputs(blocks[0][0]))
    torch.testing.assert_close(seen["probabilities"], logits.softmax(dim=1), rtol=1e-3, atol=1e-6)
    protocol = scorer.protocols[rows["diversity"]["protocol"]]
    assert protocol["extractor_sha256"]["weights"] == backbones.PACKAGED[backbones.LITE0][1]


# -- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "section", "message"),
    [
        ("clip", {"model": "ViT-B-32-quickgelu"}, f"features.clip: call it {CLIP}"),
        (
            "vit-b-32-quickgelu-metaclip_400m",
            {"model": "ViT-B-32-quickgelu", "pretrained": "metaclip_400m"},
            "weights: missing; only OpenAI's are known",
        ),
        (CLIP, {"model": "ViT-B-32"}, f"features.{CLIP}.model: input should be"),
        (
            CLIP,
            {"model": "ViT-B-32-quickgelu", "aesthetic": ["v1"]},
            "aesthetic: the heads are for ViT-L-14-quickgelu",
        ),
        (CLIP, {"model": "ViT-B-32-quickgelu", "width": 3}, f"features.{CLIP}.width: unknown key"),
    ],
)
def test_mistakes_in_a_clip_section(tiny, name, section, message):
    tiny["features"][name] = {"type": "open-clip", **section}
    with pytest.raises(UserError, match=message):
        parse_experiment(tiny, "x.yaml")


def test_one_extractor_is_not_enough(tiny):
    tiny["evaluation"]["extractors"] = ["tiny-cnn"]
    with pytest.raises(UserError, match="extractors: name two networks or more") as caught:
        parse_experiment(tiny, "x.yaml")
    assert "1 mistake\n" in str(caught.value)
    tiny["features"]["fid"] = {"type": "inception"}
    tiny["features"]["fid-clean"] = {"type": "inception", "resize": "clean"}
    tiny["evaluation"] |= {"extractors": ["fid", "fid-clean"], "main_metric": "fid-edm"}
    with pytest.raises(UserError, match="extractors: name two networks or more"):
        parse_experiment(tiny, "x.yaml")
    tiny["evaluation"]["extractors"] += ["tiny-cnn"]
    parse_experiment(tiny, "x.yaml")
