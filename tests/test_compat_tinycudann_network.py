"""compat.tinycudann's networks and initial parameters, against tiny-cuda-nn's definitions."""

import itertools
import math

import numpy as np
import pytest
import torch

import dreamfusion_fast.compat.tinycudann as tcnn
from dreamfusion_fast.compat.tinycudann.network import ACTIVATIONS, Mlp
from dreamfusion_fast.compat.tinycudann.pcg32 import Pcg32

F32 = np.float32

DEFINITIONS = {
    "None": lambda x: x,
    "ReLU": lambda x: max(0.0, x),
    "LeakyReLU": lambda x: max(0.0, x) + 0.01 * min(0.0, x),
    "SiLU": lambda x: x / (1 + math.exp(-x)),
    "Exponential": math.exp,
    "Sine": math.sin,
    "Sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "Squareplus": lambda x: 0.5 * (10 * x + math.sqrt(100 * x * x + 4)) / 10,
    "Softplus": lambda x: math.log(math.exp(10 * x) + 1) / 10,
    "Tanh": lambda x: (math.exp(x) - math.exp(-x)) / (math.exp(x) + math.exp(-x)),
}


def config(hidden=2, neurons=16, activation="ReLU", output="None", otype="CutlassMLP"):
    return {
        "otype": otype,
        "n_neurons": neurons,
        "n_hidden_layers": hidden,
        "activation": activation,
        "output_activation": output,
    }


def numbers(rng, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


def apply_by_hand(x, params, n_in, n_out, hidden, neurons, activation, output):
    """Row-major matrices one after another, the last with outputs padded to 16."""
    padded = -(-n_out // 16) * 16
    sizes = [n_in, *[neurons] * hidden, padded]
    h, start = list(x), 0
    for layer, (i, o) in enumerate(itertools.pairwise(sizes)):
        h = [sum(params[start + r * i + c] * h[c] for c in range(i)) for r in range(o)]
        start += o * i
        act = DEFINITIONS[output if layer == hidden else activation]
        h = [act(v) for v in h]
    assert start == len(params)
    return h[:n_out]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_activations(name, rng):
    assert DEFINITIONS.keys() == ACTIVATIONS.keys()
    x = torch.cat((numbers(rng, 20), torch.tensor([0.0, 5.0, -5.0])))
    want = torch.tensor([DEFINITIONS[name](v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), want)
    x = (numbers(rng, 6) + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(ACTIVATIONS[name], x)


@pytest.mark.parametrize(
    "hidden, neurons, n_out, activation, output",
    [
        (0, 16, 3, "ReLU", "Sigmoid"),
        (1, 16, 3, "ReLU", "None"),
        (3, 7, 17, "ReLU", "Exponential"),
        (2, 16, 5, "SiLU", "Softplus"),
        (2, 16, 5, "Tanh", "Squareplus"),
        (1, 16, 1, "None", "Sine"),
        (1, 300, 2, "ReLU", "None"),  # beyond our op
    ],
)
def test_layout(device, hidden, neurons, n_out, activation, output, rng):
    model = Mlp(16, n_out, config(hidden, neurons, activation, output))
    params, x = 0.3 * numbers(rng, model.n_params), numbers(rng, 3, 16)
    shape = n_out, hidden, neurons, activation, output
    want = [apply_by_hand(row, params.tolist(), 16, *shape) for row in x.tolist()]
    inputs = [t.to(device).requires_grad_() for t in (x, params)]
    got = model(*inputs, torch.float64)
    torch.testing.assert_close(got.cpu(), torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("activation", ["ReLU", "SiLU", "Squareplus"])
def test_gradcheck(device, activation, rng):
    """Once, and once more through the gradient of x."""
    model = Mlp(4, 2, config(2, 5, activation, "Tanh"))
    x = numbers(rng, 3, 4).to(device).requires_grad_()
    params = numbers(rng, model.n_params).to(device).requires_grad_()

    def gradient(x, params):
        return torch.autograd.grad(model(x, params, torch.float64).sum(), x, create_graph=True)

    assert torch.autograd.gradcheck(lambda *a: model(*a, torch.float64), (x, params))
    assert torch.autograd.gradcheck(gradient, (x, params))


def test_padded_outputs_have_no_gradient(rng):
    model = Mlp(16, 3, config(1))
    params = numbers(rng, model.n_params).requires_grad_()
    model(numbers(rng, 5, 16), params, torch.float64).square().sum().backward()
    last = params.grad[16 * 16 :].view(16, 16)
    assert (last[:3] != 0).any() and (last[3:] == 0).all()


@pytest.mark.parametrize("n_in, n_out", [(3, 1), (16, 16), (17, 33)])
def test_number_of_parameters(n_in, n_out):
    network = tcnn.Network(n_in, n_out, config(3, 32, otype="FullyFusedMLP"))
    inputs, outputs = -(-n_in // 16) * 16, -(-n_out // 16) * 16
    assert network.params.shape == (inputs * 32 + 2 * 32 * 32 + 32 * outputs,)
    assert network.n_output_dims == n_out


# ---- initial parameters -------------------------------------------------------------------------
def pcg32(seed, stream=1):
    """The generator of O'Neill 2014, one number after another."""
    increment, bits = 2 * stream + 1, 2**64 - 1
    state = (increment + seed) & bits
    state = (state * 6364136223846793005 + increment) & bits
    while True:
        word, turn = ((state >> 18 ^ state) >> 27) & 0xFFFFFFFF, state >> 59
        yield (word >> turn | word << (32 - turn)) & 0xFFFFFFFF
        state = (state * 6364136223846793005 + increment) & bits


def test_generator(seed):
    """The published sequence, and any other against one step at a time."""
    first = [0xA15C02B7, 0x7B47F409, 0xBA1D3330, 0x83D2F293, 0xBFA4784B, 0xCBED606E]
    assert Pcg32(42, 54).integers(6).tolist() == first
    generator, want = Pcg32(seed), pcg32(seed)
    want = [next(want) for _ in range(700)]
    assert generator.integers(301).tolist() == want[:301]
    generator.advance(99)
    assert generator.integers(300).tolist() == want[400:]
    assert Pcg32(seed).integers(0).shape == (0,)


def draw(generator):
    return F32((next(generator) >> 9) * 2.0**-23)


@pytest.mark.parametrize("activation", ["ReLU", "Sine"])
def test_initial_weights(activation, seed):
    """Bit for bit, in the order of the parameters."""
    network = tcnn.Network(3, 2, config(2, 16, activation), seed=seed)
    generator, want = pcg32(seed), []
    for layer in range(3):  # 16 x 16 each
        bound = F32(math.sqrt(F32(6) / F32(32)))
        if activation == "Sine":
            bound = F32(math.sqrt(F32(6) / F32(16))) if layer else F32(30) / F32(16)
        want += [draw(generator) * F32(2) * bound - bound for _ in range(256)]
    assert network.params.detach().cpu().tolist() == [float(v) for v in want]


def test_initial_features(seed):
    """Bit for bit: of a grid and of one after it, as threads of a GPU draw them."""
    grid = {"otype": "HashGrid", "n_levels": 2, "base_resolution": 5, "log2_hashmap_size": 9}
    nested = [{**grid, "n_dims_to_encode": 2}, {**grid, "n_dims_to_encode": 2}]
    module = tcnn.Encoding(4, {"otype": "Composite", "nested": nested}, seed=seed)
    n = 2 * (32 + 104)  # 5^2 and 10^2 rows, of multiples of 8
    assert module.params.shape == (2 * n,)
    threads, want = 128, []
    for part in range(2):
        generator = pcg32(seed)
        for _ in range(part * n):
            next(generator)
        draws, features = [float(draw(generator)) for _ in range(4 * threads)], [0.0] * n
        for thread in range(threads):
            for k in range(4):
                if thread + threads * k < n:
                    value = draws[4 * thread + k] * 2 * float(F32(1e-4)) - float(F32(1e-4))
                    features[thread + threads * k] = float(F32(value))
        want += features
    assert module.params.detach().cpu().tolist() == want


def test_network_draws_before_encoding(seed):
    grid = {"otype": "HashGrid", "n_levels": 1, "base_resolution": 4}
    module = tcnn.NetworkWithInputEncoding(2, 1, grid, config(1, 16), seed=seed)
    network = tcnn.Network(16, 1, config(1, 16), seed=seed)
    assert torch.equal(module.params[: 2 * 256], network.params)
    assert 0 < module.params[2 * 256 :].abs().max() <= 1e-4 and len(module.params) == 512 + 32


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"otype": "Transformer"}, ValueError, r"`network_config\.otype`: expected one of .*MLP"),
        ({"n_neurons": 48}, ValueError, r"`network_config\.n_neurons`: expected 16, 32, 64 or 128"),
        ({"n_neurons": 0}, ValueError, r"n_neurons`: expected an integer from 1"),
        ({"n_neurons": "64"}, TypeError, r"n_neurons`: expected an integer, got '64'"),
        ({"n_neurons": True}, ValueError, r"n_neurons`: expected an integer from 1 .* got True"),
        ({"n_hidden_layers": 0}, ValueError, r"n_hidden_layers`: expected an integer from 1"),
        ({"n_hidden_layers": 1.5}, TypeError, r"n_hidden_layers`: expected an integer, got 1.5"),
        ({"activation": "GELU"}, ValueError, r"\.activation`: expected one of None, ReLU, .*GELU"),
        ({"output_activation": None}, TypeError, r"output_activation`: expected a string, got No"),
        ({"feedback_alignment": True}, ValueError, r"feedback_alignment`: expected False: .* no"),
    ],
)
def test_bad_config(changes, error, message):
    with pytest.raises(error, match=message):
        tcnn.Network(3, 1, config(otype="FullyFusedMLP") | changes)


def test_unknown_key():
    with pytest.warns(UserWarning, match=r"`network_config`: ignored unknown keys: 'n_layers'; "):
        network = tcnn.Network(3, 1, {"n_neurons": 16, "n_layers": 3})
    assert network.params.numel() == tcnn.Network(3, 1, {"n_neurons": 16}).params.numel()


def test_case_and_names():
    """Names in any case, and their synonyms, as tiny-cuda-nn reads them."""
    assert "CutlassMLP" in repr(tcnn.Network(3, 1, {"n_neurons": 16.0}))
    assert "FullyFusedMLP" in repr(tcnn.Network(3, 1, {"otype": "megakernelmlp"}))
    assert "LeakyReLU" in repr(tcnn.Network(3, 1, {"activation": "leakyrelu"}))
