"""The emulation that runs the CUDA kernels on the CPU, and the race test of all kernels: built by
`make emulated`, beside the module _emulated."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ORDERS
from emulated import CANNOT_START, command_of

SPEC = importlib.util.find_spec("_emulated")
if SPEC is None:
    pytest.skip("runs in `make emulated`", allow_module_level=True)

WORKS = (
    "atomics barriers dynamic_shared indices mma no_race shared_of_two_kinds shuffles votes"
    " warp_sync"
).split()
REPORTED = {  # csrc/emulation/self_test.cu: what is said of each bad kernel
    "bad_configuration": "`divergent_kernel`: invalid configuration: 1025 threads",
    "bad_divergent_barrier": "`divergent_kernel`: threads of a block wait at different barriers",
    "bad_dynamic_overrun": "AddressSanitizer: heap-buffer-overflow.*in dynamic_overrun_kernel",
    "bad_global_overrun": "AddressSanitizer: heap-buffer-overflow.*in global_overrun_kernel",
    "bad_misaligned_load": "runtime error: .*misaligned address.*float4",
    "bad_misaligned_reduction": "`misaligned_reduction_kernel`: a pointer is not aligned",
    "bad_missing_lane": "`missing_lane_kernel`: a warp collective whose mask names lanes that neve",
    "bad_not_in_mask": "`not_in_mask_kernel`: a warp collective is called by a lane not in its mas",
    "bad_outside_mask": "`outside_mask_kernel`: a shuffle reads a lane that is not in its mask",
    "bad_partial_warp": "`missing_lane_kernel`: a warp collective whose mask names lanes that neve",
    "bad_return_before_barrier": "`early_return_kernel`: a thread has ended while others wait",
    "bad_shared_of_two_kinds": "`two_kinds_kernel`: 235520 bytes of shared memory",
    "bad_static_overrun": "AddressSanitizer: heap-buffer-overflow.*in static_overrun_kernel",
    "bad_two_masks": "`two_masks_kernel`: .*mask",
    "bad_unwritten_shared": "unwritten shared memory is NaN",
    "bad_waiting_warp": "`waiting_warp_kernel`: a warp collective whose mask names lanes that neve",
}
RACES = (
    "barrier_orders_no_blocks between_blocks no_barrier no_second_barrier no_second_warp_sync"
    " no_warp_sync shuffle_is_no_barrier warp_sync_orders_no_blocks"
).split()


def run(program: str, *arguments: str, data: bytes = b"") -> tuple[int, bytes, str]:
    """Return code, stdout and stderr of one of the test programs."""
    command = command_of(Path(SPEC.origin).with_name(program), *arguments)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(command, input=data, capture_output=True, env=environment)
    errors = done.stderr.decode(errors="replace")
    if CANNOT_START in errors:
        pytest.skip(f"{program}: this system lays out memory as {CANNOT_START}")
    return done.returncode, done.stdout, errors


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("program", ["emulation_test", "emulation_race_test"])
def test_works(program, order):
    code, out, errors = run(program, "", order)
    assert out.decode().splitlines() == [f"works_{name}: ok" for name in WORKS], errors
    assert (code, errors) == (0, "")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", REPORTED)
def test_reported(name, order):
    code, out, errors = run("emulation_test", name, order)
    assert code != 0
    assert re.search(REPORTED[name], out.decode() + errors, re.DOTALL)
    if not errors:  # no sanitizer has ended the process: the next launch is well
        assert "works_barriers: ok" in out.decode()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", RACES)
def test_race_reported(name, order):
    code, _, errors = run("emulation_race_test", f"race_{name}", order)
    assert code != 0
    assert "WARNING: ThreadSanitizer: data race" in errors


def test_float_from_half():
    bits = np.arange(2**16, dtype=np.uint16)
    code, out, errors = run("emulation_test", "from_half", data=bits.tobytes())
    assert code == 0, errors
    np.testing.assert_array_equal(np.frombuffer(out, np.float32), bits.view(np.float16))


def test_half_from_float(seed):
    """Every half, the middle of every two neighbours and what lies beside it, and any floats."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    middle = np.append((finite[1:] + finite[:-1]) / 2, [65520, -65520]).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(s * np.inf)) for s in (-1, 1)]
    random = np.random.default_rng(seed).integers(0, 2**32, 10**5, np.uint32).view(np.float32)
    floats = np.concatenate([halves, middle, *beside, random])
    code, out, errors = run("emulation_test", "to_half", data=floats.tobytes())
    assert code == 0, errors
    with np.errstate(over="ignore"):
        want = floats.astype(np.float16)
    np.testing.assert_array_equal(np.frombuffer(out, np.float16), want)
    signs = [np.signbit(x[~np.isnan(want)]) for x in (np.frombuffer(out, np.float16), want)]
    np.testing.assert_array_equal(*signs)


def test_kernels_have_no_races():
    """Every launcher of every stem at a tiny size: csrc/emulation/race_test.cpp."""
    code, out, errors = run("race_test")
    assert code == 0, out.decode() + errors
