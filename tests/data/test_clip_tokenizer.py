"""CLIP's byte-pair encoding on a vocabulary of 33 merges, made here in both forms of file.

The expected pieces are those of open_clip_torch 3.3.0's SimpleTokenizer on the same file.
"""

import gzip
import json
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict

from nuwa_jax.data.clip_tokenizer import ClipTokenizer
from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.pipeline import make_batches
from nuwa_jax.data.tokenizer import encode_text, load_tokenizer, tokenizer_of
from nuwa_jax.errors import UserError

MERGES = """t h;th e</w>;r e;re d</w>;d o;do g</w>;b a;l l</w>;ba ll</w>;' s</w>;i n;in g</w>;r u
ru n;run n;runn ing</w>;Ã ©</w>;c a;f Ã©</w>;ca fÃ©</w>;! !</w>;! !;!! !!</w>;o v;ov e;ove r</w>
ð Ł;ðŁ ĺ;2 0;2</w> 0;s t;st o;o p</w>""".replace("\n", ";").split(";")

# Printable bytes stand for themselves, the others for U+0100 and on; a word's last ends in "</w>".
SYMBOLS = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
SYMBOLS += [chr(256 + i) for i in range(256 - len(SYMBOLS))]
TOKENS = [*SYMBOLS, *(s + "</w>" for s in SYMBOLS), *(m.replace(" ", "") for m in MERGES)]
START, END = len(TOKENS), len(TOKENS) + 1

PIECES = {
    "": "",
    "the red dog": "the</w> red</w> dog</w>",
    "The RED Dog": "the</w> red</w> dog</w>",
    "  the\t red\n\ndog ": "the</w> red</w> dog</w>",
    "running over": "running</w> over</w>",
    # Contractions, where they begin a word.
    "dog's ball": "dog</w> 's</w> ball</w>",
    "DOG'S": "dog</w> 's</w>",
    "dogs'": "do g s</w> '</w>",
    "it's we're they'll": "i t</w> 's</w> w e</w> ' r e</w> th e y</w> ' ll</w>",
    "can't I'm you've I'd": "ca n</w> ' t</w> i</w> ' m</w> y o u</w> ' v e</w> i</w> ' d</w>",
    "''s": "' '</w> s</w>",
    "!'s": "! '</w> s</w>",
    # Each digit is a word; so are a fraction and a circled number.
    "2024": "2</w> 0</w> 2</w> 4</w>",
    "3rd": "3</w> r d</w>",
    "20%": "2</w> 0</w> %</w>",
    "½ ①": "Â ½</w> â ĳ ł</w>",
    # Punctuation.
    "dog, ball!!": "dog</w> ,</w> ball</w> !!</w>",
    "!!!!": "!!!!</w>",
    "well...": "w e ll</w> . . .</w>",
    "a_b-c/d": "a</w> _</w> b</w> -</w> c</w> /</w> d</w>",
    # Accents, composed or not, and other scripts.
    "café": "cafÃ©</w>",
    "cafe\u0301": "cafÃ©</w>",
    "CAFÉ": "cafÃ©</w>",
    "naïve": "n a Ã ¯ v e</w>",
    "红球 ボール": "ç º ¢ ç Ĳ ĥ</w> ã ĥ ľ ã ĥ ¼ ã ĥ «</w>",
    "Ελλάς": "Î µ Î » Î » Î ¬ Ï Ĥ</w>",
    "İstanbul": "i</w> Ì ĩ</w> st a n b u l</w>",
    # Emoji.
    "😀": "ðŁĺ Ģ</w>",
    "dog😀dog": "dog</w> ðŁĺ Ģ</w> dog</w>",
    "👨\u200d👩\u200d👧": "ðŁ ĳ ¨ â Ģ į ðŁ ĳ © â Ģ į ðŁ ĳ §</w>",
    # What ftfy and the resolving of entities mend.
    "dog’s ball": "dog</w> 's</w> ball</w>",
    "“the” dog…": '"</w> the</w> "</w> dog</w> â Ģ ¦</w>',
    "&lt;dog&gt; &amp;amp; ball": "<</w> dog</w> ></w> &</w> ball</w>",
    "<b>&quot;dog&quot;</b>": '<</w> b</w> > "</w> dog</w> " < /</w> b</w> ></w>',
    "cafÃ©": "cafÃ©</w>",
    "ﬁne": "f in e</w>",
    "ｄｏｇ": "dog</w>",
    "do\u00a0g": "d o</w> g</w>",
    "do\u200bg": "d o</w> â Ģ ĭ</w> g</w>",
    "\x07dog": "dog</w>",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The vocabulary as OpenCLIP's file and as a folder of Hugging Face's."""
    folder = tmp_path_factory.mktemp("vocabulary")
    lines = "\n".join(["#version: 0.2", *MERGES])
    packed = folder / "bpe.txt.gz"
    packed.write_bytes(gzip.compress(lines.encode()))
    (folder / "hf").mkdir()
    (folder / "hf" / "merges.txt").write_text(lines + "\n", encoding="utf-8")
    ids = {token: i for i, token in enumerate([*TOKENS, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "hf" / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    return {"OpenCLIP": packed, "Hugging Face": folder / "hf"}


@pytest.fixture(scope="module", params=["OpenCLIP", "Hugging Face"])
def tokenizer(request, files):
    return ClipTokenizer.load(files[request.param])


def test_pieces_are_those_of_open_clip(tokenizer):
    for text, pieces in PIECES.items():
        assert " ".join(TOKENS[i] for i in tokenizer.encode(text)) == pieces, text


def test_start_end_and_padding(tokenizer):
    assert tokenizer.size == len(TOKENS) + 2
    tokens = tokenizer("the red dog", 7)
    assert tokens.dtype == np.int32
    the, red, dog = (TOKENS.index(word) for word in ("the</w>", "red</w>", "dog</w>"))
    np.testing.assert_array_equal(tokens, [START, the, red, dog, END, 0, 0])
    np.testing.assert_array_equal(tokenizer("", 3), [START, END, 0])


def test_long_text_is_cut_and_keeps_its_end(tokenizer):
    the = TOKENS.index("the</w>")
    np.testing.assert_array_equal(tokenizer("the " * 100, 6), [START, the, the, the, the, END])
    np.testing.assert_array_equal(tokenizer("the the the", 5), [START, the, the, the, END])
    np.testing.assert_array_equal(tokenizer("dog", 2), [START, END])
    with pytest.raises(ValueError, match="length 1"):
        tokenizer("dog", 1)


def test_worker_processes_get_the_same_tokenizer(tokenizer):
    tokenizer("the red dog", 8)  # so that there are words in its cache
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.size == tokenizer.size
    for text in PIECES:
        np.testing.assert_array_equal(copy(text, 16), tokenizer(text, 16))


def test_a_caption_cannot_end_itself(tokenizer):
    for mark in ("<end_of_text>", "<|endoftext|>"):
        assert tokenizer.encode(f"dog {mark} dog")[-1] == TOKENS.index("dog</w>")
        assert max(tokenizer.encode(f"dog {mark} dog")) < START


def test_the_whole_vocabulary_gives_the_tokens_of_open_clip():
    open_clip = pytest.importorskip("open_clip.tokenizer")
    theirs = open_clip.SimpleTokenizer()
    ours = ClipTokenizer.load(open_clip.default_bpe())
    assert ours.size == 49408
    texts = [*PIECES, " ".join(PIECES), "a photo of a corgi's 1st skateboard, 4k — trending!"]
    for text, expected in zip(texts, theirs(texts).numpy(), strict=True):
        np.testing.assert_array_equal(ours(text, 77), expected, err_msg=text)


def test_what_is_not_a_vocabulary_is_told(files, tmp_path):
    with pytest.raises(UserError, match=r"cannot be read from .*nowhere.*vocab\.json"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")
    with pytest.raises(UserError, match=r"cannot be read.*vocab\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"t": 0, "h": 1, "a": 2, "b": 3}))
    with pytest.raises(UserError, match="not CLIP's vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"t": "zero"}))
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
    damaged = tmp_path / "bpe.txt.gz"
    for data in (b"t h\n", files["OpenCLIP"].read_bytes()[:-20], gzip.compress(b"title\nt h e\n")):
        damaged.write_bytes(data)
        with pytest.raises(UserError, match="cannot be read"):
            load_tokenizer(damaged)


def config_of(path, **text):
    config = ConfigDict(dict(model=dict(), data=dict()))
    if text:
        config.model.text = text
    if path is not None:
        config.data.tokenizer = str(path)
    return config


def test_bytes_are_read_unless_the_model_is_clips():
    for config in (config_of(None), config_of("", channels=8), config_of("", kind="bytes")):
        assert tokenizer_of(config) is encode_text


def test_vocabulary_and_model_must_belong_together(files):
    path, clip = files["OpenCLIP"], dict(kind="clip", vocabulary=END + 1)
    assert tokenizer_of(config_of(path, **clip)).size == END + 1
    # A model's own folder is looked into first.
    for folder, name in ((path.parent, "hf"), ("elsewhere", path)):
        assert tokenizer_of(config_of(name, **clip), folder).size == END + 1
    with pytest.raises(UserError, match=r"set data\.tokenizer to a folder"):
        tokenizer_of(config_of(None, **clip))
    with pytest.raises(UserError, match=rf"{END + 1} tokens, model.text.vocabulary is 49408"):
        tokenizer_of(config_of(path, kind="clip"))
    for text in ({}, dict(channels=8), dict(kind="bytes")):
        with pytest.raises(UserError, match="the model does not read it"):
            tokenizer_of(config_of(path, **text))


def test_batches_carry_clips_tokens(files):
    values = dict(height=32, width=32, frames=2, text_length=9, threads=0)
    texts = []
    for tokenizer in ("", str(files["OpenCLIP"])):
        config = DataConfig.from_config(values | dict(tokenizer=tokenizer))
        batches = make_batches(config, seed=3, batch_size=2)
        texts.append(next(batches).text)
        batches.close()
    as_bytes, tokens = texts
    assert as_bytes.max() < 257
    assert tokens.shape == (2, 9) and tokens.dtype == np.int32
    assert (tokens[:, 0] == START).all() and (tokens.max(1) == END).all()
