"""Compiles the Triton kernels ahead of time, no GPU needed: `python tests/triton_resources.py`.

Prints registers, stack, shared memory and memory instructions of every variant as a Markdown table.
Exits with 1 if one uses the stack (spills lie there) or local memory, needs more registers than its
threads have, or touches an element's bytes more often than counted (TRAFFIC).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass

import triton
from kernel_resources import find_cuobjdump
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dreamfusion_fast.kernels import sds

ARCHITECTURES = (80, 90, 120)
REGISTERS = 65536  # of a multiprocessor
STRIDES = "n q hw out_view out_c out_p prediction_view prediction_c prediction_p z_view z_c z_p"
TYPES = {
    **dict.fromkeys(STRIDES.split(), "i32"),
    **dict.fromkeys("scale rescale clip share".split(), "fp32"),
    **dict.fromkeys("z grad alphas weights negative_weights".split(), "*fp32"),
    **dict.fromkeys("out prediction z_t".split(), "*fp16"),
    **dict.fromkeys("seed_address t".split(), "*i64"),
    "bad": "*i32",
}


@dataclass(frozen=True)
class Variant:
    name: str
    kernel: object
    constants: dict
    warps: int
    block: int
    # Loads and stores of an element: once each tensor, but for what Perp-Neg and rescaling sum up.
    loads: int
    stores: int


def guide(name: str, loads: int, **constants) -> Variant:
    settings = dict(GUIDED=True, NEGATIVES=0, V_PREDICTION=False, RESCALE=False, CLIP=False)
    settings |= constants | {"BLOCK": sds.GUIDE_BLOCK}
    # The second store is the one that takes back what was written of a view that is not finite.
    return Variant(f"guide: {name}", sds.guide_kernel, settings, sds.GUIDE_WARPS, sds.GUIDE_BLOCK,
                   loads, 2)  # fmt: skip


VARIANTS = [
    Variant("perturb: 1 copy", sds.perturb_kernel, {"COPIES": 1, "BLOCK": sds.PERTURB_BLOCK}, 4,
            sds.PERTURB_BLOCK, 1, 1),
    Variant("perturb: 2 copies", sds.perturb_kernel, {"COPIES": 2, "BLOCK": sds.PERTURB_BLOCK}, 4,
            sds.PERTURB_BLOCK, 1, 2),
    guide("no scale", 1, GUIDED=False),
    guide("CFG", 2),
    guide("CFG, v", 3, V_PREDICTION=True),
    guide("CFG, rescaled, clipped", 4, RESCALE=True, CLIP=True),
    guide("Perp-Neg", 8, NEGATIVES=2),
    guide("Perp-Neg, v, rescaled", 13, NEGATIVES=2, V_PREDICTION=True, RESCALE=True),
]  # fmt: skip


def compile_variant(variant: Variant, architecture: int):
    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={n: "constexpr" if n in variant.constants else TYPES[n] for n in names},
        constexprs={(names.index(n),): value for n, value in variant.constants.items()},
    )
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": variant.warps})


def inspect(cubin: bytes, cuobjdump: str) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    row = dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups())))
    row["LDL, STL"] = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return row


def traffic(ttgir: str) -> tuple[int, int]:
    """Loads and stores of tensors: those of single numbers have no layout."""
    lines = [line for line in ttgir.splitlines() if "tensor<" in line]
    return tuple(sum(f"tt.{kind} " in line for line in lines) for kind in ("load", "store"))


def problems(variant: Variant, row: dict, counted: tuple[int, int]) -> list[str]:
    found = []
    if row["stack"] or row["local"] or row["LDL, STL"]:
        found.append("local memory")
    if row["registers"] * variant.warps * 32 > REGISTERS:
        found.append(f"{row['registers']} registers in {variant.warps} warps")
    if counted != (variant.loads, variant.stores):
        found.append(f"loads, stores: {counted}, expected {(variant.loads, variant.stores)}")
    return found


def main() -> int:
    warnings.simplefilter("ignore")  # of a default that will change
    cuobjdump, failures = find_cuobjdump(), []
    heads = ["kernel", "sm", "registers", "stack", "shared", "local", "LDL, STL"]
    print(f"| {' | '.join([*heads, 'loads', 'stores'])} |\n|---|{'---:|' * (len(heads) + 1)}")
    for variant in VARIANTS:
        for architecture in ARCHITECTURES:
            compiled = compile_variant(variant, architecture)
            row = inspect(compiled.asm["cubin"], cuobjdump)
            counted = traffic(compiled.asm["ttgir"])
            cells = [variant.name, architecture, *(row[k] for k in heads[2:]), *counted]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            failures += [
                f"{variant.name} sm_{architecture}: {p}" for p in problems(variant, row, counted)
            ]
    print(f"\n{len(VARIANTS)} variants, {len(failures)} problems", *failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
