"""The radiance field: hash grid, small MLP, density blob."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from .config import FieldConfig
from .ops import (
    frequency_encode,
    has_half,
    hash_encode,
    hash_encode_gradient,
    hash_table_rows,
    mlp,
    mlp_gradient,
    mlp_parameters,
    radiance,
)

BLOBS = {"gaussian": "gaussian", "magic3d": "cone"}  # config.blob: blob of ops.radiance
LOG_DENSITY_MAX = 8.0  # exp of more would only make gradients explode: a bin is opaque long before


def make_field(config: FieldConfig, generator: torch.Generator) -> nn.Module:
    """The Field or PaperField that config.name means. Raises ValueError for an unknown name."""
    from .field_paper import PaperField  # which builds on this file

    kinds = {"hash": Field, "paper": PaperField}
    if config.name not in kinds:
        raise ValueError(f"config `field.name`: expected {' or '.join(kinds)}, got {config.name!r}")
    return kinds[config.name](config, generator)


class Field(nn.Module):
    """Density and albedo of points inside the bounding sphere.

    The logarithm of density is the MLP's first output plus a blob (A.2) and a constant; albedo is
    the sigmoid of the other three. Other numbers of channels are latents (Metzer et al. 2023), of
    which an affine map makes colours.
    """

    def __init__(self, config: FieldConfig, generator: torch.Generator):
        super().__init__()
        if config.blob not in BLOBS:
            raise ValueError(
                f"config `field.blob`: expected {' or '.join(BLOBS)}, got {config.blob!r}"
            )
        self.config = config
        self.grid = dict(
            n_levels=config.n_levels,
            base_resolution=config.base_resolution,
            finest_resolution=config.finest_resolution,
            log2_table_size=config.log2_table_size,
        )
        rows = hash_table_rows(**self.grid)[1][-1]
        self.widths = [
            config.n_levels * config.features,
            *[config.hidden] * config.hidden_layers,
            1 + config.channels,
        ]
        table = (torch.rand(rows, config.features, generator=generator) * 2 - 1) * 1e-4
        self.table = nn.Parameter(table)
        self.weights = nn.Parameter(_he_uniform(self.widths, generator))
        if config.half:
            for name in ("table", "weights"):
                copy = getattr(self, name).detach().half()
                self.register_buffer(f"{name}_half", copy, persistent=False)
        if config.channels != 3:
            self.register_buffer("to_rgb", torch.zeros(3, config.channels))
            self.register_buffer("rgb_bias", torch.zeros(3))
        progressive = config.coarse_levels < config.n_levels
        share = torch.ones(config.n_levels * config.features) if progressive else None
        self.register_buffer("level_share", share)
        self.set_progress(torch.zeros(1))

    def set_progress(self, share: Tensor) -> None:
        """How far the run is, (1,) from 0 to 1, on the field's device: levels come in one after
        another, the finest at config.levels_until (Li et al. 2023, Neuralangelo)."""
        c = self.config
        if self.level_share is not None:
            there = c.coarse_levels + (c.n_levels - c.coarse_levels) * share / c.levels_until
            level = torch.arange(c.n_levels, device=self.level_share.device)
            shares = (there - level).clamp(0.0, 1.0)
            self.level_share.copy_(shares.repeat_interleave(c.features))

    def half_copies(self) -> dict[nn.Parameter, Tensor]:
        """Master -> float16 copy, for the optimizer to keep equal; none without config.half."""
        if not self.config.half:
            return {}
        return {self.table: self.table_half, self.weights: self.weights_half}

    def refresh_half(self) -> None:
        """Round the masters again: they were loaded."""
        for master, copy in self.half_copies().items():
            copy.copy_(master.detach())

    def forward(
        self,
        positions: Tensor,
        count: Tensor | None = None,
        latent: bool = False,
        normals: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """positions (N, 3), scene units; count (1,) int32, number of valid rows.
        Returns sigma (N,) in 1 / scene unit and albedo (N, 3) in [0, 1]; or latents
        (N, channels), if the field has them and they are asked for. With `normals` also the
        gradient of log density by position (N, 3), 1 / scene unit, else None: normals are its
        opposite direction, and it is differentiable with respect to all parameters. With
        config.half the grid and the MLP work in float16 where the device's kernels can, else in
        float32; the gradient is always computed in float32, from the masters."""
        x = positions / (2.0 * self.config.radius) + 0.5
        half = self.config.half and has_half(positions)
        first, second = ({}, {})
        if half:
            first, second = {"table_half": self.table_half}, {"params_half": self.weights_half}
        way, activation = self.config.interpolation, self.config.activation
        features = hash_encode(x, self.table, **self.grid, interpolation=way, count=count, **first)
        if self.level_share is not None:
            features = features * self.level_share.to(features.dtype)
        out = mlp(features, self.weights, self.widths, activation, count=count, **second)
        of_x = self._gradient(x, features.float(), count) if normals else None
        c = self.config
        cone = c.blob == "magic3d"
        sigma, values, gradient = radiance(
            out, positions, c.density_bias, LOG_DENSITY_MAX, BLOBS[c.blob],
            c.cone_density if cone else c.blob_density, c.cone_radius if cone else c.blob_std,
            raw=c.channels != 3, of_x=of_x, scale=0.5 / c.radius, count=count,
        )  # fmt: skip
        if c.channels != 3 and not latent:
            values = (values @ self.to_rgb.T + self.rgb_bias).clamp(0.0, 1.0)
        return sigma, values, gradient if normals else None

    def _gradient(self, x, features, count) -> Tensor:
        """Of the MLP's first output by x: backwards through MLP and grid."""
        if self.config.activation == "relu":  # its gradient is the same around each point:
            features = features.detach()  # a second order of zeros is neither made nor added
        of_out = torch.zeros(len(x), self.widths[-1], device=x.device)
        of_out[:, 0].fill_(1.0)
        of_features = mlp_gradient(
            of_out, features, self.weights, self.widths, self.config.activation, count=count
        )
        if self.level_share is not None:
            of_features = of_features * self.level_share
        return hash_encode_gradient(
            of_features, x, self.table, **self.grid, interpolation=self.config.interpolation,
            count=count,
        )  # fmt: skip


def _he_uniform(widths: list[int], generator: torch.Generator) -> Tensor:
    """Flat weights without biases, He et al. 2015, layer after layer."""
    layers = [
        (torch.rand(o * i, generator=generator) * 2 - 1) * math.sqrt(6.0 / i)
        for i, o in itertools.pairwise(widths)
    ]
    flat = torch.cat(layers)
    assert flat.numel() == mlp_parameters(widths, False)
    return flat


class Environment(nn.Module):
    """The paper's background: an MLP of the ray's positionally encoded direction (section 3.1)."""

    def __init__(self, n_frequencies: int, generator: torch.Generator):
        super().__init__()
        self.n_frequencies = n_frequencies
        self.widths = [6 * n_frequencies, 32, 3]
        self.weights = nn.Parameter(_he_uniform(self.widths, generator))

    def forward(self, rays_d: Tensor) -> Tensor:
        """rays_d (N, 3) unit. Returns colours (N, 3) in [0, 1]."""
        encoded = frequency_encode(rays_d, self.n_frequencies)
        return torch.sigmoid(mlp(encoded, self.weights, self.widths))
