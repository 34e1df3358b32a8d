"""What the project needs of its dependencies. `make test-minimum` runs all tests marked `contract`
with the lowest versions that pyproject.toml allows (constraints-minimum.txt, tests/minimum.py)."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tomllib

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import harness
import methods
from harness import OneStepPipeline
from harness.denoiser import guided
from harness.features.timm_backbones import KNOWN, Backbone
from harness.io.records import ScoreRecord
from harness.networks import build_denoiser, load_denoiser, save_denoiser
from harness.streams import seeded
from harness.validation import parse_experiment
from tests.conftest import ROOT
from tests.minimum import differences, pins, requirements
from tests.test_trainer import fit


def test_minima_are_the_bounds_of_pyproject():
    pinned = pins()
    for requirement in requirements():
        bounds = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        assert bounds == [pinned[canonicalize_name(requirement.name)]], str(requirement)


def test_installed_versions_are_compared_with_the_minima():
    pinned = pins()
    assert list(differences(pinned)) == []
    assert list(differences(pinned | {"torch": Version("2.12.0"), "idna": Version("9")})) == [
        "idna 9 is installed, not 3.20",
        "torch 2.12.0 is installed, not 2.11.0",
    ]
    for name in ("timm", "tensorboard", "triton"):  # the last only exists on some platforms
        del pinned[name]
    assert list(differences(pinned)) == [
        "tensorboard is not installed, not 2.18.0",
        "timm is not installed, not 1.0.31",
    ]


SKIPPING = """
import pytest

def test_passes(): pass
def test_needs_a_package(): pytest.importorskip("no_such_package")
@pytest.mark.skipif(True, reason="a reason")
def test_has_a_condition(): pass
@pytest.mark.xfail
def test_is_expected_to_fail(): assert False
"""


def test_skipped_tests_fail_with_minimum_versions(tmp_path):
    hooks = "from tests.minimum import pytest_make_collect_report, pytest_runtest_makereport"
    (tmp_path / "conftest.py").write_text(hooks)
    (tmp_path / "test_some.py").write_text(SKIPPING)
    (tmp_path / "test_all.py").write_text("import pytest\npytest.skip('', allow_module_level=1)")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = []
    for arguments in (["test_some.py"], ["test_all.py"]):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode, done.stdout + done.stderr
        output.append(done.stdout)
    assert "1 failed, 1 passed, 1 xfailed, 1 error" in output[0] and "1 error" in output[1]
    assert "no_such_package" in output[0] and "a reason" in output[0]


def test_extras_agree_on_bounds():
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    bounds: dict[str, set[str]] = {}
    for requirement in map(Requirement, [line for lines in optional.values() for line in lines]):
        bounds.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


@pytest.mark.contract
def test_every_module_is_imported():
    names = [
        module.name
        for package in (harness, methods)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    assert len(names) > 90
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)


SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
UNETS = {
    "UNet2DModel": {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 4,
    },
    "UNet2DConditionModel": {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 4,
    },
}


@pytest.mark.contract
@pytest.mark.parametrize("name", UNETS)
def test_diffusers_unets_compute_and_are_stored(name, tmp_path):
    generator = torch.Generator().manual_seed(0)
    text = {"embeddings": torch.randn(2, 5, 16, generator=generator)}
    null = {"embeddings": torch.zeros(1, 5, 16)}
    reads_text = name == "UNet2DConditionModel"
    with seeded(0):
        network = {"type": name, **SMALL, **UNETS[name]}
        options = (0, 0.5, 0.0, null) if reads_text else (3,)
        denoiser = build_denoiser(network, (3, 8, 8), *options).eval()
    x, sigma = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([0.5, 40.0])
    condition = text if reads_text else torch.tensor([0, 2])
    with torch.no_grad():
        images = denoiser(x, sigma, condition)
        assert images.shape == x.shape and images.isfinite().all()
        assert not torch.equal(images, guided(denoiser, 2.0)(x, sigma, condition))
        sha256 = save_denoiser(denoiser, tmp_path)
        assert torch.equal(load_denoiser(tmp_path, sha256)(x, sigma, condition), images)


@pytest.mark.contract
@pytest.mark.parametrize("name", KNOWN)
def test_backbones_of_gdd_have_maps_with_gradients(name):
    timm = pytest.importorskip("timm")
    with seeded(0):
        backbone = Backbone(name, timm.create_model(name, pretrained=False))
    backbone.set_input_size(64)
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    maps = backbone(x)
    assert [tuple(m.shape) for m in maps] == [
        (1, channels, 64 // stride, 64 // stride)
        for channels, stride in zip(backbone.map_channels, (4, 8, 16, 32), strict=True)
    ]
    (gradient,) = torch.autograd.grad(sum(m.square().mean() for m in maps), x)
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.contract
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_loggers_write_files(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(tmp_path / "run", loggers=["csv", name])
    pattern = {"tensorboard": "events.out.tfevents.*", "wandb": "*.wandb"}[name]
    assert list((tmp_path / "run").rglob(pattern))  # wandb's own process fills it later


@pytest.mark.slow
@pytest.mark.contract
def test_one_student_passes_through_every_stage(empty_workspace, tiny):
    workspace = empty_workspace
    tiny["students"] = {"dmd": tiny["students"]["dmd"]}
    for name in ("tiny-cnn", "tiny-clip"):
        tiny["features"][name]["images"] = 256
    tiny["features"].pop("tiny-critic")
    tiny["teachers"]["edm"]["images"] = 128
    tiny["training"]["budget"] = [{"unit": "images", "amount": 32}]
    tiny["evaluation"] |= {"num_samples": 360, "sampling_seeds": [0]}
    workspace.write_config(tiny)
    plan = workspace.run("snakemake", "-n", "all", "--configfile", "configs/tiny.yaml")
    assert plan.returncode == 0 and "score_references" in plan.stdout, plan.stdout + plan.stderr
    pairs = next(iter(parse_experiment(tiny, "tiny.yaml").pair_sets))
    for arguments in (
        ["data"],
        ["features", "tiny-cnn"],
        ["features", "tiny-clip"],
        ["teacher", "edm"],
        ["pairs", pairs],
        ["train", "dmd", "0"],
        ["score", "dmd", "0"],
        ["score-references", "edm"],
        ["agreement"],
        ["report"],
        ["export", "dmd", "0", "exported"],
    ):
        done = workspace.stage(*arguments)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
    scores = ScoreRecord.read(workspace.results / "scores" / "dmd" / "seed0.json")
    rows = next(entry for entry in scores.entries if entry.final).rows
    assert {row.extractor for row in rows} == {"tiny-cnn", "tiny-clip"}
    assert {"fd", "kd", "recall", "accuracy"} <= {row.metric for row in rows}
    assert all(row.status is None for row in rows)
    agreement = (workspace.results / "tables" / "agreement.csv").read_text()
    assert {"torch-fidelity", "clean-fid"} <= set(re.findall("torch-fidelity|clean-fid", agreement))
    assert ",no\n" not in agreement
    assert (workspace.results / "report.html").stat().st_size > 100_000
    pipeline = OneStepPipeline.from_pretrained(workspace.root / "exported")
    assert len(pipeline(class_labels=[3, 7]).images) == 2
