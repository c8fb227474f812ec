"""Guidance: a frozen text-to-image prior that says how noise looks in a picture.

An object that guides has `embed(prompts)`, `encode(image)`, `predict_noise(z_t, t, embedding)`,
`alphas_cumprod` and `image_size`; it needs no base class. If it has `set_cameras(cameras,
background, generator)`, that is called before each prediction.
"""

from __future__ import annotations

import torch

from .diffusers_pipeline import DiffusersGuidance, load_pipeline

__all__ = ["DiffusersGuidance", "load", "load_pipeline"]


def load(name: str, device: torch.device | str = "cpu"):
    """The guidance called `name`: "toybox" (the embedded prior), "exemplar" (the toybox's exact
    score), or the folder or hub name of a diffusers pixel-space text-to-image pipeline.

    Raises ValueError when there is no such pipeline or it is incomplete.
    """
    from .. import toybox  # it builds on this module

    if name == "toybox":
        return toybox.load_prior(device)
    if name == "exemplar":
        return toybox.ExemplarGuidance(device)
    return DiffusersGuidance(load_pipeline(name), device)
