import copy
import math

import pytest
import torch
from conftest import assert_close, check_threads

from dreamfusion_fast.ops import Adam, _backend, adam_step, reference

SETTINGS = (0.05, 0.9, 0.99, 1e-8)  # lr, beta1, beta2, eps


def state(rng, shape, dtype=torch.float32, device="cpu", counter=torch.int32):
    """param, grad, exp_avg, exp_avg_sq, step, skipped: as after five steps."""
    values = [torch.randn(shape, dtype=torch.float64, generator=rng) for _ in range(4)]
    values[3] = values[3].square()
    counters = torch.tensor([5], dtype=counter), torch.tensor([2], dtype=torch.int32)
    return [v.to(device, dtype) for v in values] + [c.to(device) for c in counters]


def check(tensors, *settings):
    got, want = [t.clone() for t in tensors], [t.clone() for t in tensors]
    assert adam_step(*got, *settings) is None
    reference.adam_step(*want, *settings)
    for a, b in zip(got[:4], want[:4], strict=True):
        assert_close("adam_step", a, b)
    assert torch.equal(got[4], want[4]) and torch.equal(got[5], want[5])
    return got


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (16384,), (3, 5471), ()])
@pytest.mark.parametrize("grad_scale", [1.0, 128.0])
def test_twin(device, dtype, shape, grad_scale, rng):
    got = check(state(rng, shape, dtype, device), *SETTINGS, grad_scale)
    assert got[4].item() == 6 and got[5].item() == 2


def test_rate_is_a_factor_of_lr(device, dtype, rng):
    tensors = state(rng, 41, dtype, device)
    want = [t.clone() for t in tensors]
    rate = torch.tensor([0.25], device=device)
    adam_step(*tensors, *SETTINGS, rate=rate)
    adam_step(*want, 0.25 * SETTINGS[0], *SETTINGS[1:])
    assert all(torch.equal(a, b) for a, b in zip(tensors, want, strict=True))


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5471)])
def test_loss_scale_is_a_factor_of_grad_scale(device, dtype, shape, rng):
    """Whatever it is: the gradients that it has multiplied mean the same."""
    tensors, want = state(rng, shape, dtype, device), None
    for factor in (1.0, 2.0**-3, 2.0**15):
        got = [t.clone() for t in tensors]
        got[1] *= 16.0 * factor
        adam_step(*got, *SETTINGS, 16.0, loss_scale=torch.tensor([factor], device=device))
        want = got if want is None else want
        for i in (0, 2, 3, 4, 5):
            assert torch.equal(got[i], want[i])
    check(tensors, *SETTINGS, 1.0, None, None, torch.tensor([3.7], device=device))


def test_what_overflows_under_the_loss_scale_skips_the_update(device, rng):
    """Unscaled, the gradient would be finite."""
    tensors = state(rng, 9, device=device)
    tensors[1].fill_(3e38)
    adam_step(*tensors, *SETTINGS, loss_scale=torch.tensor([1e-2], device=device))
    assert tensors[5].item() == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 40000])
def test_non_finite_gradient_skips_the_update(device, dtype, bad, where, rng):
    tensors = state(rng, 40001, dtype, device, torch.int64)
    tensors[1][where] = bad
    got = check(tensors, *SETTINGS)
    assert all(
        torch.equal(a, b)
        for i, (a, b) in enumerate(zip(got, tensors, strict=True))
        if i not in (1, 5)
    )
    assert got[5].item() == 3


@pytest.mark.parametrize("where", range(5))
def test_any_start(device, where, rng):
    """Views that begin where no vector may be read or written."""
    tensors = state(rng, 1001, device=device)
    views = [t.new_empty(1005)[i == where :][:1001].copy_(t) for i, t in enumerate(tensors[:4])]
    want = check(tensors, *SETTINGS)
    adam_step(*views, *tensors[4:], *SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(views, want[:4], strict=True))


@pytest.mark.parametrize("shape", [(0,), (1,), (1026,), (3, 337)])
@pytest.mark.parametrize("offset", [0, 1])
def test_half_copy(device, dtype, shape, offset, rng):
    """The copy is the rounded parameter; where there is no half, it is refused."""
    tensors = state(rng, shape, dtype, device)
    tensors[0] *= 40000  # some overflow
    n = tensors[0].numel()
    copy = torch.full((n + 9,), 7.0, dtype=torch.float16, device=device)
    inner = copy[offset : offset + n].view(shape)
    if not _backend.kernels(tensors[0]).has_half:
        with pytest.raises(ValueError, match="`param_half`: expected None on cpu, got a tensor"):
            adam_step(*tensors, *SETTINGS, param_half=inner)
        return
    want = check(tensors, *SETTINGS)
    adam_step(*tensors, *SETTINGS, param_half=inner)
    assert all(torch.equal(a, b) for a, b in zip(tensors, want, strict=True))
    assert torch.equal(inner, tensors[0].half())
    assert (copy[:offset] == 7).all() and (copy[offset + n :] == 7).all()
    if n:
        tensors[1].view(-1)[-1] = math.nan
        inner.zero_()
        adam_step(*tensors, *SETTINGS, param_half=inner)
        assert not inner.any()


def test_thread_count_does_not_matter(rng):
    tensors = state(rng, 100000)

    def run():
        out = [t.clone() for t in tensors]
        adam_step(*out, *SETTINGS)
        return tuple(out)

    check_threads(run)


def test_registration(rng):
    device = torch.device("cpu")
    tensors = state(rng, 9, device=device)
    op = torch.ops.dreamfusion_fast.adam_step.default
    torch.library.opcheck(op, (*tensors, *SETTINGS, 1.0))
    want, got = [t.clone() for t in tensors], [t.clone() for t in tensors]
    adam_step(*want, *SETTINGS)
    compiled = torch.compile(adam_step, fullgraph=True, backend="aot_eager")
    compiled(*got, *SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if _backend.kernels(got[0]).has_half:
        copy = torch.zeros_like(got[0], dtype=torch.float16)
        torch.library.opcheck(op, (*tensors, *SETTINGS, 1.0, copy))
        compiled(*got, *SETTINGS, 1.0, copy)
        assert torch.equal(copy, got[0].half())


def test_autograd_sees_the_change(rng):
    param = torch.nn.Parameter(torch.ones(3))
    loss = param.square().sum()
    tensors = state(rng, 3)
    adam_step(param, *tensors[1:], *SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def models(device):
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)).to(device)
    theirs = copy.deepcopy(ours)
    optimizers = [
        kind([{"params": m[0].parameters(), "lr": 0.03}, {"params": m[1].parameters()}],
             lr=0.01, betas=(0.8, 0.95), eps=1e-6)
        for kind, m in ((Adam, ours), (torch.optim.Adam, theirs))
    ]  # fmt: skip
    return ours, theirs, *optimizers


def train(model, optimizer, x, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def check_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert_close("adam_step", p, q)


def test_optimizer_agrees_with_torch_and_loads_its_state(device, rng):
    x = torch.randn(5, 3, generator=rng).to(device)
    ours, theirs, our_adam, their_adam = models(device)
    train(ours, our_adam, x)
    train(theirs, their_adam, x)
    check_same(ours, theirs)
    ours.load_state_dict(theirs.state_dict())
    our_adam.load_state_dict(copy.deepcopy(their_adam.state_dict()))
    assert all(s["step"].tolist() == [4] for s in our_adam.state.values())
    train(ours, our_adam, x)
    train(theirs, their_adam, x)
    check_same(ours, theirs)


def test_optimizer_resumes_bit_for_bit(device, rng):
    x = torch.randn(5, 3, generator=rng).to(device)
    one, two, adam, _ = models(device)
    train(one, adam, x)
    two.load_state_dict(one.state_dict())
    resumed = Adam([{"params": two[0].parameters()}, {"params": two[1].parameters()}])
    resumed.load_state_dict(copy.deepcopy(adam.state_dict()))
    train(one, adam, x)
    train(two, resumed, x)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_optimizer_counts_skipped_tensors(device):
    param = torch.nn.Parameter(torch.ones(3, device=device))
    adam = Adam([param], lr=0.1)
    param.grad = torch.tensor([1.0, math.nan, 1.0], device=device)
    adam.step()
    assert adam.skipped() == 1 and adam.state[param]["step"].item() == 0
    assert torch.equal(param.detach(), torch.ones_like(param))


def test_optimizer_keeps_half_copies(device, rng):
    x = torch.randn(5, 3, generator=rng).to(device)
    model = models(device)[0]
    copied = model[0].weight
    copy = torch.zeros_like(copied, dtype=torch.float16)
    adam = Adam(model.parameters(), half_copies={copied: copy})
    if _backend.kernels(copied).has_half:
        train(model, adam, x, 2)
        assert torch.equal(copy, copied.half())
    with pytest.raises(ValueError, match="`half_copies`: expected parameters of this optimizer"):
        Adam(model[1].parameters(), half_copies={copied: copy})


@pytest.mark.parametrize(
    "index, value, error, message",
    [
        (0, torch.zeros(3).half(), TypeError, "`param`: expected float32 or float64"),
        (1, torch.zeros(4), ValueError, r"`grad`: .* shape \(3,\), got float32 \(4,\)"),
        (2, torch.zeros(3).double(), TypeError, "`exp_avg`: expected float32 tensor"),
        (3, torch.zeros(6)[::2], ValueError, r"`exp_avg_sq`: .* pass exp_avg_sq.contiguous\(\)"),
        (4, torch.zeros(1), TypeError, "`step`: expected int32 or int64"),
        (5, torch.zeros(1).long(), TypeError, "`skipped`: expected int32"),
        (6, -1.0, ValueError, "`lr`: expected 0 to inf, got -1.0"),
        (7, 1.0, ValueError, "`beta1`: expected 0 to"),
        (10, 0.0, ValueError, "`grad_scale`: expected more than 0, got 0.0"),
        (11, torch.zeros(3), TypeError, r"`param_half`: expected float16 .*, got float32 \(3,\)"),
        (11, torch.zeros(4).half(), ValueError, r"`param_half`: .*, got float16 \(4,\)"),
        (12, torch.zeros(2), ValueError, r"`rate`: expected float32 .* \(1,\), got float32 \(2,\)"),
        (13, torch.zeros(2), ValueError, r"`loss_scale`: expected float32 .*, got float32 \(2,\)"),
    ],
)
def test_bad_input(index, value, error, message, rng):
    arguments = [*state(rng, 3), *SETTINGS, 1.0, None, None, None]
    arguments[index] = value
    with pytest.raises(error, match=message):
        adam_step(*arguments)
