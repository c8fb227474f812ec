"""Judges of R-Precision: a CLIP by name.

A judge has `image_size` (pixels) and `similarities(images, prompts)`; it needs no base class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from .toybox.scorer import Scorer, check_images

OPEN_CLIP = "open_clip:"
_CHUNK = 64  # pictures or prompts at once


def load(name: str | None = None, device="cpu"):
    """The judge called `name`: None, the toybox's own; "open_clip:MODEL/PRETRAINED", by the package
    open_clip; else the folder or hub name of a CLIP of transformers. Raises ValueError when there
    is none."""
    if name is None:
        return Scorer(device=device)
    if name.startswith(OPEN_CLIP):
        return OpenClip(name, device)
    expected = "argument `--clip`: expected the folder or hub name of a CLIP of transformers"
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind == "clip":  # others would be given weights at random
            return Scorer(name, device)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"{expected}, got `{name}`: {reason}") from None
    raise ValueError(f"{expected}, got `{name}`, a model of type {kind}")


class OpenClip:
    """A CLIP of the package open_clip, in float32.

    Args:
        name: "open_clip:MODEL/PRETRAINED", e.g. open_clip:ViT-B-32/laion2b_s34b_b79k.
        device: where it runs.
    Raises:
        ValueError: the package is not installed, or knows no such model.
    """

    def __init__(self, name: str, device="cpu"):
        try:
            import open_clip
        except ImportError:
            raise ValueError(
                f"argument `--clip`: expected the package open_clip for `{name}`, which is not "
                f"installed: pip install open_clip_torch"
            ) from None
        model, slash, pretrained = name.removeprefix(OPEN_CLIP).partition("/")
        if not (model and slash and pretrained):
            raise ValueError(
                f"argument `--clip`: expected open_clip:MODEL/PRETRAINED, got `{name}`"
            )
        try:
            self.model = open_clip.create_model(model, pretrained=pretrained)
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"argument `--clip`: `{name}`: {reason}") from None
        self.device = torch.device(device)
        self.model = self.model.float().eval().requires_grad_(False).to(self.device)
        self.tokenizer = open_clip.get_tokenizer(model)
        visual = self.model.visual
        size = visual.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        self.mean, self.std = (
            torch.tensor(x, device=self.device)[:, None, None]
            for x in (visual.image_mean, visual.image_std)
        )
        self._texts: tuple[list[str], Tensor] | None = None

    @torch.no_grad()
    def similarities(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine similarities (B, P) of images (B, 3, S, S) in [0, 1] and P prompts, on the CPU."""
        check_images(images)
        if self._texts is None or self._texts[0] != list(prompts):
            chunks = [prompts[i : i + _CHUNK] for i in range(0, len(prompts), _CHUNK)]
            tokens = [self.tokenizer(list(c)).to(self.device) for c in chunks]
            texts = torch.cat([self.model.encode_text(t) for t in tokens])
            self._texts = list(prompts), F.normalize(texts, dim=-1)
        image = torch.cat([self._embed(x) for x in images.split(_CHUNK)])
        return (image @ self._texts[1].T).cpu()

    def _embed(self, images: Tensor) -> Tensor:
        x, size = images.to(self.device, torch.float32), self.image_size
        if x.shape[-1] != size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return F.normalize(self.model.encode_image((x - self.mean) / self.std), dim=-1)
