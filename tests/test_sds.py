"""Equation 3 from noise to gradient: against float64, and the Triton kernels against the twins."""

import importlib
import math

import pytest
import torch

from dreamfusion_fast import graph, sds
from dreamfusion_fast.config import GuidanceConfig
from dreamfusion_fast.guidance.protocol import Conditions

ALPHAS = torch.linspace(0.999, 0.001, 100)


class Shrink:
    """Guidance whose prediction is known: eps(z, t, c) = c z."""

    def __init__(self, prediction_type="epsilon", dtype=torch.float32):
        self.prediction_type, self.dtype = prediction_type, dtype

    def predict(self, z_t, t, conditions):
        return (conditions.text[:, None, None, None] * z_t.double()).to(z_t.dtype)


def random_seed(seed: int) -> torch.Tensor:
    return torch.tensor([seed * 0x9E3779B9 - 2**61])


def gradient(config, guide, seed, embedding, negative_weights=None, n=3, share=1.0):
    """The SDS gradient of a random picture, and by equation 3 in float64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, 4, 4, generator=generator)
    schedule = sds.Schedule(ALPHAS, config)
    t, where, bad = schedule.draw(n, 0.3, generator), random_seed(seed), torch.zeros(1).int()
    got = sds.gradient(
        guide, z, t, where, Conditions(embedding), schedule, bad, negative_weights, share
    )
    noise = sds.normals(where, n, 48).view_as(z).double()
    a = ALPHAS[t].double()[:, None, None, None]
    z_t = a.sqrt() * z + (1 - a).sqrt() * noise
    eps = [e[:, None, None, None].double() * z_t for e in embedding.split(n)]
    if guide.prediction_type == "v_prediction":
        eps = [a.sqrt() * e + (1 - a).sqrt() * z_t for e in eps]
    hat = eps[0]
    if len(eps) > 1:
        hat = (1 + config.scale) * eps[0] - config.scale * eps[1]
    w = 1 - a if config.weighting == "sigma2" else torch.ones_like(a)
    assert bad.item() == 0
    return got, (share * w * (hat - noise)).float()


@pytest.mark.parametrize("scale", [0.0, 7.5, 100.0])
@pytest.mark.parametrize("weighting", ["sigma2", "uniform"])
@pytest.mark.parametrize("prediction_type", sds.PREDICTIONS)
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.float16, 3e-3)])
def test_gradient_is_equation_3(scale, weighting, prediction_type, dtype, rtol, seed):
    """Relative to the largest number: a difference of predictions loses digits of their size."""
    config = GuidanceConfig(scale=scale, weighting=weighting)
    embedding = torch.tensor([0.5, 0.3, 0.1, 0.2, 0.9, 0.4])[: 6 if scale else 3]
    got, want = gradient(config, Shrink(prediction_type, dtype), seed, embedding, share=0.25)
    assert (got - want).abs().max() < rtol * want.abs().max()


def test_clip_and_rescale(seed):
    embedding = torch.tensor([0.5, 0.3, 0.1, 0.2, 0.9, 0.4])
    plain, _ = gradient(GuidanceConfig(scale=5.0), Shrink(), seed, embedding)
    clipped, _ = gradient(GuidanceConfig(scale=5.0, clip=0.1), Shrink(), seed, embedding)
    torch.testing.assert_close(clipped, plain.clamp(-0.1, 0.1))
    # Every prediction here is a multiple of z_t: at the standard deviation of cond's it is cond's,
    # or its opposite.
    embedding = torch.tensor([0.5, 0.3, 0.4, 0.2, 0.1, 0.4])
    rescaled, _ = gradient(GuidanceConfig(scale=5.0, rescale=1.0), Shrink(), seed, embedding)
    cond, _ = gradient(GuidanceConfig(scale=0.0), Shrink(), seed, embedding[:3])
    torch.testing.assert_close(rescaled, cond, rtol=1e-4, atol=1e-5)


def test_perp_neg_takes_what_is_new_in_the_negative(seed):
    """A negative along cond - uncond changes nothing; one across it is added in full."""
    n = 2
    t, where, bad = torch.tensor([10, 90]), random_seed(seed), torch.zeros(1).int()
    uncond, along, across = (
        torch.randn(n, 1, 2, 2),
        torch.zeros(n, 1, 2, 2),
        torch.zeros(n, 1, 2, 2),
    )
    along[:, 0, 0, 0], across[:, 0, 1, 1] = 2.0, 3.0
    z_t = torch.zeros(4 * n, 1, 2, 2)

    def guide(*negatives, weights=None):
        prediction = torch.cat((uncond + along, uncond, *negatives))
        return sds.guide(
            prediction, z_t, t, where, ALPHAS, torch.ones(100), bad, 9.0, weights
        )  # fmt: skip

    weights = torch.tensor([[-0.5, -0.25]]).repeat(n, 1)
    plain = guide()
    with_negatives = guide(uncond + 0.7 * along, uncond + across + along, weights=weights)
    torch.testing.assert_close(with_negatives - plain, 10.0 * -0.25 * across)


def test_a_view_that_is_not_finite_is_left_out_and_counted():
    t, where, bad = torch.tensor([3, 50, 90]), torch.tensor([5]), torch.tensor([4]).int()
    prediction = torch.randn(3, 3, 4, 4)
    whole = sds.guide(prediction, prediction, t, where, ALPHAS, ALPHAS, torch.zeros(1).int())
    prediction[1, 2, 3, 3] = math.nan
    got = sds.guide(prediction, prediction, t, where, ALPHAS, ALPHAS, bad)
    assert bad.item() == 5 and (got[1] == 0).all()
    assert torch.equal(got[[0, 2]], whole[[0, 2]])


class Exact:
    """The exact score of a few pictures of 48 numbers, all alike likely."""

    def __init__(self, pictures):
        self.pictures = pictures

    def predict(self, z_t, t, conditions):
        from dreamfusion_fast.toybox.exemplar import exact_noise  # needs diffusers

        pictures = self.pictures.to(z_t).expand(len(z_t), -1, -1)
        noise = exact_noise(z_t.flatten(1), ALPHAS[t].to(z_t), pictures)
        return noise.view_as(z_t)


def test_exact_scores_give_the_closed_form(seed):
    """Perturb and guide, against the formulas in float64."""
    guide, n = Exact(torch.rand(3, 48) * 2 - 1), 5
    schedule = sds.Schedule(ALPHAS, GuidanceConfig(scale=0.0))
    z, t, where = torch.randn(n, 3, 4, 4), torch.randint(5, 95, (n,)), random_seed(seed)
    bad = torch.zeros(1).int()
    got = sds.gradient(guide, z, t, where, Conditions(torch.zeros(n, 1)), schedule, bad)
    noise = sds.normals(where, n, 48).view_as(z).double()
    a = ALPHAS[t].double()[:, None, None, None]
    hat = guide.predict(a.sqrt() * z + (1 - a).sqrt() * noise, t, None)
    torch.testing.assert_close(got, ((1 - a) * (hat - noise)).float(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("t, most", [(90, 0.5), (20, 0.01)])
def test_the_control_variate_keeps_the_mean_and_lowers_the_variance(t, most, seed):
    """Equation 3 with and without - eps: means agree, of 4000 draws of the noise."""
    guide, n = Exact(torch.rand(3, 48) * 2 - 1), 4000
    schedule = sds.Schedule(ALPHAS, GuidanceConfig(scale=0.0))
    z = guide.pictures[0].view(1, 3, 4, 4).repeat(n, 1, 1, 1)
    where = random_seed(seed)
    times = torch.full((n,), t)
    bad = torch.zeros(1).int()
    with_it = sds.gradient(
        guide, z, times, where, Conditions(torch.zeros(n, 1)), schedule, bad
    ).flatten(1)
    without = with_it + schedule.weights[t] * sds.normals(where, n, 48)
    error = (without.var(0) / n).sqrt()
    assert ((with_it.mean(0) - without.mean(0)).abs() < 5 * error).all()
    ratio = float(with_it.var(0).mean() / without.var(0).mean())
    print(f"alpha² = {ALPHAS[t]:.2f}: variance with the control variate is {ratio:.4f} of without")
    assert ratio < most


# ---- noise and time -----------------------------------------------------------------------------
def test_noise_is_philox_and_normal(seed):
    where = random_seed(seed)
    # The known answer of Random123 for a key and counters of zero:
    zero = sds._philox(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    assert [int(x) for x in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    x = sds.normals(where, 8, 20001).double()
    assert x.shape == (8, 20001)
    n = x.numel()
    for moment, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**moment).mean() - mean) < 5 * (variance / n) ** 0.5
    flat = x.flatten()
    for lag in (1, 5001, 20001):  # neighbours, the next quarter, the next view
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / n**0.5
    assert not torch.equal(sds.normals(where + 1, 8, 20001), x.float())


def test_timesteps_keep_to_the_papers_range(rng):
    t = sds.Schedule(torch.linspace(1, 0, 1000), GuidanceConfig()).draw(20000, 0.0, rng)
    assert t.min() == 20 and t.max() == 979
    assert abs(t.float().mean() - 499.5) < 10


@pytest.mark.parametrize(
    "way, middle", [("linear", 0.7), ("sqrt", 0.9 - 0.4 * 0.5**0.5), ("step", 0.5)]
)
def test_the_upper_end_of_t_falls(way, middle):
    config = GuidanceConfig(t_range=(0.1, 0.9), t_high_end=0.5, t_anneal=way)
    ranges = [sds.t_range_at(config, p) for p in (0.0, 0.5, 1.0)]
    assert ranges == [(0.1, 0.9), (0.1, pytest.approx(middle)), (0.1, pytest.approx(0.5))]
    assert sds.t_range_at(GuidanceConfig(t_range=(0.02, 0.5)), 1.0) == (0.02, 0.5)


def test_timesteps_of_an_empty_range(rng):
    for t_range, want in (((0.5, 0.5), 500), ((1.0, 1.0), 999)):
        schedule = sds.Schedule(torch.linspace(1, 0, 1000), GuidanceConfig(t_range=t_range))
        assert schedule.draw(3, 0.0, rng).tolist() == [want] * 3


def test_importance_draws_have_the_same_mean_gradient(rng):
    """Of any function f of t: E[w(t) f(t)]."""
    alphas = torch.linspace(0.999, 0.001, 1000)
    f = torch.sin(torch.arange(1000) / 90)
    means = []
    for way in ("uniform", "importance"):
        schedule = sds.Schedule(alphas, GuidanceConfig(t_draw=way, t_high_end=0.5))
        schedule.draw(10, 0.0, rng)
        t = schedule.draw(200_000, 0.9, rng)
        means.append((schedule.weights[t] * f[t]).mean())
    assert abs(means[0] - means[1]) < 0.01


@pytest.mark.parametrize(
    "name, value", [("weighting", "snr"), ("t_draw", "snr"), ("t_anneal", "snr")]
)
def test_unknown_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`: expected .*, got 'snr'"):
        sds.Schedule(ALPHAS, GuidanceConfig(**{name: value}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"z": torch.zeros(2, 3, 4, 4).double()}, "`z`: expected contiguous float32"),
        ({"t": torch.zeros(3).long()}, r"`t` and `seed`: expected int64 \(2,\)"),
        ({"seed": torch.zeros(1)}, "`t` and `seed`: expected int64"),
    ],
)
def test_bad_input_of_perturb(change, message):
    given = {
        "z": torch.zeros(2, 3, 4, 4),
        "t": torch.zeros(2).long(),
        "seed": torch.zeros(1).long(),
    }
    with pytest.raises(ValueError, match=message):
        sds.perturb(**{**given, **change}, alphas_cumprod=ALPHAS)


@pytest.mark.parametrize(
    "shape, weights, message",
    [
        ((5, 3, 4, 4), None, r"`prediction`: expected \(K \* 2, 3 or more, 4, 4\), got \(5,"),
        ((4, 2, 4, 4), None, "`prediction`: expected"),
        ((6, 3, 4, 4), None, "`negative_weights`: expected 1 a view, for 3 conditions, got 0"),
        ((4, 3, 4, 4), torch.zeros(2, 1), "`negative_weights`: expected 0 a view"),
    ],
)
def test_bad_input_of_guide(shape, weights, message):
    t, where, bad = torch.zeros(2).long(), torch.zeros(1).long(), torch.zeros(1).int()
    z_t = torch.zeros(shape[0], 3, 4, 4)
    with pytest.raises(ValueError, match=message):
        sds.guide(torch.zeros(shape), z_t, t, where, ALPHAS, ALPHAS, bad, 1.0, weights)


# ---- Triton -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def kernels():
    """kernels/sds.py: compiled where there is a GPU, else interpreted (conftest)."""
    pytest.importorskip("triton", reason="triton is not installed")
    return importlib.import_module("dreamfusion_fast.kernels.sds")


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(3, 4, 7, 9), (1, 1, 1, 1), (2, 3, 1, 5), (2, 4, 40, 32)]


def compare(got, want, dtype):
    """One rounding more or less of the inputs' products; a step of the last digit in half."""
    rtol = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=rtol, atol=5e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_perturb(kernels, shape, dtype, layout, seed):
    z, t = torch.randn(shape), torch.randint(0, 100, shape[:1])
    out = torch.full((2 * shape[0], *shape[1:]), 7.0, dtype=dtype, device=DEVICE)
    out = out.contiguous(memory_format=layout)
    kernels.perturb(*(x.to(DEVICE) for x in (z, t, random_seed(seed), ALPHAS)), out)
    want = sds.perturb(z, t, random_seed(seed), ALPHAS, 2, dtype, layout == torch.channels_last)
    compare(out.cpu(), want, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "conditions, rescale, prediction_type, clip",
    [
        (1, 0.0, "epsilon", math.inf),
        (2, 0.0, "epsilon", 0.5),
        (2, 0.7, "v_prediction", math.inf),
        (3, 0.0, "epsilon", math.inf),
        (4, 0.4, "v_prediction", 1.0),
    ],
)
def test_triton_guide(
    kernels, shape, conditions, rescale, prediction_type, clip, dtype, layout, seed
):
    """Also with channels that are left out, and with one view that is not finite."""
    n, c, h, w = shape
    prediction = torch.randn(conditions * n, c + 1, h, w).to(dtype)
    prediction[n - 1, 0, 0, 0] = math.nan
    prediction = prediction.contiguous(memory_format=layout)
    z_t = torch.randn(conditions * n, c, h, w).to(dtype).contiguous(memory_format=layout)
    weights = -torch.rand(n, conditions - 2) if conditions > 2 else None
    step = torch.randint(0, 100, (n,)), random_seed(seed), ALPHAS, 1 - ALPHAS
    bad = [torch.tensor([3]).int() for _ in range(2)]
    want = sds.guide(
        prediction, z_t, *step, bad[0], 10.0, weights, prediction_type, rescale, clip, 0.25
    )
    there = [x.to(DEVICE) for x in (prediction, z_t, *step, bad[1])]
    got = kernels.guide(
        *there, 10.0, None if weights is None else weights.to(DEVICE),
        prediction_type == "v_prediction", rescale, clip, 0.25,
    ).cpu()  # fmt: skip
    if rescale and c * h * w == 1:  # one number has no spread
        assert not want.any() and not got.any()
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert bad[0].item() == there[-1].item()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CUDA graph needs a GPU")
def test_triton_in_a_graph(seed):
    """Replays read the seed, the times and the picture anew."""
    z, t = torch.randn(2, 4, 8, 8, device=DEVICE), torch.tensor([10, 50], device=DEVICE)
    where, bad = random_seed(seed).to(DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    schedule = sds.Schedule(ALPHAS.to(DEVICE), GuidanceConfig(scale=3.0))
    embedding, out = torch.tensor([0.5, 0.3, 0.2, 0.9], device=DEVICE), torch.zeros_like(z)

    def step():
        out.copy_(sds.gradient(Shrink(), z, t, where, Conditions(embedding), schedule, bad))

    captured = graph.Captured(step, DEVICE)
    for k in range(6):
        z.normal_()
        t.copy_(torch.tensor([k, 90 - k]))
        where += 1
        captured()
        on_cpu = sds.Schedule(ALPHAS, GuidanceConfig(scale=3.0))
        given = [x.cpu() for x in (z, t, where)]
        conditions = Conditions(embedding.cpu())
        want = sds.gradient(Shrink(), *given, conditions, on_cpu, torch.zeros(1).int())
        torch.testing.assert_close(out.cpu(), want, rtol=1e-4, atol=1e-4)
    assert captured.graph is not None


def test_triton_takes_no_strided_rows(kernels):
    out = torch.zeros(2, 3, 4, 8)[..., :4]
    with pytest.raises(ValueError, match="expected a dense layout, got strides"):
        kernels.perturb(torch.zeros(2, 3, 4, 4), *[torch.zeros(2).long()] * 2, ALPHAS, out)
