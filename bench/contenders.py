"""Who races in `make bench`: a process each, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.record import OURS

PEER_OPS = ("adam", "composite", "composite_lit", "frequency_encode", "generate_rays",
             "hash_encode", "hash_encode_inputs", "march", "mlp", "occupancy", "radiance", "render",
             "spherical_harmonics", "step")  # fmt: skip
TORCH_OPS = (*PEER_OPS,)
COMPILED_OPS = tuple(op for op in TORCH_OPS if op != "step")
EAGER = "eager"  # what ours itself is compared with


@dataclass(frozen=True)
class Contender:
    """`module` is imported by the contender's process (bench/runner.py says what it must have);
    where that fails the contender is absent. `ops` are those it has, at `sizes` only where these
    are given. `tolerance`: of one that works in float16, where it is larger than the task's."""

    name: str
    module: str
    ops: tuple[str, ...] = TORCH_OPS
    sizes: tuple[str, ...] | None = None
    env: dict[str, str] = field(default_factory=dict)
    tolerance: float = 0.0


def enters(c: Contender, op: str, size: str) -> bool:
    """Whether it races there."""
    return op in c.ops and size in (c.sizes or (size,))


def contenders() -> dict[str, Contender]:
    """Ours first. The same module may race under several names: it is told which."""
    one_thread = {"OMP_NUM_THREADS": "1"}
    return {
        c.name: c
        for c in (
            Contender(OURS, "bench.peer_torch"),
            Contender("ours-1-thread", "bench.peer_torch", env=one_thread),
            Contender("ours-unfused", "bench.peer_torch", ("render",)),
            Contender(EAGER, "bench.peer_torch"),
            # Compilation takes up to a minute an op: hence not everywhere.
            Contender("compiled", "bench.peer_torch", COMPILED_OPS, ("paper", "compact")),
            Contender("drjit", "bench.peer_drjit", PEER_OPS),
            Contender("jax", "bench.peer_jax", PEER_OPS),
            Contender("taichi", "bench.peer_taichi", ("hash_encode",)),
            Contender("warp", "bench.peer_warp", ("hash_encode",)),
            Contender("nerfacc", "bench.peer_nerfacc", ("composite",)),
            Contender("tiny-cuda-nn", "bench.peer_tcnn", ("mlp",), tolerance=2e-2),
        )
    }
