"""Captioned digits, and teachers and students that read captions."""

import pytest
import torch

from harness.config.schema import DataSection, Sampler
from harness.context import Context, TrainingData
from harness.data import captioned_digits
from harness.data import datasets as data
from harness.data.captioned_digits import ATTRIBUTES, COPIES, captions, draw, measure
from harness.data.digits import read_digits
from harness.data.registry import AttributeChecker, Prompts, data_source
from harness.errors import UserError
from harness.evaluation.feature_set import FeatureSet
from harness.evaluation.references import Reference
from harness.evaluation.registry import METRICS
from harness.fake_score import drop_condition
from harness.features.base import parse_settings
from harness.features.small_clip import SmallCLIP, SmallCLIPExtractor
from harness.features.train import augmented
from harness.networks import build_denoiser, load_denoiser, save_denoiser
from harness.networks.backbones.unet2d_condition import TextDenoiser
from harness.sampling import heun, sample
from harness.validation import parse_experiment
from tests.test_config import keys

NETWORK = {
    "type": "UNet2DConditionModel",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def embeddings(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of prompt n: tokens that say n."""
    return {"embeddings": (numbers.view(-1, 1, 1) + torch.arange(12.0).view(1, 3, 4)).half()}


@pytest.fixture
def denoiser() -> TextDenoiser:
    torch.manual_seed(0)
    return build_denoiser(NETWORK, (3, 16, 16), 10, null=embeddings(torch.tensor([-5])))


@pytest.fixture(scope="module")
def parts():
    return data_source(DataSection(name="captioned-digits")).read()


def test_every_image_has_the_attributes_of_its_caption(parts):
    train, held, names = parts
    texts, attributes = captions()
    assert len(train) == 1438 * COPIES and len(held) == 359 * COPIES and names[7] == "seven"
    assert len(texts) == len(set(texts)) == 10 * 4 * 2 * 2 * 3
    for part in (train, held):
        assert attributes.check(part.pixels, part.labels).all()
        assert attributes.classes(part.labels).bincount().min() > 200
    text, row = texts[train.labels[0]], attributes.values[train.labels[0]]
    for values, i in zip(ATTRIBUTES.values(), row, strict=True):
        assert values[i] in text


def test_checker_reports_the_attributes_in_which_another_caption_differs(parts):
    train, _, _ = parts
    (_, attributes), index = captions(), torch.arange(0, 2000)
    pixels, labels = train.pixels[index], train.labels[index]
    other = labels.roll(7)
    same = attributes.values[labels, 1:] == attributes.values[other, 1:]
    assert torch.equal(attributes.check(pixels, other), same) and not same.all()
    assert torch.equal(measure(255 - pixels)[:, 1], 1 - measure(pixels)[:, 1])


def test_drawings_of_a_digit_depend_only_on_its_number():
    digits, labels = read_digits()
    both, numbers = draw(digits[:6], labels[:6], torch.arange(6))
    one, number = draw(digits[4:5], labels[4:5], torch.tensor([4]))
    assert torch.equal(one, both[4 * COPIES : 5 * COPIES])
    assert torch.equal(number, numbers[4 * COPIES : 5 * COPIES])


def test_captions_are_loaded_with_the_data_set(tmp_path):
    data.prepare(DataSection(name="captioned-digits"), tmp_path)
    for images in (True, False):
        dataset = data.load(tmp_path, images)
        assert dataset.num_conditions == 480 and dataset.num_classes == 10
        assert dataset.prompts.texts == captions()[0]
        assert torch.equal(dataset.attributes.values, captions()[1].values)
    labels = torch.tensor([0, 479])
    assert dataset.classes(labels).tolist() == [0, 9]
    plain = data.Dataset("x", None, None, ("a", "b"), "")
    assert plain.num_conditions == 2 and torch.equal(plain.classes(labels), labels)


def test_attribute_accuracy_asks_for_everything():
    values = torch.tensor([[3, 0, 0, 0], [4, 1, 1, 1]])
    attributes = AttributeChecker(values, ("ink", "ground", "side"), measure)
    shown = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
    classes = attributes.classes(torch.tensor([0, 0, 1, 1]))
    probabilities = torch.nn.functional.one_hot(torch.tensor([3, 3, 3, 4]), 10).float()
    outputs = {"probabilities": probabilities, "attributes_correct": shown.all(dim=1)}
    outputs |= {f"{name}_correct": shown[:, i] for i, name in enumerate(("ink", "ground", "side"))}
    features = FeatureSet(outputs, Reference(None), torch.tensor([0, 0, 1, 1]), classes)
    found = {name: METRICS[name].estimate(features).value for name in METRICS if "accuracy" in name}
    assert found == {
        "accuracy": 75.0,
        "attribute-accuracy": 25.0,
        "ink-accuracy": 75.0,
        "ground-accuracy": 100.0,
        "side-accuracy": 75.0,
    }


def test_a_text_denoiser_s_folder_is_whole(denoiser, tmp_path):
    sha256 = save_denoiser(denoiser.eval(), tmp_path)
    again = load_denoiser(tmp_path, sha256)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 20.0])
    asked = embeddings(torch.tensor([3, 7]))
    with torch.no_grad():
        for condition in (None, asked):
            assert torch.equal(denoiser(x, sigma, condition), again(x, sigma, condition))
        assert not torch.equal(again(x, sigma), again(x, sigma, asked))
    assert again.text_width == 4 and again.num_classes == 0
    (tmp_path / "null.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        load_denoiser(tmp_path, sha256)


def test_prompts_reach_the_network_by_number(denoiser):
    """In training and in sampling: the embeddings of the numbers that are drawn."""
    pixels = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    sources = TrainingData((3, 16, 16), 6, 2.5, pixels, torch.arange(6), embeddings=embeddings)
    sources.pair_tensors = {"x": torch.zeros(6, 3, 16, 16), "condition": torch.arange(6)}
    context = Context({"student": denoiser}, sources, 0, 0, range(8))
    for _, condition in (context.real(), context.pairs()[1:]):
        numbers = condition["embeddings"][:, 0, 0]
        assert condition["embeddings"].shape == (8, 3, 4) and set(numbers.tolist()) <= set(range(6))
    assert context.generated().condition["embeddings"].shape == (8, 3, 4)
    given = []

    def generate(z, condition, noise):
        given.append(condition["embeddings"][:, 0, 0].long())
        return z

    labels = torch.cat(
        [y for _, y in sample(generate, 300, (3, 2, 2), 6, 0, embeddings=embeddings)]
    )
    assert torch.equal(torch.cat(given)[:300], labels)


def test_a_share_of_conditions_is_left_out(denoiser):
    context = Context({}, TrainingData((3, 16, 16), 6, 2.5), 0, 0, range(4000))
    asked = embeddings(torch.zeros(4000))
    found = drop_condition(context, denoiser, asked, 0.1)["embeddings"][:, 0, 0]
    assert set(found.tolist()) == {0.0, -5.0}
    assert float((found == -5).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_a_guided_sampler_counts_and_uses_both_scores(denoiser):
    calls = []
    hook = denoiser.register_forward_hook(lambda _, args, out: calls.append(len(out)))
    z, asked = torch.randn(2, 3, 16, 16), embeddings(torch.tensor([1, 2]))
    with torch.no_grad():
        guided = heun(denoiser.eval(), z, asked, steps=3, guidance=2.0)
        images = sum(calls)
        plain = heun(denoiser, z, asked, steps=3)
    hook.remove()
    sampler = Sampler(steps=3, guidance=2.0)
    assert images == 2 * sampler.nfe == 20 and Sampler(steps=3).nfe == 5
    assert not torch.allclose(guided, plain)


def captioned_dataset() -> data.Dataset:
    texts, attributes = captions()
    none = data.Images(torch.zeros(0, 3, 16, 16, dtype=torch.uint8), torch.zeros(0))
    return data.Dataset("captioned-digits", none, none, (), "", attributes, Prompts(texts, ""))


def test_a_clip_reads_captions(tmp_path):
    torch.manual_seed(0)
    clip = SmallCLIP(captioned_dataset(), 8).eval()
    assert clip.captions.shape == (480, 1, 16) and len(clip.captions.unique(dim=0)) == 480
    settings = parse_settings({"type": "clip", "images": 1})
    encoder, texts = SmallCLIPExtractor("clip", settings), list(captions()[0])
    encoder.network = clip
    assert encoder.truncated(texts) == 0 and encoder.truncated(["one two three " * 9]) == 1
    tokens = encoder.encode(texts[:5])["embeddings"]
    assert tokens.shape == (5, 16, 16)
    # open_clip computes the embedding of a text from its last token.
    ends = clip.captions[:5, 0].argmax(dim=1)
    pooled = tokens[torch.arange(5), ends] @ clip.clip.text_projection
    assert torch.allclose(pooled, clip.clip.encode_text(clip.captions[:5, 0]), atol=1e-5)
    # The rest is padded with that token, so that the teacher reads only trained tokens.
    given = []
    handle = clip.clip.token_embedding.register_forward_hook(
        lambda _, args, out: given.append(args)
    )
    encoder.encode(texts[:5])
    handle.remove()
    for row, end in zip(given[0][0], ends, strict=True):
        assert row[end:].unique().tolist() == [row.max()] and (row[:end] < row.max()).all()


def test_captions_that_say_the_same_in_other_words_match(parts):
    """CLIP's targets: all images of which a caption is true; computed here pair by pair."""
    torch.manual_seed(0)
    clip = SmallCLIP(captioned_dataset(), 8).eval()
    labels = torch.tensor([0, 1, 2, 3, 0, 479])  # three wordings of one meaning, and others
    pixels = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    sources = TrainingData((3, 16, 16), 480, 1.0, pixels, labels)
    context = Context({"features": clip}, sources, seed=0, step=0, samples=range(12))
    extractor = SmallCLIPExtractor("clip", parse_settings({"type": "clip", "images": 1}))
    images, drawn = context.real()
    x, named = augmented(context, images), captions()[1].values[drawn]
    logits = clip(x, clip.captions[drawn, 0])
    expected = 0.0
    for i in range(12):
        true = [j for j in range(12) if (named[i] == named[j]).all()]
        for scores in (logits[i], logits[:, i]):
            expected -= scores.log_softmax(0)[true].mean() / 24
    assert torch.allclose(extractor.loss(context), expected, atol=1e-5)
    assert len(named.unique(dim=0)) < len(drawn.unique())


def test_text_teachers_and_captions_must_match(tiny):
    captioned, text = {"name": "captioned-digits"}, {"network": NETWORK}

    def problem_keys(teacher=None, **changes):
        teacher = tiny["teachers"]["edm"] | (teacher or {})
        return keys(tiny | {"teachers": {"edm": teacher}} | changes)

    network, encoder = "teachers.edm.network.type", "teachers.edm.text_encoder"
    assert network in problem_keys(data=captioned)
    assert encoder in problem_keys(text, data=captioned)
    assert encoder in problem_keys(text | {"text_encoder": "tiny-clp"}, data=captioned)
    assert encoder in problem_keys(text | {"text_encoder": "tiny-cnn"}, data=captioned)
    assert network in problem_keys(text)
    assert encoder in problem_keys({"text_encoder": "tiny-clip"})


def test_guidance_needs_an_unconditional_teacher(tiny):
    tiny["teachers"]["edm"] |= {"label_dropout": 0.0, "sampler": {"steps": 3, "guidance": 2.0}}
    tiny["students"]["sid"]["settings"] = tiny["students"]["sid"].get("settings", {}) | {
        "teacher_guidance": 1.5
    }
    assert keys(tiny) == [
        "teachers.edm.sampler.guidance",
        "students.sid.settings.teacher_guidance",
    ]
    tiny["teachers"]["edm"]["label_dropout"] = 0.1
    parse_experiment(tiny, "t.yaml")


def test_attributes_are_measured_at_half_strength():
    """Generated images are paler than the data."""
    digits, labels = read_digits()
    pixels, numbers = draw(digits[:200], labels[:200], torch.arange(200))
    ground = torch.tensor(list(captioned_digits.GROUNDS.values()))[
        captions()[1].values[numbers, 2]
    ].view(-1, 3, 1, 1)
    pale = (ground + 0.5 * (pixels.float() - ground)).round().to(torch.uint8)
    assert captions()[1].check(pale, numbers).float().mean() > 0.99
