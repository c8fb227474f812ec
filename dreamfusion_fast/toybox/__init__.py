"""The embedded world: objects with known shapes, a diffusion prior and a scorer trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .world import check_prompt, clay_prompt

if TYPE_CHECKING:  # diffusers takes seconds: who only asks for words or folders does not wait
    from ..guidance import DiffusersGuidance

PRIOR = Path(__file__).parent / "prior"
SCORER = Path(__file__).parent / "scorer"

__all__ = ["PRIOR", "SCORER", "load_prior"]


def load_prior(device="cpu", **options) -> DiffusersGuidance:
    """The embedded 64x64 text-conditional prior, by the path that any pipeline takes."""
    from ..guidance import DiffusersGuidance, load_pipeline

    guide = DiffusersGuidance(load_pipeline(str(PRIOR)), device, check_prompt, **options)
    guide.textureless_prompt = clay_prompt  # the word that its training had for such pictures
    return guide
