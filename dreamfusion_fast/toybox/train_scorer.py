"""Train the embedded scorer: `python -m dreamfusion_fast.toybox.train_scorer --minutes 12`.

A small CLIP (Radford et al. 2021) on all pairs of the toybox, those that the prior never sees
included, and on textureless objects, "a grey clay car": it is a judge of colour and of geometry,
never guidance. A batch holds few of the 312 prompts, so the loss is the
softmax over all of them for each picture, i.e. the image-to-text half of CLIP's loss with every
text there is; the text-to-image half is left out. Pictures are spoilt at random as unfinished
radiance fields are: blur, fog, floaters, missing parts, bent outlines, strong colours.
Stops are safe: the state is written atomically, and the same command resumes it.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

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
from .scorer import FOLDER
from .train_prior import build_tokenizer

COLOURS = (*world.COLOURS, "grey clay")  # the last one: textureless
CAPTIONS = [(c, o) for o in world.OBJECTS for c in COLOURS]
HALF = [0.5, 0.5, 0.5]  # mean and standard deviation of the model's normalisation


@dataclass
class ScorerConfig:
    minutes: float = 12.0  # wall time of all sessions together
    batch: int = 64
    fresh: int = 16  # new pictures a step; the others were drawn before, and are spoilt anew
    bank: int = 2048  # pictures kept for that
    learning_rate: float = 8e-4
    warmup: int = 200  # steps
    weight_decay: float = 0.05
    ema: float = 0.998
    spoilt: float = 0.6  # share of the pictures that `spoil` may change
    clay: float = 0.2  # share of textureless pictures
    start: str = ""  # folder of the scorer whose weights are the start
    views_per_object: int = 600
    seed: int = 0
    threads: int = 2


def build_model(vocabulary: int) -> CLIPModel:
    """ViT with 64 patches of 8x8 and a two-layer text tower, 1.1 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
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
        overhead = pictures.views["view"] == camera.VIEWS.index("overhead")
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
        ambient = torch.where(textureless, 0.1 + 0.3 * u[3], lit)
        images = p.render(index, grey * self.palettes[caption], ambient, generator)
        mirrored = torch.rand(n, generator=generator) < 0.5  # the world is symmetric in y
        return torch.where(mirrored[:, None, None, None], images.flip(-1), images), caption


class Bank:
    """The last pictures of a source, to be used again: shading one costs as much as a step."""

    def __init__(self, source: Source, size: int, generator: torch.Generator):
        self.source, self.generator, self.next = source, generator, 0
        parts = [source.draw(64, generator) for _ in range(-(-size // 64))]
        self.images, self.pairs = (torch.cat(x)[:size] for x in zip(*parts))

    def draw(self, n: int, fresh: int) -> tuple[Tensor, Tensor]:
        """n images, `fresh` of them new, and pair indices; the oldest leave the bank."""
        rows = (self.next + torch.arange(fresh)) % len(self.pairs)
        self.images[rows], self.pairs[rows] = self.source.draw(fresh, self.generator)
        self.next = (self.next + fresh) % len(self.pairs)
        old = torch.randint(len(self.pairs), (n - fresh,), generator=self.generator)
        rows = torch.cat((rows, old))[torch.randperm(n, generator=self.generator)]
        return self.images[rows], self.pairs[rows]


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
    def __init__(self, config: ScorerConfig, folder: Path):
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config, self.folder = config, folder
        self.tokenizer = build_tokenizer()
        self.model = build_model(len(self.tokenizer))
        if config.start:
            known = CLIPModel.from_pretrained(config.start).float().state_dict()
            self.model.load_state_dict(known)
        self.shadow = [p.detach().clone() for p in self.model.parameters()]
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
        )
        self.texts = [self._tokens(template) for template in world.TEMPLATES]
        self.step, self.elapsed, self.recent = 0, 0.0, []
        if (folder / "state.pt").exists():
            self._load(torch.load(folder / "state.pt", weights_only=True))

    def _tokens(self, template: str) -> Tensor:
        prompts = [template.format(colour=c, object=o) for c, o in CAPTIONS]
        # What pads the shorter ones lies behind their ends, which see only what is before them.
        return self.tokenizer(prompts, padding=True, return_tensors="pt").input_ids

    def logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Cosine similarities over the learnt temperature, (B, 312)."""
        m = self.model
        image = m.visual_projection(m.vision_model(images * 2 - 1).pooler_output).float()
        text = m.text_projection(m.text_model(tokens).pooler_output).float()
        scale = m.logit_scale.clamp(max=math.log(100)).exp()
        return scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T

    def learning_rate(self) -> float:
        c = self.config
        done = min(1.0, self.elapsed / (60 * c.minutes))
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
        return c.learning_rate * min(cosine, (self.step + 1) / c.warmup)

    def train_step(self, images: Tensor, pair: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        # Every other step the canonical "a red car", else one of its variants.
        template = 0 if self.step % 2 else self.step // 2 % len(self.texts)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.logits(images, self.texts[template])
        loss = F.cross_entropy(logits, pair)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.shadow, list(self.model.parameters()), 1 - decay)
        right = (logits.argmax(1) == pair).float().mean()
        self.recent.append(torch.stack((loss.detach(), right)))
        self.step += 1

    def run(self, cache: Path) -> None:
        """Train on. cache: folder of the traced views, see `traced_views`."""
        c = self.config
        source = Source(Pictures(c.views_per_object, c.seed, CameraConfig(), cache), c.clay)
        generator = torch.Generator().manual_seed(c.seed + 1 + self.step)
        bank = Bank(source, c.bank, generator)
        last = saved = time.perf_counter()
        while self.elapsed < 60 * c.minutes:
            images, pair = bank.draw(c.batch, c.fresh)
            n = round(c.spoilt * c.batch)
            images = torch.cat((spoil(images[:n], generator), images[n:]))
            self.train_step(images, pair)
            now = time.perf_counter()
            self.elapsed, last = self.elapsed + now - last, now
            if self.step % 100 == 0:
                self._log()
            if now - saved > 60:
                self.save()
                saved = last = time.perf_counter()
        self.save()

    def _log(self) -> None:
        loss, right = torch.stack(self.recent).mean(0).tolist()
        self.recent.clear()
        row = {
            "step": self.step,
            "pictures": self.step * self.config.batch,
            "minutes": round(self.elapsed / 60, 2),
            "loss": round(loss, 4),
            "top1": round(right, 4),
        }
        print(json.dumps(row), flush=True)
        with open(self.folder / "curve.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """The resumable state, and the averaged weights as a transformers folder."""
        state = {
            "model": self.model.state_dict(),
            "shadow": self.shadow,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
        }
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")
        export(self.shadow, self.tokenizer, self.folder / "scorer")
        (self.folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1))

    def _load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.shadow, self.step, self.elapsed = state["shadow"], state["step"], state["elapsed"]


def export(weights: list[Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `weights` (in the order of build_model's parameters) as an fp16 CLIP folder."""
    model = build_model(len(tokenizer))
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=HALF, image_std=HALF
    ).save_pretrained(folder)


def main(
    out: Path = Path("runs/scorer"),
    minutes: float = ScorerConfig.minutes,
    batch: int = ScorerConfig.batch,
    learning_rate: float = ScorerConfig.learning_rate,
    views_per_object: int = ScorerConfig.views_per_object,
    seed: int = ScorerConfig.seed,
    threads: int = ScorerConfig.threads,
    start: bool = False,
    cache: Path | None = None,
) -> None:
    """Train the toybox scorer, or go on with the training that lies in --out. start: from the
    weights of the embedded one."""
    out.mkdir(parents=True, exist_ok=True)
    config = ScorerConfig(
        minutes=minutes,
        batch=batch,
        learning_rate=learning_rate,
        views_per_object=views_per_object,
        seed=seed,
        threads=threads,
        start=str(FOLDER) if start else "",
    )
    Trainer(config, out).run(cache or out / "views")


if __name__ == "__main__":
    typer.run(main)
