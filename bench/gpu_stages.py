"""The stages of gpu_check.py. Each takes (check, limit in seconds) and returns what it found:
`ok`, and `error` or `note`; details go into check.record."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import time

from bench import gpu_build
from bench.processes import ANSWER, Worker, run, run_all, tail

SIZES = ("toybox", "paper")  # of the benchmarks on a GPU
CMAKE_SHARE = 0.6  # of the build's time; the rest is for a direct build if that fails
TEST_JOBS = 4  # processes that share the GPU
COMPILE_SHARE = 0.5  # of the benchmarks' time, for torch.compile
REHEARSED_TESTS = ("adam", "march", "mlp")
REHEARSED_CASES = ("mlp", "march", "ray_sphere_intersect")
NEEDED = ("torch", "pybind11", "pytest", "numpy")


# ---- environment --------------------------------------------------------------------------------
def environment(check, limit: float) -> dict:
    """The card, its driver, torch, nvcc and what else is there."""
    found = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": _commit(check),
        "tools": {t: shutil.which(t) for t in ("cmake", "ninja", "g++", "compute-sanitizer")},
        "missing": [n for n in NEEDED if importlib.util.find_spec(n) is None],
    }
    nvcc = gpu_build.find_nvcc()
    version = run([nvcc, "--version"], 20, check.root)["output"] if nvcc else ""
    found["nvcc"] = (re.findall(r"release \S+ \S+", version) or ["not found"])[0]
    code = ("import torch; print(torch.__version__); print(torch.version.cuda);"
            "print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')")  # fmt: skip
    torch = run([sys.executable, "-c", code], limit, check.root)
    lines = [*torch["output"].splitlines(), "", "", ""] if torch["status"] == 0 else [""] * 3
    found["torch"], found["torch_cuda"], card = lines[:3]
    query = "name,driver_version,compute_cap,memory.total,clocks.max.sm"
    smi = run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], 20, check.root)
    found["nvidia_smi"] = smi["output"].strip()
    check.record["environment"] = found
    if check.rehearsal:
        return {"ok": not found["missing"], "note": f"rehearsal; missing: {found['missing']}"}
    check.record["card"] = card or "no card"
    capability = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], 20,
                     check.root)["output"]  # fmt: skip
    check.arch = gpu_build.compute_capability(capability) or check.arch
    if not card:
        return {"ok": False, "error": "torch sees no GPU: " + tail(torch["output"], 3)}
    note = f"{card}, sm_{check.arch}, torch {found['torch']}, nvcc {found['nvcc']}"
    return {"ok": not found["missing"] and bool(nvcc), "note": f"{note}, {found['missing']=}"}


def _commit(check) -> str:
    """The working tree's, "+" if it was changed; a copy without .git has none."""
    commands = ("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")
    head, changes = (run(["git", *a], 10, check.root) for a in commands)
    if head["status"] != 0:
        return "unknown"
    return head["output"].strip() + ("+" if changes["output"].strip() else "")


# ---- build --------------------------------------------------------------------------------------
def build(check, limit: float) -> dict:
    """By CMake where it is found, else (or if that fails) directly; then import."""
    end, reports = time.monotonic() + limit, {}
    arguments = check.root, check.work, check.arch, check.jobs
    missing = gpu_build.placeholders(check.root)
    if not check.rehearsal:
        share = CMAKE_SHARE * limit
        reports["cmake"] = gpu_build.cmake_build(*arguments, share, check.env)
    if check.rehearsal or not reports["cmake"]["ok"]:
        cuda = not (check.rehearsal and missing)
        left = end - time.monotonic()
        reports["direct"] = gpu_build.direct_build(*arguments, left, check.env, cuda)
    reports["import"] = gpu_build.check_imports(check.root, check.env)
    check.record["build"] = reports
    built = any(reports[how]["ok"] for how in ("cmake", "direct") if how in reports)
    notes = [f"{how} {'ok' if r['ok'] else 'failed'}" for how, r in reports.items()]
    if missing:
        notes.append(f"not written yet: {', '.join(missing)}")
    if check.rehearsal:
        notes.append("_cuda for sm_90 " + ("compiled" if not missing else "not compiled"))
    failed = [r for r in reports.values() if not r["ok"]]
    ok = built and reports["import"]["ok"] and (check.rehearsal or reports["import"]["_cuda"])
    detail = {"error": tail(str(failed), 10)} if not ok else {}
    return {"ok": ok, "note": "; ".join(notes), **detail}


# ---- tests --------------------------------------------------------------------------------------
def lane_mapping(check, limit: float) -> dict:
    """The kernels' instructions, above all mma's lanes, against plain loops on the GPU."""
    source, program = check.root / "csrc/emulation/self_test.cu", check.work / "self_test"
    code = f"arch=compute_{check.arch},code=sm_{check.arch}"
    command = [gpu_build.find_nvcc(), "-std=c++17", "-DDF_ISA=cuda", "-DDF_IS_CUDA", "-Icsrc",
               "-gencode", code, source, "-o", program]  # fmt: skip
    end = time.monotonic() + limit
    result = run(command, limit, check.root, check.env)
    if result["status"] != 0:
        return {"ok": False, "error": "nvcc: " + tail(result["output"], 10)}
    if check.rehearsal:
        return {"ok": True, "note": "rehearsal: compiled, not run"}
    result = run([program], end - time.monotonic(), check.root, check.env)
    check.record["lane_mapping"] = result
    lines = result["output"].splitlines()
    bad = [x for x in lines if "ok" not in x.lower()] or lines[-3:]
    if result["status"] != 0:
        return {"ok": False, "error": "; ".join(bad)}
    return {"ok": True, "note": f"{len(lines)} checks"}


def pytest_command(files, select: str) -> list:
    return [sys.executable, "-m", "pytest", *files, "-k", select, "-q", "--tb=short", "-p",
            "no:cacheprovider", "--maxfail=10"]  # fmt: skip


def summary(result: dict) -> dict:
    """pytest's counts; no test at all is a failure."""
    output = result["output"]
    last = ([x for x in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+", x)] or [""])[-1]
    counts = {w.rstrip("s") if w.startswith("error") else w: int(n)
              for n, w in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", last)}  # fmt: skip
    counts["errors"] = counts.pop("error", 0)
    report = {**counts, "seconds": result["seconds"], "ok": result["status"] == 0}
    if result["status"] == 5:
        report["error"] = "no test selected"
    elif result["status"] != 0:
        report["error"] = _first_failures(output) or tail(output, 3)
        report["output"] = tail(output, 60)
    return report


def _first_failures(output: str) -> str:
    return "; ".join(re.findall(r"^(?:FAILED|ERROR) (.+)$", output, re.MULTILINE)[:4])


def _run_tests(check, commands: dict, limit: float, jobs: int) -> dict:
    results = run_all(commands, limit, check.root, check.env, jobs)
    reports = {name: summary(result) for name, result in results.items()}
    check.record.setdefault("tests", {}).update(reports)
    failed = [name for name, r in reports.items() if not r["ok"]]
    passed = sum(r.get("passed", 0) for r in reports.values())
    return {"ok": not failed, "note": f"{passed} passed",
            **({"error": "see Tests: " + ", ".join(failed)} if failed else {})}  # fmt: skip


def tests_half(check, limit: float) -> dict:
    """The MLP's tensor cores first."""
    if check.rehearsal:
        return {"ok": True, "note": "rehearsal: half is for CUDA only"}
    command = pytest_command(["tests/test_mlp.py"], "cuda and half")
    return _run_tests(check, {"mlp in half": command}, limit, 1)


def tests(check, limit: float) -> dict:
    """Each stem's files in a process of their own: one bad access does not spoil the others."""
    names = REHEARSED_TESTS if check.rehearsal else gpu_build.stems(check.root)
    select = "cpu and twin and float32" if check.rehearsal else "cuda"
    commands = {n: pytest_command(gpu_build.tests(check.root, n), select) for n in names}
    commands["sds"] = pytest_command(["tests/test_sds.py"], "triton")
    return _run_tests(check, commands, limit, min(TEST_JOBS, check.jobs))


# ---- compute-sanitizer --------------------------------------------------------------------------
def sanitizer(tool: str):
    """A stage: every op once, forward and backward, at the smallest size."""

    def stage(check, limit: float) -> dict:
        program = [sys.executable, "bench/worker.py", "--once", "--sizes", "tiny", "--device",
                   check.device]  # fmt: skip
        if check.rehearsal:
            result = run(program, limit, check.root, check.env)
            ran = result["output"].count("ran ")
            note = {"note": f"rehearsal: {ran} ops run on the CPU without {tool}"}
            return {"ok": result["status"] == 0, **note, **_problem(result)}
        found = shutil.which("compute-sanitizer") or shutil.which(
            "/usr/local/cuda/bin/compute-sanitizer"
        )
        if found is None:
            return {"ok": True, "note": "compute-sanitizer is absent: nothing was checked"}
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        options += ["--report-api-errors", "no"]  # torch asks for what a card may lack
        env = {**check.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        result = run([found, *options, *program], limit, check.root, env)
        check.record[tool] = {"status": result["status"], "output": tail(result["output"], 60)}
        ran = result["output"].count("ran ")
        return {"ok": result["status"] == 0, "note": f"{ran} ops run", **_problem(result)}

    return stage


def _problem(result: dict) -> dict:
    return {} if result["status"] == 0 else {"error": tail(result["output"], 4)}


# ---- benchmarks ---------------------------------------------------------------------------------
def benchmarks(check, limit: float) -> dict:
    """Workers start and compile side by side, and measure one at a time."""
    end, rows = time.monotonic() + limit, []
    check.record["benchmarks"], check.record["compile"] = rows, []
    listed = run([sys.executable, "bench/worker.py", "--list"], limit, check.root, check.env)
    names = REHEARSED_CASES if check.rehearsal else listed["output"].split()
    if listed["status"] != 0:
        return {"ok": False, "error": tail(listed["output"], 4)}
    workers = {name: _worker(check, name) for name in names}
    try:
        rows += _side_by_side(workers, end)
        _collect(workers, rows, "measure", end)
        compile_end = time.monotonic() + COMPILE_SHARE * (end - time.monotonic())
        seconds = 0.8 * (compile_end - time.monotonic())
        check.record["compile"] = _side_by_side(workers, compile_end, f"compile {seconds:.0f}")
        _collect(workers, rows, "compiled", end)
    finally:
        for worker in workers.values():
            worker.close()
    failed = {r["op"] for r in rows if "error" in r and r.get("implementation", "op") == "op"
              and not (check.rehearsal and "CUDA only" in r["error"])}  # fmt: skip
    compiled = sum("error" not in r for r in check.record["compile"])
    note = f"{sum('error' not in r for r in rows)} measurements, {compiled} twins compiled"
    return {"ok": not failed, "note": note,
            **({"error": "failed: " + ", ".join(sorted(failed))} if failed else {})}  # fmt: skip


def _worker(check, name: str) -> Worker:
    sizes = "tiny" if check.rehearsal else ",".join(SIZES)
    seconds = ["--seconds", "0.02"] if check.rehearsal else []
    command = [sys.executable, "bench/worker.py", "--case", name, "--sizes", sizes,
               "--device", check.device, *seconds]  # fmt: skip
    return Worker(command, check.root, check.env, check.work / f"worker-{name}.log")


def _collect(workers: dict, rows: list, command: str, end: float) -> None:
    """Send the command to one worker after another and add the rows that it answers."""
    for name, worker in list(workers.items()):
        worker.send(command)
        rows += _receive(workers, name, end, command)


def _side_by_side(workers: dict, end: float, command: str | None = None) -> list[dict]:
    """Send the command to all workers at once, and wait for all (None: for them to be ready)."""
    for worker in workers.values():
        if command:
            worker.send(command)
    return [row for name in list(workers) for row in _receive(workers, name, end, command)]


def _receive(workers: dict, name: str, end: float, command: str | None) -> list[dict]:
    """A worker's rows; one that fails or is late is left out from then on."""
    try:
        answer = workers[name].receive(end - time.monotonic())
        return answer if command else []
    except RuntimeError as error:
        workers.pop(name).close()
        row = {"op": name, "size": "all", "precision": "all", "error": str(error)}
        late = {"implementation": "compiled"} if (command or "").startswith("compile") else {}
        return [row | late]


# ---- steps --------------------------------------------------------------------------------------
def steps(check, limit: float) -> dict:
    end, rows = time.monotonic() + limit, []
    check.record["steps"] = rows
    problems = []
    for size in ("tiny",) if check.rehearsal else SIZES:
        command = [sys.executable, "bench/step.py", "--size", size, "--device", check.device]
        command += ["--seconds", "0.02"] if check.rehearsal else []
        result = run(command, end - time.monotonic(), check.root, check.env)
        answers = [x for x in result["output"].splitlines() if x.startswith(ANSWER)]
        rows += [json.loads(x[len(ANSWER) :]) for x in answers]
        if result["status"] != 0:
            problems.append(f"{size}: {tail(result['output'], 3)}")
    problems += [f"{r['size']} {r['variant']}: {r['error']}" for r in rows if "error" in r]
    return {"ok": not problems, "note": f"{len(rows)} variants",
            **({"error": "; ".join(problems)} if problems else {})}  # fmt: skip


def sds(check, limit: float) -> dict:
    """The arithmetic around the U-Net: Triton's kernels against the usual lines."""
    result = run([sys.executable, "bench/sds.py", "--device", check.device], limit, check.root,
                 check.env)  # fmt: skip
    table = [line for line in result["output"].splitlines() if line.startswith("|")]
    check.record["sds"] = table
    ratios = "; ".join(line.strip("| ") for line in table[2:])
    return {"ok": result["status"] == 0, "note": ratios, **_problem(result)}


STAGES = {
    "environment": environment,
    "build": build,
    "lane mapping": lane_mapping,
    "tests: mlp in half": tests_half,
    "tests": tests,
    "memcheck": sanitizer("memcheck"),
    "benchmarks": benchmarks,
    "steps": steps,
    "sds": sds,
    "racecheck": sanitizer("racecheck"),
}
