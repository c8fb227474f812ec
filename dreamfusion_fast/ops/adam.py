"""Adam, one fused pass over each parameter tensor, safe against non-finite gradients."""

from __future__ import annotations

import torch

from ._backend import (
    check_range,
    check_tensor,
    kernels,
    ptr,
    register,
    scalar,
    settled,
    stream,
)

COUNTERS = (torch.int32, torch.int64)


def adam_step(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    skipped: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    grad_scale: float = 1.0,
    param_half: torch.Tensor | None = None,
    rate: torch.Tensor | None = None,
    loss_scale: torch.Tensor | None = None,
) -> None:
    """Make one step of Adam (Kingma and Ba 2015, algorithm 1) in place.

    If any gradient is not finite, nothing changes but `skipped`, which goes up by one; this is
    decided on the device, without a sync.

    Args:
        param: any shape, float32 or float64; changed.
        grad: shape and dtype of param, gradient times grad_scale and loss_scale.
        exp_avg: like grad, running mean of the gradient, zero before the first step; changed.
        exp_avg_sq: like grad, running mean of its square, zero before the first step; changed.
        step: (1,) int32 or int64, number of steps made so far; goes up by one.
        skipped: (1,) int32, number of steps skipped.
        lr: learning rate, at least 0.
        beta1: decay of exp_avg, 0 to 1, less than 1.
        beta2: decay of exp_avg_sq, 0 to 1, less than 1.
        eps: added to the denominator, at least 0.
        grad_scale: the loss scale; gradients are divided by it. Above 0.
        param_half: shape of param, float16, CUDA only: receives the new parameters, rounded; a
            step that is skipped leaves it as it is.
        rate: (1,) float32 on param's device, a factor of lr: may be changed between replays of a
            CUDA graph, which keeps every plain number.
        loss_scale: (1,) float32 on param's device, above 0, a factor of grad_scale: likewise.
    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device, layout or range is wrong.
    """
    check_tensor("param", param)
    like = (param.dtype, tuple(param.shape), param.device)
    check_tensor("grad", grad, *like)
    check_tensor("exp_avg", exp_avg, *like)
    check_tensor("exp_avg_sq", exp_avg_sq, *like)
    check_tensor("step", step, COUNTERS, (1,), param.device)
    check_tensor("skipped", skipped, torch.int32, (1,), param.device)
    _check_settings(lr, beta1, beta2, eps)
    if not grad_scale > 0:
        raise ValueError(f"argument `grad_scale`: expected more than 0, got {grad_scale}")
    check_tensor("param_half", param_half, torch.float16, *like[1:], optional=True)
    check_tensor("rate", rate, torch.float32, (1,), param.device, optional=True)
    check_tensor("loss_scale", loss_scale, torch.float32, (1,), param.device, optional=True)
    if param_half is not None and not kernels(param).has_half:
        raise ValueError(f"argument `param_half`: expected None on {param.device}, got a tensor")
    with torch.no_grad():
        torch.ops.dreamfusion_fast.adam_step(
            param, grad, exp_avg, exp_avg_sq, step, skipped, lr, beta1, beta2, eps, grad_scale,
            param_half, rate, loss_scale,
        )  # fmt: skip


def _check_settings(lr, beta1, beta2, eps):
    check_range("lr", lr, 0, float("inf"))
    check_range("beta1", beta1, 0, 1 - 2**-53)
    check_range("beta2", beta2, 0, 1 - 2**-53)
    check_range("eps", eps, 0, float("inf"))


def _step(
    param, grad, exp_avg, exp_avg_sq, step, skipped, lr, beta1, beta2, eps, grad_scale,
    param_half=None, rate=None, loss_scale=None,
):  # fmt: skip
    changed = [param, exp_avg, exp_avg_sq, step, skipped, param_half]
    changed = [t for t in changed if t is not None and not t.is_inference()]
    torch.autograd.graph.increment_version(changed)  # autograd then notices the change
    module = kernels(param)
    found, factors = torch.empty_like(skipped), param.new_empty(module.ADAM_FACTORS)
    module.adam_step(
        scalar(param), ptr(param), ptr(grad), ptr(exp_avg), ptr(exp_avg_sq), ptr(step),
        ptr(skipped), ptr(rate), ptr(loss_scale), ptr(param_half), ptr(found), ptr(factors),
        step.dtype == torch.int64, param.numel(), lr, beta1, beta2, eps, grad_scale, stream(param),
    )  # fmt: skip


register(
    "adam_step(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!) step, Tensor(e!) skipped, float lr, float beta1, float beta2, float eps,"
    " float grad_scale, Tensor(f!)? param_half=None, Tensor? rate=None,"
    " Tensor? loss_scale=None) -> ()",
    _step,
    lambda *args: None,
)


class Adam(torch.optim.Optimizer):
    """torch.optim.Adam's interface over `adam_step`: parameter groups with lr, betas and eps, and
    a state dict with step, exp_avg and exp_avg_sq. Loads a state dict of torch.optim.Adam.

    A tensor whose gradient is not finite keeps its parameters and its state; `skipped` counts.
    Parameters are contiguous float32 or float64.

    half_copies: parameter -> float16 tensor of its shape, kept equal to the rounded parameter by
    every step from then on (CUDA only; no part of the state dict, and not filled here).
    rate: (1,) float32, a factor of every group's lr that may change on the device.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, half_copies=None, rate=None):
        self._rate = rate
        self._skipped = {}  # device -> (1,) int32
        self._half_copies = dict(half_copies or {})
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        ours = {param for group in self.param_groups for param in group["params"]}
        if not ours.issuperset(self._half_copies):
            raise ValueError(
                "argument `half_copies`: expected parameters of this optimizer as keys"
            )

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_settings(group["lr"], *group["betas"], group["eps"])

    def skipped(self) -> int:
        """Number of tensor updates skipped since construction. Waits for the device."""
        return sum(int(n) for n in self._skipped.values())

    def skipped_on(self, device: torch.device) -> torch.Tensor:
        """The count of one device, (1,) int32, for who must not wait."""
        device = settled(device)
        if device not in self._skipped:
            self._skipped[device] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._skipped[device]

    @torch.no_grad()
    def step(self, closure=None, grad_scale: float = 1.0, loss_scale: torch.Tensor | None = None):
        """Update every parameter that has a gradient; gradients are divided by grad_scale, and by
        loss_scale (1,), which may change on the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group, grad_scale, loss_scale)
        return loss

    def _update(self, param, group, grad_scale, loss_scale):
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros(1, dtype=torch.int32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        adam_step(
            param, param.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], state["step"],
            self.skipped_on(param.device), group["lr"], *group["betas"], group["eps"], grad_scale,
            self._half_copies.get(param), self._rate, loss_scale,
        )  # fmt: skip

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for param, state in self.state.items():  # torch.optim.Adam keeps a float step of shape ()
            step = torch.as_tensor(state["step"]).to(param.device, torch.int32)
            state["step"] = step.reshape(1).clone()
