"""A function of static tensors, replayed as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


class Captured:
    """Calls `function`; on CUDA, after a few calls, by replaying a graph of its kernels.

    The function takes and returns nothing, reads and writes tensors that keep their places, never
    waits for the device and never asks for a size that lives there. The CPU calls it as it is.
    Where it cannot be captured, it is called as it is from then on: a warning says why, once.

    Args:
        function: what is called.
        device: where it works.
        pool: of torch.cuda.graph_pool_handle: graphs that share one share their memory. They may,
            if nothing that one of them leaves in it is read after another has run.
        enabled: False: never captured.
    Attributes:
        failed: whether a capture was tried and failed.
    """

    WARM_UP = 3  # calls on a side stream before the capture: libraries set themselves up there

    def __init__(
        self,
        function: Callable[[], None],
        device: torch.device,
        pool: tuple[int, int] | None = None,
        enabled: bool = True,
    ):
        self.function, self.device, self.pool = function, device, pool
        self.enabled, self.failed, self.side = enabled, False, None
        self.reset()

    def reset(self) -> None:
        """Capture anew: after a tensor has changed its place, or a plain number its value."""
        self.graph, self.calls = None, 0

    def __call__(self) -> None:
        if self.device.type != "cuda" or not self.enabled or self.failed:
            self.function()
        elif self.graph is not None:
            self.graph.replay()
        elif self.calls < self.WARM_UP:
            self._call_aside()
            self.calls += 1
        else:
            self._capture()
            self()  # capturing runs nothing

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.side):
                self.function()
            self.graph = graph
        except RuntimeError as error:
            self.failed = True
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            warnings.warn(
                f"CUDA graph: the step could not be captured and goes on without, slower: {reason}",
                stacklevel=4,
            )

    def _call_aside(self) -> None:
        current = torch.cuda.current_stream(self.device)
        self.side = self.side or torch.cuda.Stream(self.device)  # each has memory of its own
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            self.function()
        current.wait_stream(self.side)
