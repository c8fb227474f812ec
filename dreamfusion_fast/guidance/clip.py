"""Guidance by a CLIP: Dream Fields (Jain et al. 2022), the baseline of DreamFusion's table 1.

There is no diffusion: the loss is minus the cosine similarity of picture and prompt, beside the
transmittance loss of `losses`. The paper's finding: colours satisfy CLIP, geometry does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..toybox.scorer import FOLDER, Scorer


class ClipGuidance:
    """Gradients of a CLIP's similarity.

    Args:
        model: folder or hub name of a CLIP of transformers; None: the toybox's scorer, which then
            is judge and guide at once, as CLIP is in the paper's numbers in parentheses.
        device: where it runs, in float32.
    Raises:
        ValueError: there is no such model.
    """

    resizes = True

    def __init__(self, model: str | None = None, device="cpu"):
        self.scorer = Scorer(model or FOLDER, device)
        self.image_size = self.scorer.image_size

    def embed(self, prompts: list[str]) -> Tensor:
        """(P, D) unit vectors."""
        with torch.no_grad():
            return self.scorer.embed_texts(list(prompts))

    def encode(self, image: Tensor) -> Tensor:
        """The picture (B, 3, S, S) in [0, 1] itself."""
        return image

    def gradient(self, image: Tensor, embedding: Tensor) -> Tensor:
        """Of the sum over B pictures of -cos(picture, prompt), with respect to the pictures."""
        with torch.enable_grad():
            image = image.detach().requires_grad_()
            similarity = (self.scorer.embed_images(image) * embedding).sum()
            return torch.autograd.grad(-similarity, image)[0]
