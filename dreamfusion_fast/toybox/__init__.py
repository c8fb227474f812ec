"""The embedded world: objects with known shapes, a diffusion prior and a scorer trained on them."""

from __future__ import annotations

from pathlib import Path

from ..guidance.diffusers_pipeline import DiffusersGuidance, load_pipeline
from .exemplar import ExemplarGuidance
from .world import check_prompt, clay_prompt

PRIOR = Path(__file__).parent / "prior"
SCORER = Path(__file__).parent / "scorer"

__all__ = ["PRIOR", "SCORER", "ExemplarGuidance", "load_prior"]


def load_prior(device="cpu", **options) -> DiffusersGuidance:
    """The embedded 64x64 text-conditional prior, by the path that any pipeline takes."""
    guide = DiffusersGuidance(load_pipeline(str(PRIOR)), device, check_prompt, **options)
    guide.textureless_prompt = clay_prompt  # the word that its training had for such pictures
    return guide
