"""Peak memory of `render` against the single ops, forward and backward, a process each.

    python bench/memory.py [--sides 64,256,512]

On a CPU it is the high-water mark of memory, less what was there before the call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

from bench.runner import high_water, reset_high_water

SIDES = (64, 256, 512)  # pixels of a square picture, 64 samples a ray
LIMIT = 600  # seconds of a process


def one(name: str, side: int) -> dict:
    """In a process of its own: megabytes that forward and backward need beside inputs and code,
    warmed up on a small picture, and on a GPU what torch allocated."""
    import torch

    from bench import peer_torch, task, tasks

    def prepared(pixels):
        size = dataclasses.replace(tasks.SIZES["paper"], pixels=pixels)
        problem = task.build("render", size)
        return problem, peer_torch.OPS["render"](problem.arrays, problem.settings, True)[0]

    peer_torch.start(name, keep=False)
    prepared(16)[1]()
    problem, call = prepared(side)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated()
    else:
        before = reset_high_water()
        call()
        peak = high_water()
    return {"contender": name, "pixels": side, "samples": problem.settings["count"],
            "peak_mb": (peak - before) / 1e6}  # fmt: skip


def measure(sides=SIDES) -> list[dict]:
    """A row a contender and side: contender, pixels, samples, peak_mb, or problem."""
    from bench.suite import ops_there

    names = ("ours", "ours-unfused") if "render" in ops_there()[0] else ("ours-unfused",)
    rows = []
    for side in sides:
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--sides", str(side)]
            row = {"contender": name, "pixels": side}
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
                lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
                last = lines[-1] if lines else f"ended with status {done.returncode}"
                rows.append({**row, "problem": last} if done.returncode else json.loads(last))
            except subprocess.TimeoutExpired:
                rows.append({**row, "problem": f"out of time ({LIMIT} s)"})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sides", default=",".join(map(str, SIDES)), help="with commas")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sides = [int(side) for side in options.sides.split(",")]
    if options.one:
        return print(json.dumps(one(options.one, sides[0])))
    for row in measure(sides):
        result = f"{row['peak_mb']:9.1f} MB" if "peak_mb" in row else row["problem"]
        print(f"{row['pixels']:5}² {row['contender']:14} {result}")


if __name__ == "__main__":
    main()
