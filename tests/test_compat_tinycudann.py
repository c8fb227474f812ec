"""compat.tinycudann's modules: types, shapes, parameters, gradients, errors."""

import copy
import pickle

import pytest
import torch

import dreamfusion_fast.compat.tinycudann as tcnn
from dreamfusion_fast.ops import _backend

GRID = {
    "otype": "HashGrid",
    "n_levels": 3,
    "log2_hashmap_size": 7,
    "base_resolution": 4,
    "per_level_scale": 1.5,
}
MLP = {"otype": "FullyFusedMLP", "n_neurons": 16, "n_hidden_layers": 2, "activation": "ReLU"}


def make(device, seed=1337, output="Sigmoid", activation="ReLU"):
    """A module whose features matter, as they do once trained."""
    config = MLP | {"activation": activation, "output_activation": output}
    module = tcnn.NetworkWithInputEncoding(3, 2, GRID, config, seed=seed).to(device)
    with torch.no_grad():
        module.params[-module._model.encoding.n_params :] *= 5e3
    return module


def half_of(device):
    return _backend.has_half(torch.zeros(1, device=device))


def points(rng, n, device, dims=3):
    """Multiples of 2^-10."""
    return torch.randint(0, 1025, (n, dims), generator=rng).to(device).float() / 1024


def in_double(module, x):
    """The same computation in float64."""
    params = module.params.detach().double().requires_grad_()
    return params, module._model(x.double(), params, torch.float64)


def tolerance(device):
    return {"rtol": 1e-2, "atol": 1e-2} if half_of(device) else {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("n", [0, 1, 7, 255, 257])
def test_forward_and_backward(device, n, rng):
    """SiLU: in float16 a value may fall to the other side of ReLU's bend."""
    module = make(device, activation="SiLU")
    x = points(rng, n, device).requires_grad_()
    out = module(x)
    wanted = torch.float16 if half_of(device) else torch.float32
    assert out.shape == (n, 2) and out.dtype == wanted == module.dtype
    weight = torch.linspace(-1, 1, 2, device=device)
    (out.float() * weight).sum().backward()
    x64 = x.detach().double().requires_grad_()
    params, want = in_double(module, x64)
    (want * weight).sum().backward()
    torch.testing.assert_close(out.double(), want, **tolerance(device))
    scale = 1 + float(params.grad.abs().max()) if n else 1.0
    torch.testing.assert_close(
        module.params.grad.double() / scale, params.grad / scale, **tolerance(device)
    )
    distance = (x.grad.double() - x64.grad).norm()
    assert distance <= (0.02 if half_of(device) else 1e-4) * x64.grad.norm()
    assert module.params.grad.dtype == x.grad.dtype == torch.float32


def test_rows_do_not_depend_on_each_other(device, rng):
    module, x = make(device), points(rng, 300, device)
    whole = module(x)
    torch.testing.assert_close(module(x[:1]), whole[:1], **tolerance(device))
    torch.testing.assert_close(module(x[7:290]), whole[7:290], **tolerance(device))


@pytest.mark.parametrize("loss_scale", [None, 64.0])
def test_second_order(device, loss_scale, rng):
    """The gradient of a gradient by the points: an eikonal loss; refused in float16, as there."""
    module = make(device, output="None")
    if loss_scale:
        module.loss_scale = loss_scale
    x = points(rng, 20, device).requires_grad_()
    (slope,) = torch.autograd.grad(module(x).float().sum(), x, create_graph=True)
    loss = (slope.norm(dim=-1) - 1).square().mean()
    if half_of(device):
        with pytest.raises(RuntimeError, match="in float16 it can be differentiated once"):
            loss.backward()
        return
    loss.backward()
    x = x.detach().double().requires_grad_()
    params, out = in_double(module, x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (slope.norm(dim=-1) - 1).square().mean().backward()
    scale = float(params.grad.abs().max())
    torch.testing.assert_close(
        module.params.grad.double() / scale, params.grad / scale, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("loss_scale", [None, 64.0])
def test_second_order_of_an_encoding(device, loss_scale, rng):
    module = tcnn.Encoding(3, GRID | {"interpolation": "Smoothstep"}).to(device)
    if loss_scale:
        module.loss_scale = loss_scale
    x = (points(rng, 20, device) + 0.0001).requires_grad_()
    (slope,) = torch.autograd.grad(module(x).float().sum(), x, create_graph=True)
    slope.square().sum().backward()
    x64 = x.detach().double().requires_grad_()
    params, out = in_double(module, x64)
    (slope,) = torch.autograd.grad(out.sum(), x64, create_graph=True)
    slope.square().sum().backward()
    for got, want in ((module.params.grad, params.grad), (x.grad, x64.grad)):
        scale = float(want.abs().max())
        torch.testing.assert_close(got.double() / scale, want / scale, rtol=1e-2, atol=2e-2)


def test_encoding_dtypes(device, rng):
    x = points(rng, 5, device)
    plain = tcnn.Encoding(3, GRID, dtype=torch.float32).to(device)
    half = tcnn.Encoding(3, GRID, dtype=torch.float16).to(device)
    assert plain(x).dtype == plain.dtype == torch.float32 and plain.loss_scale == 1
    assert half(x).dtype == half.dtype == torch.float16 and half.loss_scale == 128
    torch.testing.assert_close(half(x).float(), plain(x), rtol=1e-2, atol=1e-6)
    assert half.params.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.bool])
def test_inputs_of_any_dtype(device, dtype):
    module = make(device)
    x = torch.tensor([[0, 1, 1], [1, 0, 0]], device=device)
    assert torch.equal(module(x.to(dtype)), module(x.float()))


def test_any_layout_of_inputs(device, rng):
    module, x = make(device), points(rng, 6, device, 9)
    assert torch.equal(module(x[:, ::3]), module(x[:, ::3].contiguous()))


def test_loss_scale_cancels(device, rng):
    module, x = make(device), points(rng, 50, device)
    grads = []
    for scale in (1.0, 1024.0):
        module.loss_scale = scale
        assert module.loss_scale == scale
        grads += torch.autograd.grad(module(x).float().sum(), module.params)
    torch.testing.assert_close(*grads, **tolerance(device))


def test_autocast_changes_nothing(device, rng):
    module, x = make(device), points(rng, 5, device)
    config = MLP | {"activation": "Tanh", "otype": "CutlassMLP"}
    plain = tcnn.Network(3, 1, config).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        got = module(x), plain(x)
    assert all(torch.equal(a, b) for a, b in zip(got, (module(x), plain(x))))


def test_state(device, rng):
    """One array, `params`; saved, copied and pickled modules give the same results."""
    module, x = make(device), points(rng, 5, device)
    state = module.state_dict()
    assert list(state) == ["params"] and state["params"].dtype == torch.float32
    other = tcnn.NetworkWithInputEncoding(
        3, 2, GRID, MLP | {"output_activation": "Sigmoid"}, seed=2
    ).to(device)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(state)
    for found in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(found(x), module(x)) and found.n_output_dims == 2


def test_seeds():
    a, b, c = (tcnn.Encoding(2, GRID, seed=s).params.detach() for s in (1337, 1337, 7))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a, tcnn.Encoding(2, GRID).params.detach())
    assert abs(float(a.mean())) < 1e-5 and 9e-5 < float(a.abs().max()) <= 1e-4


def test_attributes():
    module = make("cpu", seed=3)
    assert (module.n_input_dims, module.n_output_dims, module.seed) == (3, 2, 3)
    assert module.encoding_config == GRID and module.network_config["n_neurons"] == 16
    assert "n_input_dims=3" in repr(module) and "log2_hashmap_size" in repr(module)
    assert not module.jit_fusion and not tcnn.supports_jit_fusion()
    module.jit_fusion = tcnn.supports_jit_fusion()
    with pytest.warns(UserWarning, match="jit_fusion: not supported, stays False"):
        module.jit_fusion = True
    assert not module.jit_fusion
    tcnn.free_temporary_memory()


def test_without_parameters(device):
    module = tcnn.Encoding(3, {"otype": "SphericalHarmonics", "degree": 2}).to(device)
    assert module.params.shape == (0,) and module.params.dtype == torch.float32
    assert module(torch.rand(4, 3, device=device)).shape == (4, module.n_output_dims) == (4, 4)


def test_it_learns(device, rng):
    """Three steps of Adam on one small batch."""
    module, x = make(device), points(rng, 32, device)
    target = x[:, :2].square()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (module(x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_input_elsewhere_is_moved():
    module = make("cpu").to("cpu")
    x = torch.rand(2, 3, device="meta")
    with pytest.warns(UserWarning, match="input is on meta, the parameters are on cpu"):
        with pytest.raises(NotImplementedError):  # torch: a meta tensor has no data
            module(x)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(4, 2), ValueError, r"`x`: expected a real .* \(N, 3\), got \(4, 2\)"),
        (torch.zeros(3), ValueError, r"\(N, 3\), got \(3,\)"),
        (torch.zeros(2, 4, 3), ValueError, r"\(N, 3\), got \(2, 4, 3\)"),
        (torch.zeros(4, 3, dtype=torch.complex64), TypeError, "got torch.complex64"),
        ([[0.0, 0.0, 0.0]], TypeError, "got list"),
    ],
)
def test_bad_input(x, error, message):
    with pytest.raises(error, match=message):
        make("cpu")(x)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: tcnn.Encoding(0, GRID), ValueError, "`n_input_dims`: expected 1 to .*, got 0"),
        (lambda: tcnn.Encoding(2.5, GRID), TypeError, "`n_input_dims`: expected an integer"),
        (lambda: tcnn.Network(2, 0, MLP), ValueError, "`n_output_dims`: expected 1 to .*, got 0"),
        (lambda: tcnn.Encoding(2, GRID, seed=-1), ValueError, "`seed`: expected 0 to .*, got -1"),
        (
            lambda: tcnn.Encoding(2, GRID, dtype=torch.bfloat16),
            ValueError,
            "`dtype`: expected float16, float32 or None, got torch.bfloat16",
        ),
        (lambda: tcnn.Network(2, 1, None), TypeError, "`network_config`: expected a dict, got No"),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()
