"""The measures, on fields whose answers are known."""

import pytest
import torch

from dreamfusion_fast import evaluate
from dreamfusion_fast.toybox import shapes, world


class Solid:
    """A field that is dense exactly where an object is, scaled about the origin."""

    def __init__(self, name, scale=1.0):
        self.name, self.scale = name, scale

    def __call__(self, positions):
        inside = shapes.occupancy(self.name, positions / self.scale)
        return torch.where(inside, 100.0, 0.0), torch.ones_like(positions)


def test_iou_of_the_true_shape_is_one():
    assert evaluate.volume_iou(Solid("cube"), 0.75, "cube") == pytest.approx(1.0, abs=1e-6)


def test_iou_of_a_smaller_cube_is_the_ratio_of_volumes():
    got = evaluate.volume_iou(Solid("cube", 0.8), 0.75, "cube")
    assert got == pytest.approx(0.8**3, abs=0.05)  # a cell is 2 % of its side


def test_iou_of_another_object_is_low():
    assert evaluate.volume_iou(Solid("airplane"), 0.75, "ball") < 0.3


def test_default_pairs():
    pairs = evaluate.default_pairs("toybox")
    trained = [p for p in pairs if not world.is_held_out(*p)]
    assert len({o for _, o in trained}) == 12 and len(pairs) == 18
    exemplar = evaluate.default_pairs("exemplar")
    assert len({o for _, o in exemplar}) == 8


def test_table_and_means():
    results = [evaluate.Result("a red car", False, 0.8, 1.0, 10.0),
               evaluate.Result("a blue car", True, 0.6, 0.5, 20.0)]  # fmt: skip
    s = evaluate.summary(results)
    assert s["mean_iou"] == pytest.approx(0.7) and s["r_precision_trained"] == 1.0
    assert s["r_precision_held_out"] == 0.5 and "| a blue car | held out |" in evaluate.markdown(
        results
    )
