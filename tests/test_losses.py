"""Regularizers against their formulas, and the schedules of their weights."""

import math

import pytest
import torch
from test_static_step import NoSync

from dreamfusion_fast import losses
from dreamfusion_fast.config import LossConfig


def test_opacity_penalty_is_the_papers():
    opacity = torch.tensor([[[0.0, 0.3], [1.0, 0.5]]])
    want = sum((o * o + 0.01) ** 0.5 for o in (0.0, 0.3, 1.0, 0.5))
    assert float(losses.opacity_penalty(opacity)) == pytest.approx(want, rel=1e-6)
    assert float(losses.opacity_penalty(opacity.repeat(3, 1, 1))) == pytest.approx(want, rel=1e-6)


def test_orientation_sums_pixels_and_averages_views():
    sums = torch.tensor([[[0.1, 0.2]], [[0.0, 0.5]]])
    assert float(losses.orientation_penalty(sums)) == pytest.approx(0.4)


def test_entropy_is_that_of_a_coin():
    opacity = torch.tensor([[0.2, 0.5], [0.9, 0.7]])
    want = sum(-o * math.log(o) - (1 - o) * math.log(1 - o) for o in (0.2, 0.5, 0.9, 0.7)) / 2
    assert float(losses.entropy(opacity)) == pytest.approx(want, rel=1e-6)


def test_entropy_is_finite_at_its_ends():
    opacity = torch.tensor([[0.0, 1.0, 1.0000001, 1e-30, 0.3]], requires_grad=True)
    losses.entropy(opacity).backward()
    assert opacity.grad.isfinite().all() and (opacity.grad[0, :4] == 0).all()
    assert float(opacity.grad[0, 4]) == pytest.approx(math.log(0.7 / 0.3), rel=1e-5)
    assert float(losses.entropy(torch.tensor([[0.0, 1.0]]))) < 1e-3


def test_normal_smoothness_sums_neighbours(rng):
    n = torch.randn(2, 3, 4, 5, generator=rng)
    pairs = [((y, x), (y + dy, x + dx)) for y in range(4) for x in range(5)
             for dy, dx in ((0, 1), (1, 0)) if y + dy < 4 and x + dx < 5]  # fmt: skip
    at = n.permute(2, 3, 0, 1)
    want = sum((at[a] - at[b]).square().sum() for a, b in pairs) / 2
    torch.testing.assert_close(losses.normal_smoothness(n), want)
    assert losses.normal_smoothness(n[:, :, :1, :1]) == 0


def rays(rng, counts, spare=7, order=None):
    """weights, t, dt and packed of rays with these counts, one after the other in `order`, and
    `spare` rows at the end that belong to none."""
    order = list(range(len(counts))) if order is None else order
    packed, start, t = torch.zeros(len(counts), 2, dtype=torch.int32), 0, []
    for ray in order:
        packed[ray] = torch.tensor([start, counts[ray]])
        t.append(torch.rand(counts[ray], generator=rng).sort().values + 0.7)
        start += counts[ray]
    weights, dt = (torch.rand(start + spare, generator=rng) for _ in range(2))
    weights[start:] = 0
    return weights, torch.cat([*t, torch.zeros(spare)]), 0.01 + dt, packed


def direct(weights, t, dt, packed):
    """Equation 15, pair by pair."""
    results = []
    for start, count in packed.tolist():
        w, s, d = (x[start : start + count] for x in (weights, t, dt))
        pairs = w[:, None] * w[None] * (s[:, None] - s[None]).abs()
        results.append(pairs.sum() + (w.square() * d).sum() / 3)
    return torch.stack(results)


@pytest.mark.parametrize(
    "counts, order",
    [
        ([3, 0, 5, 1], None),
        ([0, 0, 4], None),
        ([4, 2, 0, 9], [3, 1, 2, 0]),
        ([0], None),
        ([1], None),
    ],
)
def test_distortion_is_equation_15(rng, counts, order):
    weights, t, dt, packed = rays(rng, counts, order=order)
    args = weights.double().requires_grad_(), t.double(), dt.double(), packed
    got, want = losses.distortion(*args), direct(*args)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(len(counts), generator=rng).double()
    gradients = [torch.autograd.grad(x, args[0], cotangent)[0] for x in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_distortion_has_right_gradients(rng):
    weights, t, dt, packed = rays(rng, [3, 0, 4])
    args = t.double(), dt.double(), packed
    weights = weights.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: losses.distortion(w, *args), (weights,))


def test_distortion_ignores_rows_and_rays_without_samples(rng):
    weights, t, dt, packed = rays(rng, [3, 0, 4])
    want = losses.distortion(weights, t, dt, packed)
    weights[-7:] = math.nan  # what no ray holds
    packed[1, 0] = 900  # as a ray that found no room
    assert torch.equal(losses.distortion(weights, t, dt, packed), want) and want[1] == 0
    empty = torch.zeros(0)
    assert losses.distortion(empty, empty, empty, packed * 0).tolist() == [0, 0, 0]


def test_distortion_keeps_its_digits_over_many_samples(rng):
    weights, t, dt, packed = rays(rng, [50] * 4000)
    weights *= 1 / 25
    got, want = (
        losses.distortion(weights, t, dt, packed),
        direct(*map(_double, (weights, t, dt)), packed),
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def _double(x):
    return x.double()


def test_distortion_never_waits(rng):
    weights, t, dt, packed = rays(rng, [3, 0, 4])
    weights.requires_grad_()
    with NoSync():
        losses.distortion(weights, t, dt, packed).sum().backward()
    assert weights.grad[:7].abs().min() > 0 and (weights.grad[7:] == 0).all()


def test_weights_go_linearly_to_their_end():
    schedule = (0.4, 0.2, 0.5)
    got = [losses.weight_at(schedule, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert got == pytest.approx([0.4, 0.3, 0.2, 0.2, 0.2])
    paper = LossConfig()
    want = [1e-3, 1e-4 + 0.5 * (1e-2 - 1e-4), 0, 0, 0, 0, 0.88]
    assert losses.weights_at(paper, 1 / 6).tolist() == pytest.approx(want)
    assert losses.active(paper) == {"opacity", "orientation"}
    assert losses.active(LossConfig(opacity=(0, 0, 1), entropy=(0, 1, 1))) == {
        "entropy",
        "orientation",
    }


def test_terms_meet_their_weights():
    terms = {"distortion": torch.tensor(2.0), "opacity": torch.tensor(3.0)}
    assert losses.weighted(terms, torch.tensor([10.0, 0, 0, 0.5, 0])) == 31


@pytest.mark.parametrize(
    "name, schedule, message",
    [
        ("opacity", (0.1, 0.1, 1.5), "`loss.opacity`: .* got 1.5: schedules past the last step"),
        ("entropy", (0.1, 0.1, 0.0), "`loss.entropy`: expected an end above 0"),
        ("orientation", (-0.1, 0.1, 1.0), "`loss.orientation`: expected weights of at least 0"),
        ("distortion", (0.0, math.nan, 1.0), "`loss.distortion`: expected weights"),
        ("distortion", 0.1, r"`loss.distortion`: expected \(start, end, until\), got 0.1"),
        ("normal_smoothness", (0.1, 0.1), r"`loss.normal_smoothness`: expected \(start, end"),
    ],
)
def test_schedules_that_cannot_be_followed(name, schedule, message):
    with pytest.raises(ValueError, match=message):
        losses.check_schedules(LossConfig(**{name: schedule}))


def test_transmittance_empties_down_to_its_target():
    opacity = torch.stack((torch.full((8, 8), 0.3), torch.full((8, 8), 0.05))).requires_grad_()
    loss = losses.transmittance(opacity, torch.tensor(0.88))
    assert loss.item() == pytest.approx(-(0.7 + 0.88) / 2)
    loss.backward()
    assert (opacity.grad[0] > 0).all() and (opacity.grad[1] == 0).all()
