"""The paper roofline (bench/model.py): its formulas against cases counted by hand."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import limits, model
from bench.limits import CARDS, SIZES, Card, Size
from dreamfusion_fast.config import FieldConfig

# 2 views of 1 x 1 rays, 3 of 5 bins kept; one dense level of 2³ = 8 rows, widths 2, 3, 4.
FIELD = FieldConfig(
    n_levels=1, base_resolution=1, finest_resolution=1, log2_table_size=3, features=2, hidden=3
)
SMALL = Size("small", 2, 1, 5, 3, FIELD, 2, frequencies=2, degree=2)
# A second's worth of anything is 1, and L1 holds nothing: 1000 bytes of L2, one multiprocessor.
UNIT = Card("unit", 1.0, 1.0, 1.0, 1000.0, 1, 1.0, "invented")


def test_sizes():
    assert SMALL.rays == 2 and SMALL.rows == 6 and SMALL.widths == [2, 3, 4]
    assert SMALL.level_rows == [8]
    assert SIZES["paper"].rays == 16384 and SIZES["paper"].widths == [32, 64, 4]


@pytest.mark.parametrize(
    "kernel, half, dram",
    [
        ("generate_rays", False, 2 * (12 + 1) * 4 + 2 * 6 * 4),
        ("ray_sphere_intersect", False, 2 * (6 + 2) * 4),
        # origins, directions, near, far; start and count; position, t, dt; 8 cells' bits
        ("march", False, 2 * 8 * 4 + 2 * 2 * 4 + 6 * 5 * 4 + 1),
        ("hash_encode_forward", False, 6 * 3 * 4 + 6 * 2 * 4 + 8 * 2 * 4),
        ("hash_encode_forward", True, 6 * 3 * 4 + 6 * 2 * 2 + 8 * 2 * 2),
        ("hash_encode_backward", False, 6 * 3 * 4 + 6 * 2 * 4 + 8 * 2 * 4),
        ("hash_encode_backward", True, 6 * 3 * 4 + 6 * 2 * 2 + 8 * 2 * 4),
        ("mlp_forward", False, 4 * (6 * (2 + 4) + 18)),
        ("mlp_forward", True, 2 * (6 * (2 + 4) + 18)),
        ("mlp_backward", False, 4 * (6 * (2 + 2 + 4) + 2 * 18)),
        ("mlp_backward", True, 2 * (6 * (2 + 2 + 4) + 18) + 4 * 18),
        ("composite_forward", False, 4 * (6 * (6 + 1) + 2 * (2 + 5))),
        ("composite_backward", False, 4 * (6 * (6 + 1 + 4) + 2 * (2 + 5))),
        # beside composite's: gradient, origin, direction, a light a view; normal, orientation
        ("composite_lit_forward", False, 4 * (6 * (7 + 3) + 2 * (7 + 6 + 4) + 2 * 7)),
        ("composite_lit_backward", False, 4 * (6 * (11 + 6) + 2 * (7 + 6 + 4) + 2 * 7)),
        ("radiance_forward", False, 6 * (4 + 3 + 4) * 4),
        ("radiance_forward", True, 6 * (4 * 2 + (3 + 4) * 4)),
        ("radiance_backward", False, 6 * (4 + 4 + 4) * 4),
        ("radiance_backward", True, 6 * (4 * 2 + (4 + 4) * 4)),
        ("occupancy_points", False, 8 * 3 * 4),
        ("occupancy_update", False, 8 * 3 * 4 + 1),
        ("adam_step", False, (16 + 18) * 7 * 4),
        ("adam_step", True, (16 + 18) * (7 * 4 + 2)),
        ("spherical_harmonics_forward", False, 6 * (3 + 4) * 4),
        ("spherical_harmonics_backward", False, 6 * (3 + 4 + 3) * 4),
        ("frequency_encode_forward", False, 2 * (3 + 12) * 4),
        ("frequency_encode_backward", False, 2 * (3 + 12 + 3) * 4),
    ],
)
def test_dram_bytes(kernel, half, dram):
    assert model.KERNELS[kernel](SMALL, UNIT, half).dram == dram


def test_hash_gathers():
    """A level that L1 holds is fetched once; a larger one costs 4 pairs of corners a point, of
    which every fourth (eighth in half) straddles two sectors; each corner's atomic costs two."""
    assert model.hash_encode_forward(SMALL, UNIT, False).gathers == 8 * 2 * 4
    large = dataclasses.replace(FIELD, base_resolution=64, finest_resolution=64, log2_table_size=20)
    large = dataclasses.replace(SMALL, field=large)
    assert model.hash_encode_forward(large, UNIT, False).gathers == 6 * 5 * 32
    assert model.hash_encode_forward(large, UNIT, True).gathers == 6 * 4.5 * 32
    assert model.hash_encode_backward(large, UNIT, False).gathers == 6 * 8 * 2 * 32


def test_hash_table_larger_than_l2():
    """An eighth of it fits: of the sectors asked for, seven eighths miss; its gradient goes out
    as zeros, comes back and goes out again."""
    cells = dataclasses.replace(FIELD, base_resolution=9, finest_resolution=9, log2_table_size=10)
    size = dataclasses.replace(SMALL, samples=100, field=cells)  # 1000 rows of 8 bytes, 200 points
    assert model.hash_encode_forward(size, UNIT, False).dram == 200 * 20 + 7 / 8 * 200 * 8 * 32
    assert model.hash_encode_backward(size, UNIT, False).dram == 200 * 20 + 3 * 8000


def test_mlp_operations():
    """Two for a multiply-add. Backward: the hidden layer again, and two products a layer. Tensor
    cores compute whole tiles: 16 inputs, 8 outputs."""
    forward, backward = model.mlp_forward, model.mlp_backward
    assert forward(SMALL, UNIT, False).operations == 2 * 6 * (2 * 3 + 3 * 4)
    assert backward(SMALL, UNIT, False).operations == 2 * 6 * (2 * 3 + 2 * (2 * 3 + 3 * 4))
    assert forward(SMALL, UNIT, True).tensor == 2 * 6 * (16 * 8 + 16 * 8)
    assert forward(SMALL, UNIT, True).operations == forward(SMALL, UNIT, False).tensor == 0
    paper = SIZES["paper"]
    assert forward(paper, UNIT, True).tensor == 2 * 2**20 * (32 * 64 + 64 * 8)


def test_adam_reads_gradients_again_from_dram_where_l2_is_too_small():
    p = 16 + 18
    assert model.adam_step(SMALL, UNIT, False).gathers == 4 * p
    tiny = dataclasses.replace(UNIT, l2_bytes=1)
    work = model.adam_step(SMALL, tiny, False)
    assert (work.dram, work.gathers, work.launches) == (p * 32, 0, 4)


def test_the_slowest_resource_is_the_prediction():
    work = model.Work(dram=2.0, gathers=5.0, operations=3.0, tensor=4.0)
    assert work.times(UNIT) == {
        "DRAM": 2.0, "L2 (assumed rate)": 7.0, "fp32": 3.0, "tensor cores": 4.0,
        "launch (assumed)": model.LAUNCH,
    }  # fmt: skip
    row = model.predict("mlp_forward", SMALL, UNIT)
    assert row["limit"] == "DRAM" or row["limit"] == "fp32"
    assert row["prediction_us"] == 1e6 * max(row["dram"], row["operations"])
    assert model.predict("mlp_forward", SMALL, CARDS[0])["limit"] == "launch (assumed)"


def test_published_limits():
    """As the data sheets have them."""
    h100, h200, a100, ada = CARDS
    assert (h100.dram, h100.tensor, h100.fp32) == (3.35e12, 989e12, 67e12)
    assert (h200.dram, h200.tensor, h200.fp32) == (4.8e12, 989e12, 67e12)
    assert (a100.dram, a100.tensor, a100.fp32) == (2.039e12, 312e12, 19.5e12)
    assert (ada.dram, ada.tensor, ada.fp32) == (1.008e12, 165.2e12, 82.6e12)
    assert all("data sheet" in c.source or "white paper" in c.source for c in CARDS)
    assert limits.card_named(h100.name) is h100 and limits.card_named("another") is None


def larger(size):
    """Sizes with one setting more each."""
    grown = {"views": 5, "pixels": 65, "samples": size.samples + 1, "occupancy_resolution": 144,
             "channels": 4, "degree": 5, "frequencies": 4, "bins": size.bins + 1}  # fmt: skip
    fields = {"n_levels": 17, "log2_table_size": 20, "features": 4, "hidden": 80,
              "hidden_layers": 2}  # fmt: skip
    yield from (dataclasses.replace(size, **{k: v}) for k, v in grown.items())
    for k, v in fields.items():
        yield dataclasses.replace(size, field=dataclasses.replace(size.field, **{k: v}))


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["paper", "toybox"])
def test_monotonic_in_sizes(name, card):
    rows = model.predict_all(SIZES[name])
    for size in larger(SIZES[name]):
        for before, after in zip(rows, model.predict_all(size), strict=True):
            assert after["prediction_us"] >= before["prediction_us"] * (1 - 1e-12), after["kernel"]


def test_half_never_costs_more_traffic_but_in_adam():
    for card in CARDS:
        for f in model.HALF:
            half, full = (f(SIZES["paper"], card, h) for h in (True, False))
            assert (half.dram < full.dram) == (f is not model.adam_step)


def test_step_is_the_sum_of_its_kernels():
    card, size = CARDS[0], SIZES["paper"]
    rows = [model.predict(f.__name__, size, card) for f in model.STEP]
    step = model.predict_step(size, card)
    assert step["prediction_us"] == pytest.approx(sum(r["prediction_us"] for r in rows))
    assert step["limit"] == "most in hash_encode_backward"


def test_prints_predictions(capsys, tmp_path):
    file = tmp_path / "model.json"
    model.main(["--size", "toybox", "--json", str(file)])
    heading, *_, _ = text = capsys.readouterr().out.splitlines()
    assert "Prediction, nothing measured" in heading
    assert any("prediction, µs" in line for line in text if line.startswith("| kernel"))
    assert any(line.startswith("Assumptions") and "2 µs a launch" in line for line in text)
    saved = json.loads(file.read_text())
    assert saved["prediction"] is True
    assert {r["kernel"] for r in saved["rows"]} == {*model.KERNELS, "step"}
    assert "prediction" in model.__doc__.split("\n")[0]
