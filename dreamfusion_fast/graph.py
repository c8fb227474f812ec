"""A function of static tensors, replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Captured:
    """Calls `function`; on CUDA, after a few calls, by replaying a graph of its kernels.

    The function takes and returns nothing, reads and writes tensors that keep their places, never
    waits for the device and never asks for a size that lives there. The CPU calls it as it is.

    Args:
        function: what is called.
        device: where it works.
    """

    WARM_UP = 3  # calls on a side stream before the capture: libraries set themselves up there

    def __init__(self, function: Callable[[], None], device: torch.device):
        self.function, self.device, self.side = function, device, None
        self.reset()

    def reset(self) -> None:
        """Capture anew: after a tensor has changed its place, or a plain number its value."""
        self.graph, self.calls = None, 0

    def __call__(self) -> None:
        if self.device.type != "cuda":
            self.function()
        elif self.graph is not None:
            self.graph.replay()
        elif self.calls < self.WARM_UP:
            self._call_aside()
            self.calls += 1
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.side):
                self.function()
            self.graph = graph
            graph.replay()  # capturing runs nothing

    def _call_aside(self) -> None:
        current = torch.cuda.current_stream(self.device)
        self.side = self.side or torch.cuda.Stream(self.device)  # each has memory of its own
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            self.function()
        current.wait_stream(self.side)
