"""A race: contenders take turns at one problem, after their results were found equal.

Each is a process of its own (bench/runner.py) that is stopped while another one has its turn, so
that no pool of spinning threads disturbs it. A round goes through all contenders, every other one
backwards.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import processes, runner
from bench.contenders import EAGER, Contender
from bench.record import OURS
from bench.task import Problem

ROOT = Path(__file__).resolve().parents[1]
NOISY = 0.3  # of the median: a wider spread is marked
ROUNDS = (5, 40)
LEAST = 1e-3  # seconds that a warm measurement takes: shorter calls are repeated
LONG = 0.1  # seconds of a call that needs no warm-up: the state of the caches is nothing to it


@dataclass(frozen=True)
class Budget:
    """Seconds: of one contender's turns in a race, of a call that is still raced, of one that
    prepares (compilation included). cold: also measure with empty caches."""

    seconds: float = 0.5
    longest: float = 4.0
    prepare: float = 120.0
    cold: bool = True


class Absent(Exception):
    """The contender cannot work here."""


class Racer:
    """A contender's process: started when first asked, again after it was lost."""

    def __init__(self, contender: Contender, folder: Path):
        self.contender, self.log = contender, folder / f"{contender.name}.log"
        self.worker, self.version, self.absent = None, None, None

    def ask(self, request: dict, limit: float):
        """The answer. Raises RuntimeError: it failed, ended, or took too long; Absent."""
        if request["do"] == "time" and (status := self.worker.process.poll()) is not None:
            raise RuntimeError(f"ended with status {status} while another had its turn: memory?")
        self._start()
        with self._awake():
            self.worker.send(json.dumps(request))
            answer = self.worker.receive(limit)
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _start(self) -> None:
        if self.absent:
            raise Absent(self.absent)
        if self.worker and self.worker.process.poll() is None:
            return
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | self.contender.env
        command = [sys.executable, runner.__file__, self.contender.module, self.contender.name]
        self.worker = processes.Worker(command, ROOT, env, self.log)
        answer = self.worker.receive(120)
        if "absent" in answer:
            self.absent = answer["absent"]
            self.close()
            raise Absent(self.absent)
        self.version = answer["version"]

    @contextlib.contextmanager
    def _awake(self):
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.worker.process.send_signal(number)

    def drop(self) -> None:
        """Forget the op, if the process is there; a process that cannot ends."""
        if self.worker and self.worker.process.poll() is None:
            try:
                self.ask({"do": "drop"}, 60)
            except RuntimeError:
                self.close()

    def close(self) -> None:
        if self.worker:
            self.worker.close()
            self.worker = None


@dataclass
class Entry:
    """What is known of a contender in a race."""

    racer: Racer
    outputs: Path
    seconds: float | None = None  # of a call, after the first
    peak: int = 0  # bytes of memory that preparing it took
    problem: str | None = None
    error: float | None = None
    equal: bool | None = None
    warm: list[float] | None = None
    cold: list[float] | None = None


def difference(a: np.ndarray, b: np.ndarray, outliers: float = 0.0) -> float:
    """The largest difference but for a share of outliers, as a share of b's largest number."""
    if a.shape != b.shape:  # flat, see runner.thin
        return math.inf
    if not b.size:
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0 if np.array_equal(a, b, equal_nan=True) else math.inf
    apart, largest = np.abs(a - b), max(float(np.abs(b).max()), 1e-30)
    found = np.quantile(apart, 1 - outliers) if outliers else apart.max()
    return float(found) / largest


def compare(entry: Entry, truth: Path, problem: Problem) -> None:
    """Fill in equal and error, by the results that both wrote."""
    with np.load(entry.outputs) as got, np.load(truth) as want:
        if len(got) != len(want):
            entry.error = math.inf
        else:
            entry.error = max((difference(got[k], want[k], problem.task.outliers) for k in want),
                              default=0.0)  # fmt: skip
    entry.equal = entry.error <= max(problem.task.tolerance, entry.racer.contender.tolerance)


class Race:
    """Of the racers at one problem and pass."""

    def __init__(self, problem: Problem, backward: bool, racers: list[Racer], folder: Path,
                 budget: Budget = Budget()):  # fmt: skip
        self.problem, self.backward, self.budget = problem, backward, budget
        self.folder = folder  # with the arrays
        self.temporary = tempfile.TemporaryDirectory()
        out = Path(self.temporary.name)
        self.entries = {r.contender.name: Entry(r, out / f"{r.contender.name}.npz")
                        for r in racers}  # fmt: skip

    def run(self, skipped: dict[str, str] | None = None) -> dict[str, Entry]:
        """Prepare, compare, time, drop. skipped: contender to the reason why it is not tried."""
        with self.temporary:
            for name, entry in self.entries.items():
                entry.problem = (skipped or {}).get(name) or self._prepare(entry)
            self._check()
            self._rounds()
            for entry in self.entries.values():
                entry.racer.drop()
        return self.entries

    def _prepare(self, entry: Entry) -> str | None:
        request = {"do": "prepare", "op": self.problem.task.name, "folder": str(self.folder),
                   "settings": self.problem.settings, "backward": self.backward,
                   "out": str(entry.outputs), "in_place": self.problem.task.in_place}  # fmt: skip
        try:
            answer = entry.racer.ask(request, self.budget.prepare)
            entry.seconds, entry.peak = answer["again"], answer["peak"]
        except Absent as absent:
            return f"absent: {absent}"
        except RuntimeError as error:
            entry.racer.close()
            return str(error)
        if entry.seconds > self.budget.longest:
            entry.racer.drop()
            return f"a call takes {entry.seconds:.3g} s: over the limit of {self.budget.longest} s"

    def _check(self) -> None:
        """All by ours, and ours by the eager twin; if ours is not there, all by the eager twin."""
        there = [name for name, e in self.entries.items() if e.outputs.exists()]
        truth = next((name for name in (OURS, EAGER) if name in there), None)
        for name in there:
            against = EAGER if name == OURS and EAGER in there else truth
            if against and against != name:
                compare(self.entries[name], self.entries[against].outputs, self.problem)
        if OURS in there and self.entries[OURS].error is None:  # nothing to compare ours with
            self.entries[OURS].equal = None

    def _rounds(self) -> None:
        timed = [e for e in self.entries.values() if not e.problem and e.equal is not False]
        rounds = {id(e): self._count(e) for e in timed}
        for e in timed:
            e.warm, e.cold = [], [] if self._cold(e) else None
        for i in range(max(rounds.values(), default=0)):
            for e in timed if i % 2 == 0 else reversed(timed):
                if i < rounds[id(e)] and not e.problem:
                    self._turn(e)

    def _cold(self, e: Entry) -> bool:
        return self.budget.cold and e.seconds < 5 * LONG

    def _count(self, e: Entry) -> int:
        """Rounds of an entry, so that its turns fit the budget but for the least rounds."""
        warm = max(LEAST, e.seconds) + (e.seconds if e.seconds < LONG else 0.0)
        cold = e.seconds + 0.02 if self._cold(e) else 0.0
        return int(min(ROUNDS[1], max(ROUNDS[0], self.budget.seconds / (warm + cold))))

    def _turn(self, e: Entry) -> None:
        calls = int(min(200, max(1, LEAST / e.seconds)))
        requests = [(e.warm, {"do": "time", "calls": calls, "warm_up": e.seconds < LONG})]
        if self._cold(e):
            requests.append((e.cold, {"do": "time", "calls": 1, "flush": True}))
        try:
            for times, request in requests:
                times.append(e.racer.ask(request, self.budget.prepare))
        except RuntimeError as error:
            e.problem, e.warm, e.cold = str(error), None, None
            e.racer.close()


def spread(seconds: list[float] | None) -> dict | None:
    """Milliseconds of the median and the 20th and 80th percentile; None without times."""
    if not seconds:
        return None
    p20, median, p80 = (1e3 * np.quantile(seconds, (0.2, 0.5, 0.8))).tolist()
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80}


def is_noisy(times: dict | None) -> bool | None:
    return times and times["p80_ms"] - times["p20_ms"] > NOISY * times["median_ms"]
