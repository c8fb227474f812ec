"""The process that measures one case of bench/cases.py, driven line by line by gpu_check.py.

Reads commands from stdin and answers each with one line, ANSWER and JSON:
    measure   the op and its twin, at every size and precision: rows
    compile N torch.compile of the twins, each called once, in N seconds: what compiled
    compiled  measure those: rows
So that workers start and compile side by side, and measure one at a time. With --once, instead:
every op of every case forward and backward, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch._functorch.config

from bench import cases
from bench.processes import ANSWER
from bench.timing import SECONDS, Clock


def text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def outputs(function, tensors) -> tuple:
    """Results of function(*tensors), as a tuple; of one that works in place, none."""
    result = function(*tensors)
    return result if isinstance(result, tuple) else () if result is None else (result,)


def backward_call(function, tensors):
    """A call that computes the gradients again and again, from one forward pass."""
    outs = [x for x in outputs(function, tensors) if x.requires_grad]
    inputs = [x for x in tensors if x.requires_grad]
    cotangents = [torch.randn_like(x) for x in outs]
    return lambda: torch.autograd.grad(outs, inputs, cotangents, retain_graph=True)


def relative_error(case: cases.Case) -> float | None:
    """Largest difference of the op's results from the twin's, relative to the largest result."""
    if not case.comparable:
        return None
    results = []
    for function in (case.op, case.twin):
        copies = tuple(x.detach().clone() for x in case.tensors)
        results.append(outputs(function, copies) or copies)
    return max(
        (float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
         for a, b in zip(*results, strict=True) if b.numel()), default=0.0,
    )  # fmt: skip


class Bench:
    """One case at all sizes and precisions."""

    def __init__(self, name: str, sizes: list[str], device: torch.device, seconds: float):
        self.name, self.device, self.clock = name, device, Clock(device, seconds)
        precisions = (False, True)[: 1 + (name in cases.HALF)]
        self.variants = [(size, half) for size in sizes for half in precisions]
        self.compiled = {}  # variant -> function

    def _row(self, variant, scene=None, **values) -> dict:
        samples = {"samples_per_ray": scene.size.samples} if scene else {}
        return {"op": self.name, "size": variant[0], "precision": "half" if variant[1] else "fp32",
                **samples, **values}  # fmt: skip

    def _case(self, variant):
        if variant[1] and self.device.type == "cpu":
            raise RuntimeError("half precision: CUDA only")
        return cases.build(self.name, variant[0], self.device, variant[1])

    def measure(self) -> list[dict]:
        return [row for variant in self.variants for row in self._measure(variant)]

    def _measure(self, variant) -> list[dict]:
        try:
            case, scene = self._case(variant)
        except Exception as problem:
            return [self._row(variant, error=text(problem))]
        rows, error = [], None
        try:
            error = relative_error(case)
        except Exception as problem:
            rows.append(self._row(variant, implementation="comparison", error=text(problem)))
        for implementation, function in (("op", case.op), ("twin", case.twin)):
            for row in self._passes(variant, case, scene, implementation, function):
                rows.append({**row, "relative_error": error})
        return rows

    def _passes(self, variant, case, scene, implementation, function) -> list[dict]:
        rows = []
        for direction, kernel in (("forward", case.forward), ("backward", case.backward)):
            if kernel is None:
                continue
            row = self._row(variant, scene, implementation=implementation, direction=direction,
                            kernel=kernel)  # fmt: skip
            try:
                rows.append({**row, **self._time(function, case.tensors, direction)})
            except Exception as problem:
                rows.append({**row, "error": text(problem)})
        return rows

    def _time(self, function, tensors, direction: str) -> dict:
        if direction == "backward":
            return self.clock.measure(backward_call(function, tensors))
        with torch.no_grad():
            return self.clock.measure(lambda: function(*tensors))

    def compile(self, limit: str) -> list[dict]:
        """Compile each twin that is likely to be done in time."""
        torch._functorch.config.donated_buffer = False  # backward is called many times
        rows, begin, last = [], time.perf_counter(), 0.0
        for variant in self.variants:
            start = time.perf_counter()
            if start - begin + last > float(limit):
                rows.append(self._row(variant, error="not compiled: no time left"))
                continue
            try:
                self.compiled[variant] = self._compile(variant)
                last = time.perf_counter() - start
                rows.append(self._row(variant, seconds=last))
            except Exception as problem:
                rows.append(self._row(variant, error="not compiled: " + text(problem)))
        return rows

    def _compile(self, variant):
        """Called once, both passes. The case is made again each time: memory is free between."""
        case, _ = self._case(variant)
        function = torch.compile(case.twin, dynamic=False)
        with torch.no_grad():
            function(*case.tensors)
        if case.backward:
            backward_call(function, case.tensors)()
        return function

    def measure_compiled(self) -> list[dict]:
        rows = []
        for variant, function in self.compiled.items():
            case, scene = self._case(variant)
            rows += self._passes(variant, case, scene, "compiled", function)
        return rows


def run_once(device: torch.device, size: str) -> None:
    """Every op forward and backward, all precisions, without the twins."""
    for name in cases.CASES:
        for half in (False, True)[: 1 + (name in cases.HALF and device.type == "cuda")]:
            case, _ = cases.build(name, size, device, half)
            case.op(*case.tensors)
            if case.backward:
                backward_call(case.op, case.tensors)()
            if device.type == "cuda":
                torch.cuda.synchronize()
            print(f"ran {name}{' half' if half else ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument("--case", choices=cases.CASES)
    parser.add_argument("--sizes", default="tiny", help="names of bench/limits.py, with commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one measurement")
    parser.add_argument("--once", action="store_true")
    options = parser.parse_args()
    device, sizes = torch.device(options.device), options.sizes.split(",")
    if options.list:
        return print(*cases.CASES)
    if options.once:
        return run_once(device, sizes[0])
    bench = Bench(options.case, sizes, device, options.seconds)
    commands = {"measure": bench.measure, "compile": bench.compile,
                "compiled": bench.measure_compiled}  # fmt: skip
    print(ANSWER + json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        print(ANSWER + json.dumps(commands[command](*arguments)), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
