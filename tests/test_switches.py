"""Settings for speed change results by rounding only."""

import copy
import dataclasses
import importlib.util

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from harness import kernels
from harness.networks import triton_ops
from harness.students.run import assemble
from harness.training.trainer import Trainer, replace_nonfinite_
from harness.validation import parse_experiment
from harness.workflow.dry_run import dry_run_inputs
from tests.conftest import DATA, ROOT

SONG = {
    "type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}


def trained(
    tmp_path,
    student: str,
    network: dict | None = None,
    kind: type[Trainer] = Trainer,
    steps: int = 4,
    **switches,
) -> Trainer:
    """A trainer after some iterations of a student on random images."""
    raw = yaml.safe_load((DATA / "tiny.yaml").read_text())
    if network:
        raw["teachers"]["edm"]["network"] = network
    experiment = parse_experiment(raw, "tiny")
    run = experiment.student_run(student, 0)
    run = dataclasses.replace(run, training=run.training.model_copy(update=switches))
    torch.manual_seed(0)
    inputs = dry_run_inputs(experiment, student)
    trainer = kind(assemble(run, inputs, tmp_path, "test"))
    for _ in range(steps):
        trainer.step()
    return trainer


def assert_equal_losses(a: Trainer, b: Trainer) -> None:
    """Compare losses, not weights: Adam's first steps amplify rounding of small gradients."""
    assert a.metrics.keys() == b.metrics.keys()
    for name, mean in a.metrics.items():
        assert float(mean) == pytest.approx(float(b.metrics[name]), rel=1e-2), name


def assert_equal_but_for_rounding(a: Trainer, b: Trainer) -> None:
    assert_equal_losses(a, b)
    assert a.ledger.flops == b.ledger.flops and a.ledger.passes == b.ledger.passes
    assert a.state_dict()["tensors"].keys() == b.state_dict()["tensors"].keys()


def test_channels_last(tmp_path):
    plain, switched = (trained(tmp_path, "gdd", SONG, channels_last=on) for on in (False, True))
    for network in (switched.networks["student"], switched.ema):
        weight = next(p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_equal_but_for_rounding(plain, switched)


@pytest.mark.slow
def test_fused_training_differs_from_plain_training_by_rounding(tmp_path, monkeypatch):
    """In Triton's interpreter. The first iteration counts operations and is plain."""
    monkeypatch.setattr(kernels, "agrees", lambda name, check: True)
    launched, launch = [], triton_ops.launch
    monkeypatch.setattr(triton_ops, "launch", lambda *a, **k: launched.append(launch(*a, **k)))
    network = SONG | {"channel_mult": [1], "attn_resolutions": []}
    plain = trained(tmp_path, "sid", network, steps=2)
    assert not launched
    with kernels.kernels("always"):
        fused = trained(tmp_path, "sid", network, steps=2, channels_last=True)
    assert len(launched) > 100
    assert_equal_losses(plain, fused)
    assert plain.ledger.flops == fused.ledger.flops and plain.ledger.passes == fused.ledger.passes


def test_networks_with_fused_kernels_are_channels_last_on_a_gpu_in_bf16(tmp_path, monkeypatch):
    trainer = trained(tmp_path, "sid", SONG)
    net, classifier = trainer.networks["student"], torch.nn.Conv2d(4, 4, 3)

    def placed(net, device: str, **switches) -> bool:
        trainer.device, trainer.loop = device, trainer.run.loop.model_copy(update=switches)
        formats = []
        monkeypatch.setattr(torch.nn.Module, "to", lambda *_, **options: formats.append(options))
        trainer._place(net)
        return formats != [{}]

    assert placed(net, "cuda", precision="bf16") and placed(net, "cuda", channels_last=True)
    assert not placed(net, "cpu", precision="bf16") and not placed(net, "cuda")
    assert not placed(net, "cuda", precision="bf16", channels_last=False)
    assert not placed(classifier, "cuda", precision="bf16")
    with kernels.kernels("off"):
        assert not placed(net, "cuda", precision="bf16")


def test_all_nonfinite_gradients_are_replaced_together():
    """In any memory format, bit for bit as one by one."""
    gradients = [torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last), torch.randn(5)]
    gradients += [torch.randn(2, 3).t(), torch.randn(())]
    gradients[0][1, 2, 0, 1], gradients[0][0, 0, 0, 0] = torch.nan, 1e9
    gradients[1][2], gradients[2][1, 0] = torch.inf, -torch.inf
    separate = [g.clone() for g in gradients]
    pointers = [g.data_ptr() for g in gradients]
    replace_nonfinite_(gradients, together=True)
    replace_nonfinite_(separate, together=False)
    for ours, reference, pointer in zip(gradients, separate, pointers, strict=True):
        assert torch.equal(ours, reference) and ours.data_ptr() == pointer
    assert gradients[1][2] == 1e5 and gradients[2][1, 0] == -1e5 and gradients[0][0, 0, 0, 0] == 1e9
    replace_nonfinite_([], together=True)


def test_resume_with_channels_last(tmp_path):
    """Files hold contiguous tensors; the optimisers' moments must return to the weights' layout."""
    trainer, resumed = (trained(tmp_path, "gdd", SONG, channels_last=True) for _ in "ab")
    state = copy.deepcopy(trainer.state_dict())
    state["tensors"] = {k: v.contiguous() for k, v in state["tensors"].items()}
    resumed.load_state_dict(state)
    for each in (trainer, resumed):
        each.step()
    after = resumed.state_dict()["tensors"]
    for name, tensor in trainer.state_dict()["tensors"].items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("student", ["dmd", "sid", "gdd"])
def test_plain_loop_of_the_benchmark_computes_the_same(tmp_path, student):
    path = ROOT / "benchmarks" / "throughput.py"
    spec = importlib.util.spec_from_file_location("throughput", path)
    throughput = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(throughput)
    ours = trained(tmp_path, student)
    plain = trained(tmp_path, student, kind=throughput.PlainLoop)
    assert_equal_losses(ours, plain)
    # Sharing saves the student's pass for the fake score; in GDD the generator's phase is first.
    saved = {"dmd": 4, "sid": 4, "gdd": 0}[student] * ours.run.batch
    assert plain.ledger.passes["student"][0] == ours.ledger.passes["student"][0] + saved


@pytest.mark.parametrize("student", ["dmd", "sid", "sim", "gdd"])
def test_no_iteration_waits_for_the_device(tmp_path, student):
    """Reading a value, or creating a tensor whose size depends on values, uses these operations."""
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal"}
    trainer, operations = trained(tmp_path, student), set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Recorder():
        trainer.step()
    assert operations & {"_fused_adam_", "_fused_adamw_"} and not operations & waits
    with Recorder():
        float(trainer.metrics["loss/generator"])
    assert operations & waits  # the recorder works
