"""Export: grids, solids, meshes and pictures, of analytic fields and of a stand-in renderer."""

from __future__ import annotations

import math
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import nn

from dreamfusion_fast import export
from dreamfusion_fast.camera import orbit
from dreamfusion_fast.config import FieldConfig, RenderConfig
from dreamfusion_fast.render import Rendering

RADIUS = 0.75
RED, BLUE = (0.8, 0.1, 0.1), (0.1, 0.2, 0.9)


def field(*signed_distances, colours=(RED, BLUE), inside=500.0, outside=1.0):
    """Density falling by orders of magnitude across the surface of a union, as a trained field's
    does, through a level within HALVING's at the surface; albedo of the nearest member."""

    def evaluate(positions):
        each = torch.stack([d(positions) for d in signed_distances])
        distance, which = each.min(0)
        middle, half = (math.log(inside) + math.log(outside)) / 2, math.log(inside / outside) / 2
        sigma = (middle - half * torch.tanh(distance / 0.02)).exp()
        return sigma, torch.tensor(colours)[which % len(colours)]

    return evaluate


def ball(centre, radius):
    return lambda p: (p - torch.tensor(centre)).norm(dim=-1) - radius


def cube(half):
    def distance(p):
        q = p.abs() - half
        return q.clamp_min(0).norm(dim=-1) + q.amax(-1).clamp_max(0)

    return distance


def shell(outer, thickness):
    """A cube with a closed cavity."""
    return lambda p: torch.maximum(cube(outer)(p), -cube(outer - thickness)(p))


def test_density_grid_places_cells_and_ends_at_the_sphere():
    def position_as_density(p):
        return 10.0 + p @ torch.tensor([1.0, 2.0, 4.0]), p

    grid = export.density_grid(position_as_density, 10, 0.5)
    axis = export.grid_axis(10, 0.5)
    assert grid.shape == (10, 10, 10) and grid.dtype == np.float32
    assert axis[0] == pytest.approx(-0.45) and axis[-1] == pytest.approx(0.45)
    np.testing.assert_allclose(grid[3, 5, 6], 10 + axis[3] + 2 * axis[5] + 4 * axis[6], rtol=1e-5)
    radii = np.sqrt(sum(a**2 for a in np.meshgrid(axis, axis, axis, indexing="ij")))
    assert (grid[radii > 0.5] == 0).all() and (grid[radii < 0.5] > 0).all()


def test_density_grid_refuses_nan():
    def bad(p):
        return torch.where(p[:, 0] > 0.2, float("nan"), 1.0), p

    with pytest.raises(ValueError, match=r"not finite at [0-9]+ of 512"):
        export.density_grid(bad, 8, RADIUS)


def test_solid_fills_cavities_and_drops_specks():
    blobs = field(ball((0.25, 0, 0), 0.2), ball((-0.3, 0, 0), 0.15), ball((0, 0, 0.6), 0.03))
    found, level = export.solid(export.density_grid(blobs, 64, RADIUS))
    assert level == pytest.approx(math.log(2) / RenderConfig.step)
    cell = (2 * RADIUS / 64) ** 3
    assert found.sum() * cell == pytest.approx(4 / 3 * math.pi * (0.2**3 + 0.15**3), rel=0.05)
    assert not found[:, :, 55:].any(), "the speck is still there"
    hollow, _ = export.solid(export.density_grid(field(shell(0.3, 0.08)), 64, RADIUS))
    assert hollow[32, 32, 32]
    assert hollow.sum() * cell == pytest.approx(0.6**3, rel=0.05)


def test_the_level_is_where_a_step_takes_half_of_the_light():
    dense = np.full((8, 8, 8), 900.0)
    for step in (0.025, 0.0125):
        assert export.solid(dense, step=step)[1] == pytest.approx(math.log(2) / step)
    soft = np.full((8, 8, 8), 60.0)
    assert export.solid(soft)[1] == pytest.approx(60.0 * export.SKIN)
    assert export.solid(soft)[0].all()
    thin = np.full((8, 8, 8), 6.0)
    assert export.solid(thin)[1] == pytest.approx(math.log(2) / export.FOG)


def test_solid_leaves_open_cavities_and_explicit_levels():
    def cup(p):
        bored = (p[:, :2].norm(dim=-1) - 0.2).maximum(-(p[:, 2] + 0.2))
        return torch.maximum(cube(0.3)(p), -bored)

    density = export.density_grid(field(cup), 64, RADIUS)
    assert not export.solid(density)[0][32, 32, 32]
    found, level = export.solid(density, iso=1e6)
    assert level == 1e6 and not found.any()


@pytest.mark.parametrize("density", [0.0, 0.3, 4.0])
def test_thin_fog_has_no_surface(density):
    def fog(p):
        return torch.full((len(p),), density), torch.zeros(len(p), 3)

    found, _ = export.solid(export.density_grid(fog, 16, RADIUS))
    assert not found.any()
    with pytest.raises(ValueError, match="no surface at any level: density is at most"):
        export.mesh(fog, RADIUS, 16)


def test_a_surface_in_uneven_fog_is_found():
    """What a short SDS run leaves: fog of varying density around matter that is far denser."""
    sphere = field(ball((0, 0, 0), 0.4))

    def evaluate(p):
        sigma, albedo = sphere(p)
        return sigma + 0.5 + 0.4 * torch.sin(9 * p[:, 0]), albedo

    result = export.mesh(evaluate, RADIUS, 64)
    assert result.volume == pytest.approx(4 / 3 * math.pi * 0.4**3, rel=0.06)


def test_mesh_of_a_sphere():
    result = export.mesh(field(ball((0.1, 0, 0.2), 0.4), colours=(RED,)), RADIUS, 64)
    assert result.is_watertight and result.is_winding_consistent
    assert result.volume == pytest.approx(4 / 3 * math.pi * 0.4**3, rel=0.04)
    assert result.area == pytest.approx(4 * math.pi * 0.4**2, rel=0.03)
    np.testing.assert_allclose(result.centroid, (0.1, 0, 0.2), atol=0.005)
    outward = np.einsum("ij,ij->i", result.vertices - [0.1, 0, 0.2], result.vertex_normals)
    assert (outward > 0).all()
    colours = np.asarray(result.visual.vertex_colors)[:, :3] / 255
    np.testing.assert_allclose(colours, np.broadcast_to(RED, colours.shape), atol=0.003)


def test_mesh_of_a_hollow_box_is_one_closed_box():
    result = export.mesh(field(shell(0.3, 0.06)), RADIUS, 96, iso=22.0)
    assert result.is_watertight and result.body_count == 1
    assert result.volume == pytest.approx(0.6**3, rel=0.04)
    assert result.area == pytest.approx(6 * 0.6**2, rel=0.04)


def test_mesh_colours_follow_the_parts():
    parts = field(ball((0.25, 0, 0), 0.2), ball((-0.3, 0, 0), 0.15), ball((0, 0, 0.6), 0.03))
    result = export.mesh(parts, RADIUS, 64)
    assert result.is_watertight and result.body_count == 2
    colours = np.asarray(result.visual.vertex_colors)[:, :3] / 255
    front = result.vertices[:, 0] > 0
    np.testing.assert_allclose(colours[front].mean(0), RED, atol=0.01)
    np.testing.assert_allclose(colours[~front].mean(0), BLUE, atol=0.01)


def test_mesh_that_touches_the_bounding_sphere_is_closed():
    result = export.mesh(field(ball((0, 0, 0), 2.0)), RADIUS, 32)
    assert result.is_watertight
    assert result.volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.06)


def test_glb_is_y_up_faces_z_and_keeps_colours(tmp_path):
    def tall(p):  # longest along z, then x
        return (p / torch.tensor([0.3, 0.15, 0.6])).norm(dim=-1) * 0.15 - 0.15

    made = export.mesh(field(tall, colours=(RED,)), RADIUS, 64)
    path = tmp_path / "mesh.glb"
    export.write_glb(made, path)
    assert [p.name for p in tmp_path.iterdir()] == ["mesh.glb"]
    got = trimesh.load(path, force="mesh", skip_materials=True)  # with one, it hides the colours
    assert len(got.faces) == len(made.faces)
    np.testing.assert_allclose(got.extents, made.extents[[1, 2, 0]], rtol=1e-5)
    assert got.volume == pytest.approx(made.volume, rel=1e-4)
    colours = np.asarray(got.visual.vertex_colors)[:, :3].mean(0) / 255
    np.testing.assert_allclose(colours, [0.604, 0.010, 0.010], atol=0.01)  # RED, linear


class FakeField(nn.Module):
    """A ball; `empty` for fog."""

    def __init__(self, empty=False):
        super().__init__()
        self.config = FieldConfig(radius=RADIUS)
        self.anchor = nn.Parameter(torch.zeros(1))  # a gradient that export must not keep
        self.evaluate = field(ball((0, 0, 0), 0.4), inside=2.0 if empty else 500.0)

    def forward(self, positions, count=None):
        sigma, albedo = self.evaluate(positions)
        return sigma + self.anchor.square(), albedo, None


class FakeRenderer(nn.Module):
    """Called as Renderer is. Colours tell azimuth and size; pictures over the capacity are black,
    as are all whose capacity was not fitted."""

    def __init__(self, empty=False):
        super().__init__()
        self.field, self.config = FakeField(empty), RenderConfig(image_size=16)
        self.capacity, self.calls = 16 * 16, []

    def forward(self, cameras, seed, background=None, size=None, jitter=True, shading=None):
        size = size or self.config.image_size
        n, count = len(cameras.focal), size * size * len(cameras.focal)
        self.calls.append((n, size, jitter, torch.is_grad_enabled()))
        shade = (cameras.azimuth / (2 * math.pi))[:, None, None, None] + self.field.anchor
        image = shade.expand(n, 3, size, size) * float(count <= self.capacity)
        flat = torch.ones(n, size, size)
        normal = None if shading is None else torch.stack((flat, -flat, 0 * flat), 1)
        return Rendering(image, flat, flat, torch.tensor([count]), self.capacity, normal)

    def fit_capacity(self, count):
        self.capacity = count * 5 // 4


def test_render_views_fits_the_capacity_and_puts_it_back():
    renderer = FakeRenderer()
    images = export.render_views(renderer, orbit([90.0, 180.0], 15.0, 1.5, 1.0), 32)
    assert images.shape == (2, 3, 32, 32) and not images.requires_grad
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.25, 0.5]))
    assert renderer.capacity == 16 * 16
    assert len(renderer.calls) == 3  # one of them again, after the fit
    assert all(n == 1 and not jitter and not grad for n, _, jitter, grad in renderer.calls)


def test_modes_of_render_views():
    renderer, cameras = FakeRenderer(), orbit([90.0], 15.0, 1.5, 1.0)
    normal = export.render_views(renderer, cameras, 16, mode="normal")[0, :, 0, 0]
    assert normal.tolist() == [1.0, 0.0, 0.5]
    depth = export.render_views(renderer, cameras, 16, mode="depth")[0, :, 0, 0]
    want = 1 - (1.0 - (1.5 - RADIUS)) / (2 * RADIUS)  # at a distance of 1
    assert depth.tolist() == pytest.approx([want] * 3, abs=1e-6)
    with pytest.raises(ValueError, match=r"`mode`: expected one of albedo, .*, got 'x-ray'"):
        export.render_views(renderer, cameras, mode="x-ray")


def test_preview_is_a_square_of_four(tmp_path):
    export.preview(FakeRenderer(), tmp_path / "preview.png")
    with Image.open(tmp_path / "preview.png") as picture:
        assert picture.size == (32, 32)
        corners = [picture.getpixel(at)[0] for at in ((0, 0), (31, 0), (0, 31), (31, 31))]
    assert corners == [0, 64, 128, 191]


def test_turntable_refuses_odd_sizes(tmp_path):
    with pytest.raises(ValueError, match="`size`: expected a positive even number, got 33"):
        export.turntable(FakeRenderer(), tmp_path / "turntable.mp4", size=33)


def test_export_run_writes_all_three(tmp_path):
    folder = tmp_path / "run"
    paths = export.export_run(FakeRenderer(), folder, frames=12, size=34, resolution=32)
    assert paths == [folder / n for n in ("contact_sheet.png", "turntable.mp4", "mesh.glb")]
    assert sorted(folder.iterdir()) == sorted(paths), "temporary files are left"
    with Image.open(paths[0]) as sheet:
        assert sheet.size == (8 * 34, 5 * 34)
    with imageio.get_reader(paths[1]) as video:
        frames = [np.asarray(f) for f in video]
        assert video.get_meta_data()["fps"] == 30
    assert len(frames) == 12 and frames[0].shape == (34, 34, 3)
    brightness = [f.mean() for f in frames]
    assert brightness == sorted(brightness), "the turn goes round once, in order"
    assert trimesh.load(paths[2], force="mesh").is_watertight


def test_export_run_without_a_surface_keeps_the_pictures(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"mesh.glb not written: no surface at any level"):
        paths = export.export_run(FakeRenderer(True), tmp_path, frames=2, size=16, resolution=16)
    assert [p.name for p in paths] == ["contact_sheet.png", "turntable.mp4"]
    assert all(p.exists() for p in paths)
