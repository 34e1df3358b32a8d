"""Tokenizers of pipelines' text encoders.

Without its vocabulary, transformers builds a tokenizer of a few tokens, for which all prompts are
the same. Only whole tokenizers are accepted here.
"""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness.errors import UserError

# Each alternative holds the whole vocabulary.
FILES = {
    "clip": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "t5": (("tokenizer.json",), ("spiece.model",)),
}
SETTINGS = "tokenizer_config.json"
# Embeddings are padded to a multiple of 64 or 128 rows: T5's has 32,128 rows for 32,100 tokens.
LEAST_SHARE = 0.99


def load_tokenizer(folder: Path, kind: str, vocabulary: int):
    """Load the tokenizer of a text encoder whose embedding has `vocabulary` rows. kind: "clip" or
    "t5". A `UserError` if a file is missing or damaged, or the tokenizer does not fit."""
    from transformers import CLIPTokenizer, T5Tokenizer

    _check_files(folder, kind)
    try:
        tokenizer = {"clip": CLIPTokenizer, "t5": T5Tokenizer}[kind].from_pretrained(folder)
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        unreachable = _unreachable(model, tokenizer.get_added_vocab())
    except Exception as error:  # of any of the libraries that read the files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{folder}: the tokenizer could not be read ({reason})", "damaged"
        ) from None
    found = f"{folder}: the tokenizer has {len(tokenizer)} tokens"
    if not LEAST_SHARE * vocabulary <= len(tokenizer) <= vocabulary:
        message = f"but the text encoder has embeddings of {vocabulary}; download both again"
        raise UserError(f"{found}, {message}", "tokenizer")
    if unreachable:
        message = f"but merges (merges.txt) for all except {len(unreachable)} of them"
        raise UserError(f"{found}, {message}; download it again", "tokenizer")
    return tokenizer


def _check_files(folder: Path, kind: str) -> None:
    complete = [names for names in FILES[kind] if all((folder / n).is_file() for n in names)]
    missing = "" if complete else ", or ".join(" and ".join(names) for names in FILES[kind])
    if not (folder / SETTINGS).is_file():
        missing = missing or SETTINGS
    if missing:
        message = f"{folder}: {missing} is missing; download the whole folder"
        raise UserError(message, "missing-file")
    absent = [package for package in ("sentencepiece", "protobuf") if not _installed(package)]
    if complete == [("spiece.model",)] and absent:
        message = f"spiece.model needs {' and '.join(absent)}: pip install {' '.join(absent)}"
        raise UserError(f"{folder}: {message}, or '.[text-to-image]'", "missing-package")


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _unreachable(model: dict, added: dict[str, int]) -> set[str]:
    """Tokens of a byte-pair encoding that no merge makes and that are not single symbols."""
    if model["type"] != "BPE":
        return set()
    suffix = model["end_of_word_suffix"] or ""
    made = {"".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]}
    whole = {token for token in model["vocab"] if len(token.removesuffix(suffix)) > 1}
    return whole - made - added.keys()
