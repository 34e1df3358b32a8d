"""LPIPS with VGG16 (Zhang et al. 2018, arXiv 1801.03924, version 0.1), as a loss. The network and
its calibrated heads come from the package `lpips`; the ImageNet trunk is downloaded and verified by
its hash. Both are read with `weights_only`."""

import warnings
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import interpolate

from harness.io.downloads import fetch, load_pickled
from harness.io.packages import require

TRUNK = "https://download.pytorch.org/models/vgg16-397923af.pth"
TRUNK_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"


class PerceptualDistance(nn.Module):
    """LPIPS `(B,)` between images `(B, 1 or 3, H, W)` in [-1, 1], resized bilinearly to
    `resolution`. Frozen; its trunk is random until `load_trunk`."""

    def __init__(self, resolution: int = 224):
        import lpips

        super().__init__()
        self.resolution = resolution
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses a deprecated argument of torchvision
            self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        self.eval().requires_grad_(False)

    def load_trunk(self, weights: dict[str, Tensor]) -> None:
        """Load torchvision's VGG16; its layer numbers are those within the trunk's slices."""
        trunk = self.network.net
        names = {name: "features." + name.split(".", 1)[1] for name in trunk.state_dict()}
        trunk.load_state_dict({name: weights[source] for name, source in names.items()})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        size = (self.resolution, self.resolution)
        x, y = (interpolate(z.expand(-1, 3, -1, -1), size, mode="bilinear") for z in (x, y))
        return self.network(x, y).flatten()


def trunk_file() -> Path:
    """The trunk's weights, downloaded if necessary; a `UserError` if that fails."""
    require("lpips", "LPIPS")
    return fetch(TRUNK, TRUNK_SHA256)


def load_lpips() -> PerceptualDistance:
    """LPIPS-VGG with its pretrained weights."""
    weights, distance = load_pickled(trunk_file()), PerceptualDistance()
    distance.load_trunk(weights)
    return distance
