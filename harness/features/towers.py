"""Feature networks from elsewhere: Inception, CLIP, DINOv2, EfficientNet-Lite.

Each has `fetch(section)`, which gives the file of its weights or a `UserError`; `facts(section)`,
what is known before the file is there: `sha256` (None if that of the file counts), `resize`,
`pretraining` and more for the protocol; and `load`, which reads the file as safetensors, by
`load_pickled` or by `harness.features.torchscript`: nothing is unpickled.
`see(pixels, labels)` of a network gives what the metrics need of uint8 images `(B, 1 or 3, H, W)`.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from harness.errors import UserError
from harness.features import inception
from harness.io.downloads import fetch, load_pickled

BLOCK = 64  # images at a time
# Hessel et al. 2021 write it before every caption.
PREFIX = "A photo depicts "
# OpenAI's files, which carry their sha256 in the address.
OPENAI = {
    "ViT-B-32-quickgelu": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/"
    "ViT-B-32.pt",
    "ViT-L-14-quickgelu": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/"
    "ViT-L-14.pt",
    "ViT-L-14-336-quickgelu": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/"
    "ViT-L-14-336px.pt",
}
OPENAI_ADDRESS = "https://openaipublic.azureedge.net/clip/models/"
# What an archive of OpenAI's says beside its weights.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; a file that holds none is a `UserError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from harness.features.torchscript import is_archive
    from harness.features.torchscript import read_weights as read_archive

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_archive(path):
            return read_archive(path)
        state = load_pickled(path)
        state = state.get("state_dict", state)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise RuntimeError("it holds other things than weights")
        return state
    except (SafetensorError, RuntimeError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} holds no weights: {str(error).splitlines()[0]}") from None
    except AttributeError:
        raise UserError(f"{path} holds no weights by name") from None


def fill(network: nn.Module, weights: dict[str, Tensor], path: Path, extra=()) -> None:
    """Load weights, all of them; `extra`: last parts of names that may be left over."""
    own = network.state_dict()
    kept = {k: v for k, v in weights.items() if k in own or k.split(".")[-1] not in extra}
    try:
        network.load_state_dict(kept)
    except RuntimeError as error:
        raise UserError(
            f"{path} holds the weights of another network: {str(error).splitlines()[1].strip()}"
        ) from None


def resized(pixels: Tensor, size: int) -> Tensor:
    """uint8 `(B, 3, size, size)`, bicubic with antialiasing, as PIL does it to a level or so."""
    rgb = pixels.expand(-1, 3, -1, -1)
    if rgb.shape[2:] == (size, size):
        return rgb
    return interpolate(rgb.cpu(), (size, size), mode="bicubic", antialias=True)


def full_precision():
    """A GPU would convolve in TensorFloat-32, and features differ from machine to machine."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


class Tower(nn.Module):
    """A frozen network behind a fixed input size and a normalisation of pixels in [0, 1]."""

    def __init__(self, network: nn.Module, size: int, mean, std):
        super().__init__()
        self.network, self.size = network.eval().requires_grad_(False), size
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def inputs(self, pixels: Tensor) -> Tensor:
        x = resized(pixels, self.size).to(self.mean.device).float() / 255
        return (x - self.mean) / self.std

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    @torch.no_grad()
    def see(self, pixels: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        parts = []
        with full_precision():
            for block in pixels.split(BLOCK):
                parts.append(self.outputs(self.inputs(block)))
        seen = {k: torch.cat([part[k] for part in parts]).cpu() for k in parts[0]}
        return seen | self.compared(seen["features"], labels)

    def compared(self, features: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        return {}


class Inception:
    @staticmethod
    def fetch(section) -> Path:
        return inception.fetch_weights(section.weights)

    @staticmethod
    def facts(section) -> dict:
        return {
            "sha256": inception.SHA256,
            "resize": inception.RESIZES[section.resize],
            "pretraining": (inception.PRETRAINING,),
        }

    @staticmethod
    def load(section, path: Path, *_) -> inception.Inception:
        return inception.load_inception(path, section.resize)


# -- CLIP ---------------------------------------------------------------------------------------


class ClipTower(Tower):
    """open_clip's network; embeddings have length 1, `(B, D)`.

    `captions`: one a class, or the prompts. Where there are any it gives their similarity to each
    image's own, as they are (`text_similarity`) and after Hessel's prefix (`prefixed_similarity`).
    `heads`: ratings of the embeddings by name.
    """

    def __init__(self, network: nn.Module, captions: list[str], tokenizer, heads: dict):
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        size = network.visual.image_size
        size = size if isinstance(size, int) else size[0]
        super().__init__(network, size, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
        self.captions, self.tokenizer = captions, tokenizer
        self.heads = nn.ModuleDict(heads)
        self._texts: dict[tuple[str, int], Tensor] = {}

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self.network.encode_image(x, normalize=True)}

    def texts(self, prefix: str, labels: Tensor) -> Tensor:
        """Embeddings of the captions `labels` `(B, D)`, made when they are first asked for, in
        blocks that do not depend on who asks: another batch would round otherwise."""
        for number in (labels // BLOCK).unique().tolist():
            if (prefix, number) not in self._texts:
                block = self.captions[number * BLOCK : (number + 1) * BLOCK]
                tokens = self.tokenizer([prefix + caption for caption in block])
                made = self.network.encode_text(tokens.to(self.mean.device), normalize=True)
                self._texts[prefix, number] = made.cpu()
        return torch.stack([self._texts[prefix, i // BLOCK][i % BLOCK] for i in labels.tolist()])

    def compared(self, features: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        seen = {name: head(features) for name, head in self.heads.items()}
        if not self.captions or labels is None:
            return seen
        for name, prefix in (("text_similarity", ""), ("prefixed_similarity", PREFIX)):
            seen[name] = (features * self.texts(prefix, labels)).sum(dim=1)
        return seen

    def truncated(self, prefix: str = "") -> int:
        """How many captions are longer, after the prefix, than what the network reads of them."""
        room = self.tokenizer.context_length - 2  # marks of the beginning and the end
        return sum(len(self.tokenizer.encode(prefix + c)) > room for c in self.captions)


class Clip:
    @staticmethod
    def source(section) -> tuple[str, str | None]:
        if section.weights is not None:
            return section.weights, section.sha256
        file = OPENAI[section.model]
        return OPENAI_ADDRESS + file, file.split("/")[0]

    @classmethod
    def fetch(cls, section) -> Path:
        return fetch(*cls.source(section))

    @classmethod
    def facts(cls, section) -> dict:
        return {
            "sha256": cls.source(section)[1],
            "resize": "before the network, bicubic with antialiasing, 8 bits",
            "pretraining": (f"clip-{section.pretrained}",),
            "details": {
                "model": section.model,
                "pretrained": section.pretrained,
                "caption": section.caption,
            },
        }

    @classmethod
    def load(cls, section, path: Path, dataset, heads: dict) -> ClipTower:
        import open_clip

        network = open_clip.create_model(section.model, pretrained=None)
        fill(network, read_weights(path), path, NO_WEIGHTS)
        names = dataset.class_names
        # Nothing can be said of classes that are numbers.
        named = not any(name.isdigit() for name in names)
        captions = [section.caption.format(name) for name in names] if named else []
        if dataset.evaluation_prompts:
            captions = list(dataset.evaluation_prompts.texts)
        return ClipTower(network, captions, open_clip.get_tokenizer(section.model), heads)


# -- networks of images alone -------------------------------------------------------------------


class DinoTower(Tower):
    """DINOv2 (Oquab et al. 2023): the class token behind the last norm, `(B, D)`."""

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self.network(x)}


class Dino:
    SIZE = 224

    @classmethod
    def fetch(cls, section) -> Path:
        return fetch(section.weights, section.sha256)

    @classmethod
    def facts(cls, section) -> dict:
        return {
            "sha256": section.sha256,
            "resize": f"to {cls.SIZE} x {cls.SIZE}, bicubic with antialiasing, 8 bits",
            # Its curated part holds the training images of ImageNet-1k (Oquab et al. 2023, section
            # 3), as `backbones.pretraining_set` calls them.
            "pretraining": ("lvd-142m", "imagenet-1k"),
            "details": {"model": section.model},
        }

    @classmethod
    def load(cls, section, path: Path, *_) -> DinoTower:
        from timm.models.vision_transformer import checkpoint_filter_fn

        from harness.features.timm_backbones import _timm

        name = {"vitb14": "vit_base", "vitl14": "vit_large"}[section.model] + "_patch14_dinov2"
        network = _timm().create_model(name, pretrained=False, img_size=cls.SIZE, num_classes=0)
        # Renames Meta's own file and fits its position embeddings to the size.
        fill(network, checkpoint_filter_fn(read_weights(path), network), path)
        config = network.pretrained_cfg
        return DinoTower(network, cls.SIZE, config["mean"], config["std"])


class LiteTower(Tower):
    """EfficientNet-Lite: the last pooling `(B, 1280)`, and probabilities of ImageNet's classes."""

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        features = self.network.forward_head(self.network.forward_features(x), pre_logits=True)
        return {
            "features": features,
            "probabilities": self.network.classifier(features).softmax(dim=1),
        }


class Lite:
    @staticmethod
    def backbone(section) -> str:
        return f"tf_efficientnet_{section.model}"

    @classmethod
    def fetch(cls, section) -> Path:
        from harness.features.timm_backbones import weights_file

        return weights_file(cls.backbone(section))

    @classmethod
    def facts(cls, section) -> dict:
        from harness.features.timm_backbones import pretraining_set

        return {
            "sha256": None,
            "resize": "before the network, bicubic with antialiasing, 8 bits",
            "pretraining": (pretraining_set(cls.backbone(section)),),
            "details": {"model": cls.backbone(section)},
            "same_as": f"timm/{cls.backbone(section)}",  # what a student's record calls it
        }

    @classmethod
    def load(cls, section, path: Path, *_) -> LiteTower:
        from harness.features.timm_backbones import pretrained_network

        network, _ = pretrained_network(cls.backbone(section))
        config = network.pretrained_cfg
        return LiteTower(network, config["input_size"][1], config["mean"], config["std"])


TOWERS = {
    "inception": Inception,
    "open-clip": Clip,
    "dinov2": Dino,
    "efficientnet-lite": Lite,
}
