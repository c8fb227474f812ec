"""compat.tinycudann's grids, against a walk over the definition, point by point in float64."""

import itertools
import math
import struct

import pytest
import torch

import dreamfusion_fast.compat.tinycudann as tcnn
from dreamfusion_fast.compat.tinycudann.encodings import create_encoding
from dreamfusion_fast.compat.tinycudann.grid import interpolate

SMALL = {
    "otype": "HashGrid",
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 9,
    "base_resolution": 4,
    "per_level_scale": 1.7,
}
PRIMES = (1, 2654435761, 805459861, 3674653429)


def single(x):
    """Rounded to float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def levels_by_hand(config, dims):
    """(scale, resolution, first row, rows) of each level, and the number of rows."""
    levels, start = [], 0
    growth = single(math.log2(single(config["per_level_scale"])))
    for level in range(config["n_levels"]):
        power = single(2.0 ** single(level * growth))
        scale = single(single(power * config["base_resolution"]) - 1)
        resolution = math.ceil(scale) + 1
        rows = (resolution**dims + 7) // 8 * 8
        kind = config.get("type", config["otype"].removesuffix("Grid"))
        if kind == "Hash":
            rows = min(rows, 2 ** config["log2_hashmap_size"])
        elif kind == "Tiled":
            rows = min(rows, config["base_resolution"] ** dims)
        levels.append((scale, resolution, start, rows, kind == "Hash" and rows < resolution**dims))
        start += rows
    return levels, start


def encode_by_hand(x, table, config):
    interpolation, dims, out = config.get("interpolation", "Linear"), len(x), []
    for scale, resolution, start, rows, hashed in levels_by_hand(config, dims)[0]:
        pos = [scale * v + 0.5 for v in x]
        sums = [0.0] * len(table[0])
        for corner in itertools.product((0, 1), repeat=dims):
            weight, index = 1.0, 0
            for d, (p, upper) in enumerate(zip(pos, corner)):
                f = p - math.floor(p)
                if interpolation == "Smoothstep":
                    f = f * f * (3 - 2 * f)
                if interpolation == "Nearest":
                    f = 0.0
                weight *= f if upper else 1 - f
                vertex = (math.floor(p) + upper) % 2**32
                if hashed:
                    index ^= vertex * PRIMES[d] % 2**32
                elif resolution**dims < 2**32:
                    index = (index + vertex * resolution**d) % 2**32
            row = table[start + index % rows]
            sums = [s + weight * v for s, v in zip(sums, row)]
        out += sums
    return out


CASES = [
    (3, {}),
    (3, {"interpolation": "Smoothstep"}),
    (3, {"interpolation": "nearest"}),
    (3, {"n_features_per_level": 8}),
    (3, {"otype": "Grid", "type": "Dense"}),
    (3, {"otype": "DenseGrid", "n_features_per_level": 1}),
    (3, {"otype": "TiledGrid"}),
    (3, {"otype": "TiledGrid", "n_levels": 3, "per_level_scale": 30.0}),  # beyond 32 bits
    (3, {"log2_hashmap_size": 2}),
    (3, {"base_resolution": 1, "per_level_scale": 2.5}),
    (3, {"per_level_scale": 0.6}),
    (3, {"n_levels": 3, "per_level_scale": 1000.0}),  # finer than our op's
    (2, {}),
    (2, {"interpolation": "Smoothstep", "n_features_per_level": 4}),
    (2, {"otype": "Grid", "type": "tile"}),
    (2, {"otype": "DenseGrid"}),
    (4, {"n_levels": 2}),
    (4, {"otype": "TiledGrid", "n_levels": 2, "interpolation": "Smoothstep"}),
]


@pytest.mark.parametrize("dims, changes", CASES)
def test_by_hand(device, dims, changes, rng):
    """In float64, points in and around the unit cube."""
    config = SMALL | changes
    grid = create_encoding(dims, config)
    by_hand = config | ({"type": "Tiled"} if config.get("type") == "tile" else {})
    by_hand["interpolation"] = config.get("interpolation", "Linear").capitalize()
    assert grid.rows == levels_by_hand(by_hand, dims)[1]
    x = torch.rand(30, dims, dtype=torch.float64, generator=rng) * 1.4 - 0.2
    x[:4] = torch.tensor([0.0, 1.0, 0.5, -0.2])[:, None]
    params = torch.randn(grid.n_params, dtype=torch.float64, generator=rng)
    table = params.view(grid.rows, -1).tolist()
    want = [encode_by_hand(point, table, by_hand) for point in x.tolist()]
    got = grid(x.to(device), params.to(device), torch.float64)
    torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("changes", [{}, {"interpolation": "Smoothstep"}, {"otype": "DenseGrid"}])
def test_op_and_torch_agree(device, changes, rng):
    """On x, features and their gradients, float32 points that both find in the same cell."""
    config = SMALL | changes | {"per_level_scale": 2.0}
    grid = create_encoding(3, config)
    assert grid.grid is not None
    x = torch.randint(-500, 1500, (400, 3), generator=rng).to(device, torch.float32) / 1024
    params = torch.randn(grid.n_params, generator=rng).to(device)
    results = []
    for use_op in (True, False):
        inputs = [t.clone().requires_grad_() for t in (x, params)]
        if not use_op:
            table = inputs[1].view(grid.rows, grid.features)
            ways = [interpolate(inputs[0], table, k, grid.interpolation) for k in grid.levels]
            out = torch.cat(ways, -1)
        else:
            out = grid(*inputs, torch.float32)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_what_runs_on_the_op():
    on_op = [create_encoding(d, SMALL | changes).grid is not None for d, changes in CASES]
    assert on_op == [c[0] == 3 and i in (0, 1, 3, 4, 5, 9, 10) for i, c in enumerate(CASES)]
    assert create_encoding(3, SMALL | {"n_levels": 33, "per_level_scale": 1.0}).grid is None


@pytest.mark.parametrize(
    "dims, changes",
    [
        (3, {}),
        (3, {"interpolation": "Smoothstep"}),
        (2, {}),
        (2, {"interpolation": "Smoothstep"}),
        (4, {"n_levels": 1}),
    ],
)
def test_gradcheck(device, dims, changes, rng):
    """Twice, away from the faces of cells."""
    small = {"n_levels": 2, "per_level_scale": 2.0, "base_resolution": 2, "log2_hashmap_size": 4}
    config = SMALL | small | changes
    grid = create_encoding(dims, config)
    x = torch.randint(0, 97, (3, dims), generator=rng).double() / 97 + 0.003
    params = torch.randn(grid.n_params, dtype=torch.float64, generator=rng)
    inputs = [t.to(device).requires_grad_() for t in (x, params)]

    def encode(x, params):
        return grid(x, params, torch.float64)

    assert torch.autograd.gradcheck(encode, inputs)
    assert torch.autograd.gradgradcheck(encode, inputs)


def test_nearest_has_no_gradient_by_points(rng):
    grid = create_encoding(3, SMALL | {"interpolation": "Nearest"})
    x = torch.rand(5, 3, generator=rng).requires_grad_()
    params = torch.randn(grid.n_params, generator=rng).requires_grad_()
    grid(x, params, torch.float32).sum().backward()
    assert x.grad is None and params.grad.sum() == 5 * grid.width


def test_layouts_of_known_programs():
    """instant-ngp's table and its image's, and DenseGrid's default growth to 256."""
    ngp = create_encoding(3, {"otype": "HashGrid"} | {"per_level_scale": 1.3819129})
    first = [level.resolution for level in ngp.levels[:5]]
    assert first == [16, 23, 31, 43, 59] and ngp.levels[1].start == 4096
    assert all(level.rows == 2**19 for level in ngp.levels[-9:])
    image = create_encoding(2, {"otype": "Grid", "log2_hashmap_size": 15, "per_level_scale": 1.5})
    assert [level.rows for level in image.levels[:3]] == [256, 576, 1296]
    dense = create_encoding(3, {"otype": "DenseGrid", "n_levels": 5})
    assert [level.resolution for level in dense.levels] == [16, 32, 64, 128, 256]


def test_other_ways_to_say_levels():
    grid = create_encoding(3, {"otype": "Grid", "n_features": 12, "n_features_per_level": 4})
    assert grid.n_levels == 3 and grid.width == 12


@pytest.mark.parametrize(
    "dims, changes, error, message",
    [
        (1, {}, ValueError, "HashGrid encodes 2, 3 or 4 dimensions, got 1"),
        (5, {}, ValueError, "HashGrid encodes 2, 3 or 4 dimensions, got 5"),
        (3, {"type": "Sparse"}, ValueError, r"`encoding_config\.type`: expected one of Hash, Ti"),
        (3, {"n_features_per_level": 3}, ValueError, "per_level`: expected one of 1, 2, 4, 8"),
        (3, {"n_levels": 129}, ValueError, "n_levels`: expected an integer from 1 to 128"),
        (3, {"n_features": 8}, ValueError, "expected n_levels or n_features, got both"),
        (3, {"per_level_scale": 0}, ValueError, "per_level_scale`: expected a finite number above"),
        (3, {"per_level_scale": "2"}, TypeError, "per_level_scale`: expected a number, got '2'"),
        (3, {"per_level_scale": math.nan}, ValueError, "per_level_scale`: expected a finite"),
        (3, {"interpolation": "Cubic"}, ValueError, "interpolation`: expected one of Nearest, L"),
        (3, {"hash": "Rng"}, ValueError, "hash`: expected 'CoherentPrime': the one that"),
        (3, {"stochastic_interpolation": True}, ValueError, "stochastic_interpolation`: .* not su"),
        (3, {"fixed_point_pos": True}, ValueError, "fixed_point_pos`: expected False: not suppo"),
        (3, {"otype": "DenseGrid", "per_level_scale": 20}, ValueError, r"fewer than 2\^32 param"),
    ],
)
def test_bad_config(dims, changes, error, message):
    with pytest.raises(error, match=message):
        tcnn.Encoding(dims, SMALL | changes)


def test_keys_of_a_program():
    """A program's own keys in a config, as threestudio's, change nothing."""
    plain = tcnn.Encoding(3, SMALL, seed=3)
    ignored = "`encoding_config`: ignored unknown keys: 'start_level', 'update_steps'; known: base"
    with pytest.warns(UserWarning, match=ignored):
        marked = tcnn.Encoding(3, SMALL | {"start_level": 8, "update_steps": 500}, seed=3)
    x = torch.rand(5, 3)
    assert torch.equal(plain(x), marked(x))


def test_n_features_of_no_level():
    with pytest.raises(ValueError, match="n_features`: expected a multiple of n_features_per_lev"):
        create_encoding(3, {"otype": "Grid", "n_features": 7})
