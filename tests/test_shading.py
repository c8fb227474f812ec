"""The paper's distributions of light and shading (A.2)."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from test_camera import FAILS, PASSES, N, from_one_side, ks, uniform_cdf

from dreamfusion_fast import camera, shading
from dreamfusion_fast.config import ShadingConfig

DISTANCE = 1.2  # of the camera


def rows(share=0.5, **settings) -> torch.Tensor:
    """N views from one point on the x axis."""
    cameras = from_one_side(0.0, distance=(DISTANCE, DISTANCE))
    generator = torch.Generator().manual_seed(11)
    return shading.sample(cameras, ShadingConfig(**settings), share, generator)


def cosine_cdf(length):
    """Of the cosine c between N(p, I) and p, |p| = length. For c > 0 the cosine is less where the
    part x along p is negative, or the squared part across, chi-squared of 2 degrees, is more than
    x² (1 - c²) / c²: an integral over x of exponentials of squares. For c < 0 likewise."""

    def cdf(c):
        bump = np.exp(-0.5 * length**2 * (1 - c**2))
        return norm.cdf(-length) + c * bump * norm.cdf(length * c)

    return cdf


def test_light_has_the_papers_distribution():
    light = rows()[:, :3]
    distance = light.norm(dim=1)
    assert ks(distance, uniform_cdf(0.8, 1.5)) > PASSES
    cosine = light[:, 0] / distance
    assert ks(cosine, cosine_cdf(DISTANCE)) > PASSES
    assert max(ks(cosine, cosine_cdf(f * DISTANCE)) for f in (0.8, 1.25)) < FAILS
    around = torch.atan2(light[:, 2], light[:, 1])
    assert ks(around, uniform_cdf(-math.pi, math.pi)) > PASSES


def test_lit_and_textureless_have_the_papers_probabilities():
    ambient, diffuse, texture, base = rows()[:, 3:].T
    lit = diffuse > 0
    assert torch.equal(ambient, torch.where(lit, 0.1, 1.0))
    assert torch.equal(diffuse, torch.where(lit, 0.9, 0.0))
    assert torch.equal(texture + base, torch.ones(N)) and not base[~lit].any()
    assert set(base.tolist()) == {0.0, 1.0}
    for part, whole, share in ((lit.sum(), N, 0.75), (base.sum(), lit.sum(), 0.5)):
        assert binomtest(int(part), int(whole), share).pvalue > PASSES
        assert binomtest(int(part), int(whole), share - 0.03).pvalue < FAILS


def test_the_first_steps_have_no_light():
    """1,000 of 15,000; the rest of the generator's numbers stays as it was."""
    early, late = rows(999 / 15_000), rows(1000 / 15_000)
    assert torch.equal(early[:, 3:], torch.tensor([1.0, 0, 1, 0]).expand(N, 4))
    assert torch.equal(early[:, :3], late[:, :3]) and late[:, 4].any()


def test_strengths_are_the_settings():
    got = rows(ambient=0.4, diffuse=0.5, white=0.8, lit=1.0, textureless=1.0)[0, 3:]
    assert got.tolist() == pytest.approx([0.4, 0.5, 0.0, 0.8])


@pytest.mark.parametrize(
    "mode, want",
    [("lit", (0.3, 0.7, 1, 0)), ("textureless", (0.3, 0.7, 0, 0.9)), ("albedo", (1.0, 0, 1, 0))],
)
def test_fixed_rows(mode, want):
    cameras = camera.orbit([0.0, 90.0], 20.0, 1.5, 1.0)
    got = shading.fixed(cameras, mode, white=0.9)
    torch.testing.assert_close(got[:, 3:], torch.tensor([want, want]))
    above = got[:, :3] - cameras.c2w[:, :, 3]
    torch.testing.assert_close(above, torch.tensor([0, 0, 0.45]).expand(2, 3))


def test_fixed_knows_its_modes():
    with pytest.raises(ValueError, match="`mode`: expected one of lit, textureless, albedo"):
        shading.fixed(camera.orbit([0.0], 20.0, 1.5, 1.0), "normal")
