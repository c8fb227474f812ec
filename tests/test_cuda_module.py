"""The module _cuda where there is no GPU: built by `make resources` (DF_CUDA=ON)."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dreamfusion_fast import _cpu, doctor
from dreamfusion_fast.ops import _backend, spherical_harmonics

if importlib.util.find_spec("_cuda") is None:
    pytest.skip("runs in `make resources`", allow_module_level=True)
import _cuda

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ERRORS = """
#include "gpu.h"
int main() {
  for (cudaError_t error : {cudaErrorNoKernelImageForDevice, cudaErrorMemoryAllocation}) try {
    df::cuda::check(error, "march_kernel");
  } catch (const std::runtime_error& e) { std::puts(e.what()); }
}
"""


def launch(module, n: int = 5) -> torch.Tensor:
    """Spherical harmonics of n directions, in CPU tensors, by either module."""
    directions = torch.nn.functional.normalize(torch.ones(n, 3), dim=1)
    out = torch.full((n, 4), -1.0)
    addresses = directions.data_ptr(), out.data_ptr(), 0
    module.spherical_harmonics_forward(0, *addresses, n, 2, 0)
    return out


def test_for_every_architecture_and_linked_to_no_library():
    dynamic = subprocess.run(["readelf", "-d", _cuda.__file__], capture_output=True, text=True)
    libraries = [line for line in dynamic.stdout.splitlines() if "NEEDED" in line]
    assert libraries and not any(x in line for line in libraries for x in ("cuda", "torch"))
    assert _cuda.architectures == "80-real 86-real 89-real 90-real 100-real 120"


def test_has_every_kernel_of_the_cpu():
    functions = {n for n in dir(_cpu) if callable(getattr(_cpu, n))}
    settings = {"isa", "isas", "keep_memory", "max_threads", "set_num_threads", "uniform01"}
    settings.add("use_isa")
    assert functions - settings <= set(dir(_cuda))
    for name in functions - settings:
        assert getattr(_cuda, name).__doc__ == getattr(_cpu, name).__doc__, name


def test_what_an_error_says(tmp_path):
    """The two errors that no machine without a GPU meets."""
    program = tmp_path / "errors"
    program.with_suffix(".cu").write_text(ERRORS)
    flags = ["-std=c++17", "-DDF_ISA=cuda", "-DDF_IS_CUDA", '-DDF_CUDA_ARCHITECTURES="80 90"']
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    command = [nvcc, *flags, f"-I{CSRC}", program.with_suffix(".cu"), "-o", program]
    subprocess.run(command, check=True)
    older, memory = subprocess.check_output(program, text=True).splitlines()
    assert older.startswith("kernel `march_kernel`: no kernel image")
    assert "this build holds code for 80 90, the GPU is " in older
    assert "pip install . -C cmake.define.DF_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCH" in older
    assert memory == "kernel `march_kernel`: out of memory"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_says_why_it_fails_and_harms_nothing(monkeypatch):
    want = launch(_cpu)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"kernel `sh_forward_kernel`: .*driver"):
            launch(_cuda)
    launch(_cuda, 0)  # nothing to do
    monkeypatch.setattr(_backend, "_cuda", _cuda)
    directions = torch.nn.functional.normalize(torch.ones(5, 3), dim=1)
    torch.testing.assert_close(spherical_harmonics(directions, 2), want)
    assert doctor.pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match=r"argument `--device`: .*torch sees no CUDA device"):
        doctor.pick_device("cuda")
