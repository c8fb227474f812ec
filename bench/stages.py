"""What a step of `make demo` spends its time on, by kernel: a row for the page's shares.

    python bench/stages.py [RESULT.json] [--steps 60]

Makes a toybox run twice: plainly, for the times of its steps, and under torch's profiler, for the
shares. Prints the stages, and puts the row into RESULT in the place of an earlier one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout, installed or not

import numpy as np
from torch.profiler import ProfilerActivity, profile, record_function

from bench.record import key, load
from dreamfusion_fast import ops
from dreamfusion_fast.config import preset
from dreamfusion_fast.train import Trainer

KERNEL = re.compile(
    r"(?:.*dreamfusion_fast(?:::|_))?([a-z_]+?)(?:_backward|_second|_default|Backward)*$"
)
GUIDANCE, REST = "guidance", "everything else"
SMALL = 0.01  # stages of less than this share are counted among everything else


class Marked:
    """A guidance whose predictions the profiler sees under one name."""

    def __init__(self, guide):
        self.guide = guide

    def __getattr__(self, name: str):
        return getattr(self.guide, name)

    def predict(self, *arguments):
        with record_function(GUIDANCE):
            return self.guide.predict(*arguments)


def kernel_of(event: str) -> str | None:
    """hash_encode, of its forward, its gradients and what autograd does around them."""
    found = KERNEL.match(event)
    return found[1] if found and hasattr(ops, found[1]) else None


def shares(events, seconds: float) -> dict[str, float]:
    """Seconds of each stage out of `seconds` in all, the longest first. events: the profiler's
    averages, with key, self_cpu_time_total and cpu_time_total in microseconds."""
    found = Counter()
    for event in events:
        if event.key == GUIDANCE:
            found[GUIDANCE] += 1e-6 * event.cpu_time_total
        elif name := kernel_of(event.key):
            found[name] += 1e-6 * event.self_cpu_time_total
    kept = {name: s for name, s in found.most_common() if s >= SMALL * seconds}
    return {**kept, REST: max(0.0, seconds - sum(kept.values()))}


def train(steps: int, warm_up: int, profiler) -> list[float]:
    """Seconds of each step after the first `warm_up`, with the profiler on in these only."""
    with tempfile.TemporaryDirectory() as folder:
        config = preset("toybox", prompt="a red car", steps=warm_up + steps)
        trainer = Trainer(config, folder)
        trainer.guidance.guide = Marked(trainer.guidance.guide)
        run = trainer.run()
        for _ in range(warm_up):
            next(run)
        with profiler:
            return [metrics["seconds"] for metrics in run]


def measure(steps: int, warm_up: int = 10) -> dict:
    """The row."""
    plain = sorted(train(steps, warm_up, contextlib.nullcontext()))
    profiler = profile(activities=[ProfilerActivity.CPU])
    seen = train(steps, warm_up, profiler)
    found = shares(profiler.key_averages(), sum(seen))
    p20, median, p80 = (1e3 * np.quantile(plain, (0.2, 0.5, 0.8))).tolist()
    stages = {name: s / sum(seen) * median for name, s in found.items()}
    return {
        "op": "training step", "contender": "ours", "size": "make demo",
        "direction": "with guidance", "dtype": "float32", "stages": stages,
        "warm": {"median_ms": median, "p20_ms": p20, "p80_ms": p80}, "cold": None,
        "repeats": steps, "bytes": None, "flops": None, "percent_of_limit": None, "limit": None,
        "equal": None, "error": None, "noisy": p80 - p20 > 0.3 * median, "problem": None,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, nargs="?", help="a results file of make bench")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)
    record = load(options.result) if options.result else None
    row = measure(options.steps)
    print(f"a step: {row['warm']['median_ms']:.1f} ms")
    for name, ms in row["stages"].items():
        print(f"{name:24} {ms:8.1f} ms {100 * ms / row['warm']['median_ms']:5.1f} %")
    if record:
        record["rows"] = [r for r in record["rows"] if key(r) != key(row)] + [row]
        options.result.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
