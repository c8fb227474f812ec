"""What refuses settings that cannot run: one line with their name, what was expected, what came."""

from __future__ import annotations

import math

from .config import CameraConfig, RunConfig, ShadingConfig

BACKGROUNDS = ("random", "solid", "learned", "environment")
NORMALS = ("analytic", "finite")


def check(config: RunConfig) -> None:
    """Raise ValueError for settings that cannot run: first those that need no torch to tell."""
    if not config.prompt.strip():
        raise ValueError("argument `prompt`: expected a text, got an empty one")
    for name in ("steps", "views", "accumulate", "checkpoint_every", "preview_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"argument `{name}`: expected at least 1, got {getattr(config, name)}")
    if config.render.occupancy_every < 1:
        raise ValueError(
            f"argument `occupancy_every`: expected at least 1, got {config.render.occupancy_every}"
        )
    if config.render.rows < 1:
        raise ValueError(f"config `render.rows`: expected at least 1, got {config.render.rows}")
    if config.render.background not in BACKGROUNDS:
        raise ValueError(
            f"argument `background`: expected one of {', '.join(BACKGROUNDS)}, got "
            f"{config.render.background!r}"
        )
    if config.render.normals not in NORMALS:
        raise ValueError(
            f"config `render.normals`: expected one of {', '.join(NORMALS)}, got "
            f"{config.render.normals!r}"
        )
    if not 0 < config.render.epsilon < math.inf:
        raise ValueError(
            f"config `render.epsilon`: expected more than 0, got {config.render.epsilon}"
        )
    check_camera(config.camera, config.field.radius)
    check_shading(config.shading)

    from . import losses, optimizers  # these import torch

    losses.check_schedules(config.loss)
    optimizers.check(config.optimizer)


def check_camera(camera: CameraConfig, radius: float) -> None:
    """Raise ValueError for ranges that are none, or that bring a camera into the sphere."""
    _check_range("camera.elevation", camera.elevation, -90.0, 90.0)
    _check_range("camera.azimuth", camera.azimuth)
    _check_range("camera.focal", camera.focal)
    if camera.focal[0] <= 0:
        raise ValueError(f"config `camera.focal`: expected numbers above 0, got {camera.focal}")
    for name in ("position_jitter", "look_at_std", "up_std"):
        _check_number(f"camera.{name}", getattr(camera, name))
    _check_range("camera.distance", camera.distance)
    nearest = radius + math.sqrt(3.0) * camera.position_jitter
    if not camera.distance[0] > nearest:
        raise ValueError(
            f"config `camera.distance`: expected more than {nearest:.4g}, which is field.radius + "
            f"camera.position_jitter * sqrt(3), as cameras stay outside the sphere, got "
            f"{camera.distance}"
        )


def check_shading(shading: ShadingConfig) -> None:
    """Raise ValueError for numbers that are no probabilities, strengths or distances."""
    for name in ("ambient_until", "lit", "textureless"):
        _check_number(f"shading.{name}", getattr(shading, name), 1.0)
    for name in ("ambient", "diffuse", "white"):
        _check_number(f"shading.{name}", getattr(shading, name))
    _check_range("shading.light_distance", shading.light_distance, 0.0)


def _check_number(name: str, value: float, most: float = math.inf) -> None:
    if not (0 <= value <= most and math.isfinite(value)):
        limits = "at least 0" if most == math.inf else f"0 to {most:g}"
        raise ValueError(f"config `{name}`: expected {limits}, got {value}")


def _check_range(name: str, value, least: float = -math.inf, most: float = math.inf) -> None:
    """(low, high), finite, ascending and inside [least, most]."""
    if not (len(value) == 2 and all(map(math.isfinite, value)) and value[0] <= value[1]):
        raise ValueError(f"config `{name}`: expected (low, high), low <= high, got {value}")
    if value[0] < least or value[1] > most:
        raise ValueError(f"config `{name}`: expected numbers in [{least:g}, {most:g}], got {value}")
