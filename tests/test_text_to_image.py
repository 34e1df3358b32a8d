"""A text-to-image pipeline of diffusers as a teacher, through all stages, and back as a pipeline."""

import json

import numpy as np
import pytest
from PIL import Image

from harness import cli
from harness.artifacts import read_json
from tests import pipelines

COLOURS = ("red", "green", "blue", "yellow")
PROMPTS = [f"a {colour} {thing}" for colour in COLOURS for thing in ("square", "sea", "sky")]
EXPERIMENT = """
name: pictures
device: cpu
data: {name: pictures, source: images, prompts: prompts.txt, held_out: 0.25}
features:
  lite0: {type: efficientnet-lite, model: lite0}
  lite1: {type: efficientnet-lite, model: lite1}
teachers:
  sd:
    source: sd
    sampler: {steps: 2, sigma_min: 0.03, sigma_max: 14.6, guidance: 2.0}
students:
  dmd:
    method: dmd
    settings: {regression: l2, pairs: 12, pair_steps: 2, warmup_steps: 0, teacher_guidance: 2.0}
  sid: {method: sid, settings: {fake_guidance: 1.5, fake_dropout: 0.2}}
  gdd-i: {method: gdd, freeze: innate, settings: {backbones: [tf_efficientnet_lite0], resolution: 64}}
training:
  seeds: [0]
  budget: [{unit: images, amount: 8}]
  settings: {batch: 4, lr: 1.0e-4, fake_lr: 1.0e-4, sigma_init: 2.5, dropout: 0.0, augment: 0.0}
evaluation: {num_samples: 12, sampling_seeds: [0], extractors: [lite0, lite1], grid_samples: 6, block: 8}
"""


def stage(*arguments: str) -> None:
    assert cli.main([*arguments, "--configfile", "pictures.yaml", "--threads", "1"]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder where every stage has run."""
    root = tmp_path_factory.mktemp("pictures")
    pipelines.stable_diffusion().save_pretrained(root / "sd")
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
        stage("data")
        for name in ("lite0", "lite1"):
            stage("features", name)
        stage("teacher", "sd")
        stage("pairs", "sd_n12_steps2")
        for student in ("dmd", "sid", "gdd-i"):
            stage("train", student, "0")
            stage("score", student, "0")
        stage("score-references", "sd")
        stage("report")
    return root


def test_a_whole_experiment_on_a_pipeline(made):
    results = made / "results" / "pictures"
    print(sorted(p.name for p in results.iterdir()))
    record = read_json(results / "teachers" / "sd" / "teacher.json")
    assert record["imported"]["pipeline"] == "StableDiffusionPipeline"
