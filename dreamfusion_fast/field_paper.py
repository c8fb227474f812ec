"""The paper's own radiance field (section 3.1, A.2): encoded positions, residual blocks, blob."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import FieldConfig
from .field import LOG_DENSITY_MAX, blob
from .ops import frequency_encode


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Weights uniform as in He et al. 2015, biases zero."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)  # leaves torch's own generator alone
    with torch.no_grad():
        layer.weight.uniform_(-1.0, 1.0, generator=generator).mul_(math.sqrt(6.0 / inputs))
        layer.bias.zero_()
    return layer


class ResidualBlock(nn.Module):
    """h + W₂ silu(W₁ h), both with biases: He et al.'s block of two layers, with nothing behind the
    sum. The paper says "ResNet blocks" and no more."""

    def __init__(self, width: int, generator: torch.Generator):
        super().__init__()
        self.first = linear(width, width, generator)
        self.second = linear(width, width, generator)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.second(nn.functional.silu(self.first(h)))


class PaperField(nn.Module):
    """Density and albedo of points inside the bounding sphere, as the paper has them.

    A linear layer takes the integrated encoding of a sample, a Gaussian of covariance
    lambda_Sigma² I; config.blocks residual blocks follow, a LayerNorm between each two; a linear
    layer, zero at first, ends in the logarithm of density, to which the blob and
    config.density_bias are added, and in albedo's logits. So an untrained scene is the blob, grey.
    """

    def __init__(self, config: FieldConfig, generator: torch.Generator):
        """Raises ValueError with config.half: torch's layers hold no float16 copies."""
        super().__init__()
        if config.half:
            raise ValueError("config `half`: expected false with the paper's field, got true")
        self.config = config
        self.stem = linear(6 * config.n_frequencies, config.width, generator)
        blocks = [ResidualBlock(config.width, generator) for _ in range(config.blocks)]
        norms = [nn.LayerNorm(config.width) if i else nn.Identity() for i in range(config.blocks)]
        self.blocks, self.norms = nn.ModuleList(blocks), nn.ModuleList(norms)
        self.head = linear(config.width, 1 + config.channels, generator)
        nn.init.zeros_(self.head.weight)
        self.register_buffer("spread", torch.tensor([config.spread[0]]))  # lambda_Sigma
        if config.channels != 3:
            self.register_buffer("to_rgb", torch.zeros(3, config.channels))
            self.register_buffer("rgb_bias", torch.zeros(3))

    def set_progress(self, share: Tensor) -> None:
        """How far the run is, (1,) from 0 to 1, on the field's device: lambda_Sigma falls."""
        start, end = self.config.spread
        fallen = (share / max(self.config.spread_share, 1e-9)).clamp(max=1.0)
        self.spread.copy_(start + (end - start) * fallen)

    def half_copies(self) -> dict[nn.Parameter, Tensor]:
        """None: everything is float32."""
        return {}

    def refresh_half(self) -> None:
        """Nothing to do: there are no copies."""

    def forward(
        self,
        positions: Tensor,
        count: Tensor | None = None,
        latent: bool = False,
        normals: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """positions (N, 3), contiguous, scene units; count (1,) int32, number of valid rows: the
        others' results mean nothing, but are finite where positions are.
        Returns sigma (N,) in 1 / scene unit; albedo (N, 3) in [0, 1], or latents (N, channels), if
        the field has them and they are asked for; and with normals the gradient (N, 3) of log
        sigma (before its ceiling) by position, in 1 / scene unit, itself differentiable; else
        None."""
        training, gradient = torch.is_grad_enabled(), None
        with torch.set_grad_enabled(training or normals):
            if normals and not positions.requires_grad:
                positions = positions.detach().requires_grad_()
            log_density, values = self._evaluate(positions, count)
            if normals:
                (gradient,) = torch.autograd.grad(
                    log_density.sum(), positions, create_graph=training
                )
        if not training:
            log_density, values = log_density.detach(), values.detach()
        sigma = log_density.clamp(max=LOG_DENSITY_MAX).exp()
        return sigma, self._colours(values, latent), gradient

    def _evaluate(self, positions: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
        """log sigma (N,) without a ceiling, and what becomes colour, (N, channels)."""
        variance = self.spread.square().expand(len(positions)).contiguous()
        h = self.stem(frequency_encode(positions, self.config.n_frequencies, variance, count))
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = block(norm(h))
        out = self.head(h)
        known = blob(positions, self.config) + self.config.density_bias
        return out[:, 0] + known, out[:, 1:]

    def _colours(self, values: Tensor, latent: bool) -> Tensor:
        if self.config.channels == 3:
            return torch.sigmoid(values)
        if latent:
            return values.contiguous()
        return (values @ self.to_rgb.T + self.rgb_bias).clamp(0.0, 1.0)
