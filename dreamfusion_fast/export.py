"""What a run leaves behind: pictures, a turntable, a coloured mesh.

Every file is written beside its place and renamed, so a killed run leaves whole files only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import trimesh
from PIL import Image
from scipy import ndimage
from skimage.measure import marching_cubes
from torch import Tensor, nn

from . import shading
from .camera import Cameras, orbit
from .checkpoint import write_atomically
from .config import RenderConfig

DISTANCE, FOCAL = 1.5, 1.0  # of the exported views, scene units and image widths
SIZE = 256  # pixels, of what a run leaves behind
SKIN = 0.15  # of the matter's median density: where soft matter has its surface
FOG = 0.15  # scene units: what takes longer to halve the light is no surface
SPECK = 0.005  # components smaller than this share of the largest are dropped
_CHUNK = 1 << 18  # points evaluated at once
_LOG_RANGE = 2.0  # marching cubes sees log density clipped to the level's plus or minus this
_SMOOTH = 0.7  # standard deviation of the grid's smoothing, cells

FieldFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


def grid_axis(resolution: int, radius: float) -> np.ndarray:
    """Centres (G,) of the cells along one axis of the bounding sphere's cube, scene units."""
    return ((np.arange(resolution) + 0.5) / resolution * 2.0 - 1.0) * radius


@torch.no_grad()
def density_grid(field: FieldFunction, resolution: int, radius: float) -> np.ndarray:
    """Density at the cells' centres (`grid_axis`, x first), zero outside the sphere of `radius`.

    field: positions (N, 3) to sigma (N,), albedo (N, 3). Returns (G, G, G) float32, 1 / scene unit.
    Raises ValueError where the density is not finite.
    """
    axis = torch.from_numpy(grid_axis(resolution, radius)).float()
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)
    inside = points.norm(dim=-1) <= radius
    device = _device(field)
    sigma = [field(p.to(device))[0].float().cpu() for p in points[inside].split(_CHUNK)]
    density = torch.zeros(len(points))
    density[inside] = torch.cat(sigma)
    bad = int((~torch.isfinite(density)).sum())
    if bad:
        raise ValueError(f"density is not finite at {bad} of {len(points)} points")
    return density.reshape(resolution, resolution, resolution).numpy()


def solid(
    density: np.ndarray, iso: float | None = None, step: float = RenderConfig.step
) -> tuple[np.ndarray, float]:
    """The solid that a density grid (G, G, G) shows, as booleans, and the level that bounds it.

    Without `iso` the level is what pictures are trained against: the density at which one step of
    the renderer, `step` scene units, takes half of the light, ln 2 / step. Where the matter itself
    is softer, it is SKIN of the matter's median density (measured: of 0.1 to 0.5 the share with the
    largest IoU of 14 toybox objects, with the embedded prior and with exact scores), but no less
    than takes half of the light in FOG scene units: thinner is fog. Cavities that no path from
    outside reaches are filled, since no training view sees inside an opaque surface. Specks are
    dropped. The result is empty where no density reaches the level.
    """
    level = _level(density, step) if iso is None else float(iso)
    filled = ndimage.binary_fill_holes(density > level)
    labels, n = ndimage.label(filled)
    if n > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        filled = (sizes >= SPECK * sizes.max())[labels] & filled
    return filled, level


def _level(density: np.ndarray, step: float) -> float:
    fog = math.log(2.0) / FOG
    matter = density[density > fog]
    if not matter.size:
        return fog
    return max(fog, min(math.log(2.0) / step, SKIN * float(np.median(matter))))


def mesh(
    field: FieldFunction,
    radius: float,
    resolution: int = 128,
    iso: float | None = None,
    step: float = RenderConfig.step,
) -> trimesh.Trimesh:
    """Marching cubes (Lewiner et al. 2003) on the solid's lightly smoothed log density. iso and
    step: as of `solid`.

    Vertices in scene units, z up; normals point out; vertex colours are the albedo half a cell
    inside the surface, as displayed (sRGB). Raises ValueError when there is no surface.
    """
    density = density_grid(field, resolution, radius)
    inside, level = solid(density, iso, step)
    none = f"no surface at any level: density is at most {density.max():.3g}, expected {level:.3g}"
    if not inside.any():
        raise ValueError(none)
    value = np.log(np.maximum(density, 1e-9) / level).clip(-_LOG_RANGE, _LOG_RANGE)
    value[inside & (value < 0)] = _LOG_RANGE  # what fills a cavity
    value[~inside & (value > 0)] = -_LOG_RANGE  # specks
    value = ndimage.gaussian_filter(
        np.pad(value, 2, constant_values=-_LOG_RANGE), _SMOOTH, mode="nearest"
    )
    if value.max() <= 0:
        raise ValueError(f"{none}, in more than single cells")
    cell = 2.0 * radius / resolution
    corners, faces, _, _ = marching_cubes(value, 0.0, gradient_direction="ascent")
    vertices = (corners - 2.0 + 0.5) * cell - radius
    result = trimesh.Trimesh(vertices, faces)
    if result.volume < 0:
        result.invert()
    colours = _albedo(field, result.vertices - 0.5 * cell * result.vertex_normals)
    result.visual = trimesh.visual.ColorVisuals(result, vertex_colors=colours)
    return result


@torch.no_grad()
def _albedo(field: FieldFunction, positions: np.ndarray) -> np.ndarray:
    """(N, 4) uint8 colours at (N, 3) positions."""
    points = torch.as_tensor(np.array(positions), dtype=torch.float32, device=_device(field))
    albedo = torch.cat([field(p)[1].float().cpu() for p in points.split(_CHUNK)])
    rgb = (albedo.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return np.concatenate((rgb, np.full((len(rgb), 1), 255, np.uint8)), axis=1)


def write_glb(result: trimesh.Trimesh, path: Path) -> None:
    """Binary glTF 2.0: y up, front +z (here z and +x), linear vertex colours, a matte material."""
    turned = result.copy()
    turned.vertices = np.asarray(result.vertices)[:, [1, 2, 0]]
    srgb = np.asarray(result.visual.vertex_colors)[:, :3] / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    turned.visual = trimesh.visual.ColorVisuals(
        turned, vertex_colors=(linear * 255).round().astype(np.uint8)
    )

    def matte(tree: dict) -> None:  # glTF's default is metal, dark without a sky to mirror
        surface = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
        tree["materials"] = [{"pbrMetallicRoughness": surface}]
        for shape in tree["meshes"]:
            for primitive in shape["primitives"]:
                primitive["material"] = 0

    data = trimesh.exchange.gltf.export_glb(
        trimesh.Scene(turned), include_normals=True, tree_postprocessor=matte
    )
    write_atomically(path, lambda partial: partial.write_bytes(data))


MODES = ("albedo", "lit", "textureless", "normal", "depth")


@torch.no_grad()
def render_views(
    renderer,
    cameras: Cameras,
    size: int | None = None,
    background: Tensor | None = None,
    mode: str = "albedo",
    white: float = 1.0,
) -> Tensor:
    """Pictures (B, 3, S, S) in [0, 1] of B cameras, on the CPU, one at a time and without jitter.

    renderer: called as render.Renderer is. Its sample buffers grow when a picture needs more, and
    have their old capacity again afterwards. background: (3,); by default the renderer's own.
    mode: one of MODES; lit and textureless (albedo `white`) by shading.fixed's light; normal is
    (1 + n) / 2 in world axes; depth is 1 in front of the bounding sphere, 0 behind it and beside
    the object. Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"argument `mode`: expected one of {', '.join(MODES)}, got {mode!r}")
    cameras, capacity = cameras.to(_device(renderer)), renderer.capacity
    background = None if background is None else background.to(_device(renderer))
    images = []
    try:
        for i in range(len(cameras.focal)):
            one = Cameras(*(x[i : i + 1] for x in vars(cameras).values()))
            options = dict(background=background, size=size, jitter=False)
            if mode in ("lit", "textureless", "normal"):
                lit = "lit" if mode == "normal" else mode
                options["shading"] = shading.fixed(one, lit, white)
            rendering = renderer(one, 0, **options)
            if int(rendering.count) > rendering.capacity:
                renderer.fit_capacity(int(rendering.count))
                rendering = renderer(one, 0, **options)
            images.append(_picture(rendering, mode, one, renderer).float().clamp(0, 1).cpu())
    finally:
        renderer.capacity = capacity
    return torch.cat(images)


def _picture(rendering, mode: str, camera: Cameras, renderer) -> Tensor:
    if mode == "normal":
        return 0.5 + 0.5 * rendering.normal
    if mode == "depth":
        radius = renderer.field.config.radius
        front = camera.c2w[0, :, 3].norm() - radius
        within = (rendering.depth - front * rendering.opacity) / (2.0 * radius)
        return (rendering.opacity - within)[:, None].expand(-1, 3, -1, -1)
    return rendering.image


def preview(renderer, path: Path) -> None:
    """PNG of the front, both sides and the back, at the renderer's own size."""
    cameras = orbit([0.0, 90.0, 180.0, 270.0], 15.0, DISTANCE, FOCAL)
    write_png(tiled(render_views(renderer, cameras), 2), path)


def contact_sheet(renderer, path: Path, size: int = SIZE) -> None:
    """PNG of 8 azimuths (columns) at 15 and 45 degrees of elevation (rows); then, at 15 degrees,
    lit, textureless and normals."""
    azimuths = [45.0 * i for i in range(8)]
    rows = [
        render_views(renderer, orbit(azimuths, elevation, DISTANCE, FOCAL), size)
        for elevation in (15.0, 45.0)
    ]
    rows += [
        render_views(renderer, orbit(azimuths, 15.0, DISTANCE, FOCAL), size, mode=mode)
        for mode in ("lit", "textureless", "normal")
    ]
    write_png(tiled(torch.cat(rows), 8), path)


def turntable(renderer, path: Path, frames: int = 60, size: int = SIZE, fps: int = 30) -> None:
    """MP4 (H.264, yuv420p) of one turn at 15 degrees of elevation. size: even, pixels."""
    if size % 2 or size <= 0:
        raise ValueError(f"argument `size`: expected a positive even number, got {size}")
    azimuths = [360.0 * i / frames for i in range(frames)]
    images = _bytes(render_views(renderer, orbit(azimuths, 15.0, DISTANCE, FOCAL), size))
    coding = dict(codec="libx264", pixelformat="yuv420p", macro_block_size=2, quality=8)

    def write(partial: Path) -> None:
        with imageio.get_writer(
            partial, format="FFMPEG", fps=fps, ffmpeg_log_level="error", **coding
        ) as writer:
            for image in images:
                writer.append_data(image)

    write_atomically(path, write)


def write_png(image: Tensor, path: Path) -> None:
    """image: (3, H, W) in [0, 1]."""
    write_atomically(path, Image.fromarray(_bytes(image[None])[0]).save)


def export_run(
    renderer,
    folder: Path,
    frames: int = 60,
    size: int = SIZE,
    resolution: int = 128,
) -> list[Path]:
    """Write contact_sheet.png, turntable.mp4 and mesh.glb into `folder`; returns what was written.

    A field without a surface has no mesh: a warning says so, and the pictures remain.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheet, video, glb = (folder / n for n in ("contact_sheet.png", "turntable.mp4", "mesh.glb"))
    contact_sheet(renderer, sheet, size)
    turntable(renderer, video, frames, size)
    try:
        field = renderer.field
        step = renderer.config.step
        write_glb(mesh(field, field.config.radius, resolution, step=step), glb)
    except ValueError as error:
        warnings.warn(f"{glb.name} not written: {error}", stacklevel=2)
        return [sheet, video]
    return [sheet, video, glb]


def tiled(images: Tensor, columns: int) -> Tensor:
    """(R * columns, 3, S, S) to one picture (3, R * S, columns * S)."""
    n, c, h, w = images.shape
    rows = images.reshape(n // columns, columns, c, h, w)
    return rows.permute(2, 0, 3, 1, 4).reshape(c, -1, columns * w)


def _bytes(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _device(module) -> torch.device:
    """Where a module's parameters lie; the CPU for a plain function."""
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
