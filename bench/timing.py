"""Honest times of one call: warm-up, cold cache, many repeats, median and spread."""

from __future__ import annotations

import time

import torch

SECONDS = 0.6  # spent on one measurement, at most about
REPEATS = (7, 60)
FLUSH_BYTES = 256 << 20  # more than any L2
SLEEP_CYCLES = 2_000_000  # about a millisecond: the host's share of the call hides behind it


class Clock:
    """On a GPU, CUDA events around the call, which the host queues while the GPU is kept busy, so
    that launches cost nothing unless the call waits for the device; L2 is emptied before. On the
    CPU, for rehearsals, perf_counter."""

    def __init__(self, device: torch.device, seconds: float = SECONDS):
        self.cuda, self.seconds = device.type == "cuda", seconds
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def measure(self, call) -> dict:
        """Microseconds: median, 20th and 80th percentile; and the number of repeats."""
        once = [self._once(call) for _ in range(3)][-1]  # the first ones warm up
        low, high = REPEATS
        repeats = int(min(high, max(low, self.seconds / (once + 1e-3))))
        times = torch.tensor([self._once(call) for _ in range(repeats)], dtype=torch.float64)
        p20, median, p80 = (1e6 * times.quantile(torch.tensor([0.2, 0.5, 0.8]).double())).tolist()
        return {"median_us": median, "p20_us": p20, "p80_us": p80, "repeats": repeats}

    def _once(self, call) -> float:
        """Seconds."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3
