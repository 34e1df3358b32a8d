"""What a teacher can do, as far as its section and its files tell without weights."""

from contextlib import suppress

import torch

from harness.augment import LABELS
from harness.config import schema
from harness.data.registry import data_source
from harness.denoiser import Denoiser, has_dropout
from harness.errors import UserError
from harness.freezing import freeze
from harness.method import TeacherFacts
from harness.networks import build_denoiser
from harness.networks.registry import BACKBONES
from harness.teachers.sources import Network, network_of

SHAPE, CLASSES = (3, 32, 32), 10  # of a stand-in for data that were not read yet


def teacher_facts(
    section: schema.TeacherSection | None, data: schema.DataSection | None
) -> TeacherFacts:
    """The facts about a teacher; without a valid section, only those about the data."""
    text, has_classes, classes = conditions(data)
    facts = {"text": text, "classes": has_classes}
    if section is None:
        return TeacherFacts(**facts)
    trained = isinstance(section, schema.TrainedTeacher)
    facts["unconditional"] = not trained or section.label_dropout > 0
    if (network := network_of(section)) is None:
        return TeacherFacts(**facts)
    backbone, arguments = BACKBONES[network.type], network.arguments
    facts["network"] = network.type
    facts["dropout"] = backbone.dropout
    facts["augment_labels"] = backbone.augment_labels(arguments) == LABELS
    if BACKBONES.plugin_sha256(network.type) and (built := built_on_meta(network, data)):
        facts["dropout"] = has_dropout(built)
        facts["augment_labels"] = built.augment_labels == LABELS
    if not backbone.null_label:
        facts["null_condition"] = facts["unconditional"] = False
    if network.preconditioning == "vp":
        facts["own_dropout"] = float(arguments.get("dropout") or 0.0)
        rows = arguments.get("num_class_embeds")
        if not text and rows:  # without a row more than classes there is no "no label"
            facts["null_condition"] = classes == 0 or rows > classes
            facts["unconditional"] = facts["null_condition"]
    elif not trained and arguments.get("label_dim") and "label_dropout" in arguments:
        facts["unconditional"] = arguments["label_dropout"] > 0  # EDM's networks
    return TeacherFacts(**facts)


def unfrozen(
    section: schema.TeacherSection | None, data: schema.DataSection | None, preset: str
) -> str | None:
    """Why a preset of `harness.freezing` has no layers to freeze in a plug-in's network."""
    network = section and network_of(section)
    if network is None or not BACKBONES.plugin_sha256(network.type):
        return None
    if (built := built_on_meta(network, data)) is None:
        return None
    try:
        freeze(built, preset)
    except UserError as error:
        return str(error)
    return None


def built_on_meta(network: Network, data: schema.DataSection | None) -> Denoiser | None:
    """A network without memory for its weights; None if it cannot be built."""
    shape, classes = SHAPE, CLASSES
    if data is not None:
        with suppress(UserError):
            source = data_source(data)
            shape, classes = source.image_shape or SHAPE, source.num_classes
    with suppress(Exception), torch.device("meta"):  # errors are reported where it is needed
        return build_denoiser({"type": network.type, **network.arguments}, shape, classes)
    return None


def conditions(data: schema.DataSection | None) -> tuple[bool, bool, int]:
    """Whether the conditions of a data set are texts, whether they are classes, and how many; 0
    classes: none, or unknown before the images are read."""
    if data is None or data.prompts is not None:
        return data is not None, False, 0
    with suppress(UserError):  # reported by the checks of `data`
        source = data_source(data)
        if source.captions() is not None:
            return True, False, 0
        return False, source.has_classes, source.num_classes
    return False, False, 0
