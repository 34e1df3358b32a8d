"""Weights out of TorchScript archives, without running them."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.errors import UserError
from harness.features.torchscript import is_archive, read_weights


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(), nn.LayerNorm(16))
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("counts", torch.arange(3))

    def forward(self, x):
        return self.body(x) * self.scale.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_those_of_the_module(dtype, tmp_path):
    network, path = Network().to(dtype), tmp_path / "network.pt"
    torch.jit.trace(network, torch.zeros(2, 3, 4, 4, dtype=dtype)).save(path)
    assert is_archive(path)
    weights, expected = read_weights(path), network.state_dict()
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    torch.save(expected, tmp_path / "state.pth")
    assert not is_archive(tmp_path / "state.pth")


@pytest.mark.parametrize(
    "program",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n(dS'x'\nI1\nsb.",  # a function's attribute
        b"ctorch\nFloatStorage\n(dS'x'\nI1\nsb.",
        b"c__torch__\nNet\n(dS'x'\nI1\nsb.",  # a class's
        b"ccollections\nOrderedDict\n(dS'x'\nI1\nsb.",
        b"I1\n.",  # no module
        b"",
    ],
)
def test_no_state_is_set_but_that_of_modules(program, tmp_path):
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", program)
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(UserError, match="is no TorchScript archive of weights") as error:
        read_weights(path)
    assert "\n" not in str(error.value)


def test_other_names_are_refused(tmp_path):
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", b"cos\nsystem\n(S'touch pwned'\ntR.")
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(UserError, match=r"asks for os\.system"):
        read_weights(path)
    assert not Path("pwned").exists()
