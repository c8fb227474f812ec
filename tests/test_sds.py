import pytest
import torch

from dreamfusion_fast import sds
from dreamfusion_fast.config import GuidanceConfig


class Shrink:
    """Guidance whose prediction is known: eps(z, t, c) = c z."""

    image_size = 4
    alphas_cumprod = torch.linspace(0.999, 0.001, 100)

    def encode(self, image):
        return image * 2 - 1

    def predict_noise(self, z_t, t, embedding):
        return embedding[:, None, None, None] * z_t


@pytest.mark.parametrize("scale", [0.0, 7.5, 100.0])
@pytest.mark.parametrize("weighting", ["sigma2", "uniform"])
def test_gradient_is_equation_3(scale, weighting, seed):
    config = GuidanceConfig(scale=scale, weighting=weighting)
    guide, n = Shrink(), 3
    image = torch.rand(n, 3, 4, 4, requires_grad=True)
    cond, uncond = torch.tensor([0.5, 0.3, 0.1]), torch.tensor([0.2, 0.9, 0.4])
    loss = sds.loss(guide, image, cond, uncond, config, torch.Generator().manual_seed(seed))
    loss.backward()

    generator = torch.Generator().manual_seed(seed)
    t = sds.sample_timesteps(n, 100, config.t_range, generator)
    noise = torch.randn(n, 3, 4, 4, generator=generator)
    a = guide.alphas_cumprod[t][:, None, None, None]
    z_t = a.sqrt() * (image.detach() * 2 - 1) + (1 - a).sqrt() * noise
    c, u = cond[:, None, None, None], uncond[:, None, None, None]
    eps = (1 + scale) * c * z_t - scale * u * z_t
    w = 1 - a if weighting == "sigma2" else torch.ones_like(a)
    want = 2 * w * (eps - noise) / n  # the encoder's slope is 2
    torch.testing.assert_close(image.grad, want, rtol=1e-4, atol=1e-4)


def test_no_unconditional_half_without_scale(seed):
    image = torch.rand(2, 3, 4, 4, requires_grad=True)
    args = (Shrink(), image, torch.full((2,), 0.5))
    both = [
        sds.loss(*args, u, GuidanceConfig(scale=0.0), torch.Generator().manual_seed(seed))
        for u in (None, torch.zeros(2))
    ]
    torch.testing.assert_close(*both)


def test_timesteps_keep_to_the_papers_range(rng):
    t = sds.sample_timesteps(20000, 1000, (0.02, 0.98), rng)
    assert t.min() == 20 and t.max() == 979
    assert abs(t.float().mean() - 499.5) < 10


def test_the_upper_end_of_t_falls_linearly():
    config = GuidanceConfig(t_range=(0.1, 0.9), t_high_end=0.5)
    ranges = [sds.t_range_at(config, p) for p in (0.0, 0.5, 1.0)]
    assert ranges == [(0.1, 0.9), (0.1, pytest.approx(0.7)), (0.1, pytest.approx(0.5))]
    assert sds.t_range_at(GuidanceConfig(t_range=(0.02, 0.5)), 1.0) == (0.02, 0.5)


def test_timesteps_of_an_empty_range(rng):
    assert sds.sample_timesteps(3, 1000, (0.5, 0.5), rng).tolist() == [500] * 3
    assert sds.sample_timesteps(3, 1000, (1.0, 1.0), rng).tolist() == [999] * 3


def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="`weighting`: expected sigma2 or uniform, got 'snr'"):
        sds.weight(torch.ones(1), "snr")
