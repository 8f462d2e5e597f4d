"""Text to tokens: the bytes of UTF-8, so that there is no vocabulary to download, or CLIP's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from nuwa_jax.errors import UserError

PAD = 0
VOCAB_SIZE = 257  # the padding and 256 bytes
CLIP_VOCAB_SIZE = 49_408

Tokenizer = Callable[[str, int], Int32[np.ndarray, " l"]]


def load_tokenizer(vocabulary: str | Path = "") -> Tokenizer:
    """`encode_text`, or CLIP's tokenizer where the files of its vocabulary are named.

    Raises:
      UserError: those files cannot be read.
    """
    if not vocabulary:
        return encode_text
    from nuwa_jax.data.clip_tokenizer import ClipTokenizer  # its tables take a while to load

    return ClipTokenizer.load(vocabulary)


def tokenizer_of(config: Any, folder: str | Path = "") -> Tokenizer:
    """The tokenizer that the text encoder of a whole config reads.

    Args:
      config: its `model.text` and `data.tokenizer` are looked at.
      folder: where `data.tokenizer` is looked for before it is taken as it is: a model's own.

    Raises:
      UserError: `data.tokenizer` is missing, cannot be read or belongs to another encoder.
    """
    text, path = config.model.get("text"), config.data.get("tokenizer", "")
    if text is None or text.get("kind", "bytes") != "clip":
        if path:
            raise UserError(
                f"data.tokenizer names CLIP's vocabulary, {path}, but the model does not read it: "
                'set model.text.kind="clip", or data.tokenizer=""'
            )
        return load_tokenizer()
    if not path:
        raise UserError(
            "model.text.kind is clip, whose vocabulary comes with its checkpoint: set "
            "data.tokenizer to a folder with vocab.json and merges.txt, or to OpenCLIP's "
            "bpe_simple_vocab_16e6.txt.gz"
        )
    beside = Path(folder) / path
    tokenizer = load_tokenizer(beside if beside.exists() else path)
    expected = text.get("vocabulary", CLIP_VOCAB_SIZE)
    if tokenizer.size != expected:
        raise UserError(
            f"{path} has {tokenizer.size} tokens, model.text.vocabulary is {expected}: give the "
            "vocabulary that came with the text encoder"
        )
    return tokenizer


def encode_text(text: str, length: int) -> Int32[np.ndarray, " {length}"]:
    """The tokens of `text`: each byte plus 1, padded with 0 or cut to `length`."""
    if length < 1:
        raise ValueError(f"a text takes at least one token, got length {length}")
    data = text.encode("utf-8")[:length]
    tokens = np.full(length, PAD, np.int32)
    tokens[: len(data)] = np.frombuffer(data, np.uint8).astype(np.int32) + 1
    return tokens
