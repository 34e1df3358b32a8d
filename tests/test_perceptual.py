"""LPIPS as DMD's regression: its weights' places, its input, its cost."""

import pytest
import torch

from harness.errors import UserError
from harness.features.lpips import PerceptualDistance, build_lpips, load_lpips, load_trunk
from tests.test_methods import run_method

pytest.importorskip("lpips", reason="needs the extra 'pretrained'")


@pytest.fixture(scope="module")
def network():
    """The package's network with a random trunk: nothing here is a number for a table."""
    torch.manual_seed(0)
    return build_lpips().requires_grad_(False)


def test_the_trunk_is_torchvisions_vgg16(network):
    """Filled from a VGG16, every slice computes what VGG16 computes up to its relu."""
    from torchvision.models import vgg16

    torch.manual_seed(1)
    reference = vgg16(weights=None).eval()
    load_trunk(network, reference.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for slice_end, mine in zip((4, 9, 16, 23, 30), network.net(x), strict=True):
            assert torch.equal(mine, reference.features[:slice_end](x))


def test_the_distance_enlarges_repeats_grey_and_has_a_gradient(network):
    distance = PerceptualDistance(network, resolution=64)
    sizes = []
    hook = network.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    x, y = torch.rand(2, 1, 8, 8, requires_grad=True), torch.rand(2, 1, 8, 8)
    value = distance(x, y)
    hook.remove()
    assert value.shape == (2,) and sizes == [(2, 3, 64, 64)]
    assert distance(y, y).abs().max() == 0 and value.min() > 0
    value.sum().backward()
    assert x.grad.abs().min() > 0


def test_missing_weights_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path))
    monkeypatch.setattr("harness.features.lpips.TRUNK", "http://127.0.0.1:9/vgg16.pth")
    with pytest.raises(UserError, match="cannot be downloaded") as caught:
        load_lpips()
    assert "\n" not in str(caught.value)


def test_dmd_regresses_through_lpips_and_counts_it(network, tmp_path):
    distance = PerceptualDistance(network, resolution=32)
    outcome = run_method("dmd", tmp_path, 1, critic=distance, regression="lpips")[0]
    assert outcome.ledger.passes["lpips"] == [8, 8]
    assert all(count == 0 for count in outcome.nonfinite.values())
