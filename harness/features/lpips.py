"""LPIPS with VGG16 (Zhang et al. 2018, arXiv 1801.03924, version 0.1), as a loss.

The network and its calibrated heads come from the package `lpips`; the ImageNet trunk is downloaded
and verified by its hash. Both are read with `weights_only`.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import interpolate

from harness.errors import UserError
from harness.io.downloads import fetch, load_pickled

TRUNK = "https://download.pytorch.org/models/vgg16-397923af.pth"
TRUNK_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"


class PerceptualDistance(nn.Module):
    """LPIPS `(B,)` between images `(B, 1 or 3, H, W)` in [-1, 1], resized bilinearly to
    `resolution`."""

    def __init__(self, network: nn.Module, resolution: int = 224):
        super().__init__()
        self.network, self.resolution = network, resolution

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        size = (self.resolution, self.resolution)
        x, y = (interpolate(z.expand(-1, 3, -1, -1), size, mode="bilinear") for z in (x, y))
        return self.network(x, y).flatten()


def load_trunk(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fill the trunk of `lpips.LPIPS(net="vgg")` with torchvision's VGG16, whose layer numbers are
    the same within the trunk's slices."""
    trunk = network.net
    names = {name: "features." + name.split(".", 1)[1] for name in trunk.state_dict()}
    trunk.load_state_dict({name: weights[source] for name, source in names.items()})


def build_lpips() -> nn.Module:
    """The package's network with calibrated heads and a random trunk."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses a deprecated argument of torchvision
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


def trunk_file() -> Path:
    """The trunk's weights, downloaded if necessary; a `UserError` if that fails."""
    if find_spec("lpips") is None:
        message = "LPIPS needs the package lpips: pip install 'onestep-harness[pretrained]'"
        raise UserError(message, "missing-package")
    return fetch(TRUNK, TRUNK_SHA256)


def load_lpips() -> PerceptualDistance:
    """LPIPS-VGG with its pretrained weights, frozen."""
    weights, network = load_pickled(trunk_file()), build_lpips()
    load_trunk(network, weights)
    return PerceptualDistance(network).eval().requires_grad_(False)
