"""Devices, seeds and the one tolerance table, for every test."""

from __future__ import annotations

import os
import random

# Threads that wait sleep: spinning, they take the time of whatever else runs, and run three times
# as long themselves where there are more of them than idle CPUs. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available():  # read when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

from dreamfusion_fast import _cpu
from dreamfusion_fast.ops import _backend

# op -> ((rtol, atol) in float32, (rtol, atol) in float64), against the twin in the same dtype.
# One line an op, alphabetical, with its reason.
TOLERANCE = {
    # A few roundings in another order (FMA, reciprocals), on updates of size lr < 0.1.
    "adam_step": ((1e-5, 1e-6), (1e-12, 1e-12)),
    # Sums over up to 140 samples; gradients of dt are scaled by densities of up to 30.
    "composite": ((1e-4, 1e-4), (1e-11, 1e-12)),
    # As composite; normals of gradients from 0 on have derivatives of up to 1 / EPS = 1000.
    "composite_lit": ((1e-4, 2e-4), (1e-11, 1e-11)),
    # Sine and cosine to 2 ulp of 1; gradients add up to 2^l times that, l < 5 in the tests.
    "frequency_encode": ((1e-5, 1e-5), (1e-12, 1e-12)),
    # The same, times 2^l; its gradients times up to 16^l, which damping holds to some hundreds.
    "frequency_encode_gradient": ((1e-4, 2e-4), (1e-11, 1e-11)),
    # Sums over all pixels of an image, in another order, of gradients of size 1.
    "generate_rays": ((1e-4, 1e-4), (1e-12, 1e-12)),
    # Weights agree to the bit; gradients sum terms of size N_l, up to 512, in another order.
    "hash_encode": ((1e-4, 3e-4), (1e-12, 1e-11)),
    # float16 features of float32 sums: at most one step of float16 (2^-10) beside the rounded twin.
    "hash_encode_half": ((1e-3, 1e-5), None),
    # Likewise, of terms of size N_l^2 (30^2 in the tests), times the tangent's.
    "hash_encode_second": ((1e-4, 2e-2), (1e-11, 1e-9)),
    # Sums of up to 256 products of size 1 a layer, and of 3000 rows, in another order.
    "mlp": ((1e-4, 2e-4), (1e-11, 1e-11)),
    # Hidden values and their gradients are rounded to 2^-11 of their size, about 1; summed over 203
    # rows for the parameters'. In float16, against float64 at the rounded inputs.
    "mlp_half": ((2e-3, 2e-2), None),
    # As mlp: one more product of layers.
    "mlp_second": ((1e-4, 5e-4), (1e-11, 1e-11)),
    # One rounding more or less (FMA).
    "occupancy_points": ((1e-6, 1e-6), (1e-14, 1e-14)),
    # A few roundings of numbers of size 1, densities of up to e^3, gradients of up to 25.
    "radiance": ((1e-5, 1e-5), (1e-12, 1e-12)),
    # Divided by a direction's component, which may be small.
    "ray_box_intersect": ((1e-4, 1e-5), (1e-10, 1e-12)),
    # Roots of a difference that loses digits where a ray grazes the sphere; gradients more so.
    "ray_sphere_intersect": ((1e-3, 1e-4), (1e-9, 1e-10)),
    # The same roundings; gradients sum some thousand terms of up to 10, batch by batch.
    "render": ((1e-4, 1e-3), (1e-10, 1e-10)),
    # Same recurrence, other roundings (FMA); gradients sum 64 terms of up to 30 (degree 8).
    "spherical_harmonics": ((1e-5, 1e-4), (1e-12, 1e-11)),
}


def _cuda_missing() -> str | None:
    """Why the CUDA half of the tests does not exist in this run; None if it does."""
    try:
        from dreamfusion_fast import _cuda  # noqa: F401
    except ImportError:
        return "the module dreamfusion_fast._cuda is not built"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


try:
    import _emulated  # the CUDA kernels run by the CPU under sanitizers: `make emulated`
except ImportError:
    _emulated = None

ORDERS = ("forward", "reverse", "shuffled")  # of the emulation's threads and blocks
if _emulated:
    DEVICES = [f"emulated-{order}" for order in ORDERS]
else:
    DEVICES = [f"cpu-{isa}" for isa in _cpu.isas()] + ([] if _cuda_missing() else ["cuda"])


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="repeat a run's random inputs")
    parser.addoption(
        "--every-order", action="store_true", help="emulated: each test in every order of threads"
    )


def pytest_configure(config):
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**31)  # pytest -n gives it to workers
    config.run_seed = config.option.seed


def pytest_collection_modifyitems(config, items):
    """Emulated, each case runs in one order of threads, which the run's seed chooses."""
    if not _emulated or config.getoption("--every-order"):
        return
    chosen, left = [], []
    for item in items:
        order = next((o for o in ORDERS if f"emulated-{o}" in item.name), None)
        case = item.nodeid.replace(f"emulated-{order}", "")
        drawn = random.Random(f"{config.run_seed} {case}").choice(ORDERS)
        (chosen if order in (None, drawn) else left).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=left)


def pytest_report_header(config):
    reason = _cuda_missing()
    missing = f" (no cuda: {reason})" if reason else ""
    return [f"devices: {', '.join(DEVICES)}{missing}", f"seed: --seed {config.run_seed}"]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"repeat with --seed {item.config.run_seed}"))


@pytest.fixture
def seed(request) -> int:
    """This run's seed: fresh each run, set by --seed; torch's global generator starts from it."""
    torch.manual_seed(request.config.run_seed)
    return request.config.run_seed


@pytest.fixture
def rng(seed) -> torch.Generator:
    """A CPU generator that starts from the run's seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Every device; on the CPU, every instruction set. Emulated: CPU tensors, CUDA's kernels."""
    kind, _, variant = request.param.partition("-")
    before = _cpu.isa()
    if kind == "emulated":
        _emulated.use_order(variant)
        monkeypatch.setattr(_backend, "_cpu", _emulated)
        kind = "cpu"
    elif variant:
        _cpu.use_isa(variant)
    yield torch.device(kind)
    _cpu.use_isa(before)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request) -> torch.dtype:
    return request.param


def assert_close(op: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Compare within the op's line of the tolerance table; NaN equals NaN."""
    rtol, atol = TOLERANCE[op][got.dtype == torch.float64]
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)


def check_op(op: str, function, twin, *inputs, **options) -> None:
    """Compare results, and gradients of every floating input that requires grad, with the twin's;
    where the kernels are CUDA's, emulated, also with the CPU kernels'. All are called as
    function(*inputs, **options) and return a tensor or a tuple of them."""
    want = _results(twin, inputs, options)
    cotangents = [torch.randn_like(b) for b in want]
    want += _gradients(want, inputs, cotangents)
    for module in {_backend._cpu, _cpu}:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_backend, "_cpu", module)
            got = _results(function, inputs, options)
            got += _gradients(got, inputs, cotangents)
        for a, b in zip(got, want, strict=True):
            assert_close(op, a, b)


def _results(function, inputs, options) -> list[torch.Tensor]:
    results = function(*inputs, **options)
    return list(results) if isinstance(results, tuple) else [results]


def _gradients(outputs, inputs, cotangents) -> list[torch.Tensor]:
    inputs = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not inputs or not pairs:  # constants
        return [torch.zeros_like(x) for x in inputs]
    outputs, cotangents = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True)
    )


def check_registration(name: str, function, *inputs) -> None:
    """torch.library.opcheck of torch.ops.dreamfusion_fast.<name> on its raw inputs, and one graph
    in torch.compile of the public function on the same."""
    torch.library.opcheck(getattr(torch.ops.dreamfusion_fast, name).default, inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), function(*inputs), equal_nan=True)


def check_threads(function) -> None:
    """The tensor (or tuple) that function() returns is bit-identical for any number of threads."""
    results = []
    for n in (1, 2, 3):
        _cpu.set_num_threads(n)
        result = function()
        results.append(result if isinstance(result, tuple) else (result,))
    _cpu.set_num_threads(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
