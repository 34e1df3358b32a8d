"""A diffusers text-to-image pipeline as a teacher, through all stages, and its exported students."""

import json
import shutil

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from harness import cli
from harness.denoiser import one_step, to_pixels
from harness.evaluation.accumulator import FeatureAccumulator
from harness.evaluation.scorer import Scorer
from harness.features.base import load_extractor
from harness.io.artifacts import load_tensors, read_json
from harness.networks import load_codec, load_denoiser
from harness.reporting.compare import by_prompt, paired
from harness.sampling import noise_and_labels
from harness.teachers.text_embeddings import load_embeddings
from harness.validation import load_experiment
from tests import pipelines
from tests.test_pretrained_extractors import CLIP, tiny_clip

COLOURS = ("red", "green", "blue", "yellow")
PROMPTS = [f"a {colour} {thing}" for colour in COLOURS for thing in ("square", "sea", "sky")]
EXPERIMENT = """
name: pictures
device: cpu
data: {name: pictures, source: images, prompts: prompts.txt, held_out: 0.25}
features:
  lite0: {type: efficientnet-lite, model: lite0}
  vit-b-32-quickgelu-openai: {type: open-clip, model: ViT-B-32-quickgelu, weights: clip.safetensors}
teachers:
  sd:
    source: sd
    sampler: {steps: 2, sigma_min: 0.03, sigma_max: 14.6, guidance: 2.0}
students:
  dmd:
    method: dmd
    settings: {regression: l2, pairs: 12, pair_steps: 2, warmup_steps: 0, teacher_guidance: 2.0}
  sid: {method: sid, lora: {rank: 2}, settings: {fake_guidance: 1.5, fake_dropout: 0.2}}
  gdd-i: {method: gdd, freeze: innate, settings: {discriminator: compact, backbones: [tf_efficientnet_lite0], resolution: 64}}
training:
  seeds: [0]
  budget: [{unit: images, amount: 8}]
  gradient_checkpointing: true
  settings: {batch: 4, lr: 1.0e-4, fake_lr: 1.0e-4, sigma_init: 2.5, dropout: 0.0, generator_dropout: 0.0, augment: 0.0}
evaluation: {num_samples: 12, sampling_seeds: [0], extractors: [lite0, vit-b-32-quickgelu-openai], grid_samples: 6, block: 8}
"""


def stage(*arguments: str) -> None:
    assert cli.main([*arguments, "--configfile", "pictures.yaml"]) == 0


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder in which every stage has run."""
    root = tmp_path_factory.mktemp("pictures")
    pipelines.stable_diffusion().save_pretrained(root / "sd")
    # With a byte-order mark.
    (root / "sd" / "README.md").write_text("\ufeff---\nlicense: openrail\n---\n")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (root / "images").mkdir()
    random, labels = np.random.default_rng(0), []
    for i in range(40):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i:03d}.png")
        labels.append([f"{i:03d}.png", i % len(PROMPTS)])
    (root / "images" / "dataset.json").write_text(json.dumps({"labels": labels}))
    (root / "pictures.yaml").write_text(EXPERIMENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        # A tiny CLIP instead of the published weights.
        patch.setattr(open_clip, "create_model", tiny_clip)
        torch.manual_seed(0)
        save_file(tiny_clip().state_dict(), "clip.safetensors")
        stage("data")
        for name in ("lite0", CLIP):
            stage("features", name)
        stage("teacher", "sd")
        stage("pairs", "sd_n12_steps2")
        for student in ("dmd", "sid", "gdd-i"):
            stage("train", student, "0")
            stage("score", student, "0")
        stage("score-references", "sd")
        stage("report")
        yield root


def test_imported_teacher_matches_the_pipeline(project):
    folder = project / "results" / "pictures" / "teachers" / "sd"
    record = read_json(folder / "teacher.json")
    assert record["imported"]["pipeline"] == "StableDiffusionPipeline"
    assert "evaluation_text" not in record and record["text"]["file"].startswith("text/")
    pipe = StableDiffusionPipeline.from_pretrained(project / "sd", safety_checker=None)
    codec, embeddings = load_codec(folder), load_embeddings(folder)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        assert torch.equal(codec(latents), expected)
        text, _ = pipe.encode_prompt(PROMPTS[3], "cpu", 1, False)
    stored = embeddings(torch.tensor([3]))["embeddings"].float()
    torch.testing.assert_close(stored, text, rtol=2e-3, atol=2e-3)


def expected_pixels(project, student: str, count: int) -> torch.Tensor:
    """The student's images, computed from its weights, the teacher's decoder and the prompts."""
    results = project / "results" / "pictures"
    run, teacher = results / "students" / student / "seed0", results / "teachers" / "sd"
    network = load_denoiser(run / "model", read_json(run / "student.json")["sha256"])
    z, labels = noise_and_labels(torch.arange(8), (4, 8, 8), len(PROMPTS), seed=0)
    with torch.no_grad():
        latents = one_step(network, z, load_embeddings(teacher)(labels), 2.5)
        return to_pixels(load_codec(teacher)(latents))[:count]


@pytest.mark.parametrize("student", ["dmd", "sid", "gdd-i"])
def test_stored_samples_are_decoded_images_of_the_prompts(project, student):
    path = project / "results" / "pictures" / "scores" / student / "seed0.json"
    record = read_json(path)["samples"]
    kept = load_tensors(path.with_name(record["file"]), record["sha256"])
    assert kept["pixels"].shape == (6, 3, 16, 16)
    _, labels = noise_and_labels(torch.arange(6), (4, 8, 8), len(PROMPTS), seed=0)
    assert torch.equal(kept["labels"], labels)
    expected = expected_pixels(project, student, 6)
    assert (kept["pixels"].int() - expected.int()).abs().max() <= 1
    rows = read_json(path)["entries"][-1]["rows"]
    assert {row["metric"] for row in rows} >= {"fd", "class-score", "diversity"}
    assert all("value" in row for row in rows)


def test_text_similarity_uses_the_image_s_own_prompt(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    experiment = load_experiment(project / "pictures.yaml")
    scorer = Scorer(experiment.scoring())
    extractor = load_extractor(experiment.paths.features(CLIP), scorer.dataset)
    file = project / "results" / "pictures" / "scores" / "dmd" / "seed0.prompts.csv"
    each = pd.read_csv(file)
    assert len(each) == 12 and sorted(each.prompt) == list(range(12))  # every prompt once
    pixels = expected_pixels(project, "dmd", 8)
    tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")([PROMPTS[i] for i in each.prompt[:8]])
    network = extractor.network
    with torch.no_grad():
        text = normalize(network.encode_text(tokens))
        image = normalize(network.encode_image(extractor.inputs(pixels)))
    found = torch.tensor(each[f"{CLIP}/text_similarity"][:8].to_numpy()).float()
    torch.testing.assert_close(found, (image * text).sum(dim=1), rtol=1e-2, atol=2e-3)
    rows = read_json(file.with_name("seed0.json"))["entries"][-1]["rows"]
    value = next(r["value"] for r in rows if r["metric"] == "clip-score-100-plain")
    mean = 100 * each[f"{CLIP}/text_similarity"].clip(lower=0).mean()
    assert value == pytest.approx(mean, rel=1e-4)
    protocols = read_json(file.with_name("seed0.json"))["protocols"].values()
    assert {p["caption"] for p in protocols if "caption" in p} == {"the prompt"}
    stage("prompts", "dmd", "sid")
    output = capsys.readouterr().out
    assert f"{CLIP}/text_similarity" in output and "prompts with the largest lead of sid" in output


def test_paired_interval_equals_the_paired_t_test():
    from scipy.stats import ttest_rel

    random = np.random.default_rng(0)
    keys = {"sample_seed": 0, "image": range(40), "prompt": [i % 10 for i in range(40)]}
    a, b = (pd.DataFrame(keys | {"x/y": random.normal(m, 1, 40)}) for m in (0.5, 0.0))
    row = paired(a, b.sample(frac=1, random_state=1)).iloc[0]
    test = ttest_rel(a["x/y"], b["x/y"]).confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx((test.low, test.high))
    order = by_prompt(a, b, "x/y")
    assert order.loc[3] == pytest.approx((a["x/y"] - b["x/y"])[3::10].mean())
    assert order.is_monotonic_decreasing and len(order) == 10


def test_table_and_page_show_prompts(project):
    results = project / "results" / "pictures"
    table = (results / "tables" / "comparison.md").read_text()
    assert all(f"| {name}" in table for name in ("teacher", "floor", "dmd", "sid", "gdd-i"))
    assert "a red square" in (results / "report.html").read_text()
    record = read_json(results / "students" / "sid" / "seed0" / "student.json")
    assert record["lora"]["rank"] == 2 and record["frozen_fraction"] > 0.8


@pytest.mark.parametrize("student", ["dmd", "sid"])
def test_exported_student_is_a_stock_pipeline(project, student, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    folder = tmp_path / student
    stage("export", student, "0", str(folder))
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is StableDiffusionPipeline
    pipe.set_progress_bar_config(disable=True)
    z, labels = noise_and_labels(torch.arange(3), (4, 8, 8), len(PROMPTS), seed=0)
    texts = [PROMPTS[i] for i in labels]
    options = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "pt"}
    images = pipe(texts, latents=z.clone(), **options).images
    expected = expected_pixels(project, student, 3)
    # Stored embeddings are float16.
    assert (to_pixels(2 * images - 1).int() - expected.int()).abs().max() <= 1
    head = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert head["pipeline_tag"] == "text-to-image" and head["license"] == "openrail"
    assert "base_model" not in head  # a local folder has no id on the hub
    assert not any(path.suffix in (".bin", ".pkl", ".py", ".ckpt") for path in folder.rglob("*"))


def test_export_rejects_a_changed_pipeline(project, tmp_path, monkeypatch, capsys):
    shutil.copytree(project, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    pipelines.stable_diffusion(seed=1).save_pretrained("sd")
    arguments = ["export", "dmd", "0", "out", "--configfile", "pictures.yaml"]
    assert cli.main(arguments) == 2 and not (tmp_path / "copy" / "out").exists()
    assert "sd is not the pipeline that teacher sd was imported from" in capsys.readouterr().err


def test_interrupted_scoring_resumes(project, tmp_path, monkeypatch):
    """Interrupted after its third block: these blocks are not processed again."""
    shutil.copytree(project, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    raw = yaml.safe_load((project / "pictures.yaml").read_text())
    raw["training"]["checkpoint_seconds"] = 0
    raw["evaluation"] |= {"block": 4, "num_samples": 22}
    (tmp_path / "copy" / "pictures.yaml").write_text(yaml.safe_dump(raw))
    path = tmp_path / "copy" / "results" / "pictures" / "scores" / "dmd" / "seed0.json"
    stage("score", "dmd", "0")
    whole = read_json(path)
    samples = path.with_name(whole["samples"]["file"]).read_bytes()
    complete, calls = FeatureAccumulator.complete, []

    def broken(self, block):
        calls.append(len(block.pixels))
        if len(calls) == 4:
            raise KeyboardInterrupt
        complete(self, block)

    monkeypatch.setattr(FeatureAccumulator, "complete", broken)
    path.unlink()
    assert cli.main(["score", "dmd", "0", "--configfile", "pictures.yaml"]) == 130
    parts = path.with_suffix(".parts")
    assert len(list(parts.glob("*/shard-*.safetensors"))) == 3
    calls.clear()

    def counted(self, block):
        calls.append(len(block.pixels))
        complete(self, block)

    monkeypatch.setattr(FeatureAccumulator, "complete", counted)
    stage("score", "dmd", "0")
    assert calls == [4, 4, 2] and not parts.exists()
    again = read_json(path)
    assert json.dumps(again["entries"]) == json.dumps(whole["entries"])  # there are NaNs
    assert path.with_name(again["samples"]["file"]).read_bytes() == samples


def copied(project, folder, monkeypatch, **data) -> None:
    """Work on in a copy of the folder, with other keys of `data`."""
    shutil.copytree(project, folder, symlinks=True)
    monkeypatch.chdir(folder)
    raw = yaml.safe_load((project / "pictures.yaml").read_text())
    raw["data"] |= data
    (folder / "pictures.yaml").write_text(yaml.safe_dump(raw))


def test_other_prompts_change_the_pairs(project, tmp_path, monkeypatch):
    copied(project, tmp_path / "copy", monkeypatch)
    (tmp_path / "copy" / "prompts.txt").write_text("\n".join(["a grey wall", *PROMPTS[1:]]) + "\n")
    path = tmp_path / "copy" / "results" / "pictures" / "pairs" / "sd_n12_steps2" / "pairs.json"
    before = read_json(path)
    stage("pairs", "sd_n12_steps2")
    assert read_json(path) == before
    for arguments in (["data"], ["teacher", "sd"], ["pairs", "sd_n12_steps2"]):
        stage(*arguments)
    after = read_json(path)
    assert after["run_id"] != before["run_id"] and after["sha256"] != before["sha256"]


def test_other_evaluation_prompts_retrain_nothing(project, tmp_path, monkeypatch):
    (tmp_path / "others.txt").write_text("\n".join([*PROMPTS[::-1], "a grey wall"]) + "\n")
    others = str(tmp_path / "others.txt")
    copied(project, tmp_path / "copy", monkeypatch, evaluation_prompts=others)
    results = tmp_path / "copy" / "results" / "pictures"
    before = read_json(results / "students" / "sid" / "seed0" / "student.json")
    for arguments in (["data"], ["teacher", "sd"], ["train", "sid", "0"], ["score", "sid", "0"]):
        stage(*arguments)
    after = read_json(results / "students" / "sid" / "seed0" / "student.json")
    assert (after["run_id"], after["sha256"]) == (before["run_id"], before["sha256"])
    scores = read_json(results / "scores" / "sid" / "seed0.json")
    old = read_json(project / "results" / "pictures" / "scores" / "sid" / "seed0.json")
    assert not set(scores["protocols"]) & set(old["protocols"])  # never in one column
    # Labels of real images are lines of the training prompts: they do not describe the images.
    stage("score-references", "sd")
    record = read_json(results / "scores" / "teachers" / "sd.json")["entries"]
    rows = {entry["student"]: {row["metric"] for row in entry["rows"]} for entry in record}
    assert "clip-score-100-plain" in rows["teacher"] and "fd" in rows["floor"]
    assert "clip-score-100-plain" not in rows["floor"]


def test_invalid_experiments_are_one_line_errors(project, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(project)

    def error(change) -> str:
        raw = yaml.safe_load((project / "pictures.yaml").read_text())
        change(raw)
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(raw))
        assert cli.main(["teacher", "sd", "--configfile", str(tmp_path / "wrong.yaml")]) == 2
        return capsys.readouterr().err

    def sampler(raw):
        raw["teachers"]["sd"]["sampler"]["sigma_max"] = 80.0

    def no_prompts(raw):
        del raw["data"]["prompts"]

    def larger(raw):
        raw["data"] = {"name": "none", "prompts": "prompts.txt", "image_shape": [3, 64, 64]}
        raw["students"] = {"sid": raw["students"]["sid"]}
        raw["name"] = "larger"
        raw["evaluation"]["main_metric"] = "class-score"

    def unlabelled(raw):
        raw["data"]["labels"] = False

    assert "sigma_max: 80 exceeds the pipeline's largest noise level, 14.61" in error(sampler)
    assert "a text-to-image pipeline needs data.prompts" in error(no_prompts)
    assert "students.gdd-i" in error(unlabelled)
    wrong = error(larger)
    assert "data.json" in wrong  # not prepared yet
    load_experiment(tmp_path / "wrong.yaml")
    assert cli.main(["data", "--configfile", str(tmp_path / "wrong.yaml")]) == 0
    assert "teacher sd generates 3x16x16 images, but the data has 3x64x64 images" in error(larger)
