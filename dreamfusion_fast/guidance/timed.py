"""How long a guidance takes, without waiting for it."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .protocol import Conditions


class Timed:
    """Forwards to a guidance object and adds up the seconds spent in it: on a GPU by events, which
    wait for nothing until they are read, and not inside of a graph."""

    def __init__(self, guide):
        self.guide, self.seconds, self.events, self.calls = guide, 0.0, [], 0

    def __getattr__(self, name: str):
        return getattr(self.guide, name)

    def predict(self, z_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        return self._counted(self.guide.predict, z_t, t, conditions)

    def gradient(self, image: Tensor, embedding: Tensor) -> Tensor:
        return self._counted(self.guide.gradient, image, embedding)

    def _counted(self, call, x: Tensor, *rest) -> Tensor:
        self.calls += 1
        if not x.is_cuda:
            return self._timed(call, x, *rest)
        if torch.cuda.is_current_stream_capturing():
            self.calls -= 1
            return call(x, *rest)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = call(x, *rest)
        end.record()
        self.events.append((begin, end))
        return result

    def set_cameras(self, *view) -> None:
        """Tell a guidance that depends on the exact camera (it has this method) what comes."""
        self._timed(self.guide.set_cameras, *view)

    def take_seconds(self, calls: int) -> float | None:
        """Seconds of the `calls` predictions since the last time; None where a graph hid some.
        Waits for the device."""
        for begin, end in self.events:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000.0
        seconds = self.seconds if self.calls == calls else None
        self.seconds, self.events, self.calls = 0.0, [], 0
        return seconds

    def _timed(self, call, *args):
        began = time.perf_counter()
        result = call(*args)
        self.seconds += time.perf_counter() - began
        return result
