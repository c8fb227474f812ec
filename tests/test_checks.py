"""What refuses settings that cannot run."""

import math

import pytest
from test_train import tiny

from dreamfusion_fast.checks import check
from dreamfusion_fast.config import CameraConfig, preset


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "camera.distance",
            [0.9, 1.5],
            r"expected more than 0.9232, which is field.radius \+ .*\(0.9, 1.5",
        ),
        ("camera.distance", [1.5, 1.2], r"expected \(low, high\), low <= high, got \(1.5, 1.2\)"),
        ("camera.elevation", [-100, 0], r"expected numbers in \[-90, 90\], got \(-100"),
        ("camera.elevation", [30, 20], r"expected \(low, high\)"),
        ("camera.azimuth", [0, math.inf], r"expected \(low, high\)"),
        ("camera.focal", [0, 1], "expected numbers above 0"),
        ("camera.look_at_std", -0.1, "expected at least 0, got -0.1"),
        ("field.radius", 1.4, "expected more than 1.573"),
        ("shading.lit", 1.1, "expected 0 to 1, got 1.1"),
        ("shading.textureless", -0.1, "expected 0 to 1, got -0.1"),
        ("shading.ambient_until", math.nan, "expected 0 to 1, got nan"),
        ("shading.diffuse", -1, "expected at least 0, got -1"),
        ("shading.light_distance", [1.5, 0.8], r"expected \(low, high\)"),
        ("render.normals", "numeric", "expected one of analytic, finite, got 'numeric'"),
        ("render.rows", 0, "expected at least 1, got 0"),
        ("render.epsilon", 0, "expected more than 0, got 0"),
        ("loss.opacity", [0.1, 0.1, 2], "schedules past the last step"),
        ("optimizer.name", "sgd", "expected one of adam, adan, shampoo"),
    ],
)
def test_settings_that_cannot_run(name, value, message):
    config = tiny()
    config.change(name, value)
    name = "camera.distance" if name == "field.radius" else name
    with pytest.raises(ValueError, match=f"config `{name}`: .*{message}"):
        check(config)


def test_the_papers_cameras_stay_outside_the_sphere():
    assert tiny().camera == CameraConfig()
    for config in (tiny(), *(preset(name, prompt="a car") for name in ("toybox", "sd21"))):
        check(config)
