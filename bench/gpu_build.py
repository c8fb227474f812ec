"""Builds the kernel modules into a source tree for one GPU: by CMake, or by its compilers alone.

The direct build needs g++, nvcc and pybind11's headers; it repeats what CMakeLists.txt says of
flags and definitions.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import time
from pathlib import Path

from bench.processes import run, run_all, tail

CXX = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
       "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]  # fmt: skip


def stems(root: Path) -> list[str]:
    return sorted(p.stem for p in (root / "csrc").glob("*.cu"))


def tests(root: Path, stem: str) -> list[Path]:
    """test_<stem>.py, and test_<stem>_<part>.py where there is one."""
    return [root / f"tests/test_{stem}.py", *sorted((root / "tests").glob(f"test_{stem}_*.py"))]


def placeholders(root: Path) -> list[str]:
    """Stems whose kernels are not written yet."""
    return [s for s in stems(root) if '"not written"' in (root / f"csrc/{s}.cu").read_text()]


def find_nvcc() -> str | None:
    homes = [os.environ.get(k) for k in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    found += [str(Path(home) / "bin/nvcc") for home in homes if home]
    return next((path for path in found if path and shutil.which(path)), None)


def module_path(root: Path, name: str) -> Path:
    return root / "dreamfusion_fast" / (name + sysconfig.get_config_var("EXT_SUFFIX"))


def cmake_build(root: Path, work: Path, arch: str, jobs: int, limit: float, env: dict) -> dict:
    """Configure, build and install into the tree."""
    cmake, end = shutil.which("cmake"), time.monotonic() + limit
    if cmake is None:
        return {"ok": False, "error": "cmake: not found"}
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [cmake, "-S", root, "-B", work / "cmake", *generator, "-DDF_CUDA=ON",
                 f"-DCMAKE_CUDA_ARCHITECTURES={arch}", f"-DPython_EXECUTABLE={sys.executable}",
                 f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
                 f"-DCMAKE_INSTALL_PREFIX={root}"]  # fmt: skip
    result = run(configure, limit, root, env)
    if result["status"] == 0:
        build = [cmake, "--build", work / "cmake", "--target", "install", "--parallel", jobs]
        result = run(build, end - time.monotonic(), root, env)
    ok = result["status"] == 0
    return {"ok": ok, **({} if ok else {"error": tail(result["output"])})}


def direct_build(root: Path, work: Path, arch: str, jobs: int, limit: float, env: dict,
                 cuda: bool = True) -> dict:  # fmt: skip
    """Compile everything side by side, then link each module."""
    import pybind11

    objects, end = work / "objects", time.monotonic() + limit
    objects.mkdir(parents=True, exist_ok=True)
    headers = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    commands = _cuda_commands(root, objects, headers, arch) if cuda else {}
    commands |= _cpu_commands(root, objects, headers)
    results = run_all(commands, limit, root, env, jobs)
    failed = {name: tail(r["output"], 15) for name, r in results.items() if r["status"] != 0}
    seconds = {name: round(r["seconds"], 1) for name, r in results.items()}
    report = {"ok": not failed, "failed": failed, "seconds_each": seconds}
    for module, prefixes in (("_cpu", ("base.", "v3.")), ("_cuda", ("cuda.",))):
        names = [n for p in prefixes for n in commands if n.startswith(p)]
        if not names or failed.keys() & set(names):
            continue
        files = [objects / f"{n}.o" for n in names]
        linker = [find_nvcc(), "-cudart", "static"] if module == "_cuda" else ["g++", "-fopenmp"]
        link = [*linker, "-shared", "-o", module_path(root, module), *files]
        result = run(link, end - time.monotonic(), root, env)
        report[module] = "linked" if result["status"] == 0 else tail(result["output"], 15)
        report["ok"] &= result["status"] == 0
    return report


def _cpu_commands(root: Path, objects: Path, headers: list[str]) -> dict:
    """Baseline objects come first: the linker keeps the first of merged functions."""
    commands = {}
    for isa, march in (("base", []), ("v3", ["-march=x86-64-v3"])):
        for stem in stems(root):
            commands[f"{isa}.{stem}"] = ["g++", *CXX, *march, "-fopenmp", f"-DDF_ISA={isa}", "-c",
                                         f"csrc/{stem}.cpp"]  # fmt: skip
        if isa == "base":
            commands["base.bindings"] = ["g++", *CXX, *headers, "-DDF_MODULE=_cpu", "-c",
                                         "csrc/bindings.cpp"]  # fmt: skip
            defines = ["-DDF_HAS_BASE", "-DDF_HAS_V3", '-DDF_VERSION="bench"']
            commands["base.dispatch"] = ["g++", *CXX, "-fopenmp", *defines, "-c",
                                         "csrc/dispatch.cpp"]  # fmt: skip
    return {name: [*c, "-o", objects / f"{name}.o"] for name, c in commands.items()}


def _cuda_commands(root: Path, objects: Path, headers: list[str], arch: str) -> dict:
    """The longest to compile go first."""
    defines = ["-DDF_ISA=cuda", "-DDF_IS_CUDA", f'-DDF_CUDA_ARCHITECTURES="{arch}"']
    code = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    nvcc = [find_nvcc(), "-std=c++17", "-O3", *defines, *code,
            "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c"]  # fmt: skip
    sizes = {s: (root / f"csrc/{s}.cu").stat().st_size for s in stems(root)}
    commands = {
        f"cuda.{s}": [*nvcc, f"csrc/{s}.cu"] for s in sorted(sizes, key=lambda s: -sizes[s])
    }
    commands["cuda.bindings"] = ["g++", *CXX, *headers, *defines, "-DDF_MODULE=_cuda", "-c",
                                 "csrc/bindings.cpp"]  # fmt: skip
    return {name: [*c, "-o", objects / f"{name}.o"] for name, c in commands.items()}


def check_imports(root: Path, env: dict) -> dict:
    """The ops and the tests' conftest need torch and pytest, not the packages of the rest."""
    code = (
        "import sys; import dreamfusion_fast.ops as ops; from dreamfusion_fast.ops import _backend;"
        "print('from', ops.__file__); print('_cuda', 'imported' if _backend._cuda else 'absent');"
        "heavy = {'diffusers', 'transformers', 'typer', 'rich', 'trimesh'} & set(sys.modules);"
        "print('needlessly imported:', sorted(heavy)); sys.path.insert(0, 'tests'); import conftest"
    )
    result = run([sys.executable, "-c", code], 120, root, env)
    output = result["output"]
    report = {"ok": result["status"] == 0 and "needlessly imported: []" in output,
              "_cuda": "_cuda imported" in output,
              "here": f"from {root}" in output}  # fmt: skip
    report["ok"] &= report["here"]
    return report if report["ok"] else {**report, "error": tail(output)}


def compute_capability(nvidia_smi_output: str) -> str | None:
    """ "9.0" -> "90"."""
    found = re.search(r"\b(\d+)\.(\d)\b", nvidia_smi_output)
    return found[1] + found[2] if found else None
