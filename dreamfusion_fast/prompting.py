"""Which text a view is guided by: view-dependent prompts (paper, A.2), negatives, Perp-Neg.

Embeddings are tensors (B, ...) of any shape that the guidance understands; here they are only
selected and averaged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .camera import VIEWS, Cameras
from .config import GuidanceConfig

VIEW_TEXTS = ("nearest", "interpolate", "none")
NEGATIVES = 2  # of a view: of front, side and back the two that its azimuth lies between


class Prompts:
    """The embeddings of one prompt, from every side.

    Args:
        guidance: embeds texts.
        prompt: the object.
        config: scale, negative, view_text and perp_neg are used.
        textureless: the text in the prompt's place for textureless views; None: the prompt's own,
            as in the paper.
    Raises:
        ValueError: an unknown view_text, a negative text or perp_neg without a guidance scale, or a
            text that the guidance refuses.
    """

    def __init__(
        self, guidance, prompt: str, config: GuidanceConfig, textureless: str | None = None
    ):
        if config.view_text not in VIEW_TEXTS:
            raise ValueError(
                f"config `view_text`: expected {', '.join(VIEW_TEXTS)}, got {config.view_text!r}"
            )
        if config.view_text == "none" and config.perp_neg:
            raise ValueError("config `perp_neg`: expected 0 beside view_text none")
        if not config.scale and (config.negative or config.perp_neg):
            raise ValueError(
                "config `scale`: expected more than 0 beside a negative text or perp_neg, got 0"
            )
        self.config = config
        self.views = guidance.embed(self._texts(prompt))
        self.textureless = None if textureless is None else guidance.embed(self._texts(textureless))
        self.unconditional = guidance.embed([config.negative]) if config.scale else None

    def _texts(self, prompt: str) -> list[str]:
        if self.config.view_text == "none":
            return [prompt] * len(VIEWS)
        return [f"{prompt}, {view} view" for view in VIEWS]

    def __call__(
        self, cameras: Cameras, textureless: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The embeddings of B cameras, (K * B, ...): the views'; with a guidance scale the
        unconditional ones; with perp_neg the negatives. And (B, K - 2) weights of the negatives.
        textureless: (B,) bool, which views are."""
        share = self._share(cameras)
        parts = [self._mix(share, self.views)]
        if self.textureless is not None and textureless is not None:
            other = self._mix(share, self.textureless)
            mask = textureless.to(other.device, non_blocking=True)
            parts = [torch.where(mask.view(-1, *[1] * (other.ndim - 1)), other, parts[0])]
        if self.unconditional is None:
            return parts[0], None
        parts.append(self.unconditional.expand_as(parts[0]))
        if not self.config.perp_neg:
            return torch.cat(parts), None
        which, weights = negatives(cameras, self.config.perp_neg)
        parts += [
            self.views[which[:, k].to(self.views.device, non_blocking=True)]
            for k in range(NEGATIVES)
        ]
        return torch.cat(parts), weights.to(self.views.device, non_blocking=True)

    def _share(self, cameras: Cameras) -> Tensor:
        """(B, 4): how much of each of VIEWS a camera's text is."""
        if self.config.view_text == "nearest" and not self.config.perp_neg:
            return torch.nn.functional.one_hot(cameras.view_index(), len(VIEWS)).float()
        return interpolated(cameras)

    def _mix(self, share: Tensor, views: Tensor) -> Tensor:
        return torch.einsum("bv,v...->b...", share.to(views, non_blocking=True), views)


def interpolated(cameras: Cameras) -> Tensor:
    """(B, 4) shares of VIEWS that change linearly with the angle from the front: front to side in
    the first 90 degrees, side to back in the next; overhead views stay apart."""
    quarter = _quarters(cameras)
    front, back = (1.0 - quarter).clamp_min(0.0), (quarter - 1.0).clamp_min(0.0)
    around = torch.stack((front, 1.0 - front - back, back, torch.zeros_like(front)), 1)
    overhead = torch.tensor([0.0, 0.0, 0.0, 1.0]).to(around)
    return torch.where((cameras.view_index() == 3)[:, None], overhead, around)


def negatives(cameras: Cameras, strength: float) -> tuple[Tensor, Tensor]:
    """Perp-Neg (Armandpour et al. 2023, section 4): a view's two neighbours among front, side and
    back (B, 2), and weights (B, 2) from -strength for one a quarter turn away to 0 for the view's
    own. Overhead views have none: weights of 0."""
    quarter = _quarters(cameras)
    first = (quarter >= 1.0).long()
    away = quarter - first
    weights = -strength * torch.stack((away, 1.0 - away), 1)
    weights = torch.where((cameras.view_index() == 3)[:, None], 0.0, weights)
    return torch.stack((first, first + 1), 1), weights


def _quarters(cameras: Cameras) -> Tensor:
    """Angle from the front, (B,) in quarter turns, 0 to 2."""
    return torch.acos(cameras.azimuth.cos().clamp(-1.0, 1.0)) / (0.5 * math.pi)
