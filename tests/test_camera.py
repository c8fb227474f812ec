import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm, uniform

from dreamfusion_fast import camera
from dreamfusion_fast.config import CameraConfig


def test_samples_stay_in_the_papers_ranges(rng):
    config = CameraConfig(position_jitter=0.0)
    c = camera.sample(4000, config, rng)
    distance = c.c2w[:, :, 3].norm(dim=-1)
    assert 1.0 <= distance.min() and distance.max() <= 1.5
    assert 0.7 <= c.focal.min() and c.focal.max() <= 1.35
    elevation = torch.rad2deg(c.elevation)
    assert -10.01 <= elevation.min() < -5 and 80 < elevation.max() <= 90.01
    # Half uniform in angle, half in area.
    expected = (0.3 + (1 - math.sin(math.pi / 3)) / (1 + math.sin(math.pi / 18))) / 2
    assert (elevation > 60).float().mean() == pytest.approx(expected, abs=0.035)


def test_jitter_moves_position_by_at_most_its_half_width(rng):
    still = camera.sample(100, CameraConfig(position_jitter=0.0), torch.Generator().manual_seed(3))
    moved = camera.sample(100, CameraConfig(position_jitter=0.1), torch.Generator().manual_seed(3))
    shift = (still.c2w[:, :, 3] - moved.c2w[:, :, 3]).abs()
    assert 0.05 < shift.max() <= 0.1 + 1e-6


def test_same_generator_same_cameras():
    a, b = (camera.sample(5, CameraConfig(), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a.c2w, b.c2w) and torch.equal(a.focal, b.focal)


def test_look_at_is_a_rotation_that_faces_the_target(rng):
    position = torch.randn(50, 3, generator=rng)
    target = torch.randn(50, 3, generator=rng) * 0.1
    c2w = camera.look_at(position, target, torch.tensor([0.0, 0.0, 1.0]).expand(50, 3))
    rotation = c2w[:, :, :3]
    torch.testing.assert_close(
        rotation @ rotation.mT, torch.eye(3).expand(50, 3, 3), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(50), rtol=0, atol=1e-5)
    forward = torch.nn.functional.normalize(target - position, dim=-1)
    torch.testing.assert_close(-rotation[:, :, 2], forward, rtol=0, atol=1e-5)


def test_looking_straight_down_has_a_right_hand():
    c = camera.orbit([0.0, 90.0], 90.0, 1.0, 1.0)
    assert c.c2w.isfinite().all()
    torch.testing.assert_close(torch.linalg.det(c.c2w[:, :, :3]), torch.ones(2), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "elevation, azimuth, view",
    [
        (0, 0, "front"),
        (0, 44, "front"),
        (0, 46, "side"),
        (0, 134, "side"),
        (0, 136, "back"),
        (0, 180, "back"),
        (0, 270, "side"),
        (0, 320, "front"),
        (59, 180, "back"),
        (61, 180, "overhead"),
    ],
)
def test_view_words(elevation, azimuth, view):
    angles = torch.deg2rad(torch.tensor([[float(elevation)], [float(azimuth)]]))
    assert camera.VIEWS[int(camera.view_index(*angles)[0])] == view


# The paper's distributions (A.2), by Kolmogorov and Smirnov's test. Seeds are fixed: what passes
# once passes always.
N = 20_000
PASSES, FAILS = 1e-3, 1e-9  # probabilities of samples at least so far off


def draw(**settings) -> camera.Cameras:
    """N cameras of the paper, but for `settings`; the same seed, so the same random numbers."""
    config = dataclasses.replace(CameraConfig(), **settings)
    return camera.sample(N, config, torch.Generator().manual_seed(5))


def ks(values, cdf) -> float:
    return kstest(values.double().numpy().ravel(), cdf).pvalue


def uniform_cdf(low, high):
    return uniform(low, high - low).cdf


def mixture_cdf(low, high, by_area=0.5):
    """Of elevations: with probability `by_area` uniform in area, whose measure is that of the
    sine, else in angle."""

    def cdf(e):
        area = (np.sin(e) - math.sin(low)) / (math.sin(high) - math.sin(low))
        return by_area * area + (1 - by_area) * (e - low) / (high - low)

    return cdf


def test_azimuth_and_elevation_have_the_papers_distributions():
    c = draw(position_jitter=0.0)
    position = c.c2w[:, :, 3]
    azimuth = torch.atan2(position[:, 1], position[:, 0]) % (2 * math.pi)
    elevation = torch.asin(position[:, 2] / position.norm(dim=1))
    torch.testing.assert_close(elevation, c.elevation, rtol=0, atol=1e-3)
    limits = math.radians(-10), math.radians(90)
    for a, e in ((azimuth, elevation), (c.azimuth, c.elevation)):
        assert ks(a, uniform_cdf(0, 2 * math.pi)) > PASSES
        assert ks(e, mixture_cdf(*limits)) > PASSES
        assert max(ks(e, mixture_cdf(*limits, share)) for share in (0.0, 1.0)) < FAILS


def test_distance_and_focal_length_are_uniform():
    c = draw(position_jitter=0.0)
    assert ks(c.c2w[:, :, 3].norm(dim=1), uniform_cdf(1.0, 1.5)) > PASSES
    assert ks(c.focal, uniform_cdf(0.7, 1.35)) > PASSES
    assert ks(c.focal, uniform_cdf(0.7, 1.3)) < FAILS


def test_jitter_is_uniform_in_a_box():
    shift = draw().c2w[:, :, 3] - draw(position_jitter=0.0).c2w[:, :, 3]
    for axis in shift.unbind(1):
        assert ks(axis, uniform_cdf(-0.1, 0.1)) > PASSES
    assert np.abs(np.corrcoef(shift.numpy().T) - np.eye(3)).max() < 0.03


def from_one_side(azimuth, elevation=0.0, **settings) -> camera.Cameras:
    """Cameras that all stand at one point."""
    angles = {"azimuth": (azimuth, azimuth), "elevation": (elevation, elevation)}
    return draw(**angles, position_jitter=0.0, **settings)


@pytest.mark.parametrize("azimuth, axes", [(0.0, (1, 2)), (90.0, (0, 2))])
def test_look_at_point_is_normal(azimuth, axes):
    """Seen from so far away, a ray's slope tells where it meets the plane through the origin."""
    far = 1e4
    c = from_one_side(azimuth, distance=(far, far), up_std=0.0)
    back, position = c.c2w[:, :, 2], c.c2w[:, :, 3]
    scale = position[0].norm() / back[:, 1 - axes[0]].abs()
    for axis in axes:
        target = position[:, axis] - scale * back[:, axis]
        assert ks(target, norm(0, 0.2).cdf) > PASSES
        assert ks(target, norm(0, 0.18).cdf) < FAILS


@pytest.mark.parametrize("azimuth", [0.0, 90.0])
def test_up_vector_is_normal(azimuth):
    """From the side the right-hand vector is u x back: its slope is the ratio r of a component of
    u = (0, 0, 1) + N(0, s² I) to u_z, and r / (s sqrt(1 + r²)) is standard normal. From 45 degrees
    up it is that of the same component to (u_z - u_x) / sqrt(2), and s is sqrt(2) times that."""
    for elevation, spread in ((0.0, 0.02), (45.0, 0.02 * math.sqrt(2.0))):
        right = from_one_side(azimuth, elevation, look_at_std=0.0).c2w[:, :, 0]
        along = right[:, 1] if azimuth == 0 else right[:, 0]
        slope = right[:, 2] / along.abs() * (1.0 if elevation == 0 else math.sqrt(2.0))
        scaled = slope / (spread * (1 + slope.square()).sqrt())
        assert ks(scaled, norm.cdf) > PASSES
        assert ks(1.1 * scaled, norm.cdf) < FAILS


def test_flattened_is_rows_of_c2w_position_scaled_then_focal():
    one = camera.orbit([0.0], 0.0, 1.4, 0.9)
    want = [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0.9]  # from +x: right is +y, up +z, back +x
    torch.testing.assert_close(camera.flattened(one), torch.tensor([want]).float())
    assert camera.flattened(camera.sample(3, CameraConfig(), torch.Generator())).shape == (
        3,
        camera.N_NUMBERS,
    )


def test_mirrored_twice_is_the_same_and_once_still_a_rotation(rng):
    cameras = camera.sample(20, CameraConfig(), rng)
    once = camera.mirrored(cameras)
    torch.testing.assert_close(torch.linalg.det(once.c2w[:, :, :3]), torch.ones(20))
    for a, b in zip(vars(camera.mirrored(once)).values(), vars(cameras).values()):
        torch.testing.assert_close(a, b)
    assert torch.equal(once.view_index(), cameras.view_index())


def test_repeat_puts_whole_sets_behind_each_other():
    twice = camera.orbit([0.0, 90.0], 10.0, 1.4, 1.0).repeat(2)
    assert twice.c2w.shape == (4, 3, 4) and torch.equal(twice.c2w[:2], twice.c2w[2:])
    assert torch.equal(twice.azimuth[:2], twice.azimuth[2:])
