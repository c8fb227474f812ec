"""Made-up results of the CPU suite, for the tests of what reads them."""

import itertools

MACHINE = {"slug": "test-2-cores", "cpu": "Test CPU", "cores": 2, "threads": 2,
           "commit": "0123456789", "torch": "2.13.0"}  # fmt: skip
LIMITS = {
    "fma_gflops": 80.0,
    "read_gbs": 30.0,
    "gather": [{"bytes": 16384, "g_per_s": 3.0}, {"bytes": 1 << 20, "g_per_s": 1.6}],
}
FACTORS = {"ours": 1.0, "eager": 22.0, "compiled": 12.0, "drjit": 2.8, "jax": 5.5}


def spread(ms: float, share: float = 0.04) -> dict:
    return {"median_ms": ms, "p20_ms": ms * (1 - share), "p80_ms": ms * (1 + share)}


def row(op="hash_encode", contender="ours", size="paper", direction="forward", ms=10.0,
        dtype="float32", share=0.04, **more) -> dict:  # fmt: skip
    """A row that was timed; ms: None for one that was not."""
    timed = ms is not None
    return {
        "op": op, "contender": contender, "size": size, "direction": direction, "dtype": dtype,
        "warm": spread(ms, share) if timed else None,
        "cold": spread(1.3 * ms, share) if timed else None,
        "repeats": 20 if timed else 0, "bytes": 16_777_216, "flops": 50_000_000,
        "percent_of_limit": 91.0 if timed else None, "limit": "gather",
        "equal": True, "error": 1e-7, "noisy": False, **more,
    }  # fmt: skip


def record(rows: list[dict] | None = None, **more) -> dict:
    rows = [row()] if rows is None else rows
    return {"version": 1, "date": "2030-01-02", "machine": dict(MACHINE), "limits": LIMITS,
            "rows": rows, "absent": [], **more}  # fmt: skip


def full_record() -> dict:
    """Every kind of row: all contenders, growth curves, stages, an unequal and a noisy peer."""
    rows = []
    ops = {"hash_encode": (8, 5e7), "mlp": (15, 1e9), "composite": (2, 4e6), "render": (27, 1e9)}
    for op, (ms, flops) in ops.items():
        for size in ("paper", "small"):
            for direction, factor in (("forward", 1), ("forward+backward", 2.6)):
                scale = ms * factor * (0.01 if size == "small" else 1)
                rows += [row(op, name, size, direction, scale * f, flops=flops * factor)
                         for name, f in FACTORS.items()]  # fmt: skip
    rows += [row("hash_encode", "taichi", ms=None, equal=False, error=0.25, noisy=None),
             row("mlp", "drjit", "large", ms=None, equal=None, error=None, noisy=None,
                 problem="ended with status -9: out of memory"),
             row("mlp", "warp", ms=300.0, share=0.3, noisy=True)]  # fmt: skip
    for parameter in ("points", "levels", "log2 table size", "rays", "samples"):
        for name, value in itertools.product(("ours", "eager"), (10, 12, 14)):
            at = value if parameter.startswith("log2") else 2**value
            for direction, ms in (("forward", 1e-4), ("forward+backward", 3e-4)):
                rows.append(row("hash_encode", name, f"{parameter} {at}", direction,
                                ms * 2**value * FACTORS[name], curve=parameter, at=at))  # fmt: skip
    stages = {"hash_encode": 7.6, "mlp": 11.0, "composite": 2.0, "other": 0.7}
    rows.append(row("step", size="paper", ms=21.3, stages=stages))
    return record(rows, absent=[{"contender": "warp", "reason": "not importable <here>"}])
