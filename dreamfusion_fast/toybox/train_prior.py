"""Train the embedded prior: `python -m dreamfusion_fast.toybox.train_prior --out runs/prior`.

A diffusion U-Net, conditioned on words and on the camera, on the pixel-unshuffled 64x64 picture (48
channels of 16x16, exactly invertible), with a small CLIP text encoder trained jointly, v-prediction
(Salimans & Ho 2022: unlike the epsilon loss it weighs the noisy end, where SDS learns shape), and a
schedule shifted to more noise.
Stops are safe: the state is written atomically, and the same command resumes it. Beside other work
start it with OMP_WAIT_POLICY=PASSIVE and `nice`.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor
from pytorch_optimizer import Muon
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from .. import camera
from ..checkpoint import write_atomically
from ..config import toybox_camera
from ..guidance import load_pipeline
from . import world
from .pictures import SIZE, Batch, Pictures

UNSHUFFLE = 4
LOG_EVERY, SAVE_SECONDS = 100, 180  # steps; seconds


@dataclass
class PriorConfig:
    steps: int = 14_000  # may be another number when a training goes on
    batch: int = 64
    optimizer: str = "muon"  # muon (Jordan et al. 2024), with AdamW for what is no matrix | adamw
    learning_rate: float = 1.5e-3
    warmup: int = 300  # steps
    decay_share: float = 0.3  # the last part of `steps`, in which the rate falls to zero
    ema: float = 0.9995
    unconditional: float = 0.1  # share of pictures without words or camera, for guidance
    blind: float = 0.15  # share of pictures with words, but without the camera
    views_per_object: int = 1000
    channels: tuple[int, ...] = (96, 112, 128)
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


def build_models(
    vocabulary: int, blocks: tuple[int, ...] = PriorConfig.channels
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """The text encoder and the U-Net, untrained. blocks: the U-Net's channels, level by level."""
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
        block_out_channels=blocks,
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
        class_embed_type="projection",
        projection_class_embeddings_input_dim=camera.N_NUMBERS,
    )
    # A camera says nothing before training has made it do so.
    nn.init.zeros_(unet.class_embedding.linear_2.weight)
    nn.init.zeros_(unet.class_embedding.linear_2.bias)
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


def build_optimizer(net: nn.Module, config: PriorConfig) -> torch.optim.Optimizer:
    """Raises ValueError for an unknown name."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            net.parameters(), lr=config.learning_rate, weight_decay=1e-2, betas=(0.9, 0.98)
        )
    if config.optimizer != "muon":
        raise ValueError(
            f"argument `--optimizer`: expected muon or adamw, got {config.optimizer!r}"
        )
    ends = ("conv_in", "conv_out", "embedding", "embeddings")  # no matrices between features
    matrices, rest = [], []
    for name, p in net.named_parameters():
        inner = p.ndim > 1 and not any(part in ends for part in name.split("."))
        (matrices if inner else rest).append(p)
    return Muon(
        [
            {"params": matrices, "use_muon": True, "use_adjusted_lr": True},
            {"params": rest, "use_muon": False, "betas": (0.9, 0.98)},
        ],
        lr=config.learning_rate,
        weight_decay=1e-2,
    )


class Trainer:
    """A training in a folder: state.pt (all that it needs to go on), pipeline (the average, as
    diffusers loads it), config.json, curve.jsonl.

    A step's random numbers come from the seed and the step's number alone: a training that was
    stopped, at any moment, goes on as if it had not been, to the bit where threads and machine are
    the same. Raises ValueError for the state of another network or another data set.
    """

    def __init__(self, config: PriorConfig, folder: Path):
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config, self.folder = config, folder
        self.tokenizer = build_tokenizer()
        self.text, self.unet = build_models(len(self.tokenizer), config.channels)
        self.net = nn.ModuleDict({"text": self.text, "unet": self.unet})
        if config.start and not self.state_path.exists():
            self._start_from(config.start)
        self.shadow = [p.detach().clone() for p in self.net.parameters()]
        self.scheduler = DDPMScheduler(
            trained_betas=shifted_cosine_betas(), prediction_type="v_prediction", clip_sample=True
        )
        self.optimizer = build_optimizer(self.net, config)
        self.step, self.seconds = 0, 0.0
        self.losses: list[Tensor] = []  # of the steps since the last line of the curve
        self.forward = torch.compile(self.unet) if config.compile else self.unet
        if self.state_path.exists():
            self._load(torch.load(self.state_path, weights_only=True))

    @property
    def state_path(self) -> Path:
        return self.folder / "state.pt"

    def embed(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        return self.text(tokens).last_hidden_state

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The mean squared error of v, its t stratified over the batch."""
        c, n = self.config, len(batch.images)
        u = torch.rand(n, generator=generator)
        context = self.embed(["" if x < c.unconditional else p for x, p in zip(u, batch.prompts)])
        told = (u >= c.unconditional + c.blind).float()[:, None]  # others see no camera: zeros
        numbers = camera.flattened(batch.cameras) * told
        z0 = F.pixel_unshuffle(batch.images * 2 - 1, UNSHUFFLE)
        t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000).long()
        noise = torch.randn(z0.shape, generator=generator)
        z = self.scheduler.add_noise(z0, noise, t).to(memory_format=torch.channels_last)
        target = self.scheduler.get_velocity(z0, noise, t)
        predicted = self.forward(z, t, context, class_labels=numbers).sample
        each = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        self.losses.append(each.detach().view(4, -1).mean(1))  # by quarter of the t range
        return each.mean()

    def learning_rate(self) -> float:
        c = self.config
        left = (1.0 - self.step / c.steps) / c.decay_share
        return c.learning_rate * min(1.0, (self.step + 1) / c.warmup, max(left, 0.0))

    def train_step(self, batch: Batch, generator: torch.Generator) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
            loss = self.loss(batch, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.shadow, list(self.net.parameters()), 1 - decay)
        self.step += 1

    def draw(self, pictures: Pictures) -> tuple[Batch, torch.Generator]:
        """The pictures of the next step, and the source of its other random numbers."""
        generator = torch.Generator().manual_seed((self.config.seed + 1) * 1_000_003 + self.step)
        return pictures.draw(self.config.batch, generator), generator

    def run(self) -> None:
        """Train to config.steps, saving on the way and at the end."""
        c = self.config
        pictures = Pictures(c.views_per_object, c.seed, toybox_camera())
        last = saved = time.perf_counter()
        while self.step < c.steps:
            self.train_step(*self.draw(pictures))
            now = time.perf_counter()
            self.seconds, last = self.seconds + now - last, now
            if self.step % LOG_EVERY == 0:
                self._log()
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = last = time.perf_counter()
        self.save()

    def _log(self) -> None:
        recent = torch.stack(self.losses).mean(0).tolist()
        self.losses.clear()
        row = {
            "step": self.step,
            "pictures": self.step * self.config.batch,
            "minutes": round(self.seconds / 60, 2),
            "rate": self.learning_rate(),
            "loss": sum(recent) / 4,
            "loss_by_t_quarter": [round(x, 5) for x in recent],
        }
        print(json.dumps(row), flush=True)
        with open(self.folder / "curve.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """The resumable state, and the averaged weights as a diffusers pipeline folder."""
        state = {
            "channels": list(self.config.channels),
            "words": self.tokenizer.vocab_size,
            "net": self.net.state_dict(),
            "shadow": self.shadow,
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
        }
        write_atomically(self.state_path, lambda p: torch.save(state, p))
        export(self.shadow, self.config, self.scheduler, self.folder / "pipeline")
        text = json.dumps(asdict(self.config), indent=1)
        write_atomically(self.folder / "config.json", lambda p: p.write_text(text))

    def _load(self, state: dict) -> None:
        ours = {"channels": list(self.config.channels), "words": self.tokenizer.vocab_size}
        for name, wanted in ours.items():
            if state.get(name) != wanted:
                raise ValueError(
                    f"argument `--out`: expected the state of a network of {name} {wanted}, got "
                    f"one of {state.get(name)} in {self.state_path}"
                )
        self.net.load_state_dict(state["net"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ValueError(
                f"argument `--optimizer`: expected the one of the training in {self.folder}, got "
                f"{self.config.optimizer} ({error})"
            ) from None
        self.shadow = [w.detach() for w in state["shadow"]]
        self.losses = list(state["losses"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _start_from(self, folder: str) -> None:
        """Take the weights of a shipped average; the moments begin anew, behind a warm-up."""
        pipeline = load_pipeline(folder)
        try:
            self.text.load_state_dict(pipeline.text_encoder.state_dict())
            self.unet.load_state_dict(pipeline.unet.state_dict())
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[1].strip()
            raise ValueError(
                f"argument `--start`: expected a pipeline of this network, got {folder}: {reason}"
            ) from None


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware. One that does not is many times slower in
    it than in float32, one that does is faster."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def export(weights: list[Tensor], config: PriorConfig, scheduler, folder: Path) -> None:
    """Write `weights` (in the order of build_models' parameters) as an fp16 pipeline folder."""
    tokenizer = build_tokenizer()
    text, unet = build_models(len(tokenizer), config.channels)
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
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of PriorConfig; repeatable")
    ] = None,
) -> None:
    """Train the toybox prior, or go on with the training that lies in --out."""
    try:
        config = settings(out, set_ or [])
        out.mkdir(parents=True, exist_ok=True)
        Trainer(config, out).run()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def settings(out: Path, changes: list[str]) -> PriorConfig:
    """The settings of the training in `out`, or the defaults, with NAME=VALUE on top."""
    path = out / "config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    known = asdict(PriorConfig())
    for change in changes:
        name, equals, value = change.partition("=")
        if name not in known or not equals:
            raise ValueError(f"argument `--set`: expected NAME=VALUE of {', '.join(known)}, "
                             f"got {change!r}")  # fmt: skip
        kind = type(known[name])
        try:
            values[name] = value if kind is str else json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(
                f"argument `--set`: expected {name} like {known[name]!r}, got {value!r}"
            ) from None
    values["channels"] = tuple(values.get("channels", known["channels"]))
    return PriorConfig(**values)


if __name__ == "__main__":
    typer.run(main)
