"""A paper roofline of every kernel: a prediction, not a measurement.

For each kernel the bytes and operations that its definition cannot avoid are counted, as formulas
of the op's settings, and divided by the card's limits; the slowest resource is the prediction. A
kernel that reaches 100 % of it is perfect under these counts; none is expected to.

    python bench/model.py [--size paper|toybox] [--json FILE]

What is counted:
- DRAM: every input read once and every result written once.
- L2: the DRAM traffic again; gathers in sectors of 32 bytes; and the scatter of the hash table's
  gradient, whose atomics are modelled as a read-modify-write of one sector in L2 for each corner,
  without collisions. Levels that fit in L1 are fetched once by each multiprocessor. Samples in one
  cell get no other credit for sharing its sectors: coherent rays may beat this part.
- Operations: 1 for an addition, multiplication, comparison or integer operation, 2 for a fused
  multiply-add, SPECIAL for exp, sin, division or square root.
- Launches: LAUNCH for each kernel that must wait for another.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

from bench.limits import CARDS, SIZES, Card, Size
from dreamfusion_fast.ops import mlp_parameters

SECTOR = 32  # bytes: the unit of traffic between L1 and L2 (published: CUDA documentation)
SPECIAL = 16  # assumption: 16 special-function lanes against 128 multiply-adds, each 2 operations
L1_SHARE = 64 << 10  # assumption: bytes of L1 that a level of the hash table may occupy
LAUNCH = 2e-6  # assumption: seconds that no kernel, however small, undercuts


@dataclass(frozen=True)
class Work:
    dram: float = 0.0  # bytes
    gathers: float = 0.0  # bytes between L1 and L2 beyond those
    operations: float = 0.0  # fp32
    tensor: float = 0.0  # operations of the tensor cores
    launches: int = 1

    def times(self, card: Card) -> dict[str, float]:
        """Seconds that each resource is busy, a prediction."""
        return {
            "DRAM": self.dram / card.dram,
            "L2 (assumed rate)": (self.dram + self.gathers) / card.l2,
            "fp32": self.operations / card.fp32,
            "tensor cores": self.tensor / card.tensor,
            "launch (assumed)": self.launches * LAUNCH,
        }


# One block a stem, alphabetical: Work of an op for a size. `half`: with half copies of parameters.


# ---- adam ---------------------------------------------------------------------------------------
def adam_step(s: Size, card: Card, half: bool) -> Work:
    """Every parameter of the field, in two tensors. Gradients are read to check them, then again:
    from L2 where they fit. param, exp_avg, exp_avg_sq are read and written."""
    tensors = sum(s.level_rows) * s.field.features, mlp_parameters(s.widths)
    work = [_adam_tensor(p, card, half) for p in tensors]
    return Work(*(sum(x) for x in zip(*map(dataclasses.astuple, work))))


def _adam_tensor(p: int, card: Card, half: bool) -> Work:
    again = 4 * p
    misses = again if again > card.l2_bytes else 0
    dram = p * (4 + 3 * 8 + (2 if half else 0)) + misses
    return Work(dram, again - misses, p * (13 + 2 * SPECIAL), launches=2)


# ---- composite ----------------------------------------------------------------------------------
def composite_forward(s: Size, card: Card, half: bool) -> Work:
    """sigma, rgb, t, dt in, weights out; packed in, colour, opacity, depth out."""
    c = s.channels
    dram = s.rows * 4 * (c + 4) + s.rays * (8 + 4 * (c + 2))
    return Work(dram, operations=s.rows * (SPECIAL + 8 + 2 * c))


def composite_backward(s: Size, card: Card, half: bool) -> Work:
    """sigma, rgb, t, dt, weights in, gradients of sigma and rgb out; packed, three gradients in."""
    c = s.channels
    dram = s.rows * 4 * (2 * c + 5) + s.rays * (8 + 4 * (c + 2))
    return Work(dram, operations=s.rows * (SPECIAL + 11 + 3 * c))


def composite_lit_forward(s: Size, card: Card, half: bool) -> Work:
    """As composite, and beside it: gradient in; origin, direction in, normal, orientation out; a
    view's light in. Normal and direction to the light: a reciprocal square root each."""
    plain = composite_forward(dataclasses.replace(s, channels=3), card, half)
    dram = s.rows * 12 + s.rays * (24 + 16) + s.views * 28
    return Work(plain.dram + dram, operations=plain.operations + s.rows * (2 * SPECIAL + 60))


def composite_lit_backward(s: Size, card: Card, half: bool) -> Work:
    """As composite, and beside it: gradient in, its gradient out; origin, direction, gradients of
    normal and orientation in; a view's light in."""
    plain = composite_backward(dataclasses.replace(s, channels=3), card, half)
    dram = s.rows * 24 + s.rays * (24 + 16) + s.views * 28
    return Work(plain.dram + dram, operations=plain.operations + s.rows * (2 * SPECIAL + 86))


# ---- frequency_encode ---------------------------------------------------------------------------
def frequency_encode_forward(s: Size, card: Card, half: bool) -> Work:
    """One direction a ray, of the environment map: 3 in, sine and cosine of 3 L angles out."""
    angles = 3 * s.frequencies
    return Work(s.rays * 4 * (3 + 2 * angles), operations=s.rays * angles * (1 + 2 * SPECIAL))


def frequency_encode_backward(s: Size, card: Card, half: bool) -> Work:
    """x and the gradient of the result in, that of x out."""
    angles = 3 * s.frequencies
    return Work(s.rays * 4 * (6 + 2 * angles), operations=s.rays * angles * (5 + 2 * SPECIAL))


# ---- hash_encode --------------------------------------------------------------------------------
def hash_encode_forward(s: Size, card: Card, half: bool) -> Work:
    """x and the table in, features out. Corners whose first coordinates are neighbours lie in
    neighbouring rows of a dense level; in a hashed one the exclusive or changes only the row's
    low bits: both share a sector unless the pair straddles two, chance row / SECTOR."""
    row = s.field.features * _bytes(half)
    gathers = 0.0
    for rows in s.level_rows:
        asked = s.rows * 4 * (1 + min(1.0, row / SECTOR)) * SECTOR
        gathers += min(asked, _cached(rows * row, card))
    dram = s.rows * (12 + s.widths[0] * _bytes(half)) + _read(s, row, card)
    return Work(dram, gathers, s.rows * s.field.n_levels * (72 + 16 * s.field.features))


def hash_encode_backward(s: Size, card: Card, half: bool) -> Work:
    """x and the gradient of the features in; the table's float32 gradient zeroed and scattered
    into: a sector read and written for each corner. No gradient of x: no camera learns."""
    row = s.field.features * 4
    scatter = s.rows * s.field.n_levels * 8 * 2 * SECTOR * math.ceil(row / SECTOR)
    table = sum(s.level_rows) * row
    passes = 1 if table <= card.l2_bytes else 3  # else zeros go out and come back
    dram = s.rows * (12 + s.widths[0] * _bytes(half)) + passes * table
    operations = s.rows * s.field.n_levels * (72 + 16 * s.field.features)
    return Work(dram, scatter, operations, launches=2)


def _bytes(half: bool) -> int:
    """Of a feature, or of the copy of a parameter that the kernels read."""
    return 2 if half else 4


def _cached(level_bytes: float, card: Card) -> float:
    """The most bytes all multiprocessors fetch of a level that their L1 holds."""
    return card.multiprocessors * level_bytes if level_bytes <= L1_SHARE else math.inf


def _read(s: Size, row: int, card: Card) -> float:
    """Bytes of the table that come from DRAM: no more than it has, if L2 holds it, and no more
    sectors than are asked for; above L2's size, the share it cannot hold misses each time."""
    asked = s.rows * s.field.n_levels * 8 * SECTOR
    table = sum(s.level_rows) * row
    missing = max(0.0, 1 - card.l2_bytes / table) * asked
    return max(min(table, asked), missing)


# ---- march --------------------------------------------------------------------------------------
def march(s: Size, card: Card, half: bool) -> Work:
    """Rays in, packed out; positions, t, dt of kept samples out. Each bin: a random number,
    a position, its cell's bit; a multiprocessor fetches the bits once, whatever their size."""
    bits = s.occupancy_resolution**3 / 8
    bins = s.rays * s.bins
    gathers = min(bins * SECTOR, card.multiprocessors * bits)
    return Work(s.rays * (32 + 8) + s.rows * 20 + bits, gathers, bins * 48, launches=2)


# ---- mlp ----------------------------------------------------------------------------------------
def mlp_forward(s: Size, card: Card, half: bool) -> Work:
    """x and the parameters in, result out; hidden values stay on the chip."""
    dram = (s.rows * (s.widths[0] + s.widths[-1]) + mlp_parameters(s.widths)) * _bytes(half)
    return _products(dram, 2 * s.rows * sum(_layers(s, half)), half)


def mlp_backward(s: Size, card: Card, half: bool) -> Work:
    """x, the result's gradient and the parameters in, both gradients out. Hidden layers are
    computed again; each layer has two products more, for its input and its parameters."""
    dram = (s.rows * (2 * s.widths[0] + s.widths[-1]) + mlp_parameters(s.widths)) * _bytes(half)
    dram += mlp_parameters(s.widths) * 4
    layers = _layers(s, half)
    return _products(dram, 2 * s.rows * (sum(layers[:-1]) + 2 * sum(layers)), half, launches=2)


def _layers(s: Size, half: bool) -> list[int]:
    """Multiply-adds a row of each layer; the tensor cores' tiles are 16 deep and 8 wide."""
    tile = (16, 8) if half else (1, 1)
    pairs = itertools.pairwise(s.widths)
    return [math.prod(-(-w // t) * t for w, t in zip(pair, tile)) for pair in pairs]


def _products(dram: float, operations: float, half: bool, launches: int = 1) -> Work:
    return Work(dram, 0, *((0, operations) if half else (operations, 0)), launches)


# ---- occupancy ----------------------------------------------------------------------------------
def occupancy_points(s: Size, card: Card, half: bool) -> Work:
    """Three random numbers a cell, a point out."""
    cells = s.occupancy_resolution**3
    return Work(cells * 12, operations=cells * 3 * 16)


def occupancy_update(s: Size, card: Card, half: bool) -> Work:
    """ema and density in, ema and bits out; ema again, from L2, once its mean is known."""
    cells = s.occupancy_resolution**3
    return Work(cells * (12 + 1 / 8), cells * 4, cells * 6, launches=2)


# ---- radiance -----------------------------------------------------------------------------------
def radiance_forward(s: Size, card: Card, half: bool) -> Work:
    """A network's outputs and a position a sample in, density and colour out."""
    width = s.widths[-1]
    dram = s.rows * (width * _bytes(half) + 4 * (3 + width))
    return Work(dram, operations=s.rows * (10 + SPECIAL * (width + 1)))


def radiance_backward(s: Size, card: Card, half: bool) -> Work:
    """Density, colour and their gradients in, the outputs' gradient out."""
    width = s.widths[-1]
    return Work(s.rows * width * (8 + _bytes(half)), operations=s.rows * 4 * width)


# ---- rays ---------------------------------------------------------------------------------------
def generate_rays(s: Size, card: Card, half: bool) -> Work:
    """Twelve numbers and a focal length a view in, origin and direction out."""
    return Work(s.views * 52 + s.rays * 24, operations=s.rays * (27 + SPECIAL))


def ray_sphere_intersect(s: Size, card: Card, half: bool) -> Work:
    """Origin and direction in, near and far out."""
    return Work(s.rays * 32, operations=s.rays * (29 + 3 * SPECIAL))


# ---- spherical_harmonics ------------------------------------------------------------------------
def spherical_harmonics_forward(s: Size, card: Card, half: bool) -> Work:
    """A direction a sample in, degree² values out."""
    return Work(s.rows * 4 * (3 + s.degree**2), operations=s.rows * 6 * s.degree**2)


def spherical_harmonics_backward(s: Size, card: Card, half: bool) -> Work:
    """Directions and the values' gradients in, the directions' out."""
    return Work(s.rows * 4 * (6 + s.degree**2), operations=s.rows * 14 * s.degree**2)


# ---- all of them --------------------------------------------------------------------------------
# In the order of a step, then those outside it: (function, precisions).
STEP = (generate_rays, ray_sphere_intersect, march, hash_encode_forward, mlp_forward,
        radiance_forward, composite_forward, composite_backward, radiance_backward, mlp_backward,
        hash_encode_backward, adam_step)  # fmt: skip
OTHERS = (occupancy_points, occupancy_update, spherical_harmonics_forward,
          spherical_harmonics_backward, frequency_encode_forward,
          frequency_encode_backward, composite_lit_forward, composite_lit_backward)  # fmt: skip
HALF = (hash_encode_forward, mlp_forward, radiance_forward, radiance_backward, mlp_backward,
        hash_encode_backward, adam_step)  # fmt: skip
KERNELS = {f.__name__: f for f in STEP + OTHERS}


def predict(kernel: str, size: Size, card: Card, half: bool = False) -> dict:
    """A row of the table: microseconds predicted and the resource that limits."""
    work = KERNELS[kernel](size, card, half)
    times = work.times(card)
    limit = max(times, key=times.get)
    return {
        "kernel": kernel,
        "precision": "half" if half else "fp32",
        "size": size.name,
        "card": card.name,
        "prediction_us": 1e6 * times[limit],
        "limit": limit,
        **dataclasses.asdict(work),
    }


def predict_step(size: Size, card: Card, half: bool = False) -> dict:
    """A training step without guidance: its kernels one after another."""
    rows = [predict(f.__name__, size, card, half and f in HALF) for f in STEP]
    largest = max(rows, key=lambda row: row["prediction_us"])
    keys = ("prediction_us", "dram", "gathers", "operations", "tensor", "launches")
    sums = {key: sum(row[key] for row in rows) for key in keys}
    return {**rows[0], "kernel": "step", "precision": "half" if half else "fp32",
            "limit": f"most in {largest['kernel']}", **sums}  # fmt: skip


def predict_all(size: Size) -> list[dict]:
    """Every kernel, precision and card, and the step."""
    kernels = [(f, half) for f in STEP + OTHERS for half in (False, True)[: 1 + (f in HALF)]]
    rows = [predict(f.__name__, size, c, half) for f, half in kernels for c in CARDS]
    return rows + [predict_step(size, c, half) for half in (False, True) for c in CARDS]


def table(rows: list[dict]) -> str:
    lines = [
        "| kernel | precision | card | prediction, µs | limiting resource | DRAM, MB | L2, MB "
        "| GFLOP |",
        "|---|---|---|---:|---|---:|---:|---:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['kernel']} | {r['precision']} | {r['card']} | {r['prediction_us']:.1f} "
            f"| {r['limit']} | {r['dram'] / 1e6:.2f} | {(r['dram'] + r['gathers']) / 1e6:.2f} "
            f"| {(r['operations'] + r['tensor']) / 1e9:.3f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=("paper", "toybox"), default="paper")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    rows = predict_all(size)
    print(f"## Prediction, nothing measured: size {size.name}\n")
    print(f"{size.views} views of {size.pixels} x {size.pixels} rays, {size.samples:g} samples a "
          f"ray ({size.bins:g} bins), {size.field.n_levels} levels of up to "
          f"2^{size.field.log2_table_size} rows, widths {size.widths}, "
          f"{size.occupancy_resolution}³ occupancy cells.\n")  # fmt: skip
    print(table(rows))
    print("\nLimits (published: " + "; ".join(f"{c.name}: {c.source}" for c in CARDS) + ").")
    print("Assumptions: L2 rates " + ", ".join(f"{c.l2 / 1e12:g} TB/s" for c in CARDS)
          + f", {1e6 * LAUNCH:g} µs a launch, {SPECIAL} operations a special function, "
          f"{L1_SHARE >> 10} KB of L1 for a level; samples and bins a ray.")  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps({"prediction": True, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
