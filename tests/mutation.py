"""Are the checks of the CUDA kernels worth anything? `make mutation`, after `make emulated`.

Plants the bugs below into a copy of csrc/, one at a time, recompiles the one file that holds it,
runs the check that is meant for it, and prints a Markdown table. Exits with 1 if a bug is not
caught, or not by what is expected to.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from emulated import CANNOT_START, command_of, environment, pytest_command

ROOT = Path(__file__).resolve().parents[1]

# Who catches a bug: the first of these whose pattern is in the check's output.
CATCHERS = {
    "AddressSanitizer": r"AddressSanitizer: [\w-]+",
    "ThreadSanitizer": r"ThreadSanitizer: data race",
    "UBSan": r"runtime error: [^\n]+",
    "emulation": r"kernel `\w+`: [^\n]+",
    "result": r"Mismatched elements: [^\n]+|(Assertion|Gradcheck)Error[^\n]*",
}


@dataclass(frozen=True)
class Bug:
    name: str
    file: str  # in csrc/
    old: str  # occurs once
    new: str
    check: str  # pytest: "op <arguments>", in tests/; or "race <prefix>"
    caught_by: str
    compiled: str = ""  # the stem to be compiled again, where the file's name does not say

    @property
    def stem(self) -> str:
        if self.compiled:
            return self.compiled
        stems = [p.stem for p in (ROOT / "csrc").glob("*.cu")]
        return next(s for s in [*stems, "emulation/self_test"] if self.file.startswith(s))

    @property
    def target(self) -> str:
        """What is to be linked again: the module, or the race test."""
        kind = self.check.split()[0]
        return {"op": "_emulated", "race": "race_test", "self": "emulation_race_test"}[kind]


BUGS = [
    Bug(
        "one row too many",
        "spherical_harmonics.cu",
        "if (row >= a.n) return;\n  T* const out",
        "if (row > a.n) return;\n  T* const out",
        "op test_spherical_harmonics.py -k test_edge_sizes",
        "AddressSanitizer",
    ),
    Bug(
        "shared array one too short",
        "occupancy.cu",
        "DF_SHARED(T, points, 3 * THREADS)",
        "DF_SHARED(T, points, 3 * THREADS - 1)",
        "op test_occupancy.py -k test_points_twin",
        "AddressSanitizer",
    ),
    Bug(
        "no capacity check",
        "march.cu",
        "const bool fits = stop <= a.capacity;",
        "const bool fits = row <= a.capacity;",
        "op test_march.py -k test_overflow",
        "AddressSanitizer",
    ),
    Bug(
        "no __syncthreads before a read",
        "frequency_encode.cu",
        "partial[threadIdx.x] = grad_variance;\n  __syncthreads();",
        "partial[threadIdx.x] = grad_variance;",
        "race frequency_encode_backward",
        "ThreadSanitizer",
    ),
    Bug(
        "no __syncthreads before a sum",
        "hash_encode.cu",
        "store3(parts + 3 * threadIdx.x, grad);\n  __syncthreads();",
        "store3(parts + 3 * threadIdx.x, grad);",
        "op test_hash_encode.py -k test_twin",
        "result",
    ),
    Bug(
        "no __syncthreads before shared values are overwritten",
        "mlp_half.h",
        "__syncthreads();  // nobody reads h any more",
        "",
        "race mlp_backward",
        "ThreadSanitizer",
    ),
    Bug(
        "no __syncwarp before shared values are overwritten",
        "emulation/self_test.cu",
        "    x = values[warp * WARP + (lane + 1) % WARP];\n    __syncwarp(FULL_WARP);",
        "    x = values[warp * WARP + (lane + 1) % WARP];",
        "self works_warp_sync",
        "ThreadSanitizer",
    ),
    Bug(
        "sums to memory not atomic",
        "hash_encode.cu",
        "red_add_vector<F>(grad + int64_t(F) * corner_row(cell, grid, k), part);",
        "for (int f = 0; f < F; ++f) grad[int64_t(F) * corner_row(cell, grid, k) + f] += part[f];",
        "race hash_encode_backward",
        "ThreadSanitizer",
    ),
    Bug(
        "blocks' sums to memory not atomic",
        "mlp_half.h",
        "red_add(grad + out * n_in + in, sum)",
        "grad[out * n_in + in] += sum",
        "race mlp_backward",
        "ThreadSanitizer",
    ),
    Bug(
        "mask of half a warp",
        "composite.cu",
        "const T other = __shfl_up_sync(FULL_WARP, x, offset);",
        "const T other = __shfl_up_sync(0xffffu, x, offset);",
        "op test_composite.py -k test_edge_sizes",
        "emulation",
    ),
    Bug(
        "a ray's last lanes leave before the warp's sum",
        "rays.cu",
        "  T mine = 0;  // lane k stores number k",
        "  if (lane_id() >= a.width) return;\n  T mine = 0;",
        "op test_rays.py -k test_generate_twin",
        "emulation",
    ),
    Bug(
        "divergent barrier",
        "frequency_encode.cu",
        "partial[threadIdx.x] = grad_variance;\n  __syncthreads();",
        "if (!at.inside) return;\n  partial[threadIdx.x] = grad_variance;\n  __syncthreads();",
        "op test_frequency_encode.py -k test_edge_sizes",
        "emulation",
    ),
    Bug(
        "sign of the second derivative",
        "frequency_encode.h",
        "scale * (b * across - a * along)",
        "scale * (b * across + a * along)",
        "op test_frequency_encode.py -k test_gradient_twin",
        "result",
    ),
    Bug(
        "scan off by one",
        "composite.cu",
        "if (lane_id() >= offset) x *= other;",
        "if (lane_id() > offset) x *= other;",
        "op test_composite.py -k test_twin",
        "result",
    ),
    Bug(
        "scan one step short",
        "march.cu",
        "for (int offset = 1; offset < WARP; offset *= 2)",
        "for (int offset = 1; offset < WARP / 2; offset *= 2)",
        "op test_march.py -k test_twin",
        "result",
    ),
    Bug(
        "a term of the features' derivative subtracted",
        "hash_encode.cu",
        "x * (dy * z + y * dz)",
        "x * (dy * z - y * dz)",
        "op test_hash_encode.py -k test_second_order_twin",
        "result",
    ),
    Bug(
        "the bent gradient forgotten",
        "mlp.cu",
        "const T before = bent ? slope[at] * spare[to_d + at] : T(0);",
        "const T before = T(0);",
        "op test_mlp.py -k test_second_order_gradcheck",
        "result",
    ),
    Bug(
        "hash primes swapped",
        "hash_encode.h",
        "dense ? side : 2654435761u, dense ? side * side : 805459861u",
        "dense ? side : 805459861u, dense ? side * side : 2654435761u",
        "op test_hash_encode.py -k test_twin",
        "result",
    ),
    Bug(
        "unwritten output",
        "composite.cu",
        "a.depth[ray] = depth;",
        "",
        "op test_composite.py -k test_twin",
        "result",
    ),
    Bug(
        "shading of the next view",
        "composite.h",
        "SHADING * (ray / a.rays_per_view)",
        "SHADING * ((ray + 1) / a.rays_per_view)",
        "op test_composite_lit.py -k test_twin",
        "AddressSanitizer",
    ),
    Bug(
        "a shuffle where lanes have left",
        "composite.cu",
        "if constexpr (LIT) store_rows3(",
        "if (LIT && row < stop) store_rows3(",
        "op test_composite_lit.py -k test_twin",
        "emulation",
    ),
    Bug(
        "rows past count unwritten",
        "hash_encode.cu",
        "if (point >= a.n || level >= a.n_levels) return;",
        "if (point >= valid_rows(a.count, a.n) || level >= a.n_levels) return;",
        "op test_hash_encode.py -k test_edge_sizes",
        "result",
    ),
    Bug(
        "stale capacity counter",
        "march.cu",
        "    a.counter[0] = 0;\n",
        "",
        "op test_march.py -k test_twin",
        "UBSan",
    ),
    Bug(
        "overflow: sums of products in half",
        "mlp_tiles.h",
        "for (int m = 0; m < M; ++m) mma_16x8x16(acc[m][i], a[m].r, b);",
        "for (int m = 0; m < M; ++m) {\n"
        "      mma_16x8x16(acc[m][i], a[m].r, b);\n"
        "      for (float& x : acc[m][i]) x = __half2float(__float2half_rn(x));\n"
        "    }",
        "op test_mlp.py -k test_half_sums_beyond_half",
        "result",
    ),
    Bug(
        "sums of features in half",
        "hash_encode.cu",
        "sum[f] += weight * v[k][f];",
        "sum[f] = W(T(sum[f] + weight * v[k][f]));",
        "op test_hash_encode.py -k test_half",
        "result",
    ),
    Bug(
        "vector access off alignment",
        "adam.cu",
        "if (whole) step_in_packs",
        "if (true) step_in_packs",
        "op test_adam.py -k test_any_start",
        "UBSan",
    ),
    Bug(
        "more shared memory only asked for where the dynamic part alone is too much",
        "gpu.h",
        "return dynamic_bytes > 0;",
        "return dynamic_bytes > 48 * 1024;",
        "op test_mlp.py -k test_twin",
        "emulation",
        compiled="mlp",
    ),
    Bug(
        "a loss scale that the search for bad gradients forgets",
        "adam.cu",
        "if (a.loss_scale) unscale /= T(*a.loss_scale);",
        "",
        "op test_adam.py -k test_what_overflows",
        "result",
    ),
    Bug(
        "update in spite of a bad gradient",
        "adam.cu",
        "if (i >= a.n || *a.found) return;",
        "if (i >= a.n) return;",
        "op test_adam.py -k test_non_finite",
        "result",
    ),
]


def run(command, folder: Path, variables: dict | None = None) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=folder, env=variables, shell=isinstance(command, str), text=True,
        errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def build(bug: Bug, folder: Path, build_folder: Path) -> None:
    """Compile and link the target into folder from the objects of the build, but for one."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    path = folder / "csrc" / bug.file
    text = path.read_text()
    if text.count(bug.old) != 1:
        raise ValueError(f"csrc/{bug.file} holds {text.count(bug.old)} times: {bug.old}")
    path.write_text(text.replace(bug.old, bug.new))
    code, output = run(["ninja", "-t", "commands", bug.target], build_folder)
    *compilations, link = output.strip().splitlines()
    source = f"csrc/{bug.stem}.cu"
    compilation = next(line for line in compilations if line.endswith(f"-c {ROOT / source}"))
    old_object = re.search(r"-o (\S+)", compilation)[1]
    linked = re.search(r"-o (\S+)", link)[1]
    compilation = compilation.replace(old_object, str(folder / "object.o"))
    compilation = compilation.replace(str(ROOT / source), str(folder / source))
    link = link.replace(old_object, str(folder / "object.o"))
    link = link.replace(f"-o {linked}", f"-o {folder / linked}")
    for command in (compilation, link):
        code, output = run(command, build_folder)
        if code:
            raise ValueError(f"{bug.name}: does not compile: {output}")


def check(bug: Bug, folder: Path) -> tuple[int, str]:
    """Run the bug's check on what is built in folder."""
    kind, *arguments = bug.check.split()
    if kind != "op":
        return run(command_of(folder / bug.target, *arguments), folder)
    options = "-x", "-q", "--seed", "1", "--every-order", "-p", "no:cacheprovider"
    command = pytest_command(*options, *arguments)
    return run(command, ROOT / "tests", environment(folder))


def plant(bug: Bug, build_folder: Path) -> tuple[str, str, float]:
    """Who caught the bug, what was said, seconds."""
    start = time.perf_counter()
    folder = build_folder / "mutation" / re.sub(r"\W+", "_", bug.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build(bug, folder, build_folder)
    code, output = check(bug, folder)
    (folder / "output.txt").write_text(output)
    by, said = "nothing", f"exit code {code}"
    if CANNOT_START in output:
        by, said = "not run", CANNOT_START
    elif code:
        found = ((name, re.search(pattern, output)) for name, pattern in CATCHERS.items())
        by, said = next(((name, m[0]) for name, m in found if m), ("nothing", output[-300:]))
    return by, said, time.perf_counter() - start


def row(bug: Bug, by: str, said: str, seconds: float) -> str:
    said = said.replace("|", "\\|").replace("\n", " ").removeprefix(f"{by}: ")
    wrong = "" if by in (bug.caught_by, "not run") else f" (**expected {bug.caught_by}**)"
    where = bug.check.split(maxsplit=1)[1].replace(" -k", ":")
    return f"| {bug.name} | `{bug.file}` | {by}{wrong}: {said[:90]} | {where} | {seconds:.0f} |"


def run_baseline(bugs: list[Bug], build_folder: Path, pool: ThreadPoolExecutor) -> int:
    checks = list({b.check: b for b in bugs}.values())
    codes = []
    for bug, (code, _) in zip(checks, pool.map(lambda b: check(b, build_folder), checks)):
        print(f"{bug.check}: {'fails' if code else 'passes'} without a bug", flush=True)
        codes.append(code)
    return any(codes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only bugs whose name or file holds one of these")
    parser.add_argument("--build", type=Path, default=ROOT / "build/emulated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--baseline", action="store_true", help="run the checks without bugs")
    options = parser.parse_args()
    build_folder = options.build.resolve()
    bugs = [b for b in BUGS if any(n in b.name + b.file for n in options.names or [""])]
    start = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.baseline:  # else `make emulated` is
            return run_baseline(bugs, build_folder, pool)
        print("| bug | in | caught by | check | seconds |\n|---|---|---|---|---:|", flush=True)
        caught = 0
        for bug, result in zip(bugs, pool.map(lambda bug: plant(bug, build_folder), bugs)):
            print(row(bug, *result), flush=True)
            caught += result[0] in (bug.caught_by, "not run")
    print(f"\n{caught} of {len(bugs)} caught as expected, {time.perf_counter() - start:.0f} s")
    return caught != len(bugs)


if __name__ == "__main__":
    sys.exit(main())
