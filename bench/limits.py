"""What bench/model.py and the benchmarks are measured by: cards' limits and problem sizes."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

from dreamfusion_fast.config import FieldConfig, RenderConfig
from dreamfusion_fast.ops import hash_table_rows


@dataclass(frozen=True)
class Card:
    """A card's limits; all are published but `l2`, which is an assumption."""

    name: str  # as torch.cuda.get_device_name says it
    dram: float  # bytes / s
    tensor: float  # operations / s, dense fp16 with fp32 accumulation
    fp32: float  # operations / s
    l2_bytes: float
    multiprocessors: int
    l2: float  # bytes / s: an assumption, the order of what public microbenchmarks report
    source: str


CARDS = (
    Card("NVIDIA H100 80GB HBM3", 3.35e12, 989e12, 67e12, 50e6, 132, 5.5e12,
         "NVIDIA H100 Tensor Core GPU data sheet (SXM; fp16 halved from 'with sparsity'); "
         "L2 size: NVIDIA H100 Tensor Core GPU Architecture white paper"),
    Card("NVIDIA H200", 4.8e12, 989e12, 67e12, 50e6, 132, 5.5e12,
         "NVIDIA H200 Tensor Core GPU data sheet (SXM; fp16 halved from 'with sparsity'); "
         "L2 size: as H100"),
    Card("NVIDIA A100-SXM4-80GB", 2.039e12, 312e12, 19.5e12, 40e6, 108, 4.0e12,
         "NVIDIA A100 Tensor Core GPU data sheet (80GB SXM); L2 size: NVIDIA A100 Tensor Core "
         "GPU Architecture white paper"),
    Card("NVIDIA GeForce RTX 4090", 1.008e12, 165.2e12, 82.6e12, 72e6, 128, 5.0e12,
         "NVIDIA Ada GPU Architecture white paper (fp16 with fp32 accumulation)"),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a step works on. `bins` and `samples` are averages over all rays."""

    name: str
    views: int = 4
    pixels: int = 64  # side of a picture
    bins: float = 48.0  # a ray: tested by march
    samples: float = 24.0  # a ray: kept
    field: FieldConfig = field(default_factory=FieldConfig)
    occupancy_resolution: int = RenderConfig.occupancy_resolution
    frequencies: int = RenderConfig.environment_frequencies
    degree: int = 4  # of spherical_harmonics
    channels: int = 3

    @property
    def rays(self) -> int:
        return self.views * self.pixels**2

    @property
    def rows(self) -> float:
        return self.rays * self.samples

    @property
    def grid(self) -> dict:
        names = ("n_levels", "base_resolution", "finest_resolution", "log2_table_size")
        return {name: getattr(self.field, name) for name in names}

    @property
    def widths(self) -> list[int]:
        f = self.field
        return [f.n_levels * f.features, *[f.hidden] * f.hidden_layers, 4]

    @property
    def level_rows(self) -> list[int]:
        return [b - a for a, b in itertools.pairwise(hash_table_rows(**self.grid)[1])]


PAPER_FIELD = FieldConfig(
    n_levels=16, base_resolution=16, finest_resolution=2048, log2_table_size=19, hidden=64
)
SIZES = {
    "toybox": Size("toybox"),
    "paper": Size("paper", bins=128, samples=64, field=PAPER_FIELD, occupancy_resolution=128),
    "tiny": Size("tiny", 1, 8, 12, 6, FieldConfig(log2_table_size=10), 16),  # rehearsals, tests
}


def card_named(name: str) -> Card | None:
    return next((card for card in CARDS if card.name == name), None)
