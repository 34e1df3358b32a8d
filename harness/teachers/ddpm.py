"""`DDPMPipeline` and `DDIMPipeline` folders of diffusers: a `UNet2DModel` and its scheduler."""

from pathlib import Path

from harness.config.jobs import TeacherJob
from harness.errors import UserError
from harness.networks import BACKBONES
from harness.networks.vp import VPDenoiser
from harness.teachers.folders import INDEX, WEIGHTS, DiffusersFolder, read_object

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
NETWORK, SCHEDULER = "UNet2DModel", "scheduler_config.json"


def is_ddpm(folder: Path, kind: str | None) -> bool:
    """Whether a folder is such a pipeline (`kind`: its class), or a network next to a scheduler's
    config without model_index.json."""
    return kind in PIPELINES or (kind is None and (folder / SCHEDULER).is_file())


class DDPMFolder(DiffusersFolder):
    """Two layouts, as in diffusers: parts in `unet/` and `scheduler/`, or all files in the folder
    itself (google/ddpm-cifar10-32)."""

    network = "unet"

    def __init__(self, folder: Path):
        super().__init__(folder)
        config = self.path("unet") / "config.json"
        for path in (config, self._scheduler()):
            if not path.is_file():
                raise UserError(f"{path} is missing; download the whole folder", "missing-file")
        if (name := read_object(config).get("_class_name", NETWORK)) != NETWORK:
            message = f"{config}: {name} is not supported; expected a {NETWORK}"
            raise UserError(message, "unknown-name")
        index = read_object(self.folder / INDEX) if self.kind else {}
        self._check_files()
        self._read_scheduler(self._scheduler(), index.get("scheduler"))

    def path(self, part: str) -> Path:
        folder = self.folder / part
        return folder if folder.is_dir() else self.folder

    def _scheduler(self) -> Path:
        return self.path("scheduler") / SCHEDULER

    def files(self, *parts: str) -> list[Path]:
        """The files that the teacher is made from, whatever else lies in the folder, such as a
        variant of the weights."""
        unet = self.path("unet")
        weights = sorted(path for path in unet.iterdir() if WEIGHTS.fullmatch(path.name))
        return [unet / "config.json", self._scheduler(), *weights]

    def name_of(self, path: Path) -> str:
        return path.name  # the same in both layouts

    def network_config(self) -> dict:
        """The network as in an experiment: its class under `type`, and its arguments."""
        return {"type": NETWORK, **self.config("unet")}

    def check(self, job: TeacherJob, image_shape: tuple[int, ...]) -> None:
        """Check the images and the sampler's largest noise level, before reading weights."""
        config = self.config("unet")
        size, channels = config.get("sample_size"), config.get("in_channels", 3)
        if not isinstance(size, int):
            message = (
                f"sample_size {size!r} is not the width of square images; write it as one number"
            )
            raise UserError(f"{self.path('unet') / 'config.json'}: {message}", "network")
        if (channels, size, size) != tuple(image_shape):
            own = f"{channels}x{size}x{size}"
            data = "x".join(map(str, image_shape))
            message = f"teacher {job.name} generates {own} images, but the data has {data} images"
            raise UserError(message, "shape")
        self.check_sampler(job)

    def denoiser(self, num_classes: int) -> VPDenoiser:
        """Load the denoiser for data with this number of classes."""
        backbone = BACKBONES[NETWORK]
        model = self.load(backbone.model_class(), "unet")
        options = {"prediction": self.prediction, "num_classes": num_classes}
        try:
            return backbone.denoiser("vp")(model, self.schedule, **options)
        except ValueError as error:
            raise UserError(f"{self.path('unet') / 'config.json'}: {error}", "network") from None


def build_vp_denoiser(network: dict, num_classes: int) -> VPDenoiser:
    """A denoiser with random weights and the default schedule. `network`: its class under `type`,
    and its arguments."""
    backbone = BACKBONES[network["type"]]
    settings = {key: value for key, value in network.items() if key != "type"}
    model = backbone.model_class().from_config(settings)  # ignores keys of other versions
    return backbone.denoiser("vp")(model, {}, num_classes=num_classes)
