"""What large models will need, predicted, not measured: `python bench/guidance_model.py`.

Networks of the published configurations are run without memory (torch's meta device): weights and
what lives in a pass are counted by dreamfusion_fast/preflight.py, operations by torch. Times are
those operations at half of a card's published dense fp16 rate: an assumption.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from bench.limits import CARDS
from dreamfusion_fast import preflight

VIEWS, CONDITIONS, EFFICIENCY = 4, 2, 0.5
CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
SD = dict(block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, down_block_types=CROSS,
          up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, sample_size=64)  # fmt: skip
UNETS = {  # the configurations that their authors publish, unet/config.json
    "sd15": SD | dict(cross_attention_dim=768, attention_head_dim=8),
    "sd21": SD | dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                      use_linear_projection=True),
    "sdxl": dict(
        block_out_channels=(320, 640, 1280), layers_per_block=2, sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}  # fmt: skip
VAE = dict(block_out_channels=(128, 256, 512, 512), latent_channels=4, layers_per_block=2,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
           sample_size=512)  # fmt: skip


def guide(name: str):
    """As DiffusersGuidance, of what preflight reads, on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS[name]).half()
        vae = AutoencoderKL(**VAE).half()
    pooled = name == "sdxl"
    text = SimpleNamespace(pooled=pooled, pooled_width=1280 if pooled else 0)
    return SimpleNamespace(unet=unet, vae=vae, dtype=torch.float16, text=text, reduced=8,
                           image_size=8 * unet.config.sample_size)  # fmt: skip


def weights(module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def operations(g) -> float:
    """Of a step: the U-Net for all conditions, the VAE's encoder forward and back."""
    with FlopCounterMode(display=False) as counter:
        preflight.prediction_bytes(g, VIEWS, CONDITIONS, flash=False)
        preflight.encoding_bytes(g, VIEWS, flash=False)
    return counter.get_total_flops()


def main() -> None:
    diffusers.utils.logging.set_verbosity_error()  # of casts
    print(f"PREDICTED, not measured: {VIEWS} views a step, both halves of guidance, fp16; times at "
          f"{EFFICIENCY:.0%} of the published fp16 rate.\n")  # fmt: skip
    cards = [card.name.removeprefix("NVIDIA ") for card in CARDS]
    heads = ["model", "picture", "weights GiB", "U-Net GiB", "VAE GiB", "T operations a step"]
    print(f"| {' | '.join(heads + [f'{c}, ms' for c in cards])} |")
    print(f"|---|{'---:|' * (len(heads) - 1 + len(cards))}")
    for name in UNETS:
        g = guide(name)
        work = operations(g)
        sizes = [weights(g.unet) + weights(g.vae), preflight.prediction_bytes(g, VIEWS, CONDITIONS),
                 preflight.encoding_bytes(g, VIEWS)]  # fmt: skip
        cells = [name, g.image_size, *(f"{n / 2**30:.1f}" for n in sizes), f"{work / 1e12:.1f}"]
        cells += [f"{1e3 * work / (EFFICIENCY * card.tensor):.0f}" for card in CARDS]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
