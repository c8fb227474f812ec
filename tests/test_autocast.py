"""The ops' rule for torch.autocast, see ops/_backend.py."""

from unittest import mock

import pytest
import torch
from op_table import CASES, IN_PLACE, SMOOTH, assert_all, case, energy, gradients

from dreamfusion_fast import ops
from dreamfusion_fast.ops import _backend

FREE = [name for name in CASES if name not in IN_PLACE and name != "occupancy_points"]


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_means_float32(name, lower):
    op, tensors = case(name, torch.float32)
    rounded = [t.to(lower) for t in tensors]
    want = op(*(t.float() for t in rounded))
    with torch.autocast("cpu", lower):
        got = op(*rounded)
        assert_all(torch.equal, op(*(t.float() for t in rounded)), want)
    assert_all(torch.equal, got, want)
    with pytest.raises((TypeError, ValueError), match=r"expected float32 or float64.*got "):
        op(*rounded)
    if name in SMOOTH:
        with torch.autocast("cpu", lower):
            got = gradients(energy(op), rounded)
        want = gradients(energy(op), [t.float() for t in rounded])
        assert_all(torch.equal, got, [g.to(lower) for g in want])


@pytest.mark.parametrize("name", IN_PLACE)
def test_autocast_copies_no_argument_that_is_written(name):
    op, tensors = case(name, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="got bfloat16"):
        op(*tensors)


def test_autocast_casts_by_name():
    @_backend.autocast("x")
    def op(x, table, table_half=None, count=None):
        return [t if t is None else t.dtype for t in (x, table, table_half, count)]

    f16, f32, b16 = torch.float16, torch.float32, torch.bfloat16
    x, table, count = torch.ones(1, dtype=b16), torch.ones(1), torch.ones(1, dtype=torch.int32)
    assert op(x, table) == [b16, f32, None, None]
    with torch.autocast("cpu", b16):
        assert op(x, table, count=count) == [f32, f32, None, torch.int32]
        assert op(x, table=x) == [f32, f32, None, None]
        assert op(x.double(), table) == [torch.float64, f32, None, None]
        assert op(table, table, table.half()) == [f16, f32, f16, None]
        assert op(x=table, table=x, table_half=table.half()) == [f16, f32, f16, None]
        with pytest.raises(TypeError, match="multiple values for argument 'x'"):
            op(x, table, x=x)
        with torch.autocast("cpu", enabled=False):
            assert op(x, table) == [b16, f32, None, None]
    with mock.patch.object(torch, "is_autocast_enabled") as enabled:
        enabled.side_effect = lambda kind: kind == "cuda"
        assert op(x, table) == [b16, f32, None, None]  # its tensors are the CPU's


def test_autocast_beside_float16_copies(device):
    """Kernels that have float16 are CUDA's, here emulated; the others refuse the copies."""
    grid = 2, 2, 3, 6, "linear", None
    rows, n = ops.hash_table_rows(*grid[:4])[1][-1], ops.mlp_parameters([4, 8, 2])
    shapes = (5, 3), (rows, 2), (5, 4), (n,)
    x, table, grad, params = (torch.rand(shape).to(device) for shape in shapes)
    half = table.half()
    ways = {
        "hash_encode": (lambda x, g: ops.hash_encode(x, table, *grid, half), (x, grad)),
        "grad": (lambda x, g: ops.hash_encode_gradient(g, x, table, *grid, half), (x, grad.half())),
        "mlp": (lambda x, g: ops.mlp(g, params, [4, 8, 2], params_half=params.half()),
                (x, grad.half())),
    }  # fmt: skip
    for op, exact in ways.values():
        if not _backend.kernels(x).has_half:
            with (
                torch.autocast(device.type, torch.float16),
                pytest.raises(ValueError, match="half"),
            ):
                op(x, grad)
            continue
        with torch.autocast(device.type, torch.float16):
            got = op(x, grad)
        assert torch.equal(got, op(*exact))
