"""compat.tinycudann's encodings without parameters, and compositions, against their definitions."""

import math

import pytest
import torch

import dreamfusion_fast.compat.tinycudann as tcnn
from dreamfusion_fast.compat.tinycudann.encodings import create_encoding

NO_PARAMS = torch.zeros(0, dtype=torch.float64)


def encode(config, x, aligned=None):
    """In float64; x is a list of points."""
    encoding = create_encoding(len(x[0]), config)
    if aligned:
        encoding.align(aligned)
    assert encoding.n_params == 0
    return encoding(torch.tensor(x, dtype=torch.float64), NO_PARAMS, torch.float64)


def points(rng, n, dims):
    return torch.rand(n, dims, dtype=torch.float64, generator=rng).tolist()


def check(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 12, 30])
def test_frequency(n, rng):
    x = points(rng, 5, 2)
    want = [
        [f(math.pi * 2**k * v) for v in row for k in range(n) for f in (math.sin, math.cos)]
        for row in x
    ]
    got = encode({"otype": "Frequency", "n_frequencies": n}, x)
    torch.testing.assert_close(got, torch.tensor(want).double(), rtol=0, atol=2e-16 * 2**n + 1e-6)
    low = encode({"otype": "Frequency", "n_frequencies": n}, x)[:, :2]
    check(low, [[math.sin(math.pi * row[0]), math.cos(math.pi * row[0])] for row in x])


def test_triangle_wave(rng):
    x = [*points(rng, 20, 3), [-0.4, 0.0, 1.0]]

    def wave(v):
        return abs(v - math.floor(v) - 0.5) * 4 - 1

    want = [[wave(2 ** (k - 1) * v + k / 4) for v in row for k in range(12)] for row in x]
    check(encode({"otype": "TriangleWave"}, x), want)


@pytest.mark.parametrize("bins", [1, 4, 16])
def test_one_blob(bins, rng):
    """Integrals of the kernel over bins, by its antiderivative, going round the ends."""
    x = [*points(rng, 20, 2), [0.0, 1.0]]

    def below(position, v):
        total = 0.0
        for turn in (-1, 0, 1):
            u = min(1.0, max(-1.0, (position - v + turn) * bins))
            total += 0.5 + 15 / 16 * (u - 2 / 3 * u**3 + u**5 / 5)
        return total

    want = [
        [below((k + 1) / bins, v) - below(k / bins, v) for v in row for k in range(bins)]
        for row in x
    ]
    got = encode({"otype": "OneBlob", "n_bins": bins}, x)
    check(got, want)
    check(got.unflatten(1, (2, bins)).sum(-1), [[1.0, 1.0]] * len(x))


def test_identity(rng):
    x = points(rng, 5, 3)
    config = {"otype": "Identity", "scale": 2.5, "offset": -1}
    check(encode(config, x), [[2.5 * v - 1 for v in row] for row in x])
    check(encode({"otype": "identity"}, x), x)


def legendre(band, order, z):
    """The derivative of that order of the Legendre polynomial, by its explicit sum."""
    total = 0.0
    for k in range(band // 2 + 1):
        power = band - 2 * k
        if power >= order:
            factor = (-1) ** k * math.comb(band, k) * math.comb(2 * band - 2 * k, band) / 2**band
            total += factor * math.perm(power, order) * z ** (power - order)
    return total


def harmonic(band, m, x, y, z):
    """Real spherical harmonic with the Condon-Shortley phase, as a polynomial."""
    order = abs(m)
    share = math.factorial(band - order) / math.factorial(band + order)
    norm = math.sqrt((2 * band + 1) / (4 * math.pi) * share * (2 if m else 1))
    turned = complex(x, y) ** order
    return (-1) ** order * norm * legendre(band, order, z) * (turned.imag if m < 0 else turned.real)


@pytest.mark.parametrize("degree", range(1, 9))
def test_spherical_harmonics(degree, rng):
    """Of any vector, also not of length 1; and constants as published."""
    x = points(rng, 5, 3)
    want = [
        [
            harmonic(band, m, *(2 * v - 1 for v in row))
            for band in range(degree)
            for m in range(-band, band + 1)
        ]
        for row in x
    ]
    check(encode({"otype": "SphericalHarmonics", "degree": degree}, x), want)


def test_spherical_harmonics_of_published_constants():
    x, y, z = 0.48, -0.6, 0.64
    got = encode({"otype": "SphericalHarmonics"}, [[(v + 1) / 2 for v in (x, y, z)]])[0]
    want = [0.28209479177387814, -0.48860251190291987 * y, 0.48860251190291987 * z]
    want += [-0.48860251190291987 * x, 1.0925484305920792 * x * y, -1.0925484305920792 * y * z]
    want += [0.94617469575755997 * z * z - 0.31539156525251999, -1.0925484305920792 * x * z]
    check(got[:8], want)
    check(got[15], 0.59004358992664352 * x * (-x * x + 3 * y * y))


def test_default_is_one_blob(rng):
    x = points(rng, 4, 2)
    assert torch.equal(encode({}, x), encode({"otype": "OneBlob", "n_bins": 16}, x))


@pytest.mark.parametrize(
    "config",
    [
        {"otype": "Frequency", "n_frequencies": 3},
        {"otype": "TriangleWave", "n_frequencies": 3},
        {"otype": "OneBlob", "n_bins": 8},
        {"otype": "Identity", "scale": 3.0},
        {"otype": "SphericalHarmonics", "degree": 5},
        {"otype": "Composite", "reduction": "Product", "nested": [{"n_dims_to_encode": 1},
                                                                {"n_dims_to_encode": 1}]},
    ],
)  # fmt: skip
def test_gradcheck(device, config, rng):
    x = torch.randint(1, 96, (4, 3), generator=rng).double() / 97
    encoding, none = create_encoding(3, config), NO_PARAMS.to(device)
    x = x.to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: encoding(x, none, torch.float64), x)
    if config["otype"] != "SphericalHarmonics":  # our op is differentiable once
        assert torch.autograd.gradgradcheck(lambda x: encoding(x, none, torch.float64), x)


# ---- padding and compositions -------------------------------------------------------------------
def test_padding(rng):
    """Ones behind, but in front of spherical harmonics; zeros behind a grid."""
    x = points(rng, 4, 3)
    plain = encode({"otype": "Identity"}, x)
    padded = encode({"otype": "Identity"}, x, 16)
    assert torch.equal(padded[:, :3], plain) and (padded[:, 3:] == 1).all()
    assert padded.shape == (4, 16)
    harmonics = encode({"otype": "SphericalHarmonics", "degree": 3}, x)
    padded = encode({"otype": "SphericalHarmonics", "degree": 3}, x, 16)
    assert torch.equal(padded[:, 7:], harmonics) and (padded[:, :7] == 1).all()
    assert (encode({"otype": "Empty"}, x, 16) == 1).all()
    grid = create_encoding(3, {"otype": "HashGrid", "n_levels": 3, "log2_hashmap_size": 4})
    grid.align(16)
    params = torch.ones(grid.n_params, dtype=torch.float64)
    found = grid(torch.tensor(x, dtype=torch.float64), params, torch.float64)
    check(found, [[1.0] * 6 + [0.0] * 10] * 4)


def test_composite_is_side_by_side(rng):
    x = points(rng, 4, 6)
    nested = [
        {"otype": "Frequency", "n_frequencies": 2, "n_dims_to_encode": 2},
        {"otype": "Identity", "n_dims_to_encode": 3},
        {"otype": "OneBlob", "n_bins": 4},
    ]
    parts = [[row[:2] for row in x], [row[2:5] for row in x], [row[5:] for row in x]]
    keys = [{k: v for k, v in n.items() if k != "n_dims_to_encode"} for n in nested]
    want = torch.cat([encode(c, part) for c, part in zip(keys, parts)], -1)
    config = {"otype": "Composite", "nested": nested}
    assert torch.equal(encode(config, x), want)
    padded = encode(config, x, 16)
    assert torch.equal(padded[:, :15], want) and (padded[:, 15] == 1).all()


def test_composite_places(rng):
    """dims_to_encode_begin may go back, and overlap."""
    x = points(rng, 4, 4)
    nested = [
        {"otype": "Identity", "n_dims_to_encode": 2, "dims_to_encode_begin": 1},
        {"otype": "Identity", "n_dims_to_encode": 1},
        {"otype": "Identity", "n_dims_to_encode": 2, "dims_to_encode_begin": 0},
    ]
    got = encode({"otype": "Composite", "nested": nested}, x)
    check(got, [[row[1], row[2], row[3], row[0], row[1]] for row in x])


def test_composite_aligns_grids(rng):
    """A grid of 4 features starts at a multiple of 4: what is before it is padded."""
    nested = [
        {"otype": "Identity", "n_dims_to_encode": 3},
        {"otype": "Grid", "n_levels": 1, "n_features_per_level": 4, "n_dims_to_encode": 2},
        {"otype": "Identity"},
    ]
    module = tcnn.Encoding(6, {"otype": "Composite", "nested": nested})
    x = torch.rand(5, 6, generator=rng).to(module.params.device)
    out = module(x)
    assert module.n_output_dims == 9 and out.shape == (5, 9) and (out[:, 3] == 1).all()
    assert torch.equal(out[:, :3], x[:, :3]) and torch.equal(out[:, 8:], x[:, 5:])
    assert 0 < out[:, 4:8].abs().max() <= 1e-4


@pytest.mark.parametrize("reduction", ["Sum", "product"])
def test_composite_reduces(reduction, rng):
    x = points(rng, 4, 4)
    nested = [{"otype": "Identity", "n_dims_to_encode": 2}, {"otype": "Identity", "scale": 3}]
    config = {"otype": "Composite", "reduction": reduction, "nested": nested}
    pairs = [[(row[0], 3 * row[2]), (row[1], 3 * row[3])] for row in x]
    want = [[a + b if reduction == "Sum" else a * b for a, b in row] for row in pairs]
    check(encode(config, x), want)


def test_nrc(rng):
    """The composition of Müller et al. 2021, by its name."""
    x = points(rng, 3, 10)
    got = encode({"otype": "OneBlobFrequency", "n_frequencies": 6}, x)
    assert got.shape == (3, 3 * 6 + 5 * 4 + 2)
    spatial = encode({"otype": "TriangleWave", "n_frequencies": 6}, [row[:3] for row in x])
    assert torch.equal(got[:, :18], spatial)
    check(got[:, 38:], [row[8:] for row in x])


def test_what_is_left_may_be_nothing(rng):
    x = points(rng, 3, 2)
    nested = [{"otype": "Identity", "n_dims_to_encode": 2}, {"otype": "Frequency"}]
    check(encode({"otype": "Composite", "nested": nested}, x), x)


COMPOSITE = {"otype": "Composite"}


@pytest.mark.parametrize(
    "config, error, message",
    [
        ({"otype": "Fourier"}, ValueError, r"`encoding_config\.otype`: expected one of Identity, "),
        ({"otype": 3}, TypeError, r"`encoding_config\.otype`: expected a string, got 3"),
        ({"otype": "Frequency", "n_frequencies": 0}, ValueError, "integer from 1 to 64, got 0"),
        ({"otype": "OneBlob", "n_bins": 12}, ValueError, "n_bins`: expected a power of 2, got 12"),
        ({"otype": "SphericalHarmonics", "degree": 9}, ValueError, "an integer from 1 to 8, got 9"),
        ({"otype": "Identity", "scale": math.inf}, ValueError, "scale`: expected a finite number"),
        ({"otype": "Identity", "n_dims_to_encode": 2}, ValueError, "n_dims_to_encode`: expected 3"),
        (COMPOSITE, TypeError, "nested`: expected a list of at least one config, got None"),
        (COMPOSITE | {"nested": []}, TypeError, "nested`: expected a list of at least one config"),
        (COMPOSITE | {"nested": [7]}, TypeError, r"nested\[0\]`: expected a dict, got int"),
        (
            COMPOSITE | {"nested": [{"n_dims_to_encode": 4}]},
            ValueError,
            "nested`: expected n_dims_to_encode of 3 in sum at most, got 4",
        ),
        (
            COMPOSITE | {"nested": [{}, {}]},
            ValueError,
            r"nested\[1\]\.n_dims_to_encode`: expected a number, as another one is left out",
        ),
        (
            COMPOSITE | {"nested": [{"n_dims_to_encode": 2, "dims_to_encode_begin": 2}]},
            ValueError,
            r"nested\[0\]`: expected dimensions below 3, got 2 to 3",
        ),
        (
            COMPOSITE | {"reduction": "Sum", "nested": [{"n_dims_to_encode": 1}, {}]},
            ValueError,
            r"expected encodings of one width to reduce, got \[16, 32\]",
        ),
        (COMPOSITE | {"reduction": "Mean", "nested": [{}]}, ValueError, "reduction`: expected one"),
        ([], TypeError, "`encoding_config`: expected a dict, got list"),
    ],
)
def test_bad_config(config, error, message):
    with pytest.raises(error, match=message):
        tcnn.Encoding(3, config)


def test_harmonics_of_two_dimensions():
    with pytest.raises(ValueError, match="SphericalHarmonics encodes 3 dimensions, got 2"):
        tcnn.Encoding(2, {"otype": "SphericalHarmonics"})


@pytest.mark.parametrize(
    "config, message",
    [
        ({"otype": "Frequency", "n_freqs": 3}, "ignored unknown keys: 'n_freqs'; known: n_dims_to"),
        (
            COMPOSITE | {"nested": [{"otype": "Identity", "sclae": 2}]},
            r"`encoding_config\.nested\[0\]`: ignored unknown keys: 'sclae'; known: ",
        ),
    ],
)
def test_unknown_key(config, message):
    with pytest.warns(UserWarning, match=message):
        tcnn.Encoding(3, config)
