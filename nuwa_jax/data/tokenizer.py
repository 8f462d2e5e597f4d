"""Text to tokens: the bytes of UTF-8, so that there is no vocabulary to download."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

PAD = 0
VOCAB_SIZE = 257  # the padding and 256 bytes


def encode_text(text: str, length: int) -> Int32[np.ndarray, " {length}"]:
    """The tokens of `text`: each byte plus 1, padded with 0 or cut to `length`."""
    if length < 1:
        raise ValueError(f"a text takes at least one token, got length {length}")
    data = text.encode("utf-8")[:length]
    tokens = np.full(length, PAD, np.int32)
    tokens[: len(data)] = np.frombuffer(data, np.uint8).astype(np.int32) + 1
    return tokens
