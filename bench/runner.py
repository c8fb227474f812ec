"""The process of one contender: prepares an op from files, and times it when told to.

    python bench/runner.py MODULE NAME

MODULE has OPS, which maps an op's name to `prepare(arrays, settings, backward)`, and that returns
two functions: `call()`, which runs the op once and comes back when it is done, and `outputs()`,
the numpy arrays of the last call: results, then gradients in the task's order. It may have
`start(name)`, which returns its version, `release()`, which gives memory back, and `flush()`, which
empties a device's cache.

Each line of stdin is a JSON object and answered by one (bench/processes.py):
    {"do": "prepare", "op", "folder", "settings", "backward", "out", "in_place"}: writes the results
        to `out`; seconds of the first call, and of one again, and bytes of memory at most
    {"do": "time", "calls"[, "warm_up": true | "flush": true]}: seconds of one call
    {"do": "drop"}: {}
What goes wrong is answered by {"error"}; a module that cannot be imported by {"absent"}.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

import numpy as np

from bench.processes import ANSWER

CLEAR = Path("/proc/self/clear_refs")
KEPT = 1 << 21  # numbers of a result that are written for the comparison, at most
FLUSH = 2  # times the last cache's size are touched to empty it


def last_cache() -> int:
    """Bytes of the largest cache that the first core sees; 32 MB where that is not told."""
    sizes = [p.read_text().strip() for p in
             Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]  # fmt: skip
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1] in units), default=32 << 20)


def high_water() -> int:
    """The most bytes that lay in memory since the start, or since the last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def reset_high_water() -> int:
    """Let the high-water mark begin again at what is in memory now: bytes. Some containers do not
    allow that: the mark is then that since the start, and what is counted from it the growth."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")
    return high_water()


def thin(x: np.ndarray) -> np.ndarray:
    """At most KEPT of its numbers, evenly."""
    flat = np.asarray(x).reshape(-1)
    return flat[:: -(-flat.size // KEPT) or 1]


class Runner:
    """Answers requests with the ops of a module."""

    def __init__(self, module):
        self.module, self.call = module, None
        self.buffer = np.zeros(FLUSH * last_cache() // 8)

    def prepare(self, op, folder, settings, backward, out, in_place=False) -> dict:
        before = reset_high_water()
        arrays = {p.stem: np.load(p) for p in Path(folder).glob("*.npy")}
        start = time.perf_counter()
        self.call, outputs = self.module.OPS[op](arrays, settings, backward)
        self.call()
        first = time.perf_counter() - start
        if not in_place:
            self.call()  # what is traced or captured may only now take its usual way
        peak = high_water() - before  # too little where the mark cannot be reset
        np.savez(out, *map(thin, outputs()))
        del outputs, arrays
        gc.collect()
        again = min(self._once() for _ in range(2))
        return {"first": first, "again": again, "peak": peak}

    def time(self, calls, warm_up=False, flush=False) -> float:
        """On average over `calls` calls, after one that is not timed or after the caches have
        been emptied."""
        if warm_up:
            self.call()
        if flush:
            self.buffer += 1
            getattr(self.module, "flush", lambda: None)()
        return self._once(calls)

    def drop(self) -> dict:
        """What is kept of the op, back to the system."""
        self.call = None
        gc.collect()
        getattr(self.module, "release", lambda: None)()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return {}

    def _once(self, calls: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
        return (time.perf_counter() - start) / calls

    def answer(self, request: dict):
        request = dict(request)
        try:
            return getattr(self, request.pop("do"))(**request)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def say(answer) -> None:
    print(ANSWER + json.dumps(answer), flush=True)


def main(module_name: str, name: str) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a stopped process would stay
    try:
        module = importlib.import_module(module_name)
        version = getattr(module, "start", lambda name: "")(name)
    except Exception as error:  # what a peer raises where it cannot work is its own
        return say({"absent": f"{type(error).__name__}: {str(error).strip()[:300]}"})
    say({"version": str(version), "pid": os.getpid()})
    runner = Runner(module)
    for line in sys.stdin:
        say(runner.answer(json.loads(line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
