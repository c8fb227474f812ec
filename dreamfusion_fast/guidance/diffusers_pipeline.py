"""Guidance by a pixel-space diffusers pipeline: DeepFloyd IF's stage I, or the embedded prior."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnAddedKVProcessor, AttnProcessor
from torch import Tensor

PLAIN_ATTENTION_TOKENS = 1024  # up to here two matmuls beat torch's fused attention on a CPU


def load_pipeline(name: str) -> DiffusionPipeline:
    """Load a pipeline folder or hub model through diffusers. Raises ValueError with a one-line
    reason when it cannot be had."""
    try:
        with _quiet():
            return DiffusionPipeline.from_pretrained(name, safety_checker=None, watermarker=None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"guidance `{name}`: expected toybox, exemplar, or the folder or hub name of a "
            f"diffusers pipeline that is complete and accessible, got: {reason}"
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
        yield
    finally:
        for library, level in zip(libraries, before):
            library.set_verbosity(level)
            library.enable_progress_bar()


class DiffusersGuidance:
    """A frozen pixel-space pipeline (tokenizer, text_encoder, unet, scheduler) as guidance.

    A U-Net with 3 r² input channels works on the r-fold pixel-unshuffled picture: an exact,
    invertible encoder, under which white noise stays white.

    Args:
        pipeline: diffusers pipeline whose scheduler predicts epsilon or v.
        device: where the U-Net runs.
        check_prompt: called with each prompt; raises ValueError for what the prior cannot mean.
    Attributes:
        alphas_cumprod: (T,) float32 on the device, alpha_t² of the schedule.
        image_size: side of the square picture, pixels.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        device="cpu",
        check_prompt: Callable[[str], None] | None = None,
    ):
        self.device = torch.device(device)
        self.unet = pipeline.unet.float().to(self.device, memory_format=torch.channels_last)
        self.unet.requires_grad_(False).eval()
        self.text_encoder = pipeline.text_encoder.float().to(self.device).eval()
        self.tokenizer, self.check_prompt = pipeline.tokenizer, check_prompt
        self.unshuffle = math.isqrt(self.unet.config.in_channels // 3)
        if 3 * self.unshuffle**2 != self.unet.config.in_channels:
            raise ValueError(
                f"guidance: expected a pixel-space U-Net with 3 r² input channels, "
                f"got {self.unet.config.in_channels}"
            )
        self.prediction = pipeline.scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"guidance: expected a scheduler that predicts epsilon or "
                f"v_prediction, got {self.prediction}"
            )
        self.alphas_cumprod = pipeline.scheduler.alphas_cumprod.to(self.device, torch.float32)
        self.image_size = self.unet.config.sample_size * self.unshuffle
        if self.device.type == "cpu" and self.unet.config.sample_size**2 <= PLAIN_ATTENTION_TOKENS:
            added = self.unet.config.mid_block_type == "UNetMidBlock2DSimpleCrossAttn"
            self.unet.set_attn_processor(AttnAddedKVProcessor() if added else AttnProcessor())

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """(B, tokens, width) text embeddings; "" is the unconditional one. Raises ValueError for a
        prompt with an unknown word, or too long."""
        limit = min(self.tokenizer.model_max_length, 77)
        for text in prompts:
            if text and self.check_prompt:
                self.check_prompt(text)
            tokens = self.tokenizer(text).input_ids
            if len(tokens) > limit:
                raise ValueError(
                    f"argument `prompt`: expected at most {limit} tokens, got "
                    f"{len(tokens)}: {text!r}"
                )
            if text and self.tokenizer.unk_token_id in tokens[1:-1]:
                raise ValueError(
                    f"argument `prompt`: the guidance does not know a word of {text!r}"
                )
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=limit, return_tensors="pt"
        ).input_ids
        return self.text_encoder(tokens.to(self.device))[0]

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, S, S) in [0, 1] to the model's space, differentiable."""
        return F.pixel_unshuffle(image * 2.0 - 1.0, self.unshuffle)

    def decode(self, z: Tensor) -> Tensor:
        """The inverse of encode."""
        return (F.pixel_shuffle(z, self.unshuffle) + 1.0) / 2.0

    @torch.no_grad()
    def predict_noise(self, z_t: Tensor, t: Tensor, embedding: Tensor) -> Tensor:
        """epsilon(z_t; y, t). z_t like encode's result, t (B,) int64, embedding (B, ...)."""
        out = self.unet(z_t.contiguous(memory_format=torch.channels_last), t, embedding).sample
        out = out[:, : z_t.shape[1]]  # IF also predicts a variance
        if self.prediction == "epsilon":
            return out
        alpha = self.alphas_cumprod[t].sqrt()[:, None, None, None]
        sigma = (1.0 - self.alphas_cumprod[t]).sqrt()[:, None, None, None]
        return alpha * out + sigma * z_t  # v = alpha eps - sigma x
