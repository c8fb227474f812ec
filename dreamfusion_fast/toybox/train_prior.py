"""Train the embedded prior: `python -m dreamfusion_fast.toybox.train_prior --out runs/prior`.

A diffusion U-Net, conditioned on words and on the camera, on the pixel-unshuffled 64x64 picture (48
channels of 16x16, exactly invertible), with a small CLIP text encoder trained jointly, v-prediction
(Salimans & Ho 2022: unlike the epsilon loss it weighs the noisy end, where SDS learns shape), and a
schedule shifted to more noise.
Stops are safe: the state is written atomically, and the same command resumes it. Beside other work
start it with OMP_WAIT_POLICY=PASSIVE and `nice`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnAddedKVProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from .. import camera
from ..config import toybox_camera
from ..guidance import load_pipeline
from . import world
from .pictures import SIZE, Batch, Pictures
from .training import Training, TrainingConfig, autocast, averaged, settings

UNSHUFFLE = 4
FAST = "class_embedding"  # the camera's part: what it says is faint at first among much noise
MEASURES = ["loss", *(f"loss_t{k}" for k in range(1, 5))]  # all, and by quarter of the t range


@dataclass
class PriorConfig(TrainingConfig):
    unconditional: float = 0.1  # share of pictures without words or camera, for guidance
    blind: float = 0.15  # share of pictures with words, but without the camera
    channels: tuple[int, ...] = (96, 112, 128)
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
    """The training of the prior in a folder: see Training; beside its state lies `pipeline`, the
    average, as diffusers loads it. Raises ValueError for the state of another network."""

    def __init__(self, config: PriorConfig, folder: Path):
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config, self.folder = config, folder
        self.tokenizer = build_tokenizer()
        self.text, self.unet = build_models(len(self.tokenizer), config.channels)
        if config.start and not (folder / "state.pt").exists():
            self._start_from(config.start)
        net = nn.ModuleDict({"text": self.text, "unet": self.unet})
        kind = {"channels": list(config.channels), "words": self.tokenizer.vocab_size}
        self.training = Training(net, config, folder, kind, MEASURES, FAST)
        self.scheduler = DDPMScheduler(
            trained_betas=shifted_cosine_betas(), prediction_type="v_prediction", clip_sample=True
        )
        self.forward = torch.compile(self.unet) if config.compile else self.unet

    def embed(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        return self.text(tokens).last_hidden_state

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The mean squared error of v, its t stratified over the batch; and MEASURES."""
        c, n = self.config, len(batch.images)
        u = torch.rand(n, generator=generator)
        prompts = ["" if x < c.unconditional else p for x, p in zip(u, batch.prompts)]
        told = (u >= c.unconditional + c.blind).float()[:, None]  # others see no camera: zeros
        numbers = camera.flattened(batch.cameras) * told
        z0 = F.pixel_unshuffle(batch.images * 2 - 1, UNSHUFFLE)
        t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000).long()
        noise = torch.randn(z0.shape, generator=generator)
        z = self.scheduler.add_noise(z0, noise, t).to(memory_format=torch.channels_last)
        target = self.scheduler.get_velocity(z0, noise, t)
        with autocast():
            predicted = self.forward(z, t, self.embed(prompts), class_labels=numbers).sample
        each = (predicted.float() - target).square().mean(dim=(1, 2, 3))
        loss = each.mean()
        return loss, torch.cat((loss[None], each.view(4, -1).mean(1))).detach()

    def run(self) -> None:
        c = self.config
        pictures = Pictures(c.views_per_object, c.seed, toybox_camera())
        self.training.run(lambda g: self.loss(pictures.draw(c.batch, g), g), self.ship)

    def ship(self) -> None:
        """Write the averaged weights as a diffusers pipeline folder."""
        export(self.training.shadow, self.config, self.scheduler, self.folder / "pipeline")

    def _start_from(self, folder: str) -> None:
        """Take the weights of a shipped average; the moments begin anew, behind a warm-up. It may
        know fewer words, and no camera: what it lacks begins untrained."""
        pipeline = load_pipeline(folder)
        text, unet = pipeline.text_encoder.state_dict(), pipeline.unet.state_dict()
        name = next(k for k in text if k.endswith("token_embedding.weight"))
        ours, theirs = self.tokenizer.get_vocab(), pipeline.tokenizer.get_vocab()
        rows = self.text.state_dict()[name].clone()
        for word in ours.keys() & theirs.keys():
            rows[ours[word]] = text[name][theirs[word]]
        text[name] = rows
        mine = self.unet.state_dict()
        unet = {k: mine[k] for k in mine if k.startswith("class_embedding.")} | unet
        try:
            self.text.load_state_dict(text)
            self.unet.load_state_dict(unet)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[1].strip()
            raise ValueError(
                f"argument `--start`: expected a pipeline of this network, got {folder}: {reason}"
            ) from None


def export(weights: list[Tensor], config: PriorConfig, scheduler, folder: Path) -> None:
    """Write `weights` (in the order of build_models' parameters) as an fp16 pipeline folder."""
    tokenizer = build_tokenizer()
    text, unet = build_models(len(tokenizer), config.channels)
    averaged(weights, [text, unet])
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
        config = settings(PriorConfig, out, set_ or [])
        out.mkdir(parents=True, exist_ok=True)
        Trainer(config, out).run()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    typer.run(main)
