"""Multiresolution grids of features (instant-ngp, Müller et al. 2022) as tiny-cuda-nn has them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ...ops import hash_encode
from ...ops._backend import has_half
from .config import Settings
from .part import InputPart
from .pcg32 import Pcg32, uniform_of_threads

PRIMES = (1, 2654435761, 805459861, 3674653429)
WORD = 2**32
TYPE_OF = {"Grid": "Hash", "HashGrid": "Hash", "TiledGrid": "Tiled", "DenseGrid": "Dense"}


@dataclass(frozen=True)
class Level:
    """One grid: a point x lies at scale x + 1/2, in units of cells.

    Vertex v has index Σ_d v_d resolution^d, or, hashed, the exclusive or of v_d PRIMES_d, both
    modulo 2^32; its row is that modulo `rows`. Where resolution^D does not fit in 32 bits and
    nothing is hashed, tiny-cuda-nn reads row 0 for every vertex: steps are None.
    """

    scale: float  # of float32
    resolution: int  # vertices a side
    start: int  # first row in the table
    rows: int
    hashed: bool
    steps: tuple[int, ...] | None  # what a coordinate is multiplied by


def lay_out(
    kind: str, dims: int, n_levels: int, base: int, per_level_scale: float, log2_size: int
) -> list[Level]:
    """The levels of a grid, in float32 like tiny-cuda-nn:

    scale_l = 2^(l log2 s) base - 1, resolution_l = ⌈scale_l⌉ + 1, and resolution_l^D rows, rounded
    up to a multiple of 8, but at most 2^log2_size ("Hash") or base^D ("Tiled").
    """
    levels, start = [], 0
    growth = np.float32(np.log2(np.float64(np.float32(per_level_scale))))
    for level in range(n_levels):
        power = np.float32(np.exp2(np.float64(np.float32(level) * growth)))
        scale = np.float32(power * np.float32(base)) - np.float32(1)
        resolution = math.ceil(scale) + 1
        vertices = resolution**dims
        rows = (min(vertices, WORD // 2 - 1) + 7) // 8 * 8
        if kind == "Tiled":
            rows = min(rows, base**dims)
        elif kind == "Hash":
            rows = min(rows, 2**log2_size)
        hashed = kind == "Hash" and rows < min(vertices, WORD - 1)
        steps = tuple(resolution**d for d in range(dims)) if vertices < WORD else None
        steps = PRIMES[:dims] if hashed else steps
        levels.append(Level(float(scale), resolution, start, rows, hashed, steps))
        start += rows
    return levels


def rows_of(vertices: torch.Tensor, level: Level) -> torch.Tensor:
    """The table's row of each vertex: (..., D) int64 to (...) int64."""
    if level.steps is None:
        return torch.full_like(vertices[..., 0], level.start)
    # Products of numbers below 2^32 wrap modulo 2^64, which keeps their low 32 bits.
    keys = [v * step & WORD - 1 for v, step in zip((vertices % WORD).unbind(-1), level.steps)]
    index = keys[0]
    for key in keys[1:]:
        index = index ^ key if level.hashed else (index + key) & WORD - 1
    return level.start + index % level.rows


def interpolate(
    x: torch.Tensor, table: torch.Tensor, level: Level, interpolation: str
) -> torch.Tensor:
    """The features of points x (N, D) on one level: (N, F). Plain torch, for any D, differentiable
    any number of times."""
    pos = x * level.scale + 0.5
    cell = pos.detach().floor()
    vertex = cell.nan_to_num().clamp(-(2.0**30), 2.0**30).long()
    if interpolation == "Nearest":
        return torch.nn.functional.embedding(rows_of(vertex, level), table)
    w = pos - cell
    if interpolation == "Smoothstep":
        w = w * w * (3 - 2 * w)
    weights = torch.ones_like(w[:, :1])  # (N, 2^D): bit d of a corner is its coordinate d
    for upper in w.unbind(-1):
        pair = torch.stack((1 - upper, upper), 1)
        weights = (pair[:, :, None] * weights[:, None]).flatten(1)
    d = torch.arange(x.shape[1], device=x.device)
    corners = torch.arange(2 ** x.shape[1], device=x.device)[:, None] >> d & 1
    rows = rows_of(vertex[:, None] + corners, level)
    return (weights[..., None] * torch.nn.functional.embedding(rows, table)).sum(1)


class Grid(InputPart):
    """`otype` Grid, HashGrid, TiledGrid or DenseGrid.

    What `ops.hash_encode` can do runs there: 3 dimensions, Hash or Dense, Linear or Smoothstep, up
    to 32 levels of up to 2^28 rows and 2^20 cells a side. The rest is plain torch.
    """

    filler = 0.0

    def __init__(self, n_input_dims: int, settings: Settings, otype: str):
        if n_input_dims not in (2, 3, 4):
            raise ValueError(
                f"config `{settings.name}`: {otype} encodes 2, 3 or 4 dimensions, "
                f"got {n_input_dims}"
            )
        self.kind = settings.choice("type", TYPE_OF[otype], ("Hash", "Tiled", "Tile", "Dense"))
        self.kind = "Tiled" if self.kind == "Tile" else self.kind
        self.features = int(_one_of(settings, "n_features_per_level", 2, (1, 2, 4, 8)))
        self.n_levels = self._read_levels(settings)
        self.base = settings.integer("base_resolution", 16)
        self.log2_size = settings.integer("log2_hashmap_size", 19, 0, 31)
        growth = _growth_to_256(self.base, self.n_levels) if self.kind == "Dense" else 2.0
        self.per_level_scale = settings.number("per_level_scale", growth, above=0.0)
        self.interpolation = settings.choice(
            "interpolation", "Linear", ("Nearest", "Linear", "Smoothstep")
        )
        settings.only("hash", "CoherentPrime", "the one that tiny-cuda-nn is compiled with")
        settings.only("stochastic_interpolation", False, "not supported")
        settings.only("fixed_point_pos", False, "not supported")
        self.levels = lay_out(
            self.kind, n_input_dims, self.n_levels, self.base, self.per_level_scale, self.log2_size
        )
        self.rows = self.levels[-1].start + self.levels[-1].rows
        if self.rows * self.features >= WORD:
            raise ValueError(
                f"config `{settings.name}`: expected fewer than 2^32 parameters, got "
                f"{self.rows * self.features}: lower n_levels, per_level_scale or log2_hashmap_size"
            )
        super().__init__(n_input_dims, self.n_levels * self.features, self.rows * self.features)
        self.alignment = self.features
        self.grid = self._grid_of_op()

    def _grid_of_op(self) -> tuple | None:
        """Arguments for `ops.hash_encode`, from n_levels to interpolation; None: not for it."""
        log2_size = self.log2_size if self.kind == "Hash" else 28
        fits = (
            self.n_input_dims == 3
            and self.kind != "Tiled"
            and self.interpolation != "Nearest"
            and self.n_levels <= 32
            and 3 <= log2_size <= 28
            and all(-1 < level.scale <= 2**20 for level in self.levels)
            and all(level.rows <= 2**28 for level in self.levels)
        )
        first, last = self.levels[0], self.levels[-1]
        grid = self.n_levels, first.resolution, last.resolution, log2_size
        return (*grid, self.interpolation.lower()) if fits else None

    def _read_levels(self, settings: Settings) -> int:
        names = [name for name in ("n_features", "n_grid_features") if settings.has(name)]
        if not names:
            return settings.integer("n_levels", 16, 1, 128)
        if settings.has("n_levels"):
            raise ValueError(f"config `{settings.name}`: expected n_levels or {names[0]}, got both")
        features = settings.integer(names[0], 32, 1, 128 * self.features)
        if features % self.features:
            raise ValueError(
                f"config `{settings.name}.{names[0]}`: expected a multiple of "
                f"n_features_per_level = {self.features}, got {features}"
            )
        return features // self.features

    def initialise(self, generator: Pcg32) -> list[np.ndarray]:
        return [uniform_of_threads(generator, self.n_params, 1e-4)]

    def encode(self, x: torch.Tensor, params: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        table = params.view(self.rows, self.features)
        if self.grid is not None:
            half = dtype == torch.float16 and x.dtype == torch.float32 and has_half(x)
            copy = table.detach().half() if half else None
            scales = [level.scale for level in self.levels]
            return hash_encode(x, table, *self.grid, table_half=copy, scales=scales).to(dtype)
        found = [interpolate(x, table, level, self.interpolation) for level in self.levels]
        return torch.cat(found, -1).to(dtype)

    def hyperparams(self) -> dict:
        found = {
            "otype": "Grid",
            "type": self.kind,
            "n_levels": self.n_levels,
            "n_features_per_level": self.features,
            "base_resolution": self.base,
            "per_level_scale": self.per_level_scale,
            "interpolation": self.interpolation,
            "hash": "CoherentPrime",
        }
        return found | ({"log2_hashmap_size": self.log2_size} if self.kind == "Hash" else {})


def _growth_to_256(base: int, n_levels: int) -> float:
    """DenseGrid's per_level_scale: the finest level has 256 vertices a side; in float32."""
    if n_levels == 1:
        return 1.0
    logarithm = np.float32(np.log(np.float64(np.float32(256) / np.float32(base))))
    return float(np.float32(np.exp(np.float64(logarithm / np.float32(n_levels - 1)))))


def _one_of(settings: Settings, key: str, default: int, choices: tuple[int, ...]) -> int:
    value = settings.integer(key, default)
    if value not in choices:
        names = ", ".join(map(str, choices))
        raise ValueError(f"config `{settings.name}.{key}`: expected one of {names}, got {value}")
    return value
