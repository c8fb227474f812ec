"""From prompts to one tensor a prompt, for every family of text encoders that diffusers ships."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOKENS = 77  # the most that CLIP reads, and DeepFloyd IF trained with


class TextEncoders:
    """The one or two text encoders of a pipeline, frozen.

    Two (Stable Diffusion XL): their next-to-last hidden states side by side, and the second one's
    pooled projection as one more row, filled up with zeros: an embedding stays one tensor, which
    `split` takes apart again. One: its last hidden state.

    Args:
        pipeline: has tokenizer and text_encoder, and perhaps tokenizer_2 and text_encoder_2.
        device, dtype: of the embeddings.
        on_cpu: run the encoders on the CPU, in float32: slower, and no load for a GPU.
        check_prompt: called with each prompt that is not empty; raises ValueError for what the
            model cannot mean.
    """

    def __init__(
        self,
        pipeline,
        device,
        dtype,
        check_prompt: Callable[[str], None] | None = None,
        on_cpu: bool = False,
    ):
        self.device, self.dtype, self.check_prompt = device, dtype, check_prompt
        self.where = torch.device("cpu") if on_cpu else device
        pairs = [(pipeline.tokenizer, pipeline.text_encoder)]
        if getattr(pipeline, "text_encoder_2", None) is not None:
            pairs.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
        own = torch.float32 if on_cpu else dtype
        self.pairs = [(t, frozen(e, self.where, own)) for t, e in pairs]
        self.pooled = len(pairs) == 2
        self.pooled_width = pairs[-1][1].config.projection_dim if self.pooled else 0
        # Of SDXL's base model, whose unconditional half was trained on zeros.
        self.empty_is_zero = pipeline.config.get("force_zeros_for_empty_prompt", False)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """(B, tokens, width), on the device. Raises ValueError for a prompt that is too long or has
        a word that the model does not know."""
        if not self.pairs:
            raise RuntimeError("guidance: the text encoders were released: load it again to embed")
        for text in prompts:
            if text and self.check_prompt:
                self.check_prompt(text)
        states = []
        for tokenizer, encoder in self.pairs:
            tokens = self._tokens(tokenizer, prompts)
            mask = tokens.attention_mask.to(self.where) if _is_t5(encoder) else None
            out = encoder(
                tokens.input_ids.to(self.where),
                attention_mask=mask,
                output_hidden_states=self.pooled,
            )
            states.append(out.hidden_states[-2] if self.pooled else out[0])
        embedding = torch.cat(states, -1)
        if self.pooled:
            row = out[0]  # the projection, of the second encoder
            row = torch.nn.functional.pad(row, (0, embedding.shape[-1] - row.shape[-1]))
            embedding = torch.cat((embedding, row[:, None]), 1)
        if self.empty_is_zero:
            empty = torch.tensor([not text for text in prompts], device=self.where)
            embedding = torch.where(empty[:, None, None], 0.0, embedding)
        return embedding.to(self.device, self.dtype)

    def split(self, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        """What cross-attention sees, and the pooled vector (B, width), if there is one."""
        if not self.pooled:
            return embedding, None
        return embedding[:, :-1], embedding[:, -1, : self.pooled_width]

    def release(self) -> None:
        """Forget the encoders: all prompts are embedded."""
        self.pairs = []

    def _tokens(self, tokenizer, prompts: list[str]):
        limit = min(tokenizer.model_max_length, TOKENS)
        for text in prompts:
            tokens = tokenizer(text).input_ids
            if len(tokens) > limit:
                raise ValueError(
                    f"argument `prompt`: expected at most {limit} tokens, got "
                    f"{len(tokens)}: {text!r}"
                )
            # CLIP's unknown token is its end token as well: only what lies inside counts.
            if text and tokenizer.unk_token_id in tokens[1:-1]:
                raise ValueError(
                    f"argument `prompt`: the guidance does not know a word of {text!r}"
                )
        return tokenizer(prompts, padding="max_length", max_length=limit, return_tensors="pt")


def frozen(module, device, dtype: torch.dtype):
    """The module on the device, in the dtype, for inference."""
    module.to(device)
    if module.dtype != dtype:  # diffusers warns of every cast, even of one that changes nothing
        module.to(dtype)
    return module.requires_grad_(False).eval()


def _is_t5(encoder) -> bool:
    return encoder.config.model_type == "t5"
