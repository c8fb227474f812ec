"""An example call of every public op: what tests/test_citizenship.py holds torch's rules to. As a
command, `python tests/op_table.py`: op, float32 error against the float64 twin, gradcheck."""

from __future__ import annotations

import torch

from dreamfusion_fast import ops
from dreamfusion_fast.ops import reference

G = torch.Generator().manual_seed(0)
GRID = {"n_levels": 4, "base_resolution": 4, "finest_resolution": 32, "log2_table_size": 8}
POINTS = 0.6 * torch.rand(7, 3, generator=G, dtype=torch.float64) - 0.3
PACKED = torch.tensor([[0, 5], [5, 0], [5, 3], [8, 1]], dtype=torch.int32)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=G, dtype=torch.float64)


def unit(n: int) -> torch.Tensor:
    return torch.nn.functional.normalize(rand(n, 3) - 0.5, dim=-1)


def beside(tensor: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
    """The constant in the tensor's dtype, or in float32 beside a lower one."""
    return constant.to(torch.promote_types(tensor.dtype, torch.float32))


# op -> (function(ops module, *tensors), tensors, differentiable). The function works in the dtype
# of the tensors, float64 here. In-place ops work on clones and return what changed.
def cases() -> dict:
    rows = ops.hash_table_rows(**GRID)[1][-1]
    widths = [5, 16, 16, 3]
    origins = -1.5 * unit(6) + 0.2 * rand(6, 3)
    near, far = reference.ray_sphere_intersect(origins, unit(6), 0.7)
    bits = torch.randint(0, 256, (512,), generator=G, dtype=torch.uint8)
    far = near + 1.0
    return {
        "generate_rays": (lambda m, c, f: m.generate_rays(c, f, 3, 4),
                          (rand(2, 3, 4), 3 + rand(2)), True),
        "ray_sphere_intersect": (lambda m, o, d: m.ray_sphere_intersect(o, d, 0.9),
                                 (0.3 * rand(6, 3), unit(6)), True),
        "ray_box_intersect": (lambda m, o, d: m.ray_box_intersect(o, d, 0.9),
                              (0.3 * rand(6, 3), unit(6)), True),
        "march": (lambda m, *a: tuple(m.march(*a, bits, 16, 1.0, 0.05, 200, 7)),
                  (origins, unit(6), near, far), False),
        "hash_encode": (lambda m, x, t: m.hash_encode(x, t, **GRID, interpolation="smoothstep"),
                        (rand(7, 3), rand(rows, 2)), True),
        "spherical_harmonics": (lambda m, d: m.spherical_harmonics(d, 4), (unit(7),), True),
        "frequency_encode": (lambda m, x, v: m.frequency_encode(x, 4, v),
                             (rand(7, 3), 0.1 * rand(7)), True),
        "frequency_encode_gradient": (lambda m, g, x, v: m.frequency_encode_gradient(g, x, 4, v),
                                      (rand(7, 24), rand(7, 3), 0.1 * rand(7)), True),
        "mlp": (lambda m, x, p: m.mlp(x, p, widths, "silu"),
                (rand(7, 5), rand(ops.mlp_parameters(widths)) - 0.5), True),
        "hash_encode_gradient": (
            lambda m, g, x, t: m.hash_encode_gradient(g, x, t, **GRID, interpolation="smoothstep"),
            (rand(7, 2 * GRID["n_levels"]), rand(7, 3), rand(rows, 2)), True),
        "mlp_gradient": (lambda m, g, x, p: m.mlp_gradient(g, x, p, widths, "silu"),
                         (rand(7, widths[-1]), rand(7, 5), rand(ops.mlp_parameters(widths)) - 0.5),
                         True),
        "radiance": (lambda m, o, g: m.radiance(o, beside(o, POINTS), blob_density=5.0, of_x=g),
                     (rand(7, 4) - 0.5, rand(7, 3)), True),
        "composite": (lambda m, *a: m.composite(*a, PACKED),
                      (5 * rand(9), rand(9, 3), rand(9), 0.1 * rand(9)), True),
        "composite_lit": (_lit, (5 * rand(9), rand(9, 3), 20 * rand(9, 3) - 10, 0.1 * rand(9)),
                          True),
        "occupancy_points": (lambda m, x: m.occupancy_points(8, 0.7, 3, dtype=x.dtype),
                             (rand(1),), False),
        "occupancy_update": (_occupancy, (rand(512), rand(512)), False),
        "adam_step": (_adam, (rand(50), rand(50) - 0.5, rand(50), rand(50)), False),
    }  # fmt: skip


LIGHT = rand(9), rand(4, 3), unit(4), rand(2, 7)  # t, origins, directions, shading


def _lit(m, sigma, albedo, gradient, dt):
    """The orientation is left out: to it the weights are constants, which gradcheck is not told."""
    t, o, d, shading = (beside(sigma, x) for x in LIGHT)
    return m.composite_lit(sigma, albedo, gradient, t, dt, PACKED, o, d, shading)[:5]


def _occupancy(m, ema, density):
    ema, bits = ema.clone(), torch.zeros(64, dtype=torch.uint8)
    m.occupancy_update(ema, bits, density, 0.9, 0.4)
    return ema, bits


def _adam(m, *tensors):
    param, grad, exp_avg, exp_avg_sq = (t.clone() for t in tensors)
    step, skipped = torch.tensor([3]), torch.zeros(1, dtype=torch.int32)
    m.adam_step(param, grad, exp_avg, exp_avg_sq, step, skipped, 0.01, 0.9, 0.99, 1e-8)
    return param, exp_avg, exp_avg_sq


CASES = cases()
SMOOTH = [name for name, (_, _, differentiable) in CASES.items() if differentiable]
IN_PLACE = ["adam_step", "occupancy_update"]
TWICE = ("frequency_encode", "hash_encode", "mlp")


def case(name, dtype=torch.float64):
    """The op as a function of tensors alone, and tensors for it."""
    function, tensors, _ = CASES[name]
    return lambda *t: function(ops, *t), [t.to(dtype) for t in tensors]


def as_tuple(x) -> tuple:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def assert_all(compare, got, want):
    for a, b in zip(as_tuple(got), as_tuple(want), strict=True):
        assert compare(a, b), (a, b)


def energy(op):
    """A number of the op's results that weighs every element differently."""

    def function(*tensors):
        results = [r for r in as_tuple(op(*tensors)) if r.is_floating_point()]
        return sum(
            (r.square() * torch.linspace(1, 2, r.numel()).to(r.dtype).reshape(r.shape)).sum()
            for r in results
        )

    return function


def gradients(function, tensors, create_graph=False):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, create_graph=create_graph)


def error(function, tensors, dtype: torch.dtype) -> float:
    """Largest difference from the float64 twin, relative to 1 + its size."""
    got, want = function(ops, *(t.to(dtype) for t in tensors)), function(reference, *tensors)
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True)
    return max(
        float(((a.double() - b).abs() / (1 + b.double().abs())).detach().max()) for a, b in pairs
    )


def main() -> None:
    print(f"{'op':25} {'float32 error':>14} {'float64 error':>14}  gradcheck (float64)")
    for name, (function, tensors, differentiable) in cases().items():
        errors = [error(function, tensors, d) for d in (torch.float32, torch.float64)]
        checked = "no derivative"
        if differentiable:
            inputs = tuple(t.clone().requires_grad_() for t in tensors)
            checked = torch.autograd.gradcheck(lambda *a, f=function: f(ops, *a), inputs)
            checked = "passed" if checked else "FAILED"
        print(f"{name:25} {errors[0]:14.1e} {errors[1]:14.1e}  {checked}")


if __name__ == "__main__":
    main()
