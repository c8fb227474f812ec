"""Optimizers by name, behind one small interface.

"adam" is the project's own kernel. "adan" and "shampoo" come from pytorch_optimizer, an optional
dependency. Each has

    capturable                whether a CUDA graph can hold its step
    zero_grad(set_to_none)    as torch has it
    set_share(share)          (1,) float32 on the device: factor of all learning rates from now on
    step(loss_scale=)         update; gradients are divided by loss_scale, (1,) there, or None
    skipped_on(device)        (1,) int32 there: updates left out for non-finite gradients
    tensors(), load(tensors)  its state, as "<number of the parameter>.<name>" -> tensor
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import OptimizerConfig, RunConfig
from .ops import Adam

BETAS = {"adam": (0.9, 0.99), "adan": (0.98, 0.92, 0.99), "shampoo": (0.9, 0.9)}  # by default
MOST_OBLONG = 64  # ratio of a matrix's sides: beyond, it is a table
GROW_EVERY = 1000  # whole updates after which a loss scale is doubled
SHAMPOO_EVERY = 20  # steps between inverse roots, and before the first


def build(
    config: OptimizerConfig,
    groups: list[dict],
    half_copies: dict[torch.nn.Parameter, Tensor],
    rate: Tensor,
) -> FusedAdam | Kept:
    """The optimizer that config.name names.

    Args:
        config: name, betas, eps.
        groups: parameter groups with "params" and "lr".
        half_copies: parameter -> float16 tensor of its shape, kept equal to it by each step.
        rate: (1,) float32 on the parameters' device, where set_share keeps its factor.
    Raises:
        ValueError: an unknown name, betas that do not suit it, parameters that Shampoo has no use
            for, or pytorch_optimizer is needed and not installed.
    """
    check(config)
    betas = config.betas or BETAS[config.name]
    if config.name == "adam":
        return FusedAdam(groups, betas=betas, eps=config.eps, half_copies=half_copies, rate=rate)
    kept = _kept_library(config.name)
    if config.name == "adan":
        return Kept(kept.Adan(groups, betas=betas, eps=config.eps), half_copies)
    _check_matrices([p for group in groups for p in group["params"]])
    inner = kept.ScalableShampoo(
        groups,
        betas=betas,
        moving_average_for_momentum=True,
        start_preconditioning_step=SHAMPOO_EVERY,
        preconditioning_compute_steps=SHAMPOO_EVERY,
        shape_interpretation=False,  # else it flattens small matrices
        graft_type=3,  # step sizes are RMSProp's, also of what is no matrix
        diagonal_eps=config.eps,
    )
    return Kept(inner, half_copies)


def check(config: OptimizerConfig) -> None:
    """Raise ValueError for a name that is not known, or betas or rates that do not suit it."""
    if config.name not in BETAS:
        raise ValueError(
            f"config `optimizer.name`: expected one of {', '.join(BETAS)}, got {config.name!r}"
        )
    n = len(BETAS[config.name])
    if config.betas and (len(config.betas) != n or not all(0 <= b < 1 for b in config.betas)):
        raise ValueError(
            f"config `optimizer.betas`: expected none or {n} of {config.name}'s, each at least 0 "
            f"and less than 1, got {config.betas}"
        )
    for name in ("table_rate", "mlp_rate", "warmup", "final_share", "eps"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise ValueError(
                f"config `optimizer.{name}`: expected at least 0, got {getattr(config, name)}"
            )


def rate_share(step: int, config: RunConfig) -> float:
    """Linear warm-up, then a cosine from 1 to optimizer.final_share."""
    o = config.optimizer
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
    return min(1.0, (step + 1) / max(1, o.warmup)) * (
        o.final_share + (1.0 - o.final_share) * cosine
    )


def _kept_library(name: str):
    try:
        import pytorch_optimizer
    except ImportError:
        raise ValueError(
            f"config `optimizer.name`: expected adam, as {name} is pytorch_optimizer's, which is "
            f"not installed: pip install 'dreamfusion-fast[optimizers]'"
        ) from None
    return pytorch_optimizer


def _check_matrices(params: list[Tensor]) -> None:
    """Shampoo learns how a matrix's rows and columns vary together. A hash table has no such
    structure and too many rows; our MLPs are flat arrays."""
    largest = max(params, key=Tensor.numel)
    for p in params:
        oblong = p.dim() == 2 and max(p.shape) > MOST_OBLONG * min(p.shape)
        if oblong or (p is largest and p.dim() < 2):
            raise ValueError(
                f"config `optimizer.name`: shampoo expected weight matrices, which the field "
                f"'paper' has, got a {'table' if oblong else 'flat array'} of shape "
                f"{tuple(p.shape)}"
            )


class FusedAdam(Adam):
    """ops.Adam: never waits for the device. A tensor whose gradient is not finite is left out."""

    capturable = True

    def set_share(self, share: Tensor) -> None:
        self._rate.copy_(share)

    def tensors(self) -> dict[str, Tensor]:
        states = self.state_dict()["state"].items()
        return {f"{i}.{name}": x for i, state in states for name, x in state.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
        groups = self.state_dict()["param_groups"]
        self.load_state_dict({"state": state, "param_groups": groups})


class LossScale:
    """The factor of the loss that keeps gradients within float16's range, on the device: it doubles
    after GROW_EVERY whole updates and halves when one was skipped (Micikevicius et al. 2018). Never
    waits for the device.

    Attributes:
        value: (1,) float32, the factor.
    """

    LEAST, MOST = 2.0**-10, 2.0**16

    def __init__(self, device: torch.device, start: float = 128.0):
        self.value = torch.full((1,), start, device=device)
        self.whole = torch.zeros(1, dtype=torch.int32, device=device)  # updates since a change
        self.skipped = torch.zeros(1, dtype=torch.int32, device=device)  # as seen at the last one

    def update(self, skipped: Tensor) -> None:
        """After a step. skipped: (1,) int32, the count of skipped updates since the start."""
        bad = skipped != self.skipped
        self.skipped.copy_(skipped)
        whole = (self.whole + 1) * ~bad
        grown = whole >= GROW_EVERY
        factor = 1.0 + grown.float() - 0.5 * bad.float()
        self.value.copy_((self.value * factor).clamp(self.LEAST, self.MOST))
        self.whole.copy_(whole * ~grown)

    def tensors(self) -> dict[str, Tensor]:
        return {"value": self.value, "whole": self.whole}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes what `tensors` made; of a run that has none it keeps its own."""
        for name, value in self.tensors().items():
            if name in tensors:
                value.copy_(tensors[name])


class Kept:
    """An optimizer of pytorch_optimizer. Its learning rates and its count of steps are the host's:
    no CUDA graph can hold it, and on a GPU each step waits for the device twice. If any gradient
    is not finite, the whole update is left out.

    Its state is a tree of dicts, lists and objects with tensors at the leaves; a step count a
    group.
    """

    capturable = False

    def __init__(self, inner, half_copies: dict[torch.nn.Parameter, Tensor]):
        self.inner, self.half_copies = inner, half_copies
        self.rates = [group["lr"] for group in inner.param_groups]
        self.params = [p for group in inner.param_groups for p in group["params"]]
        self.skipped = torch.zeros(1, dtype=torch.int32, device=self.params[0].device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def set_share(self, share: Tensor) -> None:
        factor = float(share)
        for group, rate in zip(self.inner.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def skipped_on(self, device: torch.device) -> Tensor:
        return self.skipped.to(device)

    @torch.no_grad()
    def step(self, loss_scale: Tensor | None = None) -> None:
        if self.skipped.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("optimizer: only adam can be captured in a CUDA graph")
        gradients = [p.grad for p in self.params if p.grad is not None]
        if not torch.stack([g.isfinite().all() for g in gradients]).all():
            self.skipped += 1
            return
        if loss_scale is not None:
            torch._foreach_div_(gradients, float(loss_scale))
        self.inner.step()
        for master, copy in self.half_copies.items():
            copy.copy_(master)

    def tensors(self) -> dict[str, Tensor]:
        numbered = {p: i for i, p in enumerate(self.params)}
        result = {}
        for group in self.inner.param_groups:
            for p in (p for p in group["params"] if p in self.inner.state):
                leaves = dict(_leaves(self.inner.state[p]))
                leaves["step"] = torch.tensor([group["step"]])
                result |= {f"{numbered[p]}.{name}": x for name, x in leaves.items()}
        return result

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError for the state of another optimizer, or of other parameters."""
        for i, p in enumerate(self.params):  # the library makes state where there are gradients
            p.grad = torch.zeros_like(p) if f"{i}.step" in tensors else None
        numbered = {p: i for i, p in enumerate(self.params)}
        for group in self.inner.param_groups:
            self.inner.init_group(group)
            steps = [tensors.get(f"{numbered[p]}.step") for p in group["params"]]
            group["step"] = max((int(x) for x in steps if x is not None), default=0)
        self.zero_grad()
        mine = self.tensors()
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in tensors.items()}:
            raise ValueError("optimizer: expected the state of the same optimizer and parameters")
        for key, value in mine.items():
            value.copy_(tensors[key])


def _leaves(node, path: str = ""):
    """(dotted path, tensor) of all tensors in a tree of dicts, lists and objects."""
    if isinstance(node, Tensor):
        yield path.lstrip("."), node
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from _leaves(child, f"{path}.{i}")
    elif isinstance(node, dict):
        for name, child in node.items():
            yield from _leaves(child, f"{path}.{name}")
    elif type(node).__module__.startswith("pytorch_optimizer") and not isinstance(node, int):
        yield from _leaves(vars(node), path)  # its enumerations are integers
