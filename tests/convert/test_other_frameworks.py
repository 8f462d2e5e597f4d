"""PyTorch's files, and diffusers as the other side; run where those are installed."""

import numpy as np
import pytest
from einops import rearrange
from small_svd import FRAMES, HEADS, SIZE, random_params, small_config, write

from nuwa_jax.convert.export import export
from nuwa_jax.convert.released import convert
from nuwa_jax.errors import UserError
from nuwa_jax.tensor_files import SafetensorsFile

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    config = small_config()
    params = random_params(config)
    write(folder, config, params)
    return folder, config, params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pth_file_is_read_like_a_safetensors_file(ours, tmp_path, dtype):
    export(ours[0], tmp_path / "sgm", "sgm")
    file = SafetensorsFile(tmp_path / "sgm" / "model.safetensors")
    state = {n: torch.tensor(file.read(n)).to(getattr(torch, dtype)) for n in file.specs}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.pth")
    for name, source in (("a", tmp_path / "model.pth"), ("b", tmp_path / "sgm/model.safetensors")):
        convert(source, tmp_path / name, dtype=dtype, size=SIZE, frames=FRAMES, **HEADS)
    a, b = (SafetensorsFile(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.specs == b.specs
    for name in a.specs:
        np.testing.assert_array_equal(a.read(name), b.read(name), err_msg=name)


def test_a_pth_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"hook": print}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="weights alone"):
        convert(tmp_path / "bad.pth", tmp_path / "out")


def test_diffusers_gives_the_same_output_from_what_is_exported(ours, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    import jax

    from nuwa_jax.models.unet import UNet
    from nuwa_jax.models.video_ldm import QUICK_COMPILE, VideoLDM

    folder, config, params = ours
    export(folder, tmp_path, "hf")
    theirs = diffusers.UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "unet").eval()
    for module in theirs.modules():
        # Theirs is 1e-6 in some blocks; Stability's code, and ours, have 1e-5 in all of them.
        if type(module).__name__ in ("ResnetBlock2D", "TemporalResnetBlock"):
            module.norm1.eps = module.norm2.eps = 1e-5
    model = VideoLDM.from_config(config.model)
    rng = np.random.default_rng(1)
    b, (h, w) = 2, (4, 8)
    x = rng.normal(size=(b, FRAMES, h, w, 8)).astype(np.float32)
    context = rng.normal(size=(b, 1, 32)).astype(np.float32)
    numbers = np.array([[4.0, 4.0, 0.02], [7.0, 100.0, 0.1]], np.float32)
    c_noise = np.array([0.3, -0.8], np.float32)

    from nuwa_jax.models.layers import sinusoids

    vector = np.concatenate([sinusoids(numbers[:, i], 256) for i in range(3)], axis=-1)
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(UNet(model.unet).apply, compiler_options=QUICK_COMPILE)
        found = apply({"params": params["unet"]}, x, c_noise, context, vector)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(rearrange(x, "b t h w c -> b t c h w")),
            torch.tensor(c_noise),
            torch.tensor(context),
            torch.tensor(numbers),
        ).sample.numpy()
    expected = rearrange(expected, "b t c h w -> b t h w c")
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 7e-6


def test_diffusers_encodes_and_decodes_the_same(ours, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    import jax

    from nuwa_jax.models.video_ldm import QUICK_COMPILE, VideoLDM

    folder, config, params = ours
    # Theirs builds its middle block with layers_per_block res blocks; Stability's always has 2.
    config = small_config(flow=False)
    config.model.autoencoder.update(num_res_blocks=2, base_channels=32)
    params = random_params(config)
    write(folder, config, params)
    export(folder, tmp_path, "hf")
    theirs = diffusers.AutoencoderKLTemporalDecoder.from_pretrained(tmp_path / "vae").eval()
    model = VideoLDM.from_config(config.model)
    video = np.random.default_rng(2).uniform(-1, 1, (1, 2, 16, 24, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        encode, decode = (
            jax.jit(method, compiler_options=QUICK_COMPILE)
            for method in (model.posterior, model.decode_raw)
        )
        mean, _ = encode(params, video)
        decoded = np.asarray(decode(params, mean))
    with torch.no_grad():
        frames = torch.tensor(rearrange(video, "b t h w c -> (b t) c h w"))
        latents = theirs.encode(frames).latent_dist.mode()
        expected = theirs.decode(latents, num_frames=2).sample.numpy()
    expected = rearrange(expected, "(b t) c h w -> b t h w c", t=2)
    latents = rearrange(latents.numpy(), "(b t) c h w -> b t h w c", t=2)
    for ours_, theirs_ in ((mean, latents), (decoded, expected)):
        error = np.linalg.norm(ours_ - theirs_) / np.linalg.norm(theirs_)
        assert error < 5e-6
