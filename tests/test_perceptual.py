"""LPIPS as the regression loss of DMD: weights, inputs and cost."""

import pytest
import torch

from harness.errors import UserError
from harness.features.lpips import PerceptualDistance, load_lpips
from tests.test_methods import run_method

pytest.importorskip("lpips", reason="needs the extra 'pretrained'")


@pytest.fixture(scope="module")
def distance():
    """LPIPS with a random trunk."""
    torch.manual_seed(0)
    return PerceptualDistance(resolution=64)


@pytest.mark.contract
def test_trunk_equals_torchvisions_vgg16():
    from torchvision.models import vgg16

    torch.manual_seed(1)
    reference = vgg16(weights=None).eval()
    distance = PerceptualDistance()
    distance.load_trunk(reference.state_dict())
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        outputs = distance.network.net(x)
        for slice_end, output in zip((4, 9, 16, 23, 30), outputs, strict=True):
            assert torch.equal(output, reference.features[:slice_end](x))


@pytest.mark.contract
def test_distance_resizes_accepts_grey_images_and_has_a_gradient(distance):
    sizes = []
    hook = distance.network.register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape)
    )
    x, y = torch.rand(2, 1, 8, 8, requires_grad=True), torch.rand(2, 1, 8, 8)
    value = distance(x, y)
    hook.remove()
    assert value.shape == (2,) and sizes == [(2, 3, 64, 64)]
    assert distance(y, y).abs().max() == 0 and value.min() > 0
    value.sum().backward()
    assert x.grad.abs().min() > 0


def test_missing_weights_are_reported_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path))
    monkeypatch.setattr("harness.features.lpips.TRUNK", "http://127.0.0.1:9/vgg16.pth")
    with pytest.raises(UserError, match="vgg16") as caught:
        load_lpips()
    assert "\n" not in str(caught.value)


def test_dmd_regression_with_lpips_is_counted(distance, tmp_path):
    outcome = run_method("dmd", tmp_path, 1, critic={"lpips": distance}, regression="lpips")[0]
    assert outcome.ledger.passes["lpips"] == [8, 8]
    assert all(count == 0 for count in outcome.nonfinite.values())
