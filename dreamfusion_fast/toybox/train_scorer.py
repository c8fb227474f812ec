"""Train the embedded scorer: `python -m dreamfusion_fast.toybox.train_scorer --out runs/scorer`.

A small CLIP (Radford et al. 2021) on all pairs of the toybox, those that the prior never sees
included, and on textureless objects, "a grey clay car": it is a judge of colour and of geometry. A
batch holds few of the 351 prompts, so the loss is the softmax over all of them for each picture,
i.e. the image-to-text half of CLIP's loss with every text there is; the text-to-image half is left
out. Each picture is there twice, once clean and once spoilt at random as unfinished radiance fields
are: blur, fog, floaters, missing parts, bent outlines, strong colours.
Stops are safe: the state is written atomically, and the same command resumes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from .. import camera
from ..config import CameraConfig
from . import world
from .pictures import SIZE, Pictures
from .train_prior import build_tokenizer
from .training import Training, TrainingConfig, autocast, averaged, settings

COLOURS = (*world.COLOURS, "grey clay")  # the last one: textureless
CAPTIONS = [(c, o) for o in world.OBJECTS for c in COLOURS]
HALF = [0.5, 0.5, 0.5]  # mean and standard deviation of the model's normalisation


@dataclass
class ScorerConfig(TrainingConfig):
    steps: int = 5_000
    learning_rate: float = 1.5e-3
    weight_decay: float = 5e-2
    ema: float = 0.998
    clay: float = 0.4  # share of textureless pictures
    width: int = 128  # of the picture's tower; another one makes a second opinion
    layers: int = 6


def judged_camera() -> CameraConfig:
    """Around what `evaluate` shows a judge: neither from above nor far off."""
    return CameraConfig(
        elevation=(-5.0, 60.0), distance=(1.2, 1.6), position_jitter=0.05, look_at_std=0.04
    )


def build_model(vocabulary: int, width: int = 128, layers: int = 6) -> CLIPModel:
    """ViT with 64 patches of 8x8 and a two-layer text tower, 1.3 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        image_size=SIZE,
        patch_size=8,
        projection_dim=64,
    )
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        projection_dim=64,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64
    )
    # torch's fused attention is many times slower than two matmuls at these sizes on a CPU.
    return CLIPModel._from_config(config, attn_implementation="eager")


class Source:
    """An endless source of (images, caption indices): all of CAPTIONS with a colour alike, and a
    share `clay` textureless ones.

    It leaves out the views that a judge of whole objects need not know: overhead, small, cropped.
    """

    def __init__(self, pictures: Pictures, clay: float):
        self.pictures, self.clay = pictures, clay
        hit = pictures.views["part"] != 255
        edge = torch.cat((hit[:, 0], hit[:, -1], hit[:, :, 0], hit[:, :, -1]), dim=1)
        whole = (edge.float().mean(1) < 0.08) & (hit.sum((1, 2)) > 0.04 * hit[0].numel())
        views = camera.view_index(pictures.views["elevation"], pictures.views["azimuth"])
        overhead = views == camera.VIEWS.index("overhead")
        kept = (whole & ~overhead).nonzero()[:, 0]
        n = torch.bincount(kept // pictures.per_object, minlength=len(pictures.objects))
        if not n.all():
            name = pictures.objects[int(n.argmin())]
            raise ValueError(
                f"argument `pictures`: expected more views an object than {pictures.per_object}, "
                f"of {name} none is whole"
            )
        self.kept = kept.split(n.tolist())  # by object
        white = torch.ones(256, 3)
        self.palettes = torch.stack([pictures.palettes.get(pair, white) for pair in CAPTIONS])

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n clean images (n, 3, 64, 64) in [0, 1] and caption indices (n,). One in four coloured
        ones is lit, and all textureless ones, which are grey to white."""
        p, colours = self.pictures, len(COLOURS)
        name = torch.randint(len(self.kept), (n,), generator=generator)
        colour = torch.randint(colours - 1, (n,), generator=generator)
        u = torch.rand(4, n, generator=generator)
        textureless = u[0] < self.clay
        caption = name * colours + torch.where(textureless, colours - 1, colour)
        rows = [self.kept[k] for k in name.tolist()]
        index = torch.stack([row[int(x * len(row))] for row, x in zip(rows, u[1].tolist())])
        grey = torch.where(textureless, 0.5 + 0.5 * u[2], 1.0)[:, None, None]
        lit = torch.where(u[3] < 0.25, 0.1, 1.0)
        ambient = torch.where(textureless, 0.1 + 0.4 * u[3], lit)
        images = p.render(index, grey * self.palettes[caption], ambient, generator)
        mirrored = torch.rand(n, generator=generator) < 0.5  # the world is symmetric in y
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images), caption


def spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (B, 3, S, S) in [0, 1] made worse as an unfinished radiance field is, each at random
    and by parts: bent, cut, fogged, blurred, with floaters, other brightness and saturation."""
    b, s = len(images), images.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *(shape or (1, 1, 1)), generator=generator)

    def sometimes(share: float) -> Tensor:
        return (uniform(0, 1) < share).float()

    # Outlines bent by a smooth displacement of up to some 2 pixels.
    bend = torch.randn(b, 2, 5, 5, generator=generator) * uniform(0, 0.04)
    bend = F.interpolate(bend, (s, s), mode="bicubic", align_corners=True)
    grid = F.affine_grid(torch.eye(2, 3).expand(b, 2, 3), list(images.shape), align_corners=False)
    x = F.grid_sample(
        images, grid + bend.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
    )
    # A missing part shows what the corner shows: mostly background.
    x = x + (x[:, :, :1, :1] - x) * sometimes(0.2) * _blob(s, uniform, 0.1, 0.25)
    for _ in range(3):  # floaters
        colour, opacity = uniform(0, 1, 3, 1, 1), uniform(0, 0.7) * sometimes(0.3)
        x = x + (colour - x) * opacity * _blob(s, uniform, 0.03, 0.25)
    fog = F.interpolate(uniform(-1, 1, 1, 4, 4), (s, s), mode="bilinear").clamp_min(0)
    x = x + (uniform(0, 1, 3, 1, 1) - x) * fog * uniform(0, 0.5) * sometimes(0.4)
    x = torch.lerp(x, _blur(x, 1.0), uniform(-0.5, 1).clamp_min(0))
    x = torch.lerp(x, _blur(x, 2.0), uniform(-2, 1).clamp_min(0))
    grey = x.mean(1, keepdim=True)
    x = torch.lerp(grey, x, uniform(0.75, 1.6))
    middle = x.mean((1, 2, 3), keepdim=True)
    x = torch.lerp(middle, x, uniform(0.8, 1.3)) * uniform(0.85, 1.15)
    noise = torch.randn(x.shape, generator=generator)
    return (x + noise * uniform(0, 0.05) * sometimes(0.5)).clamp(0, 1)


def _blob(s: int, uniform, narrow: float, wide: float) -> Tensor:
    """(B, 1, S, S) soft ellipses in [0, 1] at random places, widths as shares of the picture."""
    at = (torch.arange(s) + 0.5) / s
    across = ((at - uniform(0, 1)) / uniform(narrow, wide)).square()
    along = ((at[:, None] - uniform(0, 1)) / uniform(narrow, wide)).square()
    return (1.5 * torch.exp(-(across + along))).clamp_max(1.0)


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of (B, C, S, S)."""
    r = math.ceil(2.5 * sigma)
    k = torch.exp(-0.5 * (torch.arange(-r, r + 1) / sigma).square())
    k = (k / k.sum()).view(1, 1, 1, -1)
    flat = F.pad(x.flatten(0, 1)[:, None], (r, r, r, r), mode="replicate")
    return F.conv2d(F.conv2d(flat, k), k.mT).view(x.shape)


class Trainer:
    """The training of the scorer in a folder: see Training; beside its state lies `scorer`, the
    average, as transformers loads it."""

    def __init__(self, config: ScorerConfig, folder: Path):
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config, self.folder = config, folder
        self.tokenizer = build_tokenizer()
        self.model = build_model(len(self.tokenizer), config.width, config.layers)
        kind = {"width": config.width, "layers": config.layers,
                "words": self.tokenizer.vocab_size}  # fmt: skip
        self.training = Training(self.model, config, folder, kind, ["loss", "top1"])
        self.texts = [self._tokens(template) for template in world.TEMPLATES]
        self.see = torch.compile(self._see) if config.compile else self._see

    def _tokens(self, template: str) -> Tensor:
        prompts = [world.caption(template, o, c) for c, o in CAPTIONS]
        # What pads the shorter ones lies behind their ends, which see only what is before them.
        return self.tokenizer(prompts, padding=True, return_tensors="pt").input_ids

    def _see(self, images: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(images * 2 - 1).pooler_output)

    def logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Cosine similarities over the learnt temperature, (B, captions)."""
        m = self.model
        image = self.see(images).float()
        text = m.text_projection(m.text_model(tokens).pooler_output).float()
        scale = m.logit_scale.clamp(max=math.log(100)).exp()
        return scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T

    def loss(self, source: Source, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The cross-entropy over all captions; with it the share of pictures that were told."""
        c = self.config
        clean, caption = source.draw(c.batch // 2, generator)
        images, caption = torch.cat((clean, spoil(clean, generator))), caption.repeat(2)
        # Every other step the canonical "a red car", else one of its variants.
        step = self.training.step
        with autocast():
            logits = self.logits(images, self.texts[0 if step % 2 else step // 2 % len(self.texts)])
        loss = F.cross_entropy(logits, caption)
        right = (logits.argmax(1) == caption).float().mean()
        return loss, torch.stack((loss.detach(), right))

    def run(self) -> None:
        c = self.config
        source = Source(Pictures(c.views_per_object, c.seed, judged_camera()), c.clay)
        self.training.run(lambda g: self.loss(source, g), self.ship)

    def ship(self) -> None:
        """Write the averaged weights as a transformers folder."""
        export(self.training.shadow, self.tokenizer, self.folder / "scorer", self.config)


def export(
    weights: list[Tensor],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    config: ScorerConfig,
) -> None:
    """Write `weights` (in the order of build_model's parameters) as an fp16 CLIP folder."""
    model = build_model(len(tokenizer), config.width, config.layers)
    averaged(weights, [model])
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=HALF, image_std=HALF
    ).save_pretrained(folder)


def main(
    out: Path = Path("runs/scorer"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of ScorerConfig; repeatable")
    ] = None,
) -> None:
    """Train the toybox scorer, or go on with the training that lies in --out."""
    try:
        config = settings(ScorerConfig, out, set_ or [])
        out.mkdir(parents=True, exist_ok=True)
        Trainer(config, out).run()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    typer.run(main)
