"""diffusers' text-to-image pipelines as denoisers, compared with the pipelines themselves."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from harness.data.prompt_tables import table_format
from harness.data.registry import read_prompts
from harness.denoiser import GuidedDenoiser, guided
from harness.errors import UserError
from harness.networks import load_denoiser, save_denoiser
from harness.networks.vp import schedule_sigmas
from harness.teachers.pipelines import PipelineFolder
from harness.teachers.text_embeddings import TextEmbeddings, embed, embed_prompts
from tests import pipelines

PROMPTS = ["a red seven", "two dogs on a bench"]
MAKERS = {
    "sd-epsilon": pipelines.stable_diffusion,
    "sd-v": lambda: pipelines.stable_diffusion("v_prediction"),
    "pixart": pipelines.pixart,
}


@pytest.fixture(scope="module", params=MAKERS)
def both(request, tmp_path_factory):
    """A pipeline and its `PipelineFolder`."""
    pipe, folder = MAKERS[request.param](), tmp_path_factory.mktemp("pipeline")
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe, PipelineFolder(folder)


@pytest.fixture(scope="module")
def encoded(both):
    """The denoiser and the condition of the prompts."""
    _, folder = both
    encoder = folder.text_encoder()
    return folder.denoiser(encoder.encode([""])), encoder.encode(PROMPTS)


def latents(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def run(pipe, scheduler, guidance: float, steps: int = 5) -> list[torch.Tensor]:
    """Latents after each step of the pipeline."""
    states, original = [], pipe.scheduler
    pipe.scheduler = scheduler
    options = {}
    if "PixArt" in type(pipe).__name__:
        options = {"use_resolution_binning": False, "clean_caption": False}
        options |= {"callback": lambda step, time, x: states.append(x.clone())}
    else:
        options["callback_on_step_end"] = lambda _, step, time, inputs: (
            states.append(inputs["latents"].clone()) or inputs
        )
    try:
        pipe(
            PROMPTS,
            latents=latents(),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
            **options,
        )
    finally:
        pipe.scheduler = original
    return states


@torch.no_grad()
def euler(denoiser, x, condition, sigmas) -> list[torch.Tensor]:
    """Euler steps of the denoiser between noise levels; `x` has the first level."""
    steps = []
    for now, then in pairwise(sigmas):
        x0 = denoiser(x, now.expand(len(x)), condition)
        x = x0 + then / now * (x - x0)
        steps.append(x)
    return steps


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.contract
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_denoiser_follows_the_trajectory_of_euler(both, encoded, guidance):
    (pipe, _), (denoiser, condition) = both, encoded
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = run(pipe, scheduler, guidance)
    first = latents() * scheduler.init_noise_sigma
    if scheduler.config.timestep_spacing == "leading":  # its noise is that of sqrt(1 + sigma²)
        assert scheduler.init_noise_sigma > scheduler.sigmas[0]
    ours = euler(guided(denoiser, guidance), first, condition, scheduler.sigmas)
    assert len(ours) == len(expected) == 5
    assert max(map(relative, ours, expected)) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_denoiser_follows_the_trajectory_of_ddim(both, encoded, guidance):
    """Deterministic DDIM is Euler's method in x / sqrt(alpha)."""
    (pipe, _), (denoiser, condition) = both, encoded
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    expected = run(pipe, scheduler, guidance)
    sigmas = denoiser.log_sigmas.exp()[scheduler.timesteps].float()
    levels = torch.cat([sigmas, torch.zeros(1)])
    first = latents() * (1 + sigmas[0] ** 2).sqrt()
    ours = euler(guided(denoiser, guidance), first, condition, levels)
    scaled = [x / (1 + s**2).sqrt() for x, s in zip(ours, levels[1:], strict=True)]
    assert max(map(relative, scaled, expected)) < 1e-4


def test_guidance_combines_two_evaluations(encoded):
    denoiser, condition = encoded
    x, sigma = latents() * 3, torch.tensor([3.0, 0.7])
    with torch.no_grad():
        plain, conditional = denoiser(x, sigma), denoiser(x, sigma, condition)
        assert relative(plain, conditional) > 1e-3
        output = GuidedDenoiser(denoiser, 7.5)(x, sigma, condition)
    assert relative(output, plain + 7.5 * (conditional - plain)) < 1e-5
    assert guided(denoiser, 1.0) is denoiser


def test_timesteps_invert_the_schedule(encoded):
    denoiser, _ = encoded
    sigmas = schedule_sigmas(denoiser.schedule)
    times = denoiser.time(sigmas.float())
    assert torch.equal(times, torch.arange(len(sigmas)).float())
    between = denoiser.time((sigmas[500] * sigmas[501]).sqrt().float().view(1))
    assert float(between) == pytest.approx(500.5, abs=1e-3)
    ends = denoiser.time(torch.tensor([1e-9, 1e9]))
    assert ends.tolist() == [0.0, len(sigmas) - 1.0]


@pytest.mark.contract
def test_text_encoder_matches_the_pipeline(both, encoded):
    (pipe, _), (_, condition) = both, encoded
    with torch.no_grad():
        expected = pipe.encode_prompt(
            prompt=PROMPTS,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    assert torch.equal(condition["embeddings"], expected[0])
    if "mask" in condition:
        assert torch.equal(condition["mask"], expected[1])


@pytest.mark.contract
def test_codec_matches_the_pipeline_and_is_differentiable(both):
    pipe, folder = both
    codec, x = folder.codec(), latents().requires_grad_()
    pixels = codec(x)
    expected = pipe.vae.decode(x / pipe.vae.config.scaling_factor, return_dict=False)[0]
    assert torch.equal(pixels, expected) and pixels.shape == (2, 3, 16, 16)
    assert torch.autograd.grad(pixels.sum(), x)[0].abs().sum() > 0
    assert not any(p.requires_grad for p in codec.parameters())


def test_pixart_for_1024_pixels_gets_size_conditions(tmp_path):
    pipe = pipelines.pixart(sample_size=128)
    pipe.save_pretrained(tmp_path)
    folder = PipelineFolder(tmp_path)
    condition = folder.text_encoder().encode(PROMPTS)
    x = torch.randn(2, 4, 128, 128, generator=torch.Generator().manual_seed(1))
    size = {"resolution": torch.tensor([[1024.0, 1024.0]] * 2)}
    size["aspect_ratio"] = torch.tensor([[1.0]] * 2)
    with torch.no_grad():
        expected = pipe.transformer(
            x,
            encoder_hidden_states=condition["embeddings"],
            encoder_attention_mask=condition["mask"],
            timestep=torch.tensor([400, 400]),
            added_cond_kwargs=size,
        ).sample
        ours = folder.denoiser().run_backbone(x, torch.tensor([400.0, 400.0]), condition)
    assert torch.equal(ours, expected[:, :4]) and expected.shape[1] == 8


def test_invalid_pipeline_folder_is_rejected(both, tmp_path):
    _, good = both

    def code(call) -> str:
        with pytest.raises(UserError) as error:
            call()
        return error.value.code

    assert code(lambda: PipelineFolder(tmp_path)) == "missing-file"
    folder = tmp_path / "broken"
    shutil.copytree(good.folder, folder)
    index = folder / "model_index.json"
    original = index.read_text()
    index.write_text(json.dumps(json.loads(original) | {"_class_name": "PixArtAlfaPipeline"}))
    with pytest.raises(UserError, match="did you mean 'PixArtAlphaPipeline'"):
        PipelineFolder(folder)
    index.write_text(original)
    config = folder / "text_encoder" / "config.json"
    other = json.loads(config.read_text())
    key = "hidden_size" if "hidden_size" in other else "d_model"
    config.write_text(json.dumps(other | {key: 48}))
    assert code(PipelineFolder(folder).denoiser) == "shape"
    shutil.rmtree(folder / "vae")
    assert code(lambda: PipelineFolder(folder)) == "missing-file"


# -- prompts ------------------------------------------------------------------------------------


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n a dog \na cat\n")
    prompts = read_prompts(file)
    assert prompts.texts == ("a cat", "a dog", "a cat") and len(prompts.sha256) == 64
    file.write_text("a cat\n\n \n")
    with pytest.raises(UserError, match=r"line 2 \(and 1 more\) is empty"):
        read_prompts(file)
    file.write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_prompts(file)
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")


def test_byte_order_mark_is_not_part_of_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa café\r\na dog\r\n".encode())
    assert read_prompts(file).texts == ("a café", "a dog")
    for content in ("a café\n".encode("latin-1"), "a dog\n".encode("utf-16-le"), b"\xff\xfea\0"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is not UTF-8 text") as error:
            read_prompts(file)
        assert error.value.code == "encoding" and str(file) in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "a cat"),
        ("p.TSV", "a cat"),
        ("p.json", '["a cat"]'),
        ("p.txt", "id,file,caption\n166963,COCO_val2014_000000278829.jpg,A field with players"),
        ("p.txt", "1,2.jpg,A man\n3,4.jpg,A man, a dog\n5,6.jpg,A field"),
        ("p.txt", "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t"),
        ("p.txt", "bond\tAbstract\tBasic\nlight\tAbstract\tBasic"),
        ("p.txt", "caption\na cat\na dog"),
        ("p.txt", "text\na cat\na dog"),
        ("p.txt", "\ufeffprompt\r\na cat\r\n"),  # from Excel
        ("p.txt", '"prompt","note, long"\n"a cat",""'),
        ("p.txt", "prompt,dalle_url\na cat, black,x"),  # a column with an unknown name
        ("p.txt", ",prompt\n0,a cat\n1,a dog"),  # of pandas
        ("p.txt", "bond\tAbstract\nlight\tAbstract\tBasic"),  # empty last fields are missing
        ("p.txt", "what\tkind\na cat\tAnimals"),
        ("p.txt", 'cat.jpg,A cat\ndog.png,"A dog, black"'),
        ("p.txt", "A cat, black;img/cat.JPG\nA dog;dog.webp"),
        ("p.txt", "a cat,https://x.org/1\na dog,https://x.org/2"),
        ("p.txt", '"a man, with a dog",Animals\na cat,Animals'),
        ("p.txt", '"bond";Abstract\n"light";Abstract'),
        ("p.txt", "1. a cat\n2. a dog"),
        ("p.txt", '"A man, with a dog"\n"A cat"'),
        ("p.txt", '"A man, with a dog"\nA cat\n"A dog, black"'),  # where a comma needs them
        ("p.txt", 'A cat, black\n"a sign that says ""open"""'),
        ("p.txt", '"a cat",\n"a dog",'),  # a list from a program
        ("p.txt", '"a cat\non a mat"\na dog'),
        ("p.txt", '[\n "a cat",\n "a dog"\n]'),
        ("p.txt", '{"caption": "a cat"}\n{"caption": "a dog"}'),
    ],
)
def test_prompts_in_a_table_are_rejected(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text + "\n", encoding="utf-8", newline="")
    with pytest.raises(UserError, match="one prompt per line") as error:
        read_prompts(file)
    assert error.value.code == "table" and str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_format_of_a_url_is_that_of_its_path():
    assert table_format("https://x.org/p.csv?download=true") == "is a .csv file"
    assert table_format("https://x.org/p.txt?name=p.csv") is None


def test_prompts_that_resemble_tables_are_read(tmp_path):
    file = tmp_path / "prompts.txt"
    for text in (
        "a cat, a dog\na man, a bench",
        "7 ships, at sea\n1,000 lanterns\n2,500 candles, lit",
        'the word "caption"\n"hello" says a sign that reads "hi"\nno quotes',
        "[a cat]\n{a dog}",
        "image\ntext",
        "cat,dog\na bird",
        "1girl,solo,best quality\n1boy,best quality",  # another number of tags
        "a cat,a dog",  # a single line shows no columns
        "a bottle of 1,5 litres\na cup of 2,5 litres",
        "a cat\n3, maybe 4 dogs",  # the first line would be a heading of one column
        'a sign, "open, closed"\n"open" on a sign\na 7" record, old\na 12" record',
        "a cat | 4k\na dog | 4k",
        "red; green\nblue; yellow",
        "photo.png of a cat\na file named dog.png",
        "prompt, a knight in armour\na cat",
        "text, watermark, logo\na cat\na dog",
        "Description, style, medium\na cat",
        '"Live, laugh, love"\na cat\na dog',
        "1girl,solo,smile\n1boy,hat,sad",
        "<lora:x:1>,cat,dog\n<lora:y:1>,bird,fish",
        "a blurry photo, IMG_0001.jpg\na sharp photo, DSC_1234.jpg",
        "1. FC Köln in a stadium\n1. FC Nürnberg in a stadium",
        "a\tcat\na dog",
    ):
        file.write_text(text + "\n")
        assert read_prompts(file).texts == tuple(text.split("\n"))


def test_embeddings_are_stored_once(both, tmp_path, monkeypatch, caplog):
    _, folder = both
    monkeypatch.setattr("harness.teachers.text_embeddings.SHARD", 4)
    file, encoder = tmp_path / "prompts.txt", folder.text_encoder()
    texts = [f"prompt number {i}" for i in range(9)] + ["word " * 200]
    file.write_text("\n".join(texts))
    prompts = read_prompts(file)
    embeddings = embed_prompts(encoder, prompts, tmp_path / "text")
    assert f"truncated 1 of 10 prompts to the {encoder.limit} tokens" in caplog.text
    assert embeddings.index["prompts"] == 10
    rows = embeddings(torch.tensor([9, 0, 5]))
    expected = encoder.encode([texts[i] for i in (9, 0, 5)])
    assert rows["embeddings"].dtype == torch.float16
    torch.testing.assert_close(
        rows["embeddings"].float(), expected["embeddings"], rtol=2e-3, atol=2e-3
    )
    assert ("mask" in rows) == encoder.masked
    # Only the missing shard is computed again.
    (embeddings.folder / "index.json").unlink()
    (embeddings.folder / "shard-00001.json").unlink()
    batches = []
    original = type(encoder).encode
    monkeypatch.setattr(
        type(encoder), "encode", lambda self, t: batches.append(len(t)) or original(self, t)
    )
    again = embed_prompts(encoder, prompts, tmp_path / "text")
    assert (again.folder, again.sha256) == (embeddings.folder, embeddings.sha256)
    assert batches == [4]


def test_damaged_embeddings_are_detected_and_replaced(both, tmp_path):
    _, folder = both
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    encoder, prompts = folder.text_encoder(), read_prompts(tmp_path / "prompts.txt")
    stored = embed_prompts(encoder, prompts, tmp_path).folder
    shard = stored / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"delete teacher\.json"):
        TextEmbeddings(stored, "teacher.json")(torch.tensor([0]))
    embeddings = embed_prompts(encoder, prompts, tmp_path)
    assert embeddings.folder == stored
    row, expected = embeddings(torch.tensor([0])), embed(encoder, ("one",))
    torch.testing.assert_close(row["embeddings"], expected["embeddings"], rtol=2e-3, atol=2e-3)


def test_saved_pipeline_denoiser_is_loaded_unchanged(encoded, tmp_path):
    denoiser, condition = encoded
    again = load_denoiser(tmp_path, save_denoiser(denoiser, tmp_path))
    x, sigma = latents() * 3, torch.tensor([3.0, 0.7])
    with torch.no_grad():
        for c in (None, condition):
            assert torch.equal(denoiser(x, sigma, c), again(x, sigma, c))
    assert type(again) is type(denoiser) and again.precondition == denoiser.precondition
