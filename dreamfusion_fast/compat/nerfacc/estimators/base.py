"""What estimators have in common."""

from __future__ import annotations

import torch
from torch import nn


class AbstractEstimator(nn.Module):
    """A module that samples rays, and learns from a field where."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_dummy", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self._dummy.device

    def sampling(self, *args, **kwargs):
        raise NotImplementedError

    def update_every_n_steps(self, *args, **kwargs) -> None:
        raise NotImplementedError
