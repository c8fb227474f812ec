"""Small diffusers pipelines of every family that guides, with random weights."""

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    IFPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH, SIDE = 16, 8  # of the text, of the U-Net's picture
FAMILIES = ("sd", "sd-v", "sdxl", "if")


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    letters = string.ascii_lowercase + string.digits + ",.-'"
    words = [*letters, *(x + "</w>" for x in letters), "ab", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    )


def clip_text(tokenizer, kind=CLIPTextModel, width: int = WIDTH):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=12, max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config)


def t5():
    words = ["<pad>", "</s>", "<unk>", *"a red car front side back overhead view ,".split()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return fast, T5EncoderModel(config)


def unet(channels: int, out: int | None = None, width: int = WIDTH, **more) -> UNet2DConditionModel:
    settings = dict(
        sample_size=SIDE, in_channels=channels, out_channels=out or channels, layers_per_block=1,
        block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=width,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return UNet2DConditionModel(**{**settings, **more})


def vae() -> AutoencoderKL:
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        scaling_factor=0.2, **blocks,
    )  # fmt: skip


def scheduler(**settings) -> DDPMScheduler:
    return DDPMScheduler(steps_offset=1, clip_sample=False, **settings)


def tiny_vae() -> AutoencoderTiny:
    sizes = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    blocks = dict(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    return AutoencoderTiny(latent_channels=4, **sizes, **blocks)


def build(family: str, folder: Path):
    """The pipeline, in memory; `folder` is for tokenizer files."""
    torch.manual_seed(0)
    none = dict(safety_checker=None, feature_extractor=None)
    if family == "if":
        tokenizer, text = t5()
        return IFPipeline(
            tokenizer, text, unet(3, 6), DDPMScheduler(variance_type="learned_range"), **none,
            watermarker=None, requires_safety_checker=False,
        )  # fmt: skip
    tokenizer = clip_tokenizer(folder / "files")
    if family == "sdxl":
        second = clip_text(tokenizer, CLIPTextModelWithProjection, 24)
        added = dict(
            addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4, width=WIDTH + 24,
        )  # fmt: skip
        return StableDiffusionXLPipeline(
            vae(), clip_text(tokenizer), second, tokenizer, tokenizer, unet(4, **added),
            scheduler(), add_watermarker=False,
        )  # fmt: skip
    prediction = "v_prediction" if family == "sd-v" else "epsilon"
    return StableDiffusionPipeline(
        vae(), clip_text(tokenizer), tokenizer, unet(4), scheduler(prediction_type=prediction),
        **none, requires_safety_checker=False,
    )  # fmt: skip


def save(family: str, folder: Path) -> Path:
    """A pipeline folder as the hub holds it."""
    target = folder / family
    build(family, folder).save_pretrained(target)
    return target
