"""Everything to do on the day a GPU is at hand, in one command of under ten minutes.

    python bench/gpu_check.py [--out DIR] [--budget SECONDS]     or: make gpu-check
    python bench/gpu_check.py --rehearse                         on the CPU, as far as it goes

Needs torch with CUDA, nvcc, g++, pybind11 and pytest; no network, no virtual environment, no
installation. A stage that fails is recorded and the next one runs. Builds into this checkout and
writes DIR/<card>-<date>.json (bench/results) after every stage, and prints Markdown at the end.
A rehearsal works on a copy of the checkout in a temporary folder and leaves nothing here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import gpu_report, gpu_stages

ROOT = Path(__file__).resolve().parents[1]

# In this order: stage, most seconds it may take, seconds that the earlier ones must leave it.
STAGES = (
    ("environment", 30, 0),
    ("build", 240, 0),
    ("lane mapping", 60, 15),
    ("tests: mlp in half", 60, 20),
    ("tests", 150, 60),
    ("memcheck", 60, 20),
    ("benchmarks", 200, 110),
    ("steps", 60, 40),
    ("sds", 60, 20),
    ("racecheck", 60, 0),
)
SLOWER = 4  # a rehearsal's limits, for a machine of few cores


@dataclass
class Check:
    """One run: where, with what, and what was found."""

    root: Path  # of the checkout, or its copy
    work: Path  # scratch
    out: Path  # of the results
    rehearsal: bool
    end: float  # time.monotonic() by which all is over
    jobs: int
    record: dict
    arch: str = "90"

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def env(self) -> dict:
        alone = {"OMP_NUM_THREADS": "1"} if self.rehearsal else {}  # beside whatever else runs
        return {**os.environ, **alone, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
                "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor")}  # fmt: skip

    def save(self) -> Path:
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.record.get("card", "no-card")).strip("-")
        prefix = "rehearsal-" if self.rehearsal else ""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{prefix}{name}-{self.record['date']}.json"
        path.write_text(json.dumps(self.record, indent=1) + "\n")
        return path


def run_stage(check: Check, name: str, limit: float, function) -> None:
    """Run one stage; record its time and what went wrong. Nothing that it raises ends the run."""
    label = "rehearsal: " if check.rehearsal else ""
    print(f"== {label}{name} (at most {limit:.0f} s)", flush=True)
    start = time.monotonic()
    try:
        if limit < 5:
            raise TimeoutError("not run: no time left")
        result = function(check, limit)
    except Exception as error:
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    stage = {"stage": name, "seconds": time.monotonic() - start, **result}
    check.record["stages"].append(stage)
    print(f"   {'ok' if stage['ok'] else 'FAILED'}, {stage['seconds']:.0f} s "
          f"{stage.get('error', stage.get('note', ''))}", flush=True)  # fmt: skip
    check.save()


def copy_of_checkout(folder: Path) -> Path:
    """Sources without what was built here."""
    root = folder / "checkout"
    for part in ("bench", "csrc", "dreamfusion_fast", "tests"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.safetensors", "results")
        shutil.copytree(ROOT / part, root / part, ignore=ignore)
    for file in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, root / file)
    return root


def finish(check: Check) -> int:
    try:
        gpu_report.add_predictions(check.record)
    except Exception as error:
        check.record["stages"].append({"stage": "predictions", "ok": False, "seconds": 0.0,
                                       "error": f"{type(error).__name__}: {error}"})  # fmt: skip
    path = check.save()
    report = gpu_report.markdown(check.record)
    path.with_suffix(".md").write_text(report)
    print(f"\n{report}\nWritten: {path}, {path.with_suffix('.md').name}")
    return 0 if all(s["ok"] for s in check.record["stages"]) else 1


def start(options, scratch: Path) -> Check:
    record = {"rehearsal": options.rehearse, "card": "CPU" if options.rehearse else "no card",
              "date": datetime.date.today().isoformat(), "stages": []}  # fmt: skip
    jobs = options.jobs or os.cpu_count() or 1
    root = copy_of_checkout(scratch) if options.rehearse else ROOT
    out = scratch / "results" if options.rehearse else options.out
    end = time.monotonic() + options.budget * (SLOWER if options.rehearse else 1)
    return Check(root, scratch, out, options.rehearse, end, jobs, record)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in a temporary copy")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--budget", type=float, default=550, help="seconds for everything")
    parser.add_argument("--jobs", type=int, default=0, help="processes at a time; 0: all cores")
    parser.add_argument("--skip", default="", help="stages left out, with commas")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    skipped = {name.strip() for name in options.skip.split(",") if name.strip()}
    if unknown := skipped - {name for name, *_ in STAGES}:
        raise SystemExit(f"--skip: unknown stages {', '.join(sorted(unknown))}")
    if options.rehearse:
        os.nice(10)
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    check = start(options, scratch)
    stages = [stage for stage in STAGES if stage[0] not in skipped]
    for i, (name, most, _) in enumerate(stages):
        slower = SLOWER if options.rehearse else 1
        left = check.end - time.monotonic() - slower * sum(stage[2] for stage in stages[i + 1 :])
        run_stage(check, name, min(slower * most, left), gpu_stages.STAGES[name])
    status = finish(check)
    if not options.rehearse:
        shutil.rmtree(scratch, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
