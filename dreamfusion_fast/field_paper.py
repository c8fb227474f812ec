"""The paper's own radiance field (section 3.1, A.2): encoded positions, residual blocks, blob."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import FieldConfig
from .field import LOG_DENSITY_MAX
from .ops import frequency_encode

CHUNK = 1 << 13  # positions at a time


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


def blob(positions: Tensor, config: FieldConfig) -> Tensor:
    """What is added to the logarithm of density, so that a scene begins in the middle.

    positions (N, 3), scene units; returns (N,). "gaussian" (A.2): lambda_tau exp(-|mu|² /
    (2 sigma_tau²)); "magic3d" (Lin et al. 2023, section 3): lambda (1 - |mu| / c), whose gradient
    is zero at the centre. Raises ValueError for an unknown config.blob."""
    square = positions.square().sum(-1)
    if config.blob == "gaussian":
        return config.blob_density * torch.exp(square / (-2.0 * config.blob_std**2))
    if config.blob == "magic3d":
        distance = square.clamp(min=1e-12).sqrt()  # at 0 the root has no derivative
        return config.cone_density * (1.0 - distance / config.cone_radius)
    raise ValueError(f"config `blob`: expected gaussian or magic3d, got {config.blob!r}")


class _Recomputed(torch.autograd.Function):
    """PaperField.evaluate, piece by piece, and again in backward: what its layers would keep for
    the second order of a whole batch is tens of gigabytes."""

    @staticmethod
    def forward(ctx, field, positions, count, normals, *parameters):
        ctx.field, ctx.normals = field, normals
        ctx.save_for_backward(positions, count)
        pieces = field.pieces(positions.detach(), count)
        parts = [field.evaluate(x, normals, graph=False) for x in pieces]
        missing = len(positions) - sum(len(part[0]) for part in parts)
        rest = positions.new_zeros(missing)
        log_density, values, gradient = (torch.cat(x).detach() for x in zip(*parts, strict=True))
        values = torch.cat((values, rest[:, None].expand(-1, values.shape[1])))
        if normals:
            gradient = torch.cat((gradient, rest[:, None].expand(-1, 3)))
        return torch.cat((log_density, rest)), values, gradient

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *of_outputs):
        positions, count = ctx.saved_tensors
        parameters, first = list(ctx.field.parameters()), 0
        sums, of_positions = [torch.zeros_like(p) for p in parameters], torch.zeros_like(positions)
        for x in ctx.field.pieces(positions.detach(), count):
            x.requires_grad_()
            outputs = ctx.field.evaluate(x, ctx.normals, graph=True)
            rows = slice(first, first := first + len(x))
            pairs = list(zip(outputs, (g[rows] for g in of_outputs), strict=True))
            outputs, grads = zip(*pairs[: 3 if ctx.normals else 2], strict=True)
            totals = [of_positions[rows], *sums]
            found = torch.autograd.grad(outputs, [x, *parameters], grads, allow_unused=True)
            for total, part in zip(totals, found, strict=True):
                if part is not None:
                    total += part
        return None, of_positions, None, None, *sums


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
        parameters = list(self.parameters()) if torch.is_grad_enabled() else []
        log_density, values, gradient = _Recomputed.apply(
            self, positions, count, normals, *parameters
        )
        sigma = log_density.clamp(max=LOG_DENSITY_MAX).exp()
        return sigma, self._colours(values, latent), gradient if normals else None

    def pieces(self, positions: Tensor, count: Tensor | None) -> list[Tensor]:
        """The positions, CHUNK rows at a time; a CPU, where the count is at hand, leaves out pieces
        without a valid row."""
        n = len(positions)
        if count is not None and positions.device.type == "cpu":
            n = min(n, -(-int(count) // CHUNK) * CHUNK)
        return list(positions[:n].split(CHUNK)) or [positions]

    def evaluate(self, positions: Tensor, normals: bool, graph: bool) -> tuple[Tensor, ...]:
        """log sigma (N,) without a ceiling, what becomes colour (N, channels), and the gradient of
        log sigma (N, 3), or with no `normals` nothing, (0, 3). graph: differentiable."""
        with torch.set_grad_enabled(graph or normals):
            x = positions if positions.requires_grad else positions.detach().requires_grad_(normals)
            log_density, values = self._evaluate(x)
            gradient = positions.new_empty(0, 3)
            if normals:
                (gradient,) = torch.autograd.grad(log_density.sum(), x, create_graph=graph)
        return log_density, values, gradient

    def _evaluate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        variance = self.spread.square().expand(len(positions)).contiguous()
        h = self.stem(frequency_encode(positions, self.config.n_frequencies, variance))
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
