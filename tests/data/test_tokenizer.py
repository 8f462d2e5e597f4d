import numpy as np
import pytest

from nuwa_jax.data.tokenizer import PAD, VOCAB_SIZE, encode_text


def test_bytes_of_text_become_tokens_and_the_rest_is_padding():
    tokens = encode_text("aé", 6)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, [ord("a") + 1, 0xC3 + 1, 0xA9 + 1, PAD, PAD, PAD])


def test_long_text_is_cut_and_every_byte_has_a_token():
    assert encode_text("x" * 100, 7).shape == (7,)
    assert encode_text("\x00", 1)[0] == 1  # not the padding
    assert VOCAB_SIZE == 257
    # 0xF4 starts the last code points that UTF-8 has.
    assert encode_text("\U0010ffff", 4).max() < VOCAB_SIZE


def test_texts_that_differ_give_tokens_that_differ():
    assert not np.array_equal(encode_text("a red ball", 16), encode_text("a red bull", 16))


def test_no_room_for_a_token_is_an_error():
    with pytest.raises(ValueError, match="length 0"):
        encode_text("a", 0)
