"""A feature network without weights, as a plug-in file: small images are their own features."""

from typing import Literal

from torch import nn

from harness.config.schema import FeatureSettings
from harness.features.base import FEATURES, FeatureExtractor
from harness.io.records import FeatureRecord


@FEATURES.register("raw-pixels")
class RawPixels(FeatureExtractor):
    """The pixels themselves: no weights."""

    class Settings(FeatureSettings):
        type: Literal["raw-pixels"]

    provided = frozenset({"features", "fd"})

    def make(self, job):
        record = FeatureRecord(name=job.name, sha256="none", settings=job.settings.model_dump())
        record.write(job.folder / "features.json")
        return record

    def load(self, record, folder, dataset, device):
        self.network = nn.Flatten()

    def extract(self, pixels, labels=None):
        return {"features": pixels.flatten(1).float() / 255}
