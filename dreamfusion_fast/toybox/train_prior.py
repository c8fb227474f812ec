"""Train the embedded prior: `python -m dreamfusion_fast.toybox.train_prior --minutes 120`.

A text-conditional diffusion U-Net on the pixel-unshuffled 64x64 picture (48 channels of 16x16,
exactly invertible), with a small CLIP text encoder trained jointly, v-prediction (Salimans & Ho
2022: unlike the epsilon loss it weighs the noisy end, where SDS learns shape), and a schedule
shifted to more noise.
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
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from ..config import toybox_camera
from ..guidance import load_pipeline
from . import world
from .pictures import SIZE, Pictures

UNSHUFFLE = 4


@dataclass
class PriorConfig:
    minutes: float = 120.0  # wall time of all sessions together
    batch: int = 32
    learning_rate: float = 8e-4
    decay_share: float = 0.25  # the last part of `minutes`, in which the rate falls to zero
    ema: float = 0.9995
    unconditional: float = 0.1  # share of captions dropped, for classifier-free guidance
    views_per_object: int = 600
    seed: int = 0
    threads: int = 2
    compile: bool = False
    start: str = ""  # a pipeline folder whose weights a new training begins with


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word. An unknown word becomes [UNK], which embedding a prompt refuses."""
    words = {w: i for i, w in enumerate(("[PAD]", "[UNK]", "[BOS]", "[EOS]", *world.VOCABULARY))}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=16,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
    )


def build_models(vocabulary: int) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    width = 96
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            projection_dim=width,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    )
    channels = 3 * UNSHUFFLE**2
    unet = UNet2DConditionModel(
        sample_size=SIZE // UNSHUFFLE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(96, 112, 128),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",),
        cross_attention_dim=width,
        attention_head_dim=16,
        time_embedding_dim=192,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    # torch's fused attention is many times slower than two matmuls at these sizes on a CPU.
    unet.set_attn_processor(AttnAddedKVProcessor())
    return text, unet.to(memory_format=torch.channels_last)


def shifted_cosine_betas(n: int = 1000, shift: float = 0.25) -> list[float]:
    """The cosine schedule with its signal-to-noise ratio times shift² (Hoogeboom et al. 2023,
    "simple diffusion", eq. 3). The toybox's pictures are few flat areas: under the plain schedule
    they show through the noise at nearly all t, and the text would hardly matter."""
    t = (torch.arange(n, dtype=torch.float64) + 1) / (n + 1)
    snr = shift**2 / torch.tan(t * math.pi / 2).square()
    alphas_cumprod = snr / (1 + snr)
    previous = torch.cat((torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]))
    return (1 - alphas_cumprod / previous).tolist()


class Trainer:
    def __init__(self, config: PriorConfig, folder: Path):
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config, self.folder = config, folder
        self.tokenizer = build_tokenizer()
        self.text, self.unet = build_models(len(self.tokenizer))
        if config.start:
            pipeline = load_pipeline(config.start)
            self.text.load_state_dict(pipeline.text_encoder.state_dict())
            self.unet.load_state_dict(pipeline.unet.state_dict())
        self.net = nn.ModuleDict({"text": self.text, "unet": self.unet})
        self.shadow = [p.detach().clone() for p in self.net.parameters()]
        self.scheduler = DDPMScheduler(
            trained_betas=shifted_cosine_betas(), prediction_type="v_prediction", clip_sample=True
        )
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=config.learning_rate, weight_decay=1e-2, betas=(0.9, 0.98)
        )
        self.step, self.elapsed, self.losses = 0, 0.0, []
        self.forward = torch.compile(self.unet) if config.compile else self.unet
        if (folder / "state.pt").exists():
            self._load(torch.load(folder / "state.pt", weights_only=True))

    def embed(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        return self.text(tokens).last_hidden_state

    def loss(self, images: Tensor, prompts: list[str]) -> Tensor:
        n = len(images)
        drop = torch.rand(n) < self.config.unconditional
        context = self.embed(["" if d else p for d, p in zip(drop, prompts)])
        z0 = F.pixel_unshuffle(images * 2 - 1, UNSHUFFLE)
        t = ((torch.arange(n) + torch.rand(n)) / n * 1000).long()  # stratified over the batch
        noise = torch.randn_like(z0)
        z = self.scheduler.add_noise(z0, noise, t).to(memory_format=torch.channels_last)
        target = self.scheduler.get_velocity(z0, noise, t)
        predicted = self.forward(z, t, context).sample
        each = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        self.losses.append(each.detach().view(4, -1).mean(1))  # by quarter of the t range
        return each.mean()

    def learning_rate(self) -> float:
        c = self.config
        left = (1.0 - self.elapsed / (60 * c.minutes)) / c.decay_share
        return c.learning_rate * min(1.0, (self.step + 1) / 500, max(left, 0.01))

    def train_step(self, images: Tensor, prompts: list[str]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.loss(images, prompts)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.shadow, list(self.net.parameters()), 1 - decay)
        self.step += 1

    def run(self) -> None:
        c = self.config
        pictures = Pictures(c.views_per_object, c.seed, toybox_camera(), self.folder / "views")
        generator = torch.Generator().manual_seed(c.seed + 1 + self.step)
        torch.manual_seed(c.seed + 2 + self.step)
        last, saved = time.perf_counter(), time.perf_counter()
        while self.elapsed < 60 * c.minutes:
            self.train_step(*pictures.draw(c.batch, generator))
            now = time.perf_counter()
            self.elapsed, last = self.elapsed + now - last, now
            if self.step % 250 == 0:
                self._log()
            if now - saved > 180:
                self.save()
                saved = last = time.perf_counter()
        self.save()

    def _log(self) -> None:
        recent = torch.stack(self.losses).mean(0).tolist()
        self.losses.clear()
        row = {
            "step": self.step,
            "pictures": self.step * self.config.batch,
            "minutes": round(self.elapsed / 60, 2),
            "loss": sum(recent) / 4,
            "loss_by_t_quarter": [round(x, 5) for x in recent],
        }
        print(json.dumps(row), flush=True)
        with open(self.folder / "curve.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """The resumable state, and the averaged weights as a diffusers pipeline folder."""
        state = {
            "net": self.net.state_dict(),
            "shadow": self.shadow,
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "elapsed": self.elapsed,
        }
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")
        export(self.shadow, self.tokenizer, self.scheduler, self.folder / "pipeline")
        (self.folder / "config.json").write_text(json.dumps(asdict(self.config), indent=1))

    def _load(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.shadow = [w.detach() for w in state["shadow"]]
        self.step, self.elapsed = state["step"], state["elapsed"]


def export(weights: list[Tensor], tokenizer, scheduler, folder: Path) -> None:
    """Write `weights` (in the order of build_models' parameters) as an fp16 pipeline folder."""
    text, unet = build_models(len(tokenizer))
    with torch.no_grad():
        for p, w in zip([*text.parameters(), *unet.parameters()], weights, strict=True):
            p.copy_(w)
    IFPipeline(
        tokenizer=tokenizer,
        text_encoder=text.half(),
        unet=unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def main(
    out: Path = Path("runs/prior"),
    minutes: float = PriorConfig.minutes,
    batch: int = PriorConfig.batch,
    learning_rate: float = PriorConfig.learning_rate,
    views_per_object: int = PriorConfig.views_per_object,
    seed: int = PriorConfig.seed,
    threads: int = PriorConfig.threads,
    compile: bool = PriorConfig.compile,
    start: str = PriorConfig.start,
) -> None:
    """Train the toybox prior, or go on with the training that lies in --out."""
    out.mkdir(parents=True, exist_ok=True)
    Trainer(
        PriorConfig(
            minutes=minutes,
            batch=batch,
            learning_rate=learning_rate,
            seed=seed,
            views_per_object=views_per_object,
            threads=threads,
            compile=compile,
            start=start,
        ),
        out,
    ).run()


if __name__ == "__main__":
    typer.run(main)
