"""Cuts tests/golden/clip_text.npz: two small text towers with random weights, as torch runs them.

pip install torch transformers open_clip_torch
python tests/models/cut_clip_text_golden.py

The towers are those of the packages that released weights are used with, under the names of their
files. Weights are float16 values, run in float64. A name `tower|array` groups what a test reads.
"""

import pathlib

import numpy as np

OUT = pathlib.Path(__file__).parents[1] / "golden" / "clip_text.npz"
LENGTH, VOCABULARY = 12, 96
END = VOCABULARY - 1


def main() -> None:
    towers = {"sgm": open_clip_tower(), "hf": transformers_tower()}
    out = {f"{tower}|{name}": a for tower, arrays in towers.items() for name, a in arrays.items()}
    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.1f} kB")


def open_clip_tower(*, seed=0, width=32, heads=4, layers=2, quick_gelu=False):
    """OpenCLIP's: padded with 0, GELU as asked for; mind that `visual.` is in the file, too."""
    import torch
    from open_clip.model import CLIP

    model = CLIP(
        embed_dim=24,
        vision_cfg=dict(image_size=4, patch_size=4, width=8, layers=1, head_width=8),
        text_cfg=dict(
            context_length=LENGTH, vocab_size=VOCABULARY, width=width, heads=heads, layers=layers
        ),
        quick_gelu=quick_gelu,
    )
    out = randomize(model, seed, keep=lambda name: not name.startswith("visual."))
    out["text"] = texts(seed, padding=0)
    text = torch.from_numpy(out["text"])
    with torch.no_grad():
        x = model.token_embedding(text) + model.positional_embedding
        for i, block in enumerate(model.transformer.resblocks):
            if i == layers - 1:
                # What Stable Diffusion 2 reads: FrozenOpenCLIPEmbedder, layer="penultimate".
                out["penultimate"] = as_float32(model.ln_final(x))
            x = block(x, attn_mask=model.attn_mask)
        out["last"] = as_float32(model.ln_final(x))
        out["pooled"] = as_float32(model.encode_text(text))
    out["heads"] = np.int32(heads)
    return out


def transformers_tower(*, seed=1, width=32, heads=2, layers=2, mlp_ratio=2, act="quick_gelu"):
    """Hugging Face's: padded with the end token."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=mlp_ratio * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            projection_dim=20,
            hidden_act=act,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=END,
            pad_token_id=END,
        )
    )
    out = randomize(model, seed)
    out["text"] = texts(seed, padding=END)
    with torch.no_grad():
        given = model(torch.from_numpy(out["text"]), output_hidden_states=True)
        hidden = given.hidden_states[-2]
        out["penultimate"] = as_float32(model.text_model.final_layer_norm(hidden))
    out["last"], out["pooled"] = as_float32(given.last_hidden_state), as_float32(given.text_embeds)
    out["heads"] = np.int32(heads)
    return out


def randomize(model, seed, keep=lambda name: True):
    """Puts random float16 values into a model, now float64; returns those to be kept."""
    import torch

    rng = np.random.default_rng(seed)
    state = {}
    for name, old in model.state_dict().items():
        fan_in = old.shape[-1] if old.ndim > 1 else 16
        value = rng.normal(size=tuple(old.shape)) * fan_in**-0.5
        if old.ndim == 1 and name.endswith("weight"):  # of a norm
            value += 1
        state[name] = np.asarray(value, np.float16)
    model.double().eval().load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    return {f"weights|{name}": value for name, value in state.items() if keep(name)}


def texts(seed, padding):
    """Three texts, the last as long as can be."""
    rng = np.random.default_rng(seed)
    tokens = np.full((3, LENGTH), padding, np.int64)
    for row, length in zip(tokens, (2, 5, LENGTH - 2), strict=True):
        row[: length + 2] = [END - 1, *rng.integers(0, END - 1, length), END]
    return tokens


def as_float32(x):
    return x.numpy().astype(np.float32)


if __name__ == "__main__":
    main()
