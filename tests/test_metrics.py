"""The measures, on results whose answers are known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh

from dreamfusion_fast import export, metrics
from dreamfusion_fast.toybox import shapes, world

STEPS = torch.arange(metrics.TURN)
QUARTER = metrics.TURN // 4


class Solid:
    """A field that is dense exactly where an object is, scaled about the origin."""

    def __init__(self, name, scale=1.0):
        self.name, self.scale = name, scale

    def __call__(self, positions):
        inside = shapes.occupancy(self.name, positions / self.scale)
        return torch.where(inside, 100.0, 0.0), torch.ones_like(positions)


def test_iou_of_the_true_shape_is_one():
    assert metrics.volume_iou(Solid("cube"), 0.75, "cube") == pytest.approx(1.0, abs=1e-6)


def test_iou_of_a_smaller_cube_is_the_ratio_of_volumes():
    got = metrics.volume_iou(Solid("cube", 0.8), 0.75, "cube")
    assert got == pytest.approx(0.8**3, abs=0.05)  # a cell is 2 % of its side


def test_iou_of_another_object_is_low_and_of_nothing_zero():
    assert metrics.volume_iou(Solid("airplane"), 0.75, "ball") < 0.3

    def empty(positions):
        return torch.zeros(len(positions)), torch.zeros_like(positions)

    assert metrics.volume_iou(empty, 0.75, "ball") == 0.0


@pytest.fixture
def few_points(monkeypatch):
    monkeypatch.setattr(metrics, "POINTS", 10_000)


def test_surfaces_of_two_spheres(few_points):
    small, large = (trimesh.creation.icosphere(4, r) for r in (0.4, 0.5))
    distance, cosine = metrics.surfaces(small, large)
    assert distance == pytest.approx(0.1, abs=1e-3) and cosine == pytest.approx(1.0, abs=2e-3)
    assert metrics.surfaces(large, small) == pytest.approx((distance, cosine))
    inside_out = trimesh.Trimesh(large.vertices, large.faces[:, ::-1])
    assert metrics.surfaces(small, inside_out)[1] == pytest.approx(-1.0, abs=2e-3)


def test_chamfer_has_both_directions(few_points):
    """A sphere beside a sphere and one far off: only the way from the truth is long."""
    near, far = trimesh.creation.icosphere(3, 0.2), trimesh.creation.icosphere(3, 0.2)
    far.apply_translation([3.0, 0.0, 0.0])
    distance, _ = metrics.surfaces(near, near + far)
    # Half of the second surface's points are 3 - 0.2 from the first, more or less.
    assert distance == pytest.approx(0.5 * 0.5 * 2.8, abs=0.05)


def test_surface_of_a_cube():
    mesh = metrics.true_mesh("cube")
    assert mesh.is_watertight and mesh.volume == pytest.approx(0.66**3, rel=0.01)
    np.testing.assert_allclose(mesh.bounds, [[-0.33] * 3, [0.33] * 3], atol=2e-3)


def test_extracted_surface_is_near_the_true_one(few_points):
    mesh = export.mesh(Solid("mug"), 0.75, 64)
    assert metrics.chamfer(mesh, "mug") < 0.015
    assert metrics.normal_consistency(mesh, "mug") > 0.9
    assert metrics.chamfer(mesh, "airplane") > 0.05


def test_f_score_of_spheres(few_points):
    """Within 2 % of the box all are near; beyond it none; a half has half of the recall."""
    true, near, far = (trimesh.creation.icosphere(5, r) for r in (0.4, 0.41, 0.43))
    assert metrics.f_score(true, true) == 1.0 == metrics.f_score(near, true)
    assert metrics.f_score(far, true) == 0.0
    upper = trimesh.Trimesh(true.vertices, true.faces[true.triangles_center[:, 2] > 0.0])
    recall = 0.5 + 0.5 * 0.016 / 0.4  # what lies within the limit of the edge counts, too
    share = 1 / 0.95  # cameras see little of what is below
    assert metrics.f_score(upper, true) == pytest.approx(
        2 * recall * share / (1 + recall * share), abs=0.05
    )


def test_what_no_camera_sees_does_not_count(few_points):
    """A sphere inside of a sphere; and the bottom of what stands below the cameras."""
    outer, inner = (trimesh.creation.icosphere(5, r) for r in (0.4, 0.2))
    both = outer + inner
    points, _ = metrics._sample(both)
    seen = metrics.visible(both, points)
    inside = np.linalg.norm(points, axis=1) < 0.3
    assert not seen[inside].any() and seen[~inside].mean() > 0.8
    bottom = points[:, 2] < -0.3995  # at -0.395 some are seen from 10 degrees below
    assert bottom.any() and not seen[bottom].any()
    assert metrics.f_score(both, outer) > 0.95  # 0.89 if the inner one counted


def test_cameras_that_decide_what_is_seen_are_those_of_the_default_range():
    eyes = metrics.everywhere()
    elevation = torch.rad2deg(torch.asin(eyes[:, 2] / metrics.DISTANCE))
    assert len(eyes) == metrics.EYES and elevation.min() > -10.5 and elevation.max() > 80
    torch.testing.assert_close(eyes.norm(dim=1), torch.full((len(eyes),), 1.4).double())


def test_likeness_of_pictures(rng):
    a = torch.rand(3, 3, 16, 16, generator=rng)
    assert metrics.likeness(a, a) == (pytest.approx(60.0), pytest.approx(1.0))
    psnr, ssim = metrics.likeness(a, (a + 0.1))
    assert psnr == pytest.approx(20.0, abs=1e-3) and 0.5 < ssim < 1.0


def test_pictures_of_a_result_are_compared_with_the_true_objects(monkeypatch):
    def render_views(renderer, cameras, size, background):
        return metrics.true_views(renderer, cameras, "red", size, background)

    monkeypatch.setattr(export, "render_views", render_views)
    psnr, ssim = metrics.pictures("car", "red", "car")  # traced finer, filtered alike
    assert psnr > 35 and ssim > 0.98
    assert metrics.pictures("boat", "red", "car")[0] < 20
    assert len(metrics.picture_cameras().focal) == 24


def soft(pictures):
    """Blurred over 5 pixels and noisy, as results are."""
    noise = 0.05 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, 1) + noise


@pytest.mark.parametrize("name", ["car", "snowman", "robot"])
def test_fronts(name):
    truth = metrics.true_turn("red", name)
    front, back = truth[:1].expand_as(truth), truth[2 * QUARTER :][:1].expand_as(truth)
    janus = torch.where((STEPS < QUARTER) | (STEPS > 3 * QUARTER), STEPS, STEPS + 2 * QUARTER)
    four = torch.minimum(STEPS % QUARTER, QUARTER - STEPS % QUARTER) * 2
    assert metrics.fronts(truth, truth) == 1 and metrics.fronts(soft(truth), truth) == 1
    assert metrics.fronts(truth.roll(5, 0), truth) == 1  # turned, but one
    assert metrics.fronts(truth[janus % metrics.TURN], truth) == 2
    assert metrics.fronts(truth[four], truth) == 4
    assert metrics.fronts(front, truth) > 1 and metrics.fronts(back, truth) == 0


def test_a_single_picture_is_no_front():
    truth = metrics.true_turn("red", "car")
    pictures = truth.clone()
    pictures[10], pictures[0] = truth[0], truth[12]
    assert metrics.fronts(pictures, truth) == 1


@pytest.mark.parametrize("name", ["ball", "lamp", "cube", "apple"])
def test_what_looks_alike_all_around_has_no_front_and_no_wrong_view(name):
    truth = metrics.true_turn("red", name)
    assert metrics.fronts(truth, truth) is None and metrics.view_error(truth, truth) is None


def test_view_error():
    car, cactus = (metrics.true_turn("red", n) for n in ("car", "cactus"))
    assert metrics.view_error(car, car) == 0.0 and metrics.view_error(soft(car), car) == 0.0
    assert metrics.view_error(car.roll(2, 0), car) == 0.0  # 30 degrees off
    assert metrics.view_error(car.roll(QUARTER, 0), car) == 1.0
    half = torch.cat((car[: 2 * QUARTER], car[:1].expand(2 * QUARTER, -1, -1, -1)))
    # Of the second half's twelve, 300 to 345 degrees are within 60 of the front.
    assert metrics.view_error(half, car) == pytest.approx(8 / 24)
    assert metrics.view_error(cactus.roll(2 * QUARTER, 0), cactus) == 0.0  # the same from behind
    assert metrics.view_error(cactus.roll(QUARTER, 0), cactus) > 0.5


def test_pictures_must_be_a_turn():
    truth = metrics.true_turn("red", "car")
    with pytest.raises(ValueError, match="`pictures`: expected 24 of shape"):
        metrics.view_error(truth[:8], truth)


def test_textureless_pictures_are_grey_and_lit():
    cameras = metrics.orbit(2, 30.0)
    white, red = (metrics.true_views("car", cameras, c) for c in (None, "red"))
    assert (white - white.mean(1, keepdim=True)).abs().max() < 1e-6
    assert (red[:, 0] - red[:, 1]).max() > 0.5
    inside = red[:, 0] != 0.5
    assert white[:, 0][inside].std() > 0.05 and white.max() > 0.8


class Judge:
    """Takes every picture for the prompt of this number, and remembers the pictures."""

    image_size = 16

    def __init__(self, choice):
        self.choice = choice

    def similarities(self, images, prompts):
        self.images = images
        scores = torch.zeros(len(images), len(prompts))
        scores[:, self.choice] = 1.0
        return scores


def test_r_precision():
    images = torch.rand(4, 3, 16, 16)
    assert metrics.r_precision(Judge(1), images, ["a", "b"], 1) == 1.0
    assert metrics.r_precision(Judge(0), images, ["a", "b"], 1) == 0.0
    judge = Judge(torch.tensor([0]))
    judge.similarities = lambda images, prompts: torch.eye(2).repeat(2, 1)
    assert metrics.r_precision(judge, images, ["a", "b"], 1) == 0.5
    with pytest.raises(ValueError, match="`index`: expected 0 to 1, got 2"):
        metrics.r_precision(judge, images, ["a", "b"], 2)


def test_colour_and_geometry_are_seen_at_30_degrees(monkeypatch):
    asked = []

    def render_views(renderer, cameras, size=None, background=None, mode="albedo"):
        asked.append((mode, size, cameras))
        return torch.full((len(cameras.focal), 3, size, size), 0.5)

    monkeypatch.setattr(export, "render_views", render_views)
    pairs = world.all_pairs()
    first = pairs[0]
    assert metrics.colour_precision(None, Judge(0), *first) == (1.0, 1.0, 1.0)
    assert metrics.colour_precision(None, Judge(0), *pairs[1])[0] == 0.0
    asked[1:] = []
    assert metrics.geometry_precision(None, Judge(0), ["a", "b"], 1) == 0.0
    assert [(m, s) for m, s, _ in asked] == [("albedo", 16), ("textureless", 16)]
    for _, _, cameras in asked:
        assert torch.rad2deg(cameras.elevation).allclose(torch.tensor(30.0))
        assert len(cameras.azimuth.unique()) == metrics.AZIMUTHS


def test_true_geometry_asks_for_objects_in_clay():
    truth = metrics.true_geometry(Judge(list(shapes.OBJECTS).index("mug")))
    assert truth == {name: float(name == "mug") for name in shapes.OBJECTS}
    assert metrics.clay_prompts()[:2] == ["a grey clay ball", "a grey clay cube"]
