"""Guidance by a diffusers text-to-image pipeline: pixel-space (DeepFloyd IF's stage I, the embedded
prior) or latent (Stable Diffusion 1.x, 2.x, XL's base)."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.models.attention_processor import AttnAddedKVProcessor, AttnProcessor
from torch import Tensor

from ..camera import N_NUMBERS, flattened
from .protocol import Conditions
from .text import TextEncoders, frozen

PLAIN_ATTENTION_TOKENS = 1024  # up to here two matmuls beat torch's fused attention on a CPU
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NEEDED = ("tokenizer", "text_encoder", "unet", "scheduler")


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load a pipeline folder or hub model through diffusers, its weights in `dtype`. With
    HF_HUB_OFFLINE=1 only what the hub's cache holds is found. Raises ValueError with a one-line
    reason, and what to do, when it cannot be had."""
    try:
        with _quiet():
            return DiffusionPipeline.from_pretrained(
                name, torch_dtype=dtype, safety_checker=None, watermarker=None
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"guidance `{name}`: expected toybox, exemplar, sd15, sd21, sdxl, if, or the folder or "
            f"hub name of a diffusers pipeline that is complete and accessible, got: {reason}"
            f"{_advice(reason)}"
        ) from error


def _advice(reason: str) -> str:
    words = reason.lower()
    if "gated" in words or "401" in words or "restricted" in words:
        return " (accept the model's licence on its page, then run: hf auth login)"
    if "offline" in words or "connect" in words or "resolve" in words:
        return " (no network: download it once with network, or give a local folder)"
    if "no such file" in words or "no file named" in words or "not found" in words:
        return " (half downloaded? delete the folder, or its entry of the cache, and load again)"
    return ""


def load_tiny_vae(name: str, dtype: torch.dtype) -> AutoencoderTiny:
    """A distilled autoencoder, e.g. madebyollin/taesd: rougher latents in a fraction of the time
    and memory. Raises ValueError when it cannot be had."""
    try:
        with _quiet():
            return AutoencoderTiny.from_pretrained(name, torch_dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"guidance: expected the folder or hub name of an AutoencoderTiny, got `{name}`: "
            f"{reason}{_advice(reason)}"
        ) from error


@contextlib.contextmanager
def _quiet():
    """Without the libraries' progress bars and notes: a T5 that is a CLIP here is on purpose."""
    libraries = diffusers.utils.logging, transformers.utils.logging
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch_dtype
            yield
    finally:
        for library, level in zip(libraries, before):
            library.set_verbosity(level)
            library.enable_progress_bar()


class DiffusersGuidance:
    """A frozen pipeline as guidance.

    A pixel-space U-Net with 3 r² input channels works on the r-fold pixel-unshuffled picture: an
    exact, invertible encoder, under which white noise stays white. A latent one works on what its
    VAE makes of the picture; gradients go through the VAE's encoder.

    Args:
        pipeline: diffusers pipeline whose scheduler predicts epsilon or v.
        device: where it runs.
        check_prompt: called with each prompt; raises ValueError for what the prior cannot mean.
        dtype: fp32, fp16 or bf16. A CPU has no fast fp16: it takes fp32, and says so.
        size: side of the picture that a latent model sees, pixels; None: what it was trained for.
        compile: run the U-Net through torch.compile.
        low_memory: encode pictures one by one, in tiles, and texts on the CPU.
    Attributes:
        alphas_cumprod: (T,) float32 on the device, alpha_t² of the schedule.
        image_size: side of the square picture, pixels.
        resizes: whether other sizes are scaled to it.
        prediction_type: epsilon or v_prediction.
        takes_camera: whether the U-Net is conditioned on the camera: it has diffusers' class
            embedding of type "projection", of camera.flattened's 13 numbers.
        unconditional_camera: whether the unconditional half of classifier-free guidance is told the
            camera. It is not: the embedded prior drops words and camera together in training.
    Raises:
        ValueError: not a text-to-image pipeline of these kinds, or a size that the VAE cannot take.
    """

    channels_last = True
    unconditional_camera = False

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device="cpu",
        check_prompt: Callable[[str], None] | None = None,
        dtype: str = "fp32",
        size: int | None = None,
        compile: bool = False,
        low_memory: bool = False,
    ):
        _check_components(pipeline)
        self.device, self.dtype = torch.device(device), _dtype(dtype, torch.device(device))
        self.unet = frozen(pipeline.unet, self.device, self.dtype)
        self.unet.to(memory_format=torch.channels_last)
        self.text = TextEncoders(pipeline, self.device, self.dtype, check_prompt, low_memory)
        self.prediction_type = pipeline.scheduler.config.prediction_type
        self.alphas_cumprod = pipeline.scheduler.alphas_cumprod.to(self.device, torch.float32)
        self.vae = getattr(pipeline, "vae", None)
        self.resizes = self.vae is not None
        if self.resizes:
            self._prepare_vae(size, low_memory)
        else:
            self._prepare_pixels(size)
        side = float(self.image_size)  # for SDXL: of the original, corner of the crop, wanted
        self.sizes = torch.tensor([side, side, 0.0, 0.0, side, side], device=self.device)
        config = self.unet.config
        self.takes_camera = _takes_camera(config)
        if self.device.type == "cpu" and config.sample_size**2 <= PLAIN_ATTENTION_TOKENS:
            added = config.mid_block_type == "UNetMidBlock2DSimpleCrossAttn"
            self.unet.set_attn_processor(AttnAddedKVProcessor() if added else AttnProcessor())
        if compile:
            self.unet.compile()

    def _prepare_pixels(self, size: int | None) -> None:
        config = self.unet.config
        self.unshuffle = math.isqrt(config.in_channels // 3)
        if 3 * self.unshuffle**2 != config.in_channels:
            raise ValueError(
                f"guidance: expected a pixel-space U-Net with 3 r² input channels, "
                f"got {config.in_channels}"
            )
        self.image_size = config.sample_size * self.unshuffle
        if size not in (None, self.image_size):
            raise ValueError(
                f"argument `size`: expected {self.image_size}, the only one that a pixel-space "
                f"model sees, got {size}"
            )

    def _prepare_vae(self, size: int | None, low_memory: bool) -> None:
        vae, unet = self.vae, self.unet.config
        channels = vae.config.latent_channels
        if unet.in_channels != channels:
            raise ValueError(
                f"guidance: expected a text-to-image U-Net with the VAE's {channels} channels, got "
                f"{unet.in_channels} (an inpainting or image-to-image model?)"
            )
        self.reduced = 2 ** (len(vae.config.block_out_channels) - 1)
        # The U-Net halves the latents once for each of its levels but the last.
        whole = self.reduced * 2 ** (len(unet.block_out_channels) - 1)
        self.image_size = size or unet.sample_size * self.reduced
        if self.image_size % whole or self.image_size <= 0:
            raise ValueError(
                f"argument `size`: expected a multiple of {whole} pixels, which VAE and U-Net can "
                f"halve, got {self.image_size}"
            )
        # SDXL's overflows in fp16, and says so.
        upcast = vae.config.get("force_upcast", False) and self.dtype == torch.float16
        frozen(vae, self.device, torch.float32 if upcast else self.dtype)
        if low_memory:
            vae.enable_slicing()
            if not isinstance(vae, AutoencoderTiny):  # its tiles need the host, and it needs none
                vae.enable_tiling()

    def embed(self, prompts: list[str]) -> Tensor:
        """(B, tokens, width) text embeddings; "" is the unconditional one. Raises ValueError for a
        prompt with an unknown word, or too long."""
        return self.text(prompts)

    def release_text(self) -> None:
        """Free the text encoders. No embed() afterwards."""
        self.text.release()

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S) in [0, 1] to the model's space, differentiable."""
        if self.resizes and image.shape[-1] != self.image_size:
            image = F.interpolate(
                image, (self.image_size,) * 2, mode="bilinear", align_corners=False, antialias=True
            )
        return self._to_latents(image)

    def _to_latents(self, image: Tensor) -> Tensor:
        if self.vae is None:
            return F.pixel_unshuffle(image * 2.0 - 1.0, self.unshuffle)
        out = self.vae.encode((image * 2.0 - 1.0).to(self.vae.dtype))
        # The mode, not a draw: the noise that follows drowns the VAE's own.
        latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        shift = self.vae.config.get("shift_factor") or 0.0
        return (latents.float() - shift) * self.vae.config.scaling_factor

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Channels and side of what encode makes."""
        reduced = self.unshuffle if self.vae is None else self.reduced
        return self.unet.config.in_channels, self.image_size // reduced

    @torch.no_grad()
    def colour_map(self) -> tuple[Tensor, Tensor]:
        """The affine map from colours to latents that fits pictures of one colour best: (C, 3) and
        (C,), on the device."""
        generator = torch.Generator().manual_seed(0)
        colours = torch.rand(32, 3, generator=generator).to(self.device)
        side = min(self.image_size, 64)
        pictures = colours[:, :, None, None].expand(-1, -1, side, side)
        latents = torch.cat([self._to_latents(p).mean((2, 3)) for p in pictures.split(4)])
        ones = torch.cat((colours, torch.ones_like(colours[:, :1])), 1)
        solution = torch.linalg.lstsq(ones.cpu(), latents.float().cpu()).solution.to(self.device)
        return solution[:3].T.contiguous(), solution[3]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """The inverse of encode, but for the size; (B, 3, S, S) in [0, 1]."""
        if self.vae is None:
            return (F.pixel_shuffle(z, self.unshuffle) + 1.0) / 2.0
        shift = self.vae.config.get("shift_factor") or 0.0
        latents = z / self.vae.config.scaling_factor + shift
        return ((self.vae.decode(latents.to(self.vae.dtype)).sample.float() + 1.0) / 2.0).clamp(
            0, 1
        )

    @torch.no_grad()
    def predict(self, z_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """What the U-Net says (prediction_type) of z_t, like encode's result, t (N,) int64, under N
        conditions. IF's also holds a variance, in channels behind. Raises ValueError for cameras
        that the U-Net does not take, none where it takes them, or another number than N."""
        camera = self._camera_numbers(z_t, conditions)
        tokens, pooled = self.text.split(conditions.text)
        added = None
        if pooled is not None:
            sizes = self.sizes.to(z_t.dtype).expand(len(z_t), 6)
            added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(z_t, t, tokens, class_labels=camera, added_cond_kwargs=added).sample

    def _camera_numbers(self, z_t: Tensor, conditions: Conditions) -> Tensor | None:
        """(N, 13) in the U-Net's dtype, zeros where the camera is not told, as in its training."""
        if conditions.cameras is None:
            if self.takes_camera:
                raise ValueError(
                    "argument `conditions`: expected cameras, which the network takes (with `told` "
                    "zero where it shall not know them), got none"
                )
            return None
        n, told = len(conditions.cameras.focal), conditions.told
        if not self.takes_camera:
            raise ValueError(
                f"argument `conditions`: expected no cameras, as the network takes none, got {n}"
            )
        if n != len(z_t) or (told is not None and told.shape != (n,)):
            raise ValueError(
                f"argument `conditions`: expected {len(z_t)} cameras, one a row of z_t, got {n}"
                + ("" if told is None else f", and `told` of shape {tuple(told.shape)}")
            )
        numbers = flattened(conditions.cameras)
        return (numbers if told is None else numbers * told[:, None]).to(z_t.dtype)

    def predict_noise(self, z_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """epsilon(z_t; y, t), in float32."""
        z_t = z_t.to(self.dtype).contiguous(memory_format=torch.channels_last)
        out = self.predict(z_t, t, conditions)[:, : z_t.shape[1]].float()
        if self.prediction_type == "epsilon":
            return out
        alpha = self.alphas_cumprod[t].sqrt()[:, None, None, None]
        sigma = (1.0 - self.alphas_cumprod[t]).sqrt()[:, None, None, None]
        return alpha * out + sigma * z_t  # v = alpha eps - sigma x


def _takes_camera(config) -> bool:
    kind, width = config.class_embed_type, config.projection_class_embeddings_input_dim
    if kind is None and config.num_class_embeds is None:
        return False
    if kind == "projection" and width == N_NUMBERS:
        return True
    raise ValueError(
        f"guidance: expected a U-Net without classes, or with a class embedding of type projection "
        f"of {N_NUMBERS} numbers, the camera's, got type {kind} of "
        f"{width or config.num_class_embeds}"
    )


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"argument `dtype`: expected one of {', '.join(DTYPES)}, got {name!r}")
    if name == "fp16" and device.type == "cpu":
        warnings.warn("guidance: a CPU has no fast fp16: fp32 is used", stacklevel=3)
        return torch.float32
    return DTYPES[name]


def _check_components(pipeline) -> None:
    kind = type(pipeline).__name__
    missing = [name for name in NEEDED if getattr(pipeline, name, None) is None]
    if missing:
        raise ValueError(
            f"guidance: expected a text-to-image pipeline with {', '.join(NEEDED)}, got {kind} "
            f"without {', '.join(missing)}"
        )
    if not isinstance(pipeline.unet, diffusers.UNet2DConditionModel):
        raise ValueError(
            f"guidance: expected a text-to-image pipeline with a UNet2DConditionModel, got {kind} "
            f"with {type(pipeline.unet).__name__}"
        )
    if not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise ValueError(
            f"guidance: expected a scheduler with alphas_cumprod, got "
            f"{type(pipeline.scheduler).__name__}"
        )
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"guidance: expected a scheduler that predicts epsilon or v_prediction, got "
            f"{prediction}"
        )
