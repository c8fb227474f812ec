"""Optimizers by name: one interface, steps that follow the papers, state that resumes."""

import math
import sys

import pytest
import torch
from test_train import Orange, finish, tiny

from dreamfusion_fast import optimizers
from dreamfusion_fast.config import OptimizerConfig
from dreamfusion_fast.train import Trainer

LIBRARY = "pytorch_optimizer is not installed: pip install 'dreamfusion-fast[optimizers]'"


@pytest.fixture(params=["adam", "adan", "shampoo"])
def name(request):
    if request.param != "adam":
        pytest.importorskip("pytorch_optimizer", reason=LIBRARY)
    return request.param


def problem(name, seed=0, **settings):
    """An optimizer of a small network, and a function that leaves gradients of its error."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in
              ((model[0], 0.02), (model[2], 0.01))]  # fmt: skip
    config = OptimizerConfig(name=name, **settings)
    optimizer = optimizers.build(config, groups, {}, torch.ones(1))

    def backward(factor=1.0):
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x) - y).square().mean()
        (factor * loss).backward()
        return float(loss.detach())

    return model, optimizer, backward


def steps(optimizer, backward, n, share=1.0):
    for _ in range(n):
        backward()
        optimizer.set_share(torch.tensor([share]))
        optimizer.step()


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_error_falls(name):
    _, optimizer, backward = problem(name)
    before = backward()
    steps(optimizer, backward, 120)
    assert backward() < 0.3 * before


def test_share_scales_the_step(name):
    moved = []
    for share in (1.0, 0.25, 0.0):
        model, optimizer, backward = problem(name)
        start = values(model)
        steps(optimizer, backward, 1, share)
        moved.append(values(model) - start)
    assert moved[0].norm() > 1e-3 and not moved[2].any()
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=1e-3, atol=1e-6)


def test_gradients_are_divided_by_their_scale(name):
    results = []
    for scale in (1.0, 64.0):
        model, optimizer, backward = problem(name)
        for _ in range(3):
            backward(scale)
            optimizer.step(loss_scale=torch.tensor([scale]))
        results.append(values(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_loss_scale_halves_at_a_skip_and_grows_after_whole_updates(monkeypatch):
    monkeypatch.setattr(optimizers, "GROW_EVERY", 3)
    scale, skipped = optimizers.LossScale(torch.device("cpu")), torch.zeros(1, dtype=torch.int32)
    values = []
    for bad in (0, 0, 0, 1, 0, 0, 0, 2, 0):  # updates skipped in a step, e.g. of two tensors
        skipped += bad
        scale.update(skipped)
        values.append(scale.value.item() / 128)
    assert values == [1, 1, 2, 1, 1, 1, 2, 1, 1]
    again = optimizers.LossScale(torch.device("cpu"))
    again.load({k: v.clone() for k, v in scale.tensors().items()})
    for s, count in ((scale, skipped), (again, torch.zeros_like(skipped))):
        for _ in range(2):  # a resumed run counts its skips anew
            s.update(count)
    assert scale.value.item() == again.value.item() == 256.0
    for _ in range(60):
        skipped += 1
        scale.update(skipped)
    assert scale.value.item() == scale.LEAST


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(name, bad):
    model, optimizer, backward = problem(name)
    steps(optimizer, backward, 3)
    before = values(model)
    state = {k: v.clone() for k, v in optimizer.tensors().items()}
    backward()
    for p in model.parameters():
        p.grad.view(-1)[1] = bad
    optimizer.step()
    assert torch.equal(values(model), before)
    after = optimizer.tensors()
    assert state.keys() == after.keys() and all(torch.equal(state[k], after[k]) for k in state)
    assert int(optimizer.skipped_on(torch.device("cpu"))) == (4 if name == "adam" else 1)
    steps(optimizer, backward, 1)
    assert values(model).isfinite().all() and not torch.equal(values(model), before)


@pytest.mark.parametrize("first", [3, 30])
def test_state_resumes_bit_for_bit(name, first):
    """Shampoo takes its inverse roots at step 20."""
    one, optimizer, backward = problem(name)
    steps(optimizer, backward, first)
    two, resumed, again = problem(name)
    two.load_state_dict(one.state_dict())
    resumed.load({k: v.clone() for k, v in optimizer.tensors().items()})
    for o, b in ((optimizer, backward), (resumed, again)):
        steps(o, b, 20)
    assert torch.equal(values(one), values(two))


def test_state_of_another_optimizer_is_refused():
    pytest.importorskip("pytorch_optimizer", reason=LIBRARY)
    _, adam, backward = problem("adam")
    steps(adam, backward, 1)
    _, adan, _ = problem("adan")
    with pytest.raises(ValueError, match="expected the state of the same optimizer"):
        adan.load(adam.tensors())


def test_adan_is_algorithm_1():
    """Xie et al. 2022, whose betas are ours taken from 1, with bias correction as their code has
    it; without weight decay."""
    pytest.importorskip("pytorch_optimizer", reason=LIBRARY)
    b1, b2, b3 = optimizers.BETAS["adan"]
    model, optimizer, backward = problem("adan", eps=1e-8)
    p, lr = model[0].weight, 0.02
    want, m, v, n, last = p.detach().double().clone(), 0.0, 0.0, 0.0, None
    for k in range(1, 6):
        backward()
        g = p.grad.double()
        diff = g - (g if last is None else last)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * diff
        n, last = b3 * n + (1 - b3) * (g + b2 * diff).square(), g
        update = m / (1 - b1**k) + b2 * v / (1 - b2**k)
        want -= lr * update / ((n / (1 - b3**k)).sqrt() + 1e-8)
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-5, atol=1e-6)


def test_shampoo_preconditions_matrices():
    """After the first inverse roots a matrix's step is L^-1/4 G R^-1/4, as long as RMSProp's."""
    pytest.importorskip("pytorch_optimizer", reason=LIBRARY)
    model, optimizer, backward = problem("shampoo", betas=(0.0, 0.9))
    p, lr = model[0].weight, 0.02
    left, right, n = 1e-6 * torch.eye(16).double(), 1e-6 * torch.eye(6).double(), 0.0
    for k in range(1, optimizers.SHAMPOO_EVERY + 1):
        backward()
        g, before = p.grad.double(), p.detach().double().clone()
        left, right = (0.9 * a + 0.1 * b for a, b in ((left, g @ g.T), (right, g.T @ g)))
        n = 0.9 * n + 0.1 * g.square()
        optimizer.step()
        if k == 1:
            rms = lr * g / n.sqrt()
            torch.testing.assert_close(before - p.detach(), rms, rtol=1e-3, atol=1e-6)
    step = before - p.detach()
    expected = _root(left) @ g @ _root(right)
    cosine = torch.cosine_similarity(step.flatten(), expected.flatten(), 0)
    assert cosine > 0.99 > torch.cosine_similarity(step.flatten(), (g / n.sqrt()).flatten(), 0)
    assert step.norm() == pytest.approx(lr * float((g / n.sqrt()).norm()), rel=1e-3)


def _root(matrix):
    """The inverse fourth root, with the library's ridge."""
    e, q = torch.linalg.eigh(matrix)
    return q @ torch.diag((e + 1e-6 * e.max()) ** -0.25) @ q.T


def test_half_copies_follow():
    """Of the library's optimizers; the kernel's are tested in test_adam.py."""
    pytest.importorskip("pytorch_optimizer", reason=LIBRARY)
    model, optimizer, backward = problem("adan")
    copy = torch.zeros_like(model[0].weight, dtype=torch.float16)
    optimizer.half_copies = {model[0].weight: copy}
    steps(optimizer, backward, 1)
    assert torch.equal(copy, model[0].weight.half())


def test_adan_trains_and_resumes(tmp_path):
    pytest.importorskip("pytorch_optimizer", reason=LIBRARY)

    def config():
        result = tiny(steps=8)
        result.optimizer.name = "adan"
        return result

    finish(config(), tmp_path / "whole")
    run = Trainer(config(), tmp_path / "parts", Orange()).run()
    for _ in range(4):
        next(run)
    run.close()
    finish(config(), tmp_path / "parts", resume=True)
    files = [(tmp_path / n / "checkpoint.safetensors").read_bytes() for n in ("whole", "parts")]
    assert files[0] == files[1] and b"optimizer.0.exp_avg_diff" in files[0]
    with pytest.raises(ValueError, match=r"`optimizer.name`: expected adan, the run's, got adam"):
        Trainer(tiny(steps=8), tmp_path / "parts", Orange(), resume=True)


@pytest.mark.parametrize("shape, kind", [((3000, 2), "table"), ((640,), "flat array")])
def test_shampoo_wants_matrices(shape, kind):
    pytest.importorskip("pytorch_optimizer", reason=LIBRARY)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(shape))], "lr": 0.1}]
    with pytest.raises(ValueError, match=f"expected weight matrices, .* got a {kind} of shape"):
        optimizers.build(OptimizerConfig(name="shampoo"), groups, {}, torch.ones(1))


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    groups = [{"params": [torch.nn.Parameter(torch.zeros(4, 4))], "lr": 0.1}]
    with pytest.raises(ValueError, match=r"pip install 'dreamfusion-fast\[optimizers\]'"):
        optimizers.build(OptimizerConfig(name="adan"), groups, {}, torch.ones(1))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "sgd"}, "`optimizer.name`: expected one of adam, adan, shampoo, got 'sgd'"),
        ({"betas": (0.9, 0.9, 0.9)}, "`optimizer.betas`: expected none or 2 of adam's"),
        ({"name": "adan", "betas": (0.9, 0.9)}, "`optimizer.betas`: expected none or 3 of adan's"),
        ({"betas": (0.9, 1.0)}, "`optimizer.betas`: .* less than 1, got"),
        ({"mlp_rate": -1.0}, "`optimizer.mlp_rate`: expected at least 0, got -1.0"),
    ],
)
def test_settings_that_do_not_suit(settings, message):
    with pytest.raises(ValueError, match=message):
        optimizers.check(OptimizerConfig(**settings))
