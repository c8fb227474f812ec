"""CLIP R-Precision (Park et al. 2021), as Dream Fields and DreamFusion measure text to 3D.

Of many candidate prompts, how often is the one that a picture was made from the most similar?
Here the judge is the toybox's own small CLIP (see train_scorer.py); any other CLIP folder of
transformers loads the same way. Where Dream Fields is guided by it, its own figures stand in
parentheses.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel
from transformers.image_processing_base import ImageProcessingMixin

FOLDER = Path(__file__).parent / "scorer"
_CHUNK = 64  # pictures or prompts at once


class Scorer:
    """Image-text similarities of a CLIP in transformers' folder format, in float32."""

    def __init__(self, folder: str | Path = FOLDER, device="cpu"):
        self.device = torch.device(device)
        # torch's fused attention is many times slower than two matmuls at the toybox's sizes.
        model = CLIPModel.from_pretrained(folder, attn_implementation="eager")
        self.model = model.float().eval().requires_grad_(False).to(self.device)
        self.image_size = model.config.vision_config.image_size  # pixels
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = ImageProcessingMixin.get_image_processor_dict(folder)[0]
        self.mean, self.std = (
            torch.tensor(processor[k], device=self.device)[:, None, None]
            for k in ("image_mean", "image_std")
        )
        self._texts: tuple[list[str], Tensor] | None = None

    def similarities(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine similarities (B, P) of images (B, 3, S, S) in [0, 1] and P prompts, on the CPU."""
        check_images(images)
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"argument `prompts`: expected a list of prompts, got {prompts!r}")
        with torch.no_grad():
            image = torch.cat([self.embed_images(x) for x in images.split(_CHUNK)])
            return (image @ self.embed_texts(list(prompts)).T).cpu()

    def r_precision(self, images: Tensor, prompts: list[str], index: int) -> float:
        """Share of the images whose most similar prompt is prompts[index]."""
        if not 0 <= index < len(prompts):
            raise ValueError(f"argument `index`: expected 0 to {len(prompts) - 1}, got {index}")
        return float((self.similarities(images, prompts).argmax(1) == index).float().mean())

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, D) unit vectors of images (B, 3, S, S) in [0, 1], differentiable."""
        size = self.image_size
        x = images.to(self.device, torch.float32)
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        pooled = self.model.vision_model(pixel_values=(x - self.mean) / self.std).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """(P, D) unit vectors, remembered: evaluations ask for the same prompts again and again."""
        if self._texts is None or self._texts[0] != prompts:
            chunks = [prompts[i : i + _CHUNK] for i in range(0, len(prompts), _CHUNK)]
            self._texts = prompts, torch.cat([self._embed_chunk(c) for c in chunks])
        return self._texts[1]

    def _embed_chunk(self, prompts: list[str]) -> Tensor:
        t = self.tokenizer
        tokens = t(prompts, padding=True, truncation=True, return_tensors="pt")
        if t.unk_token_id not in (None, t.bos_token_id, t.eos_token_id, t.pad_token_id):
            unknown = (tokens.input_ids == t.unk_token_id).any(1).nonzero()[:, 0].tolist()
            if unknown:
                raise ValueError(
                    f"argument `prompts`: expected words that the scorer knows, got "
                    f"{prompts[unknown[0]]!r}"
                )
        pooled = self.model.text_model(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)


def check_images(images: Tensor) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(f"argument `images`: expected shape (B, 3, S, S), got {shape}")
    if not images.is_floating_point():
        raise ValueError(f"argument `images`: expected floating point, got {images.dtype}")
    low, high = float(images.min()), float(images.max())
    if not (0.0 <= low and high <= 1.0):  # NaN fails too
        raise ValueError(
            f"argument `images`: expected values in [0, 1], got {low:.3g} to {high:.3g}"
        )
