"""The toybox's surfaces as triangles: what the ray caster and the measures need of a shape.

The signed distances of shapes.py stay the truth. Each object is turned into triangles once a
process, fine enough (a cell is a third of a pixel) that pictures do not show it.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import trimesh
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from skimage.measure import marching_cubes
from torch import Tensor

from .shapes import OBJECT_RADIUS, signed_distance

RADIUS = 1.05 * OBJECT_RADIUS  # half the side of the meshed cube, scene units
CELLS = 192  # of that cube, a side
_BLOCK = 8  # cells a side of what is looked at, or left out, together


def distance_grid(name: str) -> Tensor:
    """Signed distances (CELLS, CELLS, CELLS) of object `name` at the centres of the cube's cells,
    exact near the surface; further off only their signs can be relied on."""
    cell = 2.0 * RADIUS / CELLS
    coarse = _lattice(CELLS // _BLOCK, _BLOCK * cell)
    distance = signed_distance(name, coarse)[0]
    # A distance is a lower bound, a thin ellipsoid's up to some 1.5 times too large.
    reach = 1.5 * 3**0.5 / 2 * _BLOCK * cell + cell
    near = (distance.abs() <= reach).nonzero()[:, 0]
    values = distance[:, None].repeat(1, _BLOCK**3)
    fine = _lattice(_BLOCK, cell)
    for rows in near.split(256):
        points = (coarse[rows, None] + fine).reshape(-1, 3)
        values[rows] = signed_distance(name, points)[0].view(len(rows), -1)
    n = CELLS // _BLOCK
    blocks = values.view(n, n, n, _BLOCK, _BLOCK, _BLOCK)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(CELLS, CELLS, CELLS)


def _lattice(n: int, spacing: float) -> Tensor:
    """(n³, 3) centres of the cells of a cube around the origin."""
    axis = (torch.arange(n) + 0.5 - n / 2) * spacing
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


@functools.cache
def true_mesh(name: str) -> trimesh.Trimesh:
    """The surface of object `name`, scene units, normals out; made once, not to be changed."""
    grid = distance_grid(name).numpy()
    corners, faces, _, _ = marching_cubes(grid, 0.0, gradient_direction="ascent")
    mesh = trimesh.Trimesh((corners + 0.5) * (2.0 * RADIUS / CELLS) - RADIUS, faces)
    if mesh.volume < 0:
        mesh.invert()
    return mesh


def scene(mesh: trimesh.Trimesh) -> EmbreeScene:
    """What `cast` casts rays at."""
    made = EmbreeScene()
    TriangleMesh(made, np.asarray(mesh.triangles, dtype=np.float32))
    return made


def cast(
    into: EmbreeScene, rays_o: np.ndarray, rays_d: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where rays (N, 3), with unit directions, first meet a scene, by Embree. Returns hit (N,) bool
    and distance (N,) float32, infinite where nothing is hit."""
    o, d = (np.ascontiguousarray(x, dtype=np.float32) for x in (rays_o, rays_d))
    found = into.run(o, d, query="INTERSECT", output=1)
    hit = found["primID"] >= 0
    return hit, np.where(hit, found["tfar"], np.float32(np.inf))


@functools.cache
def _true_scene(name: str) -> EmbreeScene:
    return scene(true_mesh(name))


def first_hits(name: str, rays_o: Tensor, rays_d: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays (N, 3), with unit directions, first meet object `name`: hit (N,) bool and distance
    (N,) float32 in scene units, infinite where nothing is hit."""
    hit, distance = cast(_true_scene(name), rays_o.numpy(), rays_d.numpy())
    return torch.from_numpy(hit), torch.from_numpy(distance)
