"""The switches for speed change rounding, nothing else."""

import importlib.util

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.config import experiment as config
from harness.denoiser import Denoiser
from harness.students.run import assemble
from harness.training.trainer import Trainer
from harness.validation import load_experiment
from harness.workflow.plan import stand_in_inputs
from tests.conftest import ROOT
from tests.test_config import mistakes, put

SONG = {
    "type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}


def trained(
    tmp_path, student: str, network: dict | None = None, kind: type[Trainer] = Trainer, **switches
) -> Trainer:
    """A trainer after some iterations of a student on random images."""
    experiment = load_experiment(ROOT / "tests/data/tiny.yaml")
    if network:
        teacher = experiment.teachers["edm"].model_copy(update={"network": network})
        experiment.teachers["edm"] = teacher
    experiment.training = experiment.training.model_copy(update=switches)
    torch.manual_seed(0)
    inputs = stand_in_inputs(experiment, student)
    trainer = kind(assemble(experiment, student, 0, inputs, tmp_path, "test"))
    for _ in range(4):
        trainer._iteration()
    return trainer


def assert_equal_losses(a: Trainer, b: Trainer) -> None:
    """Not weights, since Adam's first steps turn rounding of small gradients into steps."""
    assert a._sums.keys() == b._sums.keys()
    for name, total in a._sums.items():
        assert float(total) == pytest.approx(float(b._sums[name]), rel=1e-2), name


def assert_equal_but_for_rounding(a: Trainer, b: Trainer) -> None:
    assert_equal_losses(a, b)
    assert a.ledger.flops == b.ledger.flops and a.ledger.passes == b.ledger.passes
    assert a._state_tensors().keys() == b._state_tensors().keys()


def test_channels_last(tmp_path):
    plain, switched = (trained(tmp_path, "gdd", SONG, channels_last=on) for on in (False, True))
    for network in (switched.networks["student"], switched.ema):
        weight = next(p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_equal_but_for_rounding(plain, switched)


def test_compile(tmp_path, monkeypatch):
    """The compiler's front end on every kind of phase; its back end is left out, for time."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_module = nn.Module.compile

    def compile_here(net, **settings):
        assert isinstance(net, Denoiser)
        compile_module(net, backend=backend, fullgraph=True, **settings)

    monkeypatch.setattr(nn.Module, "compile", compile_here)
    torch._dynamo.reset()
    plain, switched = (trained(tmp_path, "sid", SONG, compile=on) for on in (False, True))
    assert_equal_but_for_rounding(plain, switched)
    # A network is traced once for each way in which it is used: none again as training goes on.
    assert 1 <= len(graphs) <= 5


@pytest.mark.parametrize("student", ["dmd", "sid", "gdd"])
def test_the_benchmarks_plain_loop_is_the_same_mathematics(tmp_path, student):
    path = ROOT / "benchmarks" / "throughput.py"
    spec = importlib.util.spec_from_file_location("throughput", path)
    throughput = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(throughput)
    ours = trained(tmp_path, student)
    plain = trained(tmp_path, student, kind=throughput.PlainLoop)
    assert_equal_losses(ours, plain)
    # What sharing saves is the student's pass for the fake score; GDD's generator goes first.
    saved = {"dmd": 4, "sid": 4, "gdd": 0}[student] * ours.run.batch
    assert plain.ledger.passes["student"][0] == ours.ledger.passes["student"][0] + saved


def test_compile_needs_a_compiler(tiny, monkeypatch):
    monkeypatch.setattr(config, "COMPILERS", ("no-such-compiler",))
    put(tiny, "training.compile", True)
    assert mistakes(tiny) == ["training.compile: needs a C++ compiler, one of no-such-compiler"]


@pytest.mark.parametrize("student", ["dmd", "sid", "sim", "gdd"])
def test_no_iteration_reads_anything_back_from_the_device(tmp_path, student):
    """The host would wait for the device. What reads a value, or makes a tensor whose size depends
    on values, goes through these operations, on every device."""
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal"}
    trainer, seen = trained(tmp_path, student), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Watch():
        trainer._iteration()
    assert seen & {"_fused_adam_", "_fused_adamw_"} and not seen & waits
    with Watch():
        float(trainer._sums["loss/generator"])
    assert seen & waits  # the watch sees what it is there for
