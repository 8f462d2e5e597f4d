"""CLIP's byte-pair encoding, by the vocabulary files that come with a checkpoint.

Tokens are those of OpenAI's and OpenCLIP's own code, which all released text towers were trained
on: ftfy mends the text (curly quotes, ligatures, text in the wrong encoding), HTML entities are
resolved, white space is one blank, letters are small. Hugging Face's tokenizer leaves out the first
two steps and differs where they matter. Unlike either, a caption in which "<end_of_text>" is spelt
out keeps it as ordinary text: a caption cannot end itself.
"""

from __future__ import annotations

import functools
import gzip
import html
import itertools
import json
import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
from jaxtyping import Int32

from nuwa_jax.errors import UserError

PAD = 0
MERGES = 48_894  # that CLIP uses of a longer list
END_OF_WORD = "</w>"
VOCABULARY_FILES = "a folder with vocab.json and merges.txt, or OpenCLIP's .txt.gz"

CONTRACTION = re.compile(r"'(s|t|re|ve|m|ll|d)", re.IGNORECASE)


class ClipTokenizer:
    """Called with a text and a length, it gives that many tokens: start, text, end, padding.

    Attributes:
      size: how many tokens there are; the last two are start and end.
    """

    def __init__(self, ids: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        """`ids` has every token but start and end, which follow; earlier merges go first."""
        self._ids = dict(ids)
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._symbols = _byte_symbols()
        self.size = len(ids) + 2
        self._word = functools.lru_cache(maxsize=1 << 16)(self._encode_word)

    def __reduce__(self) -> tuple[type[ClipTokenizer], tuple[Any, ...]]:
        """Worker processes get the vocabulary without the words met so far."""
        return ClipTokenizer, (self._ids, list(self._ranks))

    @classmethod
    def load(cls, path: str | Path) -> ClipTokenizer:
        """The tokenizer of a folder with vocab.json and merges.txt, or of OpenCLIP's .txt.gz.

        Raises:
          UserError: there is no such file, or it holds something else.
        """
        path = Path(path)
        try:
            if path.is_dir():
                merges = _merges((path / "merges.txt").read_text(encoding="utf-8"))
                ids = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
                # Their names differ between releases, their places do not.
                ids = {token: i for token, i in ids.items() if i < len(ids) - 2}
            else:
                merges = _merges(gzip.decompress(path.read_bytes()).decode("utf-8"))
                symbols = sorted(_byte_symbols())
                tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *map("".join, merges)]
                ids = {token: i for i, token in enumerate(tokens)}
        except (OSError, EOFError, zlib.error, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"CLIP's vocabulary cannot be read from {path} ({error}): name {VOCABULARY_FILES}, "
                "as they come with the checkpoint of the text encoder"
            ) from error
        needed = {*_byte_symbols(), *(s + END_OF_WORD for s in _byte_symbols())}
        needed |= {"".join(pair) for pair in merges}
        if len(needed - ids.keys()) or sorted(ids.values()) != list(range(len(ids))):
            raise UserError(
                f"{path} is not CLIP's vocabulary: {len(needed - ids.keys())} of {len(needed)} "
                f"tokens have no number; copy {VOCABULARY_FILES} again"
            )
        return cls(ids, merges)

    def __call__(self, text: str, length: int) -> Int32[np.ndarray, " {length}"]:
        """The tokens of `text`, padded with 0, or cut to `length` with the end token kept."""
        if length < 2:
            raise ValueError(f"a text takes at least a start and an end token, got length {length}")
        tokens = np.full(length, PAD, np.int32)
        inner = self.encode(text)[: length - 2]
        tokens[: len(inner) + 2] = [self.size - 2, *inner, self.size - 1]
        return tokens

    def encode(self, text: str) -> list[int]:
        """The tokens of `text` alone, however many."""
        return [token for word in split_words(clean(text)) for token in self._word(word)]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        parts = [self._symbols[byte] for byte in word.encode("utf-8")]
        parts[-1] += END_OF_WORD
        while len(parts) > 1:
            unknown = len(self._ranks)
            pair = min(itertools.pairwise(parts), key=lambda p: self._ranks.get(p, unknown))
            if pair not in self._ranks:
                break
            merged = parts[:1]
            for part in parts[1:]:
                if (merged[-1], part) == pair:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return tuple(self._ids[part] for part in parts)


def clean(text: str) -> str:
    """Mended, in small letters, with single blanks."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def split_words(text: str) -> Iterator[str]:
    """Runs of letters, single digits, runs of anything else; English contractions by themselves.

    `'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+`, for which `re` lacks the
    Unicode categories. `text` has no white space but blanks.
    """
    for chunk in text.split(" "):
        start = 0
        while start < len(chunk):
            match = CONTRACTION.match(chunk, start)
            end = match.end() if match else start + 1
            kind = None if match else _kind(chunk[start])
            while kind in ("letter", "other") and end < len(chunk) and _kind(chunk[end]) == kind:
                end += 1
            yield chunk[start:end]
            start = end


def _kind(character: str) -> str:
    return {"L": "letter", "N": "number"}.get(unicodedata.category(character)[0], "other")


def _merges(text: str) -> list[tuple[str, str]]:
    # The first line is a title.
    lines = text.split("\n")[1 : 1 + MERGES]
    return [(first, second) for first, second in (line.split() for line in lines if line)]


@functools.cache
def _byte_symbols() -> tuple[str, ...]:
    """A printable character for each byte: its own in Latin-1, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))
