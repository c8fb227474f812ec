"""A run of `make bench`: which races there are, their rows, and the results file."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench import race, roof, task, tasks
from bench.contenders import Contender, contenders, enters
from bench.limits import Size
from bench.record import OURS, VERSION, check

ROOT = Path(__file__).resolve().parents[1]
FORWARD, BOTH = "forward", "forward+backward"
CURVE_PEERS = 2  # the fastest ones, beside ours
MEMORY = 0.5  # of what is free: what one contender may need
QUICK = 0.01  # of the work that limits are measured with
EXPECTED = 0.05  # seconds: longer calls are taken to grow with the counted operations


class Case(NamedTuple):
    """A race: what all its contenders have in common."""

    op: str
    size: str
    direction: str
    curve: str | None = None
    at: int | None = None

    def __str__(self) -> str:
        return "-".join(self[:3]).replace(" ", "_")


def ops_there() -> tuple[list[str], list[dict]]:
    """Names of the tasks that ours can do, and, as absent, those that it cannot."""
    from dreamfusion_fast import ops

    missing = [name for name in tasks.FUSED if not hasattr(ops, name)]
    absent = [{"contender": f"{OURS}: {name}", "reason": f"dreamfusion_fast.ops has no `{name}`"}
              for name in missing]  # fmt: skip
    return sorted(set(task.TASKS) - set(missing)), absent


def passes(op: str) -> tuple[str, ...]:
    made = task.TASKS[op]
    return (FORWARD,) * made.forward + (BOTH,) * bool(made.gradients)


def plain_cases() -> list[Case]:
    return [Case(op, size, direction) for op in ops_there()[0] for size in task.TASKS[op].sizes
            for direction in passes(op)]  # fmt: skip


@functools.cache
def curve_sizes() -> dict[tuple, Size]:
    return {(c.op, c.parameter, at): size for c in tasks.curves() for at, size in c.sizes.items()}


def curve_cases() -> list[Case]:
    return [Case(op, f"{parameter} {at}", passes(op)[-1], parameter, at)
            for op, parameter, at in curve_sizes()]  # fmt: skip


@dataclass
class Loaded:
    """The problem that contenders work on, and the folder of its arrays."""

    key: tuple | None = None
    problem: task.Problem | None = None
    folder: tempfile.TemporaryDirectory | None = None


class Seen(NamedTuple):
    """What a contender's last call of an op took."""

    flops: float  # counted
    seconds: float
    peak: float  # bytes


def free_memory() -> int:
    """Bytes that processes can still have."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return 1024 * int(found[1])


class Suite:
    """Races when asked, and remembers the rows."""

    def __init__(self, budget: race.Budget | None = None, entrants: dict | None = None,
                 build: Callable = task.build, quick: bool = False):  # fmt: skip
        self.budget, self.build, self.quick = budget or race.Budget(), build, quick
        self.folder = tempfile.TemporaryDirectory()
        self.entrants: dict[str, Contender] = entrants or contenders()
        self.racers = {name: race.Racer(c, Path(self.folder.name))
                       for name, c in self.entrants.items()}  # fmt: skip
        self.rows: dict[Case, dict[str, dict]] = {}
        self.times: dict[tuple[Case, str], list[float]] = {}  # seconds of each round, warm
        self.history: dict[tuple, Seen] = {}  # of contender, op, backward
        self.loaded = Loaded()

    @functools.cached_property
    def limits(self) -> dict:
        return roof.measure(scale=QUICK if self.quick else 1.0)

    def race(self, case: Case, names: list[str]) -> dict[str, dict]:
        """A row of each contender that is there, by name; raced on the first call."""
        if case not in self.rows:
            _ = self.limits  # before anything else runs
            problem, folder = self._load(case)
            names = [n for n in self.entrants if n in {OURS, *names}
                     and enters(self.entrants[n], case.op, case.size)]  # fmt: skip
            backward = case.direction == BOTH
            work = problem.work(backward)
            budget = replace(self.budget, cold=case.size != "large" and not case.curve)
            skipped = {n: reason for n in names if (reason := self._too_much(n, case, work))}
            racers = [self.racers[n] for n in names]
            found = race.Race(problem, backward, racers, folder, budget).run(skipped)
            self.rows[case] = {name: self._row(case, name, e, work) for name, e in found.items()
                               if not e.racer.absent}  # fmt: skip
            for name, e in found.items():
                self.times[case, name] = e.warm or []
                if e.seconds:
                    self.history[name, case.op, backward] = Seen(work["flops"], e.seconds, e.peak)
        return self.rows[case]

    def _load(self, case: Case) -> tuple[task.Problem, Path]:
        """The case's arrays as files; the last ones stay for the next pass."""
        key = case.op, case.size
        if self.loaded.key != key:
            size = curve_sizes()[case.op, case.curve, case.at] if case.curve else (
                tasks.SIZES[case.size])  # fmt: skip
            self.loaded = Loaded()  # memory is free before the next arrays are made
            problem, folder = self.build(case.op, size), tempfile.TemporaryDirectory()
            for name, x in problem.arrays.items():
                np.save(Path(folder.name) / f"{name}.npy", x)
            self.loaded = Loaded(key, problem, folder)
        return self.loaded.problem, Path(self.loaded.folder.name)

    def _too_much(self, name: str, case: Case, work: dict) -> str | None:
        """Why it is not tried: by its last size, a call would take more than there is."""
        seen = self.history.get((name, case.op, case.direction == BOTH))
        if seen is None or not seen.flops:
            return None
        growth, free = work["flops"] / seen.flops, 1e-9 * free_memory()
        seconds, memory = growth * seen.seconds, 1e-9 * growth * seen.peak
        if seen.seconds > EXPECTED and seconds > self.budget.longest:
            return f"a call would take about {seconds:.3g} s: limit {self.budget.longest} s"
        if growth > 1 and memory > MEMORY * free:
            return f"a call would need about {memory:.2g} GB: {free:.2g} GB are free"

    def _row(self, case: Case, name: str, e: race.Entry, work: dict) -> dict:
        warm, cold = race.spread(e.warm), race.spread(e.cold)
        seconds, limit = roof.floor(work, self.limits)
        percent = 1e5 * seconds / warm["median_ms"] if warm else None
        error = None if e.error is None or not np.isfinite(e.error) else e.error
        row = {"op": case.op, "contender": name, "size": case.size, "direction": case.direction,
               "dtype": "float32", "warm": warm, "cold": cold, "repeats": len(e.warm or ()),
               "bytes": work["bytes"], "flops": work["flops"], "percent_of_limit": percent,
               "limit": limit, "equal": e.equal, "error": error, "noisy": race.is_noisy(warm),
               "problem": e.problem}  # fmt: skip
        return row | ({"curve": case.curve, "at": case.at} if case.curve else {})

    def fastest_peers(self, op: str, direction: str) -> list[str]:
        """The fastest other contenders at the paper's size; all of them if none was timed."""
        rows = self.rows.get(Case(op, "paper", direction), {})
        times = {name: row["warm"]["median_ms"] for name, row in rows.items()
                 if row["warm"] and not name.startswith(OURS)}  # fmt: skip
        fastest = sorted(times, key=times.get)[:CURVE_PEERS]
        return fastest or [n for n in self.entrants if not n.startswith(OURS)]

    def record(self) -> dict:
        """What bench/record.py describes. Raises ValueError if something of it is missing."""
        absent = [{"contender": name, "reason": r.absent}
                  for name, r in self.racers.items() if r.absent]  # fmt: skip
        rows = [row for found in self.rows.values() for row in found.values()]
        versions = {name: r.version for name, r in self.racers.items() if r.version}
        record = {"version": VERSION, "date": str(datetime.date.today()), "machine": machine(),
                  "limits": self.limits, "contenders": versions, "rows": rows,
                  "absent": [*absent, *ops_there()[1]], "quick": self.quick}  # fmt: skip
        return check(record, "this run")

    def close(self) -> None:
        for r in self.racers.values():
            r.close()
        self.loaded = Loaded()
        self.folder.cleanup()


def machine() -> dict:
    """Whose numbers these are; load: processes that ran beside the benchmark, at its end."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    found = {"cpu": cpu[1] if cpu else platform.processor() or "unknown", "cores": cores,
             "threads": torch.get_num_threads(), "commit": commit(), "gpu": gpu or "none",
             "python": sys.version.split()[0], "torch": torch.__version__,
             "system": platform.platform(), "load": round(os.getloadavg()[0], 2)}  # fmt: skip
    slug = gpu or f"{found['cpu']} {cores} cores"
    return {"slug": re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-"), **found}


def commit() -> str:
    """Of the checkout, with a plus where it was changed; unknown without git."""
    try:
        ask = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True,
                                check=True)  # fmt: skip
        name = ask(["git", "rev-parse", "--short=10", "HEAD"]).stdout.strip()
        changed = ask(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + "+" * bool(changed)


def write(record: dict, folder: Path) -> Path:
    """The results file, DATE-COMMIT.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['date']}-{record['machine']['commit']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
