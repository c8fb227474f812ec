"""Measures of a text to 3D result: against the toybox's true shapes, and by a judge of pictures.

Frame and units are the toybox's: z up, +x the front, scene units. What a result cannot have
(a surface, a front) is an error or None, never a number.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from scipy.spatial import cKDTree
from skimage.metrics import structural_similarity
from torch import Tensor

from . import camera, export, shading
from .camera import Cameras
from .config import RenderConfig
from .toybox import renderer as true_renderer
from .toybox import shapes, world
from .toybox import surfaces as surfaces_of
from .toybox.pictures import pinhole_rays
from .toybox.surfaces import true_mesh

ELEVATION, AZIMUTHS, DISTANCE, FOCAL = 30.0, 8, 1.4, 1.0  # degrees, views, units, image widths
GRID = 128  # cells a side for volume IoU and for surfaces
POINTS = 50_000  # on each surface
NEAR = 0.02  # of the true bounding box's longest side: what counts as the same place
EYES = 100  # cameras that decide what can be seen
SLACK = 0.005  # scene units in front of a point that still is its own surface
TURN, TURN_ELEVATION, TURN_SIZE = 24, 15.0, 64  # azimuths once around, degrees, pixels
FRONT, ASTRAY = 45.0, 60.0  # degrees: what counts as the front; further off is a wrong view
ALIKE = 1e-3  # mean squared difference in [0, 1] below which two pictures look the same
GREY = torch.full((3,), 0.5)  # background of compared pictures


def volume_iou(field, radius: float, name: str, step: float = RenderConfig.step) -> float:
    """IoU of the field's solid (export.solid, automatic level for a renderer of this step) with
    object `name`, in [0, 1]."""
    found, _ = export.solid(export.density_grid(field, GRID, radius), step=step)
    true = (_distances(name, radius) < 0).numpy()
    return float(np.logical_and(found, true).sum() / np.logical_or(found, true).sum())


def _distances(name: str, radius: float) -> Tensor:
    """Signed distances (G, G, G) to object `name` at the centres of the cube's cells."""
    axis = torch.from_numpy(export.grid_axis(GRID, radius)).float()
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    distance = torch.cat([shapes.signed_distance(name, p)[0] for p in points.split(1 << 18)])
    return distance.reshape(GRID, GRID, GRID)


def surfaces(found: trimesh.Trimesh, true: trimesh.Trimesh) -> tuple[float, float]:
    """Chamfer distance and normal consistency of two surfaces.

    POINTS are drawn on each, at a fixed seed; each has its nearest on the other. Chamfer is the
    mean of both directions' mean distances, scene units: two samples of one surface of area A have
    about sqrt(A / POINTS) / 2, 0.003 in the toybox. Consistency is the mean cosine of the
    normals at such pairs, in [-1, 1]: 1 for the same surface, -1 for the same inside out.
    """
    (p, n), (q, m) = _sample(found), _sample(true)
    to_true, i = cKDTree(q).query(p)
    to_found, j = cKDTree(p).query(q)
    cosines = (n * m[i]).sum(1).mean(), (m * n[j]).sum(1).mean()
    return float((to_true.mean() + to_found.mean()) / 2), float(sum(cosines) / 2)


def _sample(mesh: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray]:
    """Points (N, 3) uniform in area, and the unit normals (N, 3) of their faces."""
    points, faces = trimesh.sample.sample_surface(mesh, POINTS, seed=0)
    return np.asarray(points), mesh.face_normals[faces]


def f_score(found: trimesh.Trimesh, true: trimesh.Trimesh) -> float:
    """F-score of a surface (Knapitsch et al. 2017), in [0, 1], of what cameras can see.

    POINTS are drawn on each surface; those that no camera of `everywhere` sees are left out: the
    bottom of a cup, the inside of a hull. Precision is the share of the found ones that lie within
    NEAR of the longest side of the true bounding box of the true surface, recall the share of the
    true ones that lie as near to the found surface; the score is their harmonic mean.
    """
    p, q = _sample(found)[0], _sample(true)[0]
    limit = NEAR * float(true.extents.max())
    shares = []
    for points, own, other in ((p, found, q), (q, true, p)):
        seen = points[visible(own, points)]
        near = cKDTree(other).query(seen)[0] <= limit if len(seen) else np.zeros(1)
        shares.append(float(near.mean()))
    precision, recall = shares
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def everywhere() -> Tensor:
    """(EYES, 3) camera positions spread over the range that runs are trained in: elevations of -10
    to 90 degrees, alike dense in area (a Fibonacci lattice), DISTANCE away."""
    i = torch.arange(EYES, dtype=torch.float64) + 0.5
    low, high = math.sin(math.radians(-10.0)), 1.0
    z = low + (high - low) * i / EYES
    azimuth = i * math.pi * (3.0 - math.sqrt(5.0))
    level = (1.0 - z.square()).sqrt()
    return DISTANCE * torch.stack((level * azimuth.cos(), level * azimuth.sin(), z), 1)


def visible(mesh: trimesh.Trimesh, points: np.ndarray) -> np.ndarray:
    """Which of the points (N, 3) on a mesh some camera of `everywhere` sees, (N,) bool."""
    scene, seen = surfaces_of.scene(mesh), np.zeros(len(points), dtype=bool)
    for eye in everywhere().numpy():
        left = np.flatnonzero(~seen)
        toward = points[left] - eye
        far = np.linalg.norm(toward, axis=1)
        rays_o = np.broadcast_to(eye, toward.shape)
        _, distance = surfaces_of.cast(scene, rays_o, toward / far[:, None])
        seen[left[distance > far - SLACK]] = True
    return seen


def picture_cameras() -> Cameras:
    """The VIEWS fixed cameras of `pictures`: three elevations, azimuths spread evenly."""
    orbits = [
        camera.orbit([360.0 * (i + k / 3) / 8 for i in range(8)], elevation, DISTANCE, FOCAL)
        for k, elevation in enumerate((0.0, 30.0, 60.0))
    ]
    return Cameras(*(torch.cat(x) for x in zip(*(vars(o).values() for o in orbits))))


def pictures(renderer, colour: str, name: str) -> tuple[float, float]:
    """Mean PSNR (dB) and mean SSIM of a result's albedo against the true object's, over the views
    of picture_cameras, on grey."""
    found = export.render_views(renderer, picture_cameras(), 2 * TURN_SIZE, GREY)
    return likeness(F.avg_pool2d(found, 2), true_pictures(colour, name))


@functools.lru_cache(maxsize=32)
def true_pictures(colour: str, name: str) -> Tensor:
    """Of the true object from picture_cameras, (24, 3, S, S); not to be changed."""
    return true_views(name, picture_cameras(), colour)


def likeness(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean PSNR in dB (at most 60, of equal pictures) and mean SSIM of pictures (B, 3, S, S) in
    [0, 1]."""
    error = (a - b).square().flatten(1).mean(1).clamp_min(1e-6)
    pairs = zip(a.permute(0, 2, 3, 1).numpy(), b.permute(0, 2, 3, 1).numpy())
    similar = [structural_similarity(x, y, channel_axis=2, data_range=1.0) for x, y in pairs]
    return float((-10.0 * error.log10()).mean()), float(np.mean(similar))


def chamfer(found: trimesh.Trimesh, name: str) -> float:
    """Chamfer distance to object `name`, scene units; see `surfaces`."""
    return surfaces(found, true_mesh(name))[0]


def normal_consistency(found: trimesh.Trimesh, name: str) -> float:
    """Mean cosine between the normals of nearest points, in [-1, 1]; see `surfaces`."""
    return surfaces(found, true_mesh(name))[1]


def orbit(n: int, elevation: float) -> Cameras:
    """n cameras once around, the first in front."""
    return camera.orbit([360.0 * i / n for i in range(n)], elevation, DISTANCE, FOCAL)


def true_views(
    name: str,
    cameras: Cameras,
    colour: str | None,
    size: int = TURN_SIZE,
    background: Tensor = GREY,
) -> Tensor:
    """Pictures (B, 3, size, size) in [0, 1] of object `name`: the albedo with its main part in
    `colour`; None: textureless, all white and lit as export.render_views does it."""
    rays_o, rays_d = pinhole_rays(cameras, 2 * size)
    g = true_renderer.trace(name, rays_o, rays_d)
    points = rays_o + g.depth.float()[..., None] * rays_d
    rows = shading.fixed(cameras, "textureless" if colour is None else "albedo")
    palette = true_renderer.palette(name, world.COLOURS[colour]) if colour else torch.zeros(256, 3)
    palettes = rows[:, 5, None, None] * palette + rows[:, 6, None, None]
    light = rows[:, :3], rows[:, 3], rows[:, 4]
    behind = background.view(1, 1, 1, 3)
    images = true_renderer.shade(g.part, g.normal, points, palettes, behind, *light)
    return images.clamp(0.0, 1.0)


@functools.lru_cache(maxsize=32)
def true_turn(colour: str, name: str) -> Tensor:
    """Pictures (TURN, 3, S, S) of an object once around; not to be changed."""
    return true_views(name, orbit(TURN, TURN_ELEVATION), colour)


def turn(renderer) -> Tensor:
    """The same of a result."""
    return export.render_views(renderer, orbit(TURN, TURN_ELEVATION), TURN_SIZE, GREY)


def fronts(pictures: Tensor, truth: Tensor) -> int | None:
    """How often a result shows the object's front in one turn: 1 is right, more is Janus.

    Each picture is taken for the true azimuth whose picture is nearest (mean squared difference).
    Contiguous arcs of pictures taken for the front (within FRONT degrees of it) are counted, after
    a majority of three neighbours smooths out single ones; an arc as wide as several true fronts
    counts as several, so that a face all around is not one front. (Nor is no face at all: a result
    that is the same all around has 0 or several, by which of the true pictures it is like.)

    Args:
        pictures, truth: (TURN, 3, S, S), of the result and of the true object, same cameras.
    Returns:
        None where the true object looks the same from the front and from the back.
    """
    if _difference(truth, truth)[0, TURN // 2] < ALIKE:
        return None
    front = _turned(torch.arange(TURN)) <= FRONT
    facing = front[_nearest(pictures, truth)].int()
    facing = facing + facing.roll(1) + facing.roll(-1) >= 2
    if bool(facing.all()):
        return round(TURN / int(front.sum()))
    start = int((~facing).nonzero()[0])  # no arc goes on across it
    arcs = "".join("x" if f else " " for f in facing.roll(-start).tolist()).split()
    return sum(max(1, round(len(arc) / int(front.sum()))) for arc in arcs)


def view_error(pictures: Tensor, truth: Tensor) -> float | None:
    """Share of a result's pictures that are taken for a true azimuth more than ASTRAY degrees off,
    in [0, 1]. Right is also what looks like a true picture within those degrees (a cube's sides).
    Arguments as for `fronts`. None where no picture could be wrong (a ball)."""
    i = torch.arange(TURN)
    within = _turned(i[:, None] - i) <= ASTRAY
    alike = _difference(truth, truth) < ALIKE
    right = (within.float() @ alike.float()) > 0  # of azimuth i, taken for azimuth j
    if bool(right.all()):
        return None
    return float((~right[i, _nearest(pictures, truth)]).float().mean())


def _turned(steps: Tensor) -> Tensor:
    """The angle of so many steps of a turn, degrees in [0, 180]."""
    degrees = (360.0 / TURN) * (steps % TURN)
    return torch.minimum(degrees, 360.0 - degrees)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared differences (A, B) of pictures (A, 3, S, S) and (B, 3, S, S), both blurred:
    results are soft, and without it a soft face is nearest to a side."""
    a, b = (F.avg_pool2d(x, 3, 1) for x in (a, b))
    return torch.stack([(b - x).square().flatten(1).mean(1) for x in a])


def _nearest(pictures: Tensor, truth: Tensor) -> Tensor:
    if pictures.shape != truth.shape or len(truth) != TURN:
        raise ValueError(
            f"argument `pictures`: expected {TURN} of shape {tuple(truth.shape[1:])}, got "
            f"{tuple(pictures.shape)}"
        )
    return _difference(pictures, truth).argmin(1)


def r_precision(judge, images: Tensor, prompts: list[str], index: int) -> float:
    """Share of images (B, 3, S, S) in [0, 1] whose most similar prompt is prompts[index]; judge:
    has similarities(images, prompts) (B, P). Park et al. 2021."""
    if not 0 <= index < len(prompts):
        raise ValueError(f"argument `index`: expected 0 to {len(prompts) - 1}, got {index}")
    return float((judge.similarities(images, prompts).argmax(1) == index).float().mean())


class ColourPrecision(NamedTuple):
    """R-Precision of a result's albedo among all pairs, among those that share its colour, and
    among those that share its object, each in [0, 1]."""

    all: float
    same_colour: float
    same_object: float


def judged_views(renderer, judge, mode: str = "albedo") -> Tensor:
    """Pictures of a result as the paper's R-Precision takes them: AZIMUTHS at 30 degrees."""
    return export.render_views(renderer, orbit(AZIMUTHS, ELEVATION), judge.image_size, mode=mode)


def colour_precision(renderer, judge, colour: str, name: str) -> ColourPrecision:
    """R-Precision of a result's albedo, averaged over azimuths, among the prompts of all pairs of
    colour and object, and among parts of them."""
    images = judged_views(renderer, judge)
    pairs = world.all_pairs()
    among = (
        pairs,
        [p for p in pairs if p[0] == colour],
        [p for p in pairs if p[1] == name],
    )
    return ColourPrecision(
        *(
            r_precision(judge, images, [world.prompt(*p) for p in some], some.index((colour, name)))
            for some in among
        )
    )


def geometry_precision(renderer, judge, prompts: list[str], index: int) -> float:
    """The same of textureless pictures: white, lit, so that nothing but form can tell."""
    return r_precision(judge, judged_views(renderer, judge, "textureless"), prompts, index)


def clay_prompts() -> list[str]:
    """What the embedded scorer is asked of textureless pictures, one an object."""
    return [world.caption(world.CLAY_TEMPLATE, name) for name in shapes.OBJECTS]


def true_geometry(judge) -> dict[str, float]:
    """What geometry_precision is for the true shapes, object by object: no result can be expected
    to have more, and where it is low the measure says little."""
    cameras, prompts = orbit(AZIMUTHS, ELEVATION), clay_prompts()
    return {
        name: r_precision(judge, true_views(name, cameras, None, judge.image_size), prompts, i)
        for i, name in enumerate(shapes.OBJECTS)
    }
