"""The assembled video LDM: `init`, `encode`, `decode`, `condition`, `denoise`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from nuwa_jax.errors import UserError
from nuwa_jax.models.attention import check_implementation, implementation
from nuwa_jax.models.autoencoder import AutoencoderConfig, Encoder, TemporalDecoder
from nuwa_jax.models.clip import ClipVision, ClipVisionConfig, preprocess
from nuwa_jax.models.clip_text import ClipText, ClipTextConfig
from nuwa_jax.models.drag_attention import DragAttentionConfig, DragEmbedder, DragEmbedding
from nuwa_jax.models.flow_encoder import FlowEncoder, FlowEncoderConfig, FlowFeature, FlowHeads
from nuwa_jax.models.layers import sinusoids
from nuwa_jax.models.lora import init_lora
from nuwa_jax.models.sections import section, text_section
from nuwa_jax.models.text import TextEncoder, TextEncoderConfig, token_mask
from nuwa_jax.models.unet import UNet, UNetConfig

Params = dict[str, Any]
# For what runs once: a U-Net compiles in a fraction of the time, and rounds the same.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Parts whose parameters are read by Flax modules alone, each by the layer that uses it.
MODULES = ("autoencoder", "drag", "flow_encoder", "image_encoder", "text", "unet")
VECTOR_CHANNELS = 256  # sinusoids per number of the conditioning vector (SVD)


class Drop(NamedTuple):
    """Which conditions are withheld, per sample; each guidance scale comes from one of them."""

    text: Bool[Array, " b"]
    image: Bool[Array, " b"]
    drag: Bool[Array, " b"]


class Condition(NamedTuple):
    """All that the denoiser needs besides the noisy latents; computed once per sample."""

    concat: Float[Array, "b t h w c"] | None
    context: Float[Array, "b l c"] | None
    context_mask: Bool[Array, "b l"] | None
    vector: Float[Array, "b v"] | None
    flow: dict[str, FlowFeature] | None
    drags: DragEmbedding | None


@dataclasses.dataclass(frozen=True)
class VideoLDM:
    """A video latent diffusion model, described by its configs; parameters live outside.

    `params` is a plain nested dict with one entry per part: `autoencoder`, `latents` (mean and
    scale per channel, measured, never trained), `unet` and, where configured, `text`,
    `image_encoder`, `flow_encoder`, `drag`. A condition that is not given, and one that is dropped,
    leave the network as it is without that part.

    The first frame enters as latents concatenated to the noisy ones (`image_concat`; in the
    autoencoder's own scale if `image_concat_raw`, as SVD wants it; with a channel that marks the
    known frame if `image_mask`) and, with an `image_encoder`, as one token of the context.
    `augmentation` is the deviation of the noise added to the picture whose latents are concatenated
    (SVD: 0.02). `vector` names the numbers whose sinusoids are added to the time embedding: any of
    "fps", "motion_bucket", "augmentation". With `lora_rank`, `lora` holds a low-rank
    update of every linear layer of the base U-Net, which `nuwa_jax.models.lora.merge_lora` adds in
    before any method here takes the parameters. `attention` is what computes large attention
    (`nuwa_jax.models.attention.implementation`).
    """

    autoencoder: AutoencoderConfig
    unet: UNetConfig
    flow_encoder: FlowEncoderConfig | None = None
    text: TextEncoderConfig | ClipTextConfig | None = None
    image_encoder: ClipVisionConfig | None = None
    vector: tuple[str, ...] = ("fps",)
    motion_bucket: float = 4.0
    augmentation: float = 0.0
    image_concat: bool = True
    image_concat_raw: bool = False
    image_mask: bool = True
    lora_rank: int = 0
    attention: str = "auto"
    dtype: Any = jnp.float32
    modules: ClassVar[tuple[str, ...]] = MODULES

    def __post_init__(self) -> None:
        check_implementation(self.attention)

    @classmethod
    def from_config(cls, config: Any) -> VideoLDM:
        """Builds the model from `config.model` of a config file."""
        drag = section(DragAttentionConfig, config.get("drag"))
        flow = section(FlowEncoderConfig, config.get("flow_encoder"))
        autoencoder = section(AutoencoderConfig, config.autoencoder)
        unet = section(UNetConfig, config.unet)
        unet = dataclasses.replace(
            unet,
            out_channels=autoencoder.latent_channels,
            drag=drag,
            flow_injection=flow.injection if flow else "none",
            flow_where=flow.where if flow else unet.flow_where,
        )
        return cls(
            autoencoder=autoencoder,
            unet=unet,
            flow_encoder=flow,
            text=text_section(config.get("text")),
            image_encoder=section(ClipVisionConfig, config.get("image_encoder")),
            vector=tuple(config.vector),
            motion_bucket=config.get("motion_bucket", 4.0),
            augmentation=config.get("augmentation", 0.0),
            image_concat_raw=config.get("image_concat_raw", False),
            image_concat=config.image_concat,
            image_mask=config.image_mask,
            lora_rank=config.get("lora_rank", 0),
            attention=config.get("attention", "auto"),
            dtype=jnp.dtype(config.dtype),
        )

    def latent_shape(self, height: int, width: int, frames: int) -> tuple[int, int, int, int]:
        """Latent (t, h, w, c) of a clip of `frames` frames of `height` x `width` pixels.

        Raises:
          UserError: the size does not divide by the autoencoder's reduction times the U-Net's.
        """
        reduction = self.autoencoder.reduction
        whole = reduction * 2 ** (len(self.unet.channel_mult) - 1)
        if height % reduction or width % reduction or (height % whole or width % whole):
            raise UserError(
                f"height and width must be multiples of {whole} (autoencoder {reduction}, U-Net "
                f"{whole // reduction}), got {height}x{width}: change data.height and data.width"
            )
        channels = self.autoencoder.latent_channels
        return frames, height // reduction, width // reduction, channels

    def init(self, key: PRNGKeyArray, *, height: int, width: int, frames: int) -> Params:
        """Random float32 parameters; the sizes given matter only for their divisibility."""
        t, h, w, c = self.latent_shape(height, width, frames)
        keys = dict(
            zip(
                ("encoder", "decoder", "text", "flow", "heads", "drag", "unet", "image"),
                jax.random.split(key, 8),
                strict=True,
            )
        )
        params: Params = {
            "autoencoder": {
                "encoder": _init(self._encoder, keys["encoder"], jnp.zeros((1, height, width, 3))),
                "decoder": _init(self._decoder, keys["decoder"], jnp.zeros((1, t, h, w, c))),
            },
            "latents": {
                "mean": jnp.zeros((c,)),
                "scale": jnp.full((c,), self.autoencoder.scale),
            },
        }
        if self.text is not None:
            params["text"] = _init(self._text, keys["text"], jnp.zeros((1, 1), jnp.int32))
        if self.image_encoder is not None:
            side = self.image_encoder.image_size
            pixels = jnp.zeros((1, side, side, 3))
            params["image_encoder"] = _init(self._image_encoder, keys["image"], pixels)
        if self.flow_encoder is not None:
            flow = jnp.zeros((1, t, height, width, 2))
            encoder = _init(self._flow_encoder, keys["flow"], flow)
            features = jax.eval_shape(self._flow_encoder.apply, {"params": encoder}, flow)
            features = [jnp.zeros(f.shape) for f in features]
            heads = _init(self._flow_heads, keys["heads"], features, jnp.ones((1,)))
            params["flow_encoder"] = {"encoder": encoder}
            if heads:  # only FiLM has any
                params["flow_encoder"]["heads"] = heads
        if self.unet.drag is not None:
            params["drag"] = _init(
                self._drag,
                keys["drag"],
                jnp.zeros((1, 1, t, 2)),
                jnp.zeros((1, 1, t), jnp.int32),
                jnp.zeros((1, h, w, c)),
                jnp.ones((1,)),
            )
        # The condition's shapes are all the U-Net needs to be initialised; whatever computes them.
        anywhere = dataclasses.replace(self, attention="auto")
        condition = jax.eval_shape(
            lambda p: anywhere.condition(
                p,
                image=jnp.zeros((1, height, width, 3)),
                text=jnp.zeros((1, 1), jnp.int32),
                flow=jnp.zeros((1, t, height, width, 2)),
                points=jnp.zeros((1, 1, t, 2)),
                state=jnp.zeros((1, 1, t), jnp.int32),
                fps=jnp.ones((1,)),
                frames=t,
                size=(height, width),
            ),
            params,
        )
        condition = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), condition)
        x = jnp.zeros((1, t, h, w, c))
        params["unet"] = _init(
            self._unet, keys["unet"], *self._unet_inputs(x, x[:, 0, 0, 0, 0], condition)
        )
        if self.lora_rank:
            key = jax.random.fold_in(keys["unet"], 1)
            params["lora"] = init_lora(key, {"unet": params["unet"]}, self.lora_rank)
        return params

    def posterior(
        self, params: Params, video: Float[Array, "b t H W 3"]
    ) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]:
        """Mean and log variance of the latents, before normalisation; `video` in [-1, 1]."""
        b, t = video.shape[:2]
        frames = video.reshape(b * t, *video.shape[2:])
        moments = self._apply(self._encoder, params["autoencoder"]["encoder"], frames)
        moments = moments.reshape(b, t, *moments.shape[1:]).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def normalize(self, params: Params, z: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """Autoencoder's latents to the diffusion model's: `(z - mean) * scale`."""
        return (z - params["latents"]["mean"]) * params["latents"]["scale"]

    def denormalize(self, params: Params, z: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """The inverse of `normalize`."""
        return z / params["latents"]["scale"] + params["latents"]["mean"]

    def encode(self, params: Params, video: Float[Array, "b t H W 3"]) -> Float[Array, "b t h w c"]:
        """Normalised latents (the posterior's mean) of a video in [-1, 1]."""
        return self.normalize(params, self.posterior(params, video)[0])

    def encode_text(self, params: Params, text: Int[Array, "b l"]) -> Float[Array, "b l2 c"]:
        """The captions' features, as `condition` takes them for `text_embedding`."""
        return self._text_context(params["text"], text, jnp.zeros((len(text),), bool), None)[0]

    def decode(
        self, params: Params, latents: Float[Array, "b t h w c"], frames_per_call: int = 0
    ) -> Float[Array, "b t H W 3"]:
        """Video, about [-1, 1], of normalised latents.

        Args:
          params: the model's parameters.
          latents: normalised, as `encode` gives them.
          frames_per_call: how many consecutive frames the temporal decoder sees at once; 0: all,
            which is smoothest. Fewer need less memory. DragNUWA 1.5 decodes 1 at a time, so that
            its decoder never smooths over frames.
        """
        z = self.denormalize(params, latents)
        t = z.shape[1]
        if not 0 < frames_per_call < t:
            return self.decode_raw(params, z)
        # One call after another, or their memory would add up.
        whole = t - t % frames_per_call
        chunks = rearrange(z[:, :whole], "b (n t) h w c -> n b t h w c", t=frames_per_call)
        video = jax.lax.map(lambda chunk: self.decode_raw(params, chunk), chunks)
        video = rearrange(video, "n b t h w c -> b (n t) h w c")
        if whole < t:
            video = jnp.concatenate([video, self.decode_raw(params, z[:, whole:])], axis=1)
        return video

    def decode_raw(self, params: Params, z: Float[Array, "b t h w c"]) -> Float[Array, "b t H W 3"]:
        """Video of latents as the encoder gives them (not normalised)."""
        video = self._apply(self._decoder, params["autoencoder"]["decoder"], z)
        return video.astype(jnp.float32)

    def condition(
        self,
        params: Params,
        *,
        frames: int,
        size: tuple[int, int],
        image: Float[Array, "b H W 3"] | None = None,
        text: Int[Array, "b l"] | None = None,
        flow: Float[Array, "b t H W 2"] | None = None,
        points: Float[Array, "b k t 2"] | None = None,
        state: Int[Array, "b k t"] | None = None,
        fps: Float[Array, " b"] | None = None,
        noise: Float[Array, "b H W 3"] | None = None,
        drop: Drop | None = None,
        image_latents: Float[Array, "b h w c"] | None = None,
        text_embedding: Float[Array, "b l2 c"] | None = None,
    ) -> Condition:
        """Everything that does not depend on the noisy latents.

        Args:
          params: the model's parameters.
          frames: frames t of the video to be made.
          size: its height and width in pixels; points and flow are in these pixels.
          image: the first frame in [-1, 1].
          text: the captions' tokens (`nuwa_jax.data.tokenizer`): bytes, or CLIP's.
          flow: dense or rasterised flow, pixels per frame; `flow[:, 0] = 0`.
          points: drags in pixels, with their `state`.
          fps: frames per second; enters where the config's `vector` names it.
          noise: standard normal, for `augmentation`; without it nothing is added.
          drop: samples from which a condition is withheld.
          image_latents: of the first frame, as `encode` gives them: in place of encoding `image`,
            which is then needed for the image encoder alone. Not with `noise`, which is added to
            the picture itself.
          text_embedding: what the text encoder makes of `text`, in place of running it.
        """
        given = [a for a in (image, image_latents, text, flow, points, fps) if a is not None]
        if not given:
            raise ValueError("give at least one of image, text, flow, points, fps")
        b = given[0].shape[0]
        t, h, w, c = self.latent_shape(*size, frames)
        drop = drop or Drop(*(jnp.zeros((b,), bool) for _ in range(3)))

        first = jnp.zeros((b, h, w, c))
        has_image = jnp.zeros((b,))
        if image is not None or image_latents is not None:
            has_image = 1.0 - drop.image.astype(jnp.float32)
            if image_latents is not None:
                first = image_latents
                if self.image_concat_raw:
                    first = self.denormalize(params, first)
            else:
                picture = image
                if self.augmentation and noise is not None:
                    picture = image + self.augmentation * noise
                first = self.posterior(params, picture[:, None])[0][:, 0]
                if not self.image_concat_raw:
                    first = self.normalize(params, first)
            first = first * has_image[:, None, None, None]
        concat = None
        if self.image_concat:
            parts = [jnp.broadcast_to(first[:, None], (b, t, h, w, c))]
            if self.image_mask:
                # One channel says in which frame the picture is known: in the first, if given.
                known = (jnp.arange(t) == 0).astype(jnp.float32)[None] * has_image[:, None]
                parts.append(jnp.broadcast_to(known[:, :, None, None, None], (b, t, h, w, 1)))
            concat = jnp.concatenate(parts, axis=-1)

        context = mask = None
        if self.text is not None:
            context, mask = self._text_context(params["text"], text, drop.text, text_embedding)

        if self.image_encoder is not None:
            embedding = jnp.zeros((b, self.image_encoder.projection))
            if image is not None:
                pixels = preprocess(image, self.image_encoder.image_size)
                embedding = self._apply(self._image_encoder, params["image_encoder"], pixels)
                embedding = embedding * has_image[:, None]
            if context is None:
                context = embedding[:, None]
            else:
                context = jnp.concatenate([context, embedding[:, None]], axis=1)
                if mask is not None:
                    mask = jnp.concatenate([mask, jnp.ones((b, 1), bool)], axis=1)

        keep = 1.0 - drop.drag.astype(jnp.float32)
        features = None
        if self.flow_encoder is not None and flow is not None:
            part = params["flow_encoder"]
            maps = self._apply(self._flow_encoder, part["encoder"], flow)
            features = self._apply(self._flow_heads, part.get("heads", {}), maps, keep)
        drags = None
        if self.unet.drag is not None and points is not None:
            # Pixel centres are at integers; the network sees units of the picture.
            position = (points + 0.5) / jnp.asarray([size[1], size[0]], jnp.float32)
            drags = self._apply(self._drag, params["drag"], position, state, first, keep)

        vector = None
        if self.vector:
            numbers = {
                "fps": jnp.zeros((b,)) if fps is None else fps,
                "motion_bucket": jnp.full((b,), self.motion_bucket),
                "augmentation": jnp.full((b,), self.augmentation),
            }
            vector = jnp.concatenate(
                [sinusoids(numbers[name], VECTOR_CHANNELS) for name in self.vector], axis=-1
            )
        return Condition(concat, context, mask, vector, features, drags)

    def denoise(
        self,
        params: Params,
        x: Float[Array, "b t h w c"],
        sigma: Float[Array, " b"],
        condition: Condition,
    ) -> Float[Array, "b t h w c"]:
        """The EDM-preconditioned estimate D(x; sigma) of the clean latents (v-prediction).

        c_skip = 1/(s²+1), c_out = -s/sqrt(s²+1), c_in = 1/sqrt(s²+1), c_noise = ln(s)/4 (SVD,
        `VScalingWithEDMcNoise`).
        """
        s = sigma.reshape(-1, 1, 1, 1, 1)
        c_in = 1 / jnp.sqrt(s**2 + 1)
        inputs = self._unet_inputs(x * c_in, jnp.log(sigma) / 4, condition)
        out = self._apply(self._unet, params["unet"], *inputs)
        return x / (s**2 + 1) - out * s * c_in

    def _text_context(
        self,
        params: Params,
        text: Int[Array, "b l"] | None,
        dropped: Bool[Array, " b"],
        embedding: Float[Array, "b l2 c"] | None,
    ) -> tuple[Float[Array, "b l2 c"], Bool[Array, "b l2"] | None]:
        """The captions' features and which of them count; a dropped caption is an empty one."""
        if embedding is not None:
            # Of the captions only the empty one, which takes the place of those dropped, is left
            # to be encoded.
            empty, empty_mask = self._text_context(
                params, jnp.zeros_like(text[:1]), jnp.ones((1,), bool), None
            )
            if embedding.shape[1:] != empty.shape[1:]:
                raise UserError(
                    f"text embeddings have shape {embedding.shape[1:]}, the text encoder makes "
                    f"{empty.shape[1:]} of a caption: prepare them with this model's, and with "
                    "the same data.text_length"
                )
            context = jnp.where(dropped[:, None, None], empty, embedding.astype(empty.dtype))
            if empty_mask is None:
                return context, None
            known = token_mask(text, self.text.stride)
            return context, jnp.where(dropped[:, None], empty_mask, known)
        if isinstance(self.text, ClipTextConfig):
            empty = self.text.empty_text(self.text.max_length if text is None else text.shape[1])
            text = jnp.where(dropped[:, None], empty, empty if text is None else text)
            # Padding counts: networks trained on CLIP's features were shown those of all tokens.
            return self._apply(self._text, params, text).tokens, None
        text = jnp.zeros((len(dropped), 1), jnp.int32) if text is None else text
        text = jnp.where(dropped[:, None], 0, text)
        return self._apply(self._text, params, text)

    def _unet_inputs(self, x: Array, c_noise: Array, condition: Condition) -> tuple[Any, ...]:
        if condition.concat is not None:
            x = jnp.concatenate([x, condition.concat], axis=-1)
        return (
            x,
            c_noise,
            condition.context,
            condition.vector,
            condition.flow,
            condition.drags,
            condition.context_mask,
        )

    def _apply(self, module: Any, params: Params, *inputs: Any) -> Any:
        with implementation(self.attention):
            return module.apply({"params": params}, *inputs)

    @property
    def _encoder(self) -> Encoder:
        return Encoder(self.autoencoder, self.dtype)

    @property
    def _decoder(self) -> TemporalDecoder:
        return TemporalDecoder(self.autoencoder, self.dtype)

    @property
    def _text(self) -> TextEncoder | ClipText:
        module = ClipText if isinstance(self.text, ClipTextConfig) else TextEncoder
        return module(self.text, self.dtype)

    @property
    def _image_encoder(self) -> ClipVision:
        return ClipVision(self.image_encoder, self.dtype)

    @property
    def _flow_encoder(self) -> FlowEncoder:
        unet = self.unet
        return FlowEncoder(
            self.flow_encoder,
            unet.model_channels,
            unet.channel_mult,
            self.autoencoder.reduction,
            self.dtype,
        )

    @property
    def _flow_heads(self) -> FlowHeads:
        unet = self.unet
        return FlowHeads(self.flow_encoder, unet.model_channels, unet.channel_mult, self.dtype)

    @property
    def _drag(self) -> DragEmbedder:
        return DragEmbedder(self.unet.drag, self.dtype)

    @property
    def _unet(self) -> UNet:
        return UNet(self.unet, self.dtype)


def to_float(video: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """uint8 in [0, 255] to float32 in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """The inverse of `to_float`, rounded; what is beyond [-1, 1] is cut."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def _init(module: Any, key: PRNGKeyArray, *args: Any) -> Params:
    if isinstance(key, jax.core.Tracer):
        return module.init(key, *args).get("params", {})
    return jax.jit(module.init, compiler_options=QUICK_COMPILE)(key, *args).get("params", {})
