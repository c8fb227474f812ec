"""What the compiler made of every CUDA kernel: `make resources`. No GPU needed.

Reads the module _cuda that a release ships, all architectures of it, and prints registers, shared
memory and stack (spills lie on it) as a Markdown table, then holds the kernels to: no stack and no
local memory, a ceiling of registers, and facts about their machine code (FACTS). Exits with 1 if
one does not hold. Needs cuobjdump: the CUDA toolkit's, or the one that comes with triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

# Registers a thread, by scalar type; a multiprocessor has 65536: 64 leave room for 1024 threads,
# enough to hide accesses to memory. double is for tests and gradcheck, not for speed.
CEILING = {"float": 64, "half": 64, "double": 128, "-": 64}
CEILING_OF = {  # kernel:type -> registers, and why more
    "composite_backward_kernel:float": 72,  # 8 channels, two gradients each; or a light, a normal
    "hash_grad_x_kernel:float": 120,  # 8 corners of 8 features are on their way together
    "hash_grad_x_kernel:half": 80,
    "hash_grad_x_kernel:double": 216,  # to divide rows of staggered levels, too
    "mlp_backward_kernel:float": 168,  # 8 sums, and the addresses of two layers and both gradients
    "mlp_backward_kernel:double": 168,
    "mlp_forward_kernel:float": 72,
    "mlp_half_backward_kernel:half": 240,  # up to 10 squares of the parameters' gradient, 8 each
    "mlp_half_forward_kernel:half": 224,  # 32 rows of up to 128 values, and of the layer behind
    "sh_forward_kernel:float": 72,  # degree 8 makes 64 numbers of a recurrence
    "sh_forward_kernel:double": 136,
}

# (kernel<arguments>:type, architectures from, instructions, wanted, why)
DOUBLE_ON_PURPOSE = "adam_prepare|frequency|march_kernel|radiance|occupancy_(ema|bits)"
FACTS = [
    (r".*(backward|grad).*", 80, "ATOM", False, "sums to memory return nothing"),
    (r"hash_grad_table_kernel.*", 80, "REDG?[.]", True, "sums to memory"),
    (r"hash_grad_table_kernel<2, \w+, (float|half)>.*", 90, "REDG.*F32x2", True, "whole rows"),
    (r"hash_grad_table_kernel<[48], \w+, (float|half)>.*", 90, "REDG.*F32x4", True, "whole rows"),
    (
        r"hash_\w+<([48], \w+, float|8, \w+, half|[248], \w+, double)>.*",
        80,
        "LDG.*128",
        True,
        "a row at once",
    ),
    (r"adam_(check|update)_kernel<(4, float|2, double)>.*", 80, "LDG.*128", True, "packs"),
    (r"march_kernel<.*", 80, "ATOMG", True, "a warp takes its rows by one addition"),
    (r"mlp_half_\w+<.*", 80, "HMMA.16816.F32", True, "tensor cores, sums in float"),
    (r"mlp_half_backward\w+<.*", 80, "REDG?[.]", True, "blocks' sums of the parameters' gradient"),
    (rf"(?!{DOUBLE_ON_PURPOSE}).*:(float|half)", 80, "D(ADD|MUL|FMA)", False, "double by accident"),
]


@dataclass
class Kernel:
    name: str  # with template arguments
    scalar: str
    architecture: int
    registers: int = 0
    shared: int = 0
    stack: int = 0
    instructions: Counter = field(default_factory=Counter)

    @property
    def base(self) -> str:
        return self.name.split("<")[0]


def find_cuobjdump() -> str:
    """The toolkit's, or the one that comes with triton."""
    places = [Path("/usr/local/cuda/bin/cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    found = shutil.which("cuobjdump") or next((str(p) for p in places if p.exists()), None)
    if not found:
        raise SystemExit("machine code: no cuobjdump: pip install triton, or the CUDA toolkit")
    return found


def call(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def inspect(module: Path) -> list[Kernel]:
    """Every kernel of the module, once for each architecture."""
    cuobjdump = find_cuobjdump()
    kernels = read_resources(call(cuobjdump, "--dump-resource-usage", module))
    read_sass(call(cuobjdump, "--dump-sass", module), kernels)
    mangled = sorted({name for name, _ in kernels})
    readable = dict(zip(mangled, call("c++filt", *mangled).splitlines(), strict=True))
    for (name, _), kernel in kernels.items():
        kernel.name, kernel.scalar = read_name(readable[name])
    return list(kernels.values())


def read_name(signature: str) -> tuple[str, str]:
    """Kernel with template arguments, and scalar type, of "void .. f_kernel<2>(df::FArgs<..>)"."""
    name = re.search(r"(\w+_kernel(<.*>)?)\(", signature)[1]
    scalar = re.search(r"Args<(\w+)>", signature)
    return name.replace("__half", "half"), scalar[1].replace("__half", "half") if scalar else "-"


def read_resources(text: str) -> dict[tuple[str, int], Kernel]:
    kernels, architecture, name = {}, 0, ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            kernels[name, architecture] = Kernel(
                "", "", architecture, registers, shared, stack + local
            )
    return kernels


def read_sass(text: str, kernels: dict[tuple[str, int], Kernel]) -> None:
    architecture, kernel = 0, None
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r"\s+Function : (\w+)", line):
            kernel = kernels.get((match[1], architecture))
        elif kernel and (match := re.match(r"\s+/\*\w{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]+)", line)):
            kernel.instructions[match[1]] += 1


def count(kernel: Kernel, pattern: str) -> int:
    return sum(n for name, n in kernel.instructions.items() if re.match(pattern, name))


def ceiling(kernel: Kernel) -> int:
    return CEILING_OF.get(f"{kernel.base}:{kernel.scalar}", CEILING[kernel.scalar])


def matches(pattern: str, kernel: Kernel) -> bool:
    return re.fullmatch(pattern, f"{kernel.name}:{kernel.scalar}") is not None


def problems(kernel: Kernel) -> list[str]:
    found = []
    if kernel.stack or count(kernel, "LDL|STL"):
        found.append(f"local memory: {kernel.stack} bytes, {count(kernel, 'LDL|STL')} accesses")
    if not kernel.instructions:
        found.append("no machine code")
    if kernel.registers > ceiling(kernel):
        found.append(f"{kernel.registers} registers, more than {ceiling(kernel)}")
    for pattern, since, instructions, wanted, why in FACTS:
        if kernel.architecture >= since and matches(pattern, kernel):
            n = count(kernel, instructions)
            if wanted != (n > 0):
                found.append(f"{n} of {instructions}, {'expected' if wanted else 'none'}: {why}")
    return found


def outdated(kernels: list[Kernel]) -> list[str]:
    """Lines of the tables above that are about no kernel."""
    names = {f"{k.base}:{k.scalar}" for k in kernels}
    facts = [fact[0] for fact in FACTS if not any(matches(fact[0], k) for k in kernels)]
    return [f"no such kernel: {name}" for name in [*(CEILING_OF.keys() - names), *facts]]


def row(name: str, kernels: list[Kernel]) -> str:
    """A table row for all variants of a kernel: the most that any of them needs."""
    registers = [
        str(max(k.registers for k in kernels if k.architecture == a)) for a in ARCHITECTURES
    ]
    most = {key: max(getattr(k, key) for k in kernels) for key in ("shared", "stack")}
    kinds = ("LDG.*128", "HMMA", "REDG?[.]", "ATOM", "LDL|STL")
    sass = [str(max(count(k, pattern) for k in kernels)) for pattern in kinds]
    variants = len(kernels) // len(ARCHITECTURES)
    cells = [name, str(variants), *registers, *map(str, most.values()), *sass]
    return f"| {' | '.join(cells)} |"


def print_table(kernels: list[Kernel]) -> None:
    heads = ["kernel", "variants", *(f"sm_{a}" for a in ARCHITECTURES), "shared", "stack, spills"]
    heads += ["LDG.128", "HMMA", "RED", "ATOM", "LDL, STL"]
    print(f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
    groups = defaultdict(list)
    for kernel in kernels:
        groups[f"`{kernel.base}` {kernel.scalar}"].append(kernel)
    for name, group in sorted(groups.items()):
        print(row(name, group))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build/cuda")
    folder = parser.parse_args().folder
    modules = sorted(folder.glob("_cuda*.so"))
    if len(modules) != 1:
        raise SystemExit(f"{folder}: expected one module _cuda, found {len(modules)}")
    start = time.perf_counter()
    kernels = inspect(modules[0])
    print("Registers, and instructions: the most that a variant (template arguments) has. Shared")
    print("memory without what a launch adds, and stack: bytes.\n")
    print_table(kernels)
    failures = [
        f"{k.name} {k.scalar} sm_{k.architecture}: {p}" for k in kernels for p in problems(k)
    ]
    missing = set(ARCHITECTURES) - {k.architecture for k in kernels}
    failures += [f"no kernel for sm_{a}" for a in sorted(missing)] + outdated(kernels)
    seconds = time.perf_counter() - start
    print(f"\n{len(kernels)} kernels read in {seconds:.0f} s; {len(failures)} problems")
    print("\n".join(failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
