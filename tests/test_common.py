"""What the ops share: the random numbers of common.h and the checks of _backend.py."""

import contextlib
import platform
import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dreamfusion_fast import _cpu
from dreamfusion_fast.ops import Adam, _backend, reference
from dreamfusion_fast.ops.march import seed_tensor


def test_uniform01_twin_is_exact(seed):
    counters = torch.tensor([0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1])
    for s in (0, 1, seed, 2**32 - 1, 2**32 + seed, 2**63 - 1):
        got = reference.uniform01(s, counters[:, None], counters[None, :])
        want = [[_cpu.uniform01(s, a, b) for b in counters.tolist()] for a in counters.tolist()]
        assert torch.equal(got, torch.tensor(want))


def test_uniform01_is_uniform():
    """Moments, neighbours and a chi-square over 256 bins, for one fixed seed."""
    u = reference.uniform01(7, torch.arange(512)[:, None], torch.arange(512)[None, :]).double()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 3e-3 and abs(u.var() - 1 / 12) < 1e-3
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01
    counts = torch.histc(u, 256, 0, 1)
    assert ((counts - 1024) ** 2 / 1024).sum() < 350  # 255 degrees of freedom: 1 in 10^4


def test_instruction_sets():
    assert _cpu.isa() == _cpu.isas()[-1] and _cpu.isas()[0] == "portable"
    with pytest.raises(ValueError, match="portable"):
        _cpu.use_isa("sse")


KEEP = """
import ctypes, importlib.util, resource, sys
spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def left(size=1 << 26):
    before, memory = resident(), libc.malloc(size)
    ctypes.memset(memory, 1, size)
    libc.free(memory)
    return (resident() - before) / size

print(left(), module.keep_memory(), left())
"""


def test_keep_memory():
    """64 MiB are given back when freed, before the call and not after it."""
    command = [sys.executable, "-c", KEEP, _cpu.__file__]
    before, kept, after = subprocess.check_output(command, text=True).split()
    assert kept == str(platform.libc_ver()[0] == "glibc")
    assert float(before) < 0.1 and (kept == "False" or float(after) > 0.9)


def test_threads_follow_torch():
    assert _cpu.max_threads() == torch.get_num_threads()
    with pytest.raises(ValueError, match="argument `n`"):
        _cpu.set_num_threads(-1)


@pytest.mark.parametrize(
    "shape, accepted",
    [((2, 3), True), (("N", 3), True), (("...", 3), True), (("...", 2, 3), True),
     (("...", "A", 2, 3), False), ((3,), False), (("N", 4), False), (("...", 4), False)],
)  # fmt: skip
def test_check_tensor_shapes(shape, accepted):
    if accepted:
        return _backend.check_tensor("x", torch.zeros(2, 3), shape=shape)
    with pytest.raises(ValueError, match=r"argument `x`: expected .*, got float32 \(2, 3\)"):
        _backend.check_tensor("x", torch.zeros(2, 3), shape=shape)


def test_check_tensor_device():
    with pytest.raises(ValueError, match="argument `x`: expected a tensor on meta, got cpu"):
        _backend.check_tensor("x", torch.zeros(2), device=torch.device("meta"))


# ---- devices, by tensors that only say they lie on a GPU ----------------------------------------
def test_a_kernel_is_launched_on_its_tensors_device(monkeypatch):
    current, launched = [0], []

    @contextlib.contextmanager
    def device(where):
        before, current[0] = current[0], where.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)

    @_backend.on_its_device
    def kernel(number, x):
        launched.append(current[0])

    with FakeTensorMode():
        for where in ("cuda:1", "cuda:0", "cpu"):
            kernel(3, torch.empty(2, device=where))
    assert launched == [1, 0, 0] and current == [0]


def test_every_op_is_launched_on_its_device(monkeypatch):
    """What is registered for CUDA goes through the guard; what runs on a CPU need not."""
    seen = {}

    def impl(name, kernel, key, **_):
        seen[key] = kernel is not plain

    def plain(x):
        return x

    lib = types.SimpleNamespace(define=lambda schema, tags: schema.split("(")[0], impl=impl)
    monkeypatch.setattr(_backend, "lib", lib)
    monkeypatch.setattr(torch.library, "register_fake", lambda *a, **k: None)
    monkeypatch.setattr(torch.library, "register_vmap", lambda *a, **k: None)
    _backend.register("mlp(Tensor x) -> Tensor", plain, None)
    assert seen["CUDA"] and not seen["CPU"]


def test_a_device_without_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert _backend.settled("cuda") == torch.device("cuda:2")
    assert _backend.settled("cuda:1") == torch.device("cuda:1")
    assert _backend.settled("cpu") == torch.device("cpu")
    with FakeTensorMode():
        seed = torch.zeros(1, dtype=torch.int64, device="cuda:2")
        assert seed_tensor(seed, torch.device("cuda")) is seed
        adam = Adam([torch.nn.Parameter(torch.zeros(2, device="cuda:2"))])
        assert adam.skipped_on("cuda") is adam.skipped_on(torch.device("cuda:2"))
