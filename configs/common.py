"""What every config shares: the defaults that a preset then changes."""

from __future__ import annotations

from ml_collections import ConfigDict

from nuwa_jax.errors import UserError

BASE = (r"^(autoencoder|latents|image_encoder)/", "freeze")
LORA = r"^lora/"  # of a converted checkpoint; models trained here have none
NOT_DRAG = r"^(text/|unet/(?!.*(flow_|drag_)))"
FLOW = r"^(flow_encoder/|unet/.*flow_)"
DRAG = r"^(drag/|unet/.*drag_)"


def stages() -> ConfigDict:
    """The four stages; each rule is (regex over the parameter's path, "train" or "freeze")."""
    c = ConfigDict()
    c.autoencoder = stage(
        rules=(
            (r"^autoencoder/", "train"),
            (r"^(latents|text|image_encoder|unet|flow_encoder|drag|lora)/", "freeze"),
        ),
        condition="none",
        drop=(0.0, 0.0, 0.0),
    )
    c.autoencoder.objective = "reconstruct"
    c.text_to_video = stage(
        rules=(BASE, (NOT_DRAG, "train"), (FLOW, "freeze"), (DRAG, "freeze"), (LORA, "train")),
        condition="none",
        drop=(0.1, 0.1, 0.0),
    )
    c.flow = stage(
        rules=(BASE, (NOT_DRAG, "freeze"), (FLOW, "train"), (DRAG, "freeze"), (LORA, "freeze")),
        condition="flow",
        drop=(0.1, 0.1, 0.1),
    )
    c.drag = stage(
        rules=(BASE, (NOT_DRAG, "train"), (FLOW, "train"), (DRAG, "train"), (LORA, "train")),
        condition="drag",
        drop=(0.1, 0.1, 0.1),
    )
    return c


def stage(*, rules: tuple, condition: str, drop: tuple[float, float, float]) -> ConfigDict:
    """One row of the curriculum; a preset sets its steps, batch size and learning rate."""
    c = ConfigDict()
    c.objective = "denoise"
    c.rules = rules
    c.condition = condition
    c.drop = ConfigDict(dict(zip(("text", "image", "drag"), drop, strict=True)))
    c.steps = 1000
    c.batch_size = 8
    c.learning_rate = 1e-4
    c.warmup_steps = 50
    c.time_budget_minutes = 0.0
    c.dense_to_sparse = (0.0, 0.0)
    return c


def base() -> ConfigDict:
    """A complete config; sizes are those of the smallest useful model."""
    c = ConfigDict()
    c.preset = "nuwa"
    c.seed = 0

    c.data = ConfigDict()
    c.data.height = c.data.width = 64
    c.data.frames = 8
    c.data.fps = 8.0
    c.data.max_drags = 8
    c.data.text_length = 64
    c.data.tokenizer = ""  # CLIP's vocabulary, where model.text.kind is "clip"
    c.data.scenes_weight = 1.0
    c.data.clips = ""
    c.data.clips_weight = 0.0
    c.data.sources = ()  # further ones: dict(kind="records", path="folder", weight=1.0), ...
    c.data.format = "video"  # or "latents", where they were prepared
    c.data.flip_probability = 0.0
    c.data.flow_divisor = 1  # dense flow is sent at 1 / this of the size
    c.data.threads = 2
    c.data.workers = 0  # processes that make batches; 0: threads of this one
    c.data.prefetch = 4
    c.data.prefetch_to_device = 2
    c.data.max_replaced_share = 0.01  # of unreadable records, before the run stops
    c.data.allow_changed_clips = False
    c.data.scenes = ConfigDict()
    c.data.sampler = ConfigDict()
    c.data.perturb = ConfigDict()
    c.data.drags_on = ConfigDict()
    c.data.camera = ConfigDict()

    c.model = ConfigDict()
    c.model.dtype = "float32"
    # Kernels of the platform; or "xla" (none), "splash" (TPU), "cudnn" (GPU): models/attention.py
    c.model.attention = "auto"
    c.model.vector = ("fps",)
    c.model.image_concat = True
    c.model.image_mask = True

    c.curriculum = ("autoencoder", "text_to_video", "flow", "drag")
    c.stages = stages()
    c.diffusion = ConfigDict(dict(p_mean=0.7, p_std=1.6, sigma_min=0.002, sigma_max=700.0))
    c.raster = ConfigDict(dict(sigma=20.0, kernel_size=199))
    c.sampling = ConfigDict(dict(steps=25, method="euler"))
    c.sampling.temperature = 1.0  # scale of the noise that sampling starts from
    c.sampling.decode_frames = 0  # frames the decoder sees at once; 0: all
    c.sampling.guidance = ConfigDict(dict(text=1.0, image=1.0, drag=1.0))

    # Devices per axis (nuwa_jax/parallel/mesh.py); one may be -1: what the others leave.
    c.mesh = ConfigDict(dict(data=-1, fsdp=1, frame=1, tensor=1, slices=1))

    c.train = ConfigDict()
    c.train.init_from = ""  # weights to start from: an exported or converted model, or a workdir
    c.train.log_every = 20
    c.train.checkpoint_every = 500
    c.train.keep = 2  # checkpoints, the newest ones
    c.train.keep_every = 0  # and those of steps that are multiples of this; 0: none
    c.train.sample_every = 1000
    c.train.ema_decay = 0.999
    c.train.clip_norm = 1.0
    c.train.weight_decay = 0.01
    c.train.accumulate = 1
    # In which gradients are summed over devices; bfloat16 halves what is sent, and rounds.
    c.train.reduce_dtype = "float32"
    # A step whose loss or gradient is not finite changes nothing: "skip" counts it, and ends the
    # run after max_skipped in a row; "stop" ends it at once.
    c.train.non_finite = "skip"
    c.train.max_skipped = 10
    c.train.allow_changed_batch_size = False  # of a run that goes on
    c.train.use_previous_checkpoint = False  # the newest, if damaged, is deleted: for one start
    c.train.adam_b1, c.train.adam_b2 = 0.9, 0.999
    c.train.decay, c.train.decay_share = "linear", 0.2
    c.train.l1_weight, c.train.mse_weight, c.train.kl_weight = 1.0, 1.0, 1e-6
    c.train.calibration_batches = 8
    # Kept compiled programs: a folder, relative to the workdir, or a URL; "": none are kept.
    c.train.compile_cache = "compile_cache"
    c.train.peak_flops = 0.0  # FLOP/s of one device, for the MFU; 0: of nuwa_jax/watching/mfu.py
    c.train.profile_steps = (0, 0)  # first step and number of steps to trace, from 0 in a process
    c.train.slow_hosts_every = 10  # logged lines between comparisons of hosts; 0: never
    c.train.slow_host_ratio = 1.25  # of the median step: slower hosts are named
    c.train.watchdog_seconds = 0.0  # a step may take; 0: 10 times the median, at least 5 minutes
    c.train.watchdog_abort = False  # end with exit code 124 when a step takes longer
    return c


def no_variants(arg: str | None, name: str) -> None:
    """Refuses `--config=file.py:arg` where the file has no variants."""
    if arg:
        raise UserError(f"{name} has no variant {arg!r}: use --config={name}")


def full_size() -> ConfigDict:
    """SVD's sizes at 320x576, what the three presets have in common."""
    c = base()
    c.data.height, c.data.width, c.data.frames = 320, 576, 14
    c.data.text_length = 256
    c.data.scenes_weight, c.data.clips_weight = 0.0, 1.0
    c.data.flow_divisor = 4
    c.model.dtype = "bfloat16"
    c.model.autoencoder = ConfigDict()
    c.model.unet = ConfigDict(dict(remat="block"))  # or another of models/remat.py
    for stage in c.stages.values():
        stage.batch_size = 64
        stage.steps = 100_000
        stage.learning_rate = 1e-5
        stage.warmup_steps = 1000
    c.stages.autoencoder.learning_rate = 1e-4
    c.stages.text_to_video.learning_rate = 1e-4
    return c


def pod(c: ConfigDict) -> ConfigDict:
    """What the configs for pods have in common: the mesh, the batch, precomputed latents."""
    # Gradients of 16 parts are scattered in whole tiles (320 / 16 is not, 640 / 16 and more are);
    # of 64 parts most are not, and the compiler adds them whole on every device instead.
    c.mesh.update(data=-1, fsdp=16)
    c.model.unet.remat = "branches"  # half a GiB of a chip for 5 % of the arithmetic
    c.data.format = "latents"
    c.data.flip_probability = 0.0  # latents cannot be mirrored
    c.curriculum = tuple(name for name in c.curriculum if name != "autoencoder")
    for stage in c.stages.values():
        stage.batch_size = 256  # one clip per chip of a v5e:16x16
    return c


def variant(c: ConfigDict, arg: str | None, name: str) -> ConfigDict:
    """The config itself, or for `small` the same at widths and sizes that a CPU can step."""
    if not arg:
        return c
    if arg != "small":
        raise UserError(f"{name} has no variant {arg!r}: use --config={name} or {name}:small")
    c.data.height, c.data.width, c.data.frames = 32, 64, 3
    c.data.text_length = 32
    c.data.scenes_weight, c.data.clips_weight = 1.0, 0.0
    c.data.format = "video"  # scenes have no latents
    c.mesh.update(data=-1, fsdp=1)
    c.model.dtype = "float32"
    c.model.autoencoder.update(base_channels=16, channel_mult=(1, 1), num_res_blocks=1)
    c.model.unet.update(
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_factors=(1,),
        remat="block",
    )
    c.model.unet.head_channels = 16
    if "text" in c.model:
        c.model.text.update(channels=32, layers=1, heads=2)
    if "drag" in c.model:
        c.model.drag.update(levels=(0,), token_channels=32, heads=2)
    if "image_encoder" in c.model:
        c.model.image_encoder.update(width=32, layers=1, heads=2, projection=32, image_size=56)
    for stage in c.stages.values():
        stage.update(steps=2, batch_size=2, warmup_steps=1)
    c.train.update(log_every=1, checkpoint_every=100, sample_every=0, calibration_batches=1)
    return c
