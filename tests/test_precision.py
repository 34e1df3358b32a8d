"""`precision: fp32` is float32 on a GPU, too, unless `tf32` allows less."""

import contextlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.backends import cuda, cudnn

from harness.errors import UserError
from harness.evaluation import agreement
from harness.evaluation import stage as evaluation
from harness.evaluation.fingerprints import fingerprint
from harness.features import base as features
from harness.features.base import FEATURES, FeatureExtractor
from harness.features.classifiers import ResNet
from harness.precision import full_precision, set_precision
from harness.sampling import heun
from harness.streams import PAIR_NOISE
from harness.students import run as students
from harness.teachers import pairs, text_embeddings
from harness.teachers import stage as teachers
from harness.validation import parse_experiment
from tests.conftest import DATA, ROOT
from tests.test_denoiser import tiny_denoiser
from tests.test_scoring import score_held_out, scoring  # noqa: F401

OFF, ON = (False, False, False), (True, True, True)


def flags() -> tuple[bool, bool, bool]:
    """Whether matrix products, convolutions and recurrent layers may use TF32, by the newer flags
    of PyTorch; the older ones must agree."""
    operations = (cuda.matmul, cudnn.conv, cudnn.rnn)
    found = tuple(operation.fp32_precision == "tf32" for operation in operations)
    assert (cuda.matmul.allow_tf32, cudnn.allow_tf32) == found[:2]
    assert torch.get_float32_matmul_precision() == ("high" if found[0] else "highest")
    return found


@pytest.fixture(autouse=True)
def mode(monkeypatch):
    """Leave the process as it was. Variables of this machine do not count."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with full_precision():
        yield


@pytest.fixture
def tiny() -> dict:
    return yaml.safe_load((DATA / "tiny.yaml").read_text())


def test_tf32_is_off_unless_it_is_set():
    set_precision("cuda", tf32=True)
    assert flags() == ON
    set_precision("cuda")
    assert flags() == OFF


def test_cudnn_times_its_algorithms_only_for_static_shapes():
    for static in (True, False):
        set_precision("cuda", static_shapes=static)
        assert cudnn.benchmark is static


def test_full_precision_restores_the_mode():
    cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = False, True, True
    with contextlib.suppress(ZeroDivisionError), full_precision():
        assert flags() == OFF and not cudnn.benchmark
        _ = 1 / 0
    assert flags() == (False, True, True) and cudnn.benchmark


@pytest.mark.contract
def test_flags_replace_the_variable_of_pytorch():
    """Containers of NVIDIA set it; PyTorch reads it when it starts."""
    code = (
        "from tests.test_precision import flags, full_precision, set_precision, ON, OFF\n"
        "assert flags() == ON\n"
        "with full_precision():\n    assert flags() == OFF\n"
        "assert flags() == ON\n"
        "set_precision('cuda')\nassert flags() == OFF\n"
    )
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning:torch", "-c", code]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("value", "tf32", "device", "refused"),
    [
        ("1", False, "cuda", True),
        ("1", True, "cuda:1", True),  # feature networks would use it, too
        ("0", True, "cuda", True),
        ("0", False, "cuda", False),
        ("1", False, "cpu", False),
    ],
)
def test_variable_of_the_libraries_is_refused_where_it_changes_the_mode(
    value, tf32, device, refused, monkeypatch
):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
    if not refused:
        return set_precision(device, tf32)
    with pytest.raises(UserError) as error:
        set_precision(device, tf32)
    assert error.value.code == "environment" and "NVIDIA_TF32_OVERRIDE" in str(error.value)


STAGES = {
    "features": (features, lambda e: features.make_features(e.feature_job("tiny-cnn")), (False, True)),
    "teacher": (teachers, lambda e: teachers.make_teacher(e.teacher_job("edm")), (True, True)),
    "imported teacher": (teachers, lambda e: teachers.make_teacher(e.teacher_job("other")), (False, False)),
    "pairs": (pairs, lambda e: pairs.make_pairs(e.pair_job(next(iter(e.pair_sets)))), (True, True)),
    "train": (students, lambda e: students.train_student(e.student_run("sid", 0)), (True, True)),
    "score": (evaluation, lambda e: evaluation.score_run(e.scoring(), e.student_run("sid", 0), Path()), (True, True)),
    "score-references": (evaluation, lambda e: evaluation.score_references(e.scoring(), e.teacher_job("edm"), Path()), (True, True)),
    "score-folder": (evaluation, lambda e: evaluation.score_folder(e.scoring(), Path()), (False, False)),
    "agreement": (agreement, lambda e: agreement.write_agreement(e.scoring(), "edm", Path(), Path()), (False, False)),
}  # fmt: skip


class Started(Exception):
    """Raised by a stage instead of its work, with its numeric mode."""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tf32", [True, False])
def test_stage_sets_its_mode_before_it_computes(stage, tf32, tiny, monkeypatch):
    tiny["teachers"]["other"] = {"source": "teacher.pkl"}
    tiny["students"] = {
        name: tiny["students"][name] | {"teacher": "edm"} for name in ("dmd", "sid")
    }
    for section in (tiny["training"], tiny["evaluation"], tiny["teachers"]["edm"]):
        section["tf32"] = tf32
    module, start, (follows, static) = STAGES[stage]

    def record(device, tf32=False, static_shapes=False):
        raise Started(device, tf32, static_shapes)

    monkeypatch.setattr(module, "set_precision", record)
    with pytest.raises(Started) as mode:
        start(parse_experiment(tiny, "tiny.yaml", files=False))
    assert mode.value.args == ("cpu", tf32 and follows, static)


@pytest.mark.parametrize("name", list(FEATURES))
def test_every_feature_network_computes_in_full_precision(name):
    for method in (FEATURES[name].load, FEATURES[name].extract, FEATURES[name].start):
        assert method.__closure__ and hasattr(method, "__wrapped__"), name


def test_feature_networks_of_plugins_compute_in_full_precision():
    class Plugin(FeatureExtractor):
        make = None

        def load(self, *_):
            self.loaded = flags()

        def extract(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"features": torch.tensor(flags())}

    class Derived(Plugin):
        def extract(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            assert flags() == OFF
            return super().extract(pixels, labels) | {"more": torch.tensor(flags())}

    set_precision("cuda", tf32=True)
    extractor = Derived("plugin", None)
    extractor.load()
    outputs = extractor.extract(torch.empty(0))
    assert extractor.loaded == OFF and not any(map(torch.any, outputs.values()))
    assert flags() == ON


def test_trained_network_extracts_in_full_precision():
    extractor = FEATURES["resnet"](
        "critic", features.parse_settings({"type": "resnet", "images": 1})
    )
    extractor.network = ResNet((1, 8, 8), 10, 4).eval()
    seen = []
    for module in extractor.network.modules():
        module.register_forward_hook(lambda *_: seen.append(flags()))
    set_precision("cuda", tf32=True)
    extractor.extract(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert seen and set(seen) == {OFF} and flags() == ON


def test_scores_come_from_the_outputs_that_a_plugin_adds():
    """`start`, which scoring calls, leaves out no `extract` of a subclass."""

    class Derived(FEATURES["resnet"]):
        def extract(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return super().extract(pixels, labels) | {"mode": torch.tensor(flags())}

    extractor = Derived("critic", features.parse_settings({"type": "resnet", "images": 1}))
    extractor.network = ResNet((1, 8, 8), 10, 4).eval()
    set_precision("cuda", tf32=True)
    outputs = extractor.start(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))()
    assert outputs.keys() == {"features", "probabilities", "mode"} and not outputs["mode"].any()


def test_texts_are_encoded_in_full_precision():
    """Also before the training of a teacher that may use TensorFloat-32."""

    class Encoder:
        def encode(self, texts):
            return {"embeddings": torch.tensor(flags()).float()}

    set_precision("cuda", tf32=True)
    assert not text_embeddings.embed(Encoder(), ("",))["embeddings"].any() and flags() == ON


def test_fingerprints_contain_tf32_where_it_changes_results(tiny):
    tiny["teachers"]["other"] = tiny["teachers"]["edm"] | {"seed": 1}
    for student in tiny["students"].values():
        student["teacher"] = "edm"

    def fingerprints() -> dict:
        experiment = parse_experiment(tiny, "tiny.yaml")
        return {
            "features": experiment.features_fingerprint("tiny-cnn"),
            "teacher": experiment.teacher_fingerprint("edm"),
            "pairs": experiment.pairs_fingerprint(next(iter(experiment.pair_sets))),
            "run with pairs": experiment.run_fingerprint("dmd", 0),
            "run": experiment.run_fingerprint("sid", 0),
            "scores": fingerprint(experiment.scoring()),
        }

    before = fingerprints()

    def changed(section: dict) -> set[str]:
        section["tf32"] = True
        after = fingerprints()
        section["tf32"] = False
        return {name for name in after if after[name] != before[name]}

    assert changed(tiny["training"]) == {"run with pairs", "run"}
    assert changed(tiny["evaluation"]) == {"pairs", "run with pairs", "scores"}
    assert changed(tiny["teachers"]["edm"]) == {"teacher", "pairs", "run with pairs", "run"}
    # fp32 is the default and not listed.
    tiny["evaluation"]["precision"] = "fp32"
    assert fingerprints() == before
    tiny["evaluation"]["precision"] = "bf16"
    after = fingerprints()
    assert {n for n in after if after[n] != before[n]} == {"pairs", "run with pairs", "scores"}
    experiment = parse_experiment(tiny, "tiny.yaml")
    assert experiment.pair_job(next(iter(experiment.pair_sets))).precision == "bf16"


def test_pairs_are_generated_in_the_precision_of_sampling(tiny):
    tiny["evaluation"]["block"] = 4
    experiment, network, seen = parse_experiment(tiny, "tiny.yaml"), tiny_denoiser(channels=1), []
    network.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    made = {}
    for precision in ("fp32", "bf16"):
        job = experiment.pair_job(next(iter(experiment.pair_sets)))
        job, rows = replace(job, precision=precision), range(16, 22)
        seen.clear()
        made[precision], cost = pairs._make_shard(job, network, (10, None), rows)
        steps = job.pairs.sampler.nfe
        assert seen == [precision == "bf16"] * (1 + 2 * steps)  # one to count FLOPs, two blocks
        assert cost["flops"] > 0
    index, (full, half) = torch.arange(16, 22), made.values()
    z = PAIR_NOISE.normal(index, (1, 8, 8))
    with torch.no_grad():
        expected = heun(network, z, full["condition"], **job.pairs.sampler.model_dump()).float()
    torch.testing.assert_close(full["x"], expected)
    assert torch.equal(full["condition"], half["condition"])
    assert half["x"].dtype == torch.float32 and not torch.equal(half["x"], full["x"])


def test_every_sampling_precision_is_a_protocol_of_its_own(scoring):  # noqa: F811
    """A protocol's digest heads its column, so that columns never mix precisions."""
    from harness.evaluation.scorer import Scorer

    protocols, keys = {}, {}
    for precision, tf32 in itertools.product(("fp32", "bf16"), (False, True)):
        scorer = Scorer(scoring(precision=precision, tf32=tf32))
        row = next(r for r in score_held_out(scorer).rows if r.metric == "fd")
        protocols[precision, tf32] = dict(scorer.protocols[row.protocol])
        keys[precision, tf32] = row.protocol
    assert len(set(keys.values())) == 4
    words = {key: p.pop("sampling_precision", "") for key, p in protocols.items()}
    assert all(p == protocols["fp32", False] for p in protocols.values())
    assert words["fp32", False] == ""  # as before the key `precision`
    assert {key for key, text in words.items() if "bfloat16" in text} == {
        ("bf16", False),
        ("bf16", True),
    }
    assert {tf32 for (_, tf32), text in words.items() if "TensorFloat-32" in text} == {True}


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["product", "convolution"])
def test_float32_has_24_bits_on_a_gpu(operation):
    generator = torch.Generator().manual_seed(0)
    if operation == "product":
        a, b = (torch.randn(512, 512, generator=generator, dtype=torch.double) for _ in "ab")
        compute = torch.matmul
    else:
        a = torch.randn(8, 64, 32, 32, generator=generator, dtype=torch.double)
        b = torch.randn(64, 64, 3, 3, generator=generator, dtype=torch.double)
        compute = torch.nn.functional.conv2d
    exact = compute(a.float().double(), b.float().double())

    def error() -> float:
        computed = compute(a.float().cuda(), b.float().cuda()).cpu().double()
        return ((computed - exact).norm() / exact.norm()).item()

    set_precision("cuda")
    assert error() < 2e-5
    set_precision("cuda", tf32=True)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert error() > 1e-4
    with full_precision():
        assert error() < 2e-5
