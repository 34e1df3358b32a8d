"""A discriminator on a feature network of the experiment, for images without a suitable pretrained
network: two convolutions per map, without random mixing."""

from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from harness.denoiser import Condition
from harness.discriminators.embeddings import condition_embedding


class FeatureDiscriminator(nn.Module):
    """A head per map of a frozen feature network, with a logit per position; conditioned on class
    or text by projection (Miyato and Koyama 2018)."""

    def __init__(self, features: nn.Module, num_classes: int, width: int, text_width: int = 0):
        super().__init__()
        channels = features.map_channels
        self.hidden = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1) for c in channels)
        self.embed = nn.ModuleList(
            condition_embedding(max(num_classes, 1), width, text_width) for _ in channels
        )
        self.output = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in channels)
        for table in self.embed:
            nn.init.normal_(table.weight, std=width**-0.5)

    def forward(self, maps: list[Tensor], condition: Condition) -> list[Tensor]:
        """Logits `(B, H_i, W_i)` per head."""
        logits, heads = [], zip(maps, self.hidden, self.embed, self.output, strict=True)
        for x, hidden, embed, output in heads:
            h = leaky_relu(hidden(x), 0.2)
            score = output(h).squeeze(1)
            if condition is not None:
                score = score + (h * embed(condition)[:, :, None, None]).sum(dim=1)
            logits.append(score)
        return logits
