"""What passes between the loop and a guidance."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..camera import Cameras


@dataclass
class Conditions:
    """What N predictions are conditioned on, a row each, on the guidance's device.

    text: (N, ...), rows of the guidance's `embed`.
    cameras: the views of the N pictures; None: the guidance is told of none.
    told: (N,) float32, 1 where a row is told its camera and 0 where it is not; None: all are told.
    """

    text: Tensor
    cameras: Cameras | None = None
    told: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that it holds, in a fixed order."""
        of_cameras = [] if self.cameras is None else list(vars(self.cameras).values())
        return [self.text, *of_cameras, *([] if self.told is None else [self.told])]


def conditions_of(
    text: Tensor,
    cameras: Cameras,
    conditions: int,
    told: bool = True,
    unconditional_camera: bool = False,
) -> Conditions:
    """The conditions of B views under K conditions each, row k B + i for view i.

    Args:
        text: (K * B, ...): the views' own texts; with K > 1 the unconditional ones behind them;
            then negatives.
        cameras: of the B views.
        conditions: K.
        told: whether any row is told its camera; False: words alone guide, as in the paper.
        unconditional_camera: whether the second group, the unconditional half of classifier-free
            guidance, is told the camera, too. Negatives always are.
    """
    rows = cameras.focal.new_full((conditions, len(cameras.focal)), float(told))
    if conditions > 1 and not unconditional_camera:
        rows[1] = 0.0
    return Conditions(text, cameras.repeat(conditions), rows.flatten())
