import math

import pytest
import torch

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
