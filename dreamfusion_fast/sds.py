"""Score distillation sampling: the gradient that a frozen diffusion model gives a picture.

Paper, equation 3: grad = E[w(t) (eps_hat(z_t; y, t) - eps) dx/dtheta], no gradient through the
U-Net. `perturb` makes the U-Net's input, `guide` the gradient from its output; on CUDA each is one
Triton kernel (kernels/sds.py), elsewhere plain torch that makes the same numbers from the same
seed. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import GuidanceConfig

if TYPE_CHECKING:
    from .guidance.protocol import Conditions

PREDICTIONS = ("epsilon", "v_prediction")
_MASK = 0xFFFFFFFF


# ---- time ---------------------------------------------------------------------------------------
def t_range_at(config: GuidanceConfig, progress: float) -> tuple[float, float]:
    """The range that t is drawn from at a share `progress` of the run, 0 to 1: shapes are decided
    in much noise, details in little. The upper end falls from t_range's to t_high_end."""
    shares = {"linear": progress, "sqrt": math.sqrt(progress), "step": float(progress >= 0.5)}
    if config.t_anneal not in shares:
        raise ValueError(
            f"config `t_anneal`: expected one of {', '.join(shares)}, got {config.t_anneal!r}"
        )
    low, high = config.t_range
    return low, high - shares[config.t_anneal] * max(0.0, high - config.t_high_end)


class Schedule:
    """What depends on t alone: alphas_cumprod (T,) and w(t) (T,) on a device, and the draw of t.

    t_draw "uniform" is the paper's. "importance" draws t as often as its w(t) is large, and weights
    all alike: the same mean gradient, with less of its steps spent where little is learnt.
    Raises ValueError for an unknown setting.
    """

    def __init__(self, alphas_cumprod: Tensor, config: GuidanceConfig):
        if config.t_draw not in ("uniform", "importance"):
            raise ValueError(
                f"config `t_draw`: expected uniform or importance, got {config.t_draw!r}"
            )
        t_range_at(config, 0.0)
        self.config, self.alphas_cumprod = config, alphas_cumprod.float()
        self.weights = weight_table(self.alphas_cumprod, config.weighting).clone()
        self._chance = self.weights.cpu().clone()

    def _bounds(self, progress: float) -> tuple[int, int]:
        n = len(self._chance)
        low, high = (round(t * n) for t in t_range_at(self.config, progress))
        low = min(low, n - 1)
        return low, min(max(high, low + 1), n)

    def draw(self, n: int, progress: float, generator: torch.Generator) -> Tensor:
        """(n,) int64 timesteps on the CPU at a share `progress` of the run."""
        low, high = self._bounds(progress)
        if self.config.t_draw == "uniform":
            return torch.randint(low, high, (n,), generator=generator)
        chance = self._chance[low:high]
        self.weights.fill_(float(chance.mean()))  # in its place: a graph reads it
        return low + torch.multinomial(chance, n, True, generator=generator)


def weight_table(alphas_cumprod: Tensor, weighting: str) -> Tensor:
    """w(t) of every timestep (T,), float32: "sigma2" (paper) or "uniform"."""
    if weighting == "sigma2":
        return 1.0 - alphas_cumprod
    if weighting == "uniform":
        return torch.ones_like(alphas_cumprod)
    raise ValueError(f"config `weighting`: expected sigma2 or uniform, got {weighting!r}")


# ---- noise --------------------------------------------------------------------------------------
def normals(seed: Tensor, n_views: int, n: int) -> Tensor:
    """(n_views, n) float32 of the standard normal distribution, on seed's device, a function of
    the seed (1,) int64 alone: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, laid out as
    kernels/sds.py says."""
    quarter = -(-n // 4)
    counter = torch.arange(n_views * quarter, device=seed.device)
    bits = _philox(counter, seed & _MASK, (seed >> 32) & _MASK)
    u = [_uniform(x) for x in bits]
    pairs = [*_box_muller(u[0], u[1]), *_box_muller(u[2], u[3])]
    return torch.stack(pairs).view(4, n_views, quarter).transpose(0, 1).flatten(1)[:, :n]


def _philox(counter: Tensor, key0: Tensor, key1: Tensor) -> tuple[Tensor, ...]:
    """Four words of 32 bits, as int64, for each counter below 2^32."""
    c0, c1, c2, c3 = counter, 0, torch.zeros_like(counter), 0
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64: the high half is masked out below
        c0, c2 = (b >> 32) & _MASK ^ c1 ^ key0, (a >> 32) & _MASK ^ c3 ^ key1
        c1, c3 = b & _MASK, a & _MASK
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _uniform(bits: Tensor) -> Tensor:
    """In [0, 1): the word read as a signed number, folded."""
    signed = bits.to(torch.int32)
    return torch.where(signed < 0, ~signed, signed).float() * 4.6566127342e-10


def _box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    radius = (-2.0 * u1.clamp_min(1e-7).log()).sqrt()
    angle = (2.0 * math.pi) * u2
    return radius * angle.cos(), radius * angle.sin()


# ---- before and behind the U-Net ----------------------------------------------------------------
def perturb(
    z: Tensor,
    t: Tensor,
    seed: Tensor,
    alphas_cumprod: Tensor,
    copies: int = 1,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """z_t = alpha_t z + sigma_t eps in `dtype`, `copies` times: the model's input for all
    conditions of a batch.

    Args:
        z: (B, C, H, W) float32, contiguous.
        t: (B,) int64.
        seed: (1,) int64, of the noise.
        alphas_cumprod: (T,) float32, alpha_t².
        channels_last: the memory format of the result.
        noise: what normals makes of the seed, if it is at hand; on CUDA it never is.
    Returns:
        (copies * B, C, H, W), the first B rows for the first condition, and so on.
    """
    _check_step(z, t, seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if z.is_cuda:
        from .kernels import sds as kernels

        shape = (copies * len(z), *z.shape[1:])
        out = torch.empty(shape, dtype=dtype, device=z.device, memory_format=layout)
        kernels.perturb(z, t, seed, alphas_cumprod, out)
        return out
    alpha2 = alphas_cumprod[t][:, None, None, None]
    noise = (normals(seed, len(z), z[0].numel()) if noise is None else noise).view_as(z)
    noisy = alpha2.sqrt() * z + (1.0 - alpha2).sqrt() * noise
    return noisy.to(dtype).repeat(copies, 1, 1, 1).contiguous(memory_format=layout)


def guide(
    prediction: Tensor,
    z_t: Tensor,
    t: Tensor,
    seed: Tensor,
    alphas_cumprod: Tensor,
    weights: Tensor,
    bad: Tensor,
    scale: float = 0.0,
    negative_weights: Tensor | None = None,
    prediction_type: str = "epsilon",
    rescale: float = 0.0,
    clip: float = math.inf,
    share: float = 1.0,
    noise: Tensor | None = None,
) -> Tensor:
    """The gradient share * w(t) (eps_hat - eps) with respect to z (equation 3).

    Guidance is the paper's, e = (1 + scale) cond - scale uncond. With negative directions it is
    Perp-Neg (Armandpour et al. 2023): each neg_k - uncond, weighted, loses what lies along
    cond - uncond and is added, (1 + scale) times. rescale mixes in the guided prediction at the
    standard deviation of cond's (Lin et al. 2024, section 3.4). A v prediction becomes
    eps = alpha v + sigma z_t behind that. A view with a number that is not finite gets a gradient
    of zero, and counts in `bad`.

    Args:
        prediction: (K * B, at least C, H, W), any float dtype and dense layout: conditions cond;
            or cond and uncond; or cond, uncond and the negatives. Further channels are left out
            (DeepFloyd IF's variance).
        z_t: perturb's result.
        t, seed, alphas_cumprod: as given to perturb.
        weights: (T,) float32, w(t).
        bad: (1,) int32; goes up by the number of views that are not finite.
        scale: omega, 100 in the paper.
        negative_weights: (B, K - 2) float32, or None.
        prediction_type: what the model predicts, epsilon or v_prediction.
        rescale: 0 (off) to 1.
        clip: largest size of a number of the gradient, before `share`.
        share: a factor, one over the number of views whose gradients are added up.
        noise: as in perturb.
    Returns:
        (B, C, H, W) float32, contiguous.
    """
    _check_prediction(prediction, z_t, t, negative_weights, prediction_type)
    if prediction.is_cuda:
        from .kernels import sds as kernels

        return kernels.guide(
            prediction, z_t, t, seed, alphas_cumprod, weights, bad, scale, negative_weights,
            prediction_type == "v_prediction", rescale, clip, share,
        )  # fmt: skip
    n, channels = len(t), z_t.shape[1]
    cond, *others = prediction[:, :channels].float().split(n)
    guided = _guided(cond, others, scale, negative_weights)
    if rescale:
        std = [x.flatten(1).std(1, correction=0)[:, None, None, None] for x in (cond, guided)]
        guided = guided * (rescale * std[0] / std[1] + (1.0 - rescale))
    alpha2 = alphas_cumprod[t][:, None, None, None]
    if prediction_type == "v_prediction":
        guided = alpha2.sqrt() * guided + (1.0 - alpha2).sqrt() * z_t[:n].float()
    noise = (normals(seed, n, cond[0].numel()) if noise is None else noise).view_as(cond)
    gradient = weights[t][:, None, None, None] * (guided - noise)
    finite = gradient.isfinite().flatten(1).all(1)
    bad += (~finite).sum()
    gradient = share * gradient.clamp(-clip, clip)
    return torch.where(finite[:, None, None, None], gradient, 0.0).contiguous()


def _guided(cond: Tensor, others: list[Tensor], scale: float, weights: Tensor | None) -> Tensor:
    if not others:
        return cond
    uncond, *negatives = others
    positive = cond - uncond
    guided = cond + scale * positive
    if negatives:
        weighted = [w[:, None, None, None] * (x - uncond) for w, x in zip(weights.T, negatives)]
        negative = torch.stack(weighted).sum(0)
        dot, square = ((x * positive).flatten(1).sum(1) for x in (negative, positive))
        along = torch.where(square > 0, dot / square, 0.0)[:, None, None, None]
        guided = guided + (1.0 + scale) * (negative - along * positive)
    return guided


def _check_step(z: Tensor, t: Tensor, seed: Tensor) -> None:
    if z.dtype != torch.float32 or z.dim() != 4 or not z.is_contiguous():
        raise ValueError(
            f"argument `z`: expected contiguous float32 (B, C, H, W), got {z.dtype} "
            f"{tuple(z.shape)}, strides {z.stride()}"
        )
    if t.shape != z.shape[:1] or seed.shape != (1,) or {t.dtype, seed.dtype} != {torch.int64}:
        raise ValueError(
            f"arguments `t` and `seed`: expected int64 ({len(z)},) and (1,), got {t.dtype} "
            f"{tuple(t.shape)} and {seed.dtype} {tuple(seed.shape)}"
        )


def _check_prediction(prediction, z_t, t, negative_weights, prediction_type) -> None:
    if prediction_type not in PREDICTIONS:
        raise ValueError(
            f"argument `prediction_type`: expected {' or '.join(PREDICTIONS)}, got "
            f"{prediction_type!r}"
        )
    n = len(t)
    conditions = 0 if not n else len(prediction) // n
    negatives = 0 if negative_weights is None else negative_weights.shape[1]
    fits = len(prediction) == conditions * n and prediction.shape[2:] == z_t.shape[2:]
    if n and (not fits or prediction.shape[1] < z_t.shape[1]):
        raise ValueError(
            f"argument `prediction`: expected (K * {n}, {z_t.shape[1]} or more, "
            f"{', '.join(map(str, z_t.shape[2:]))}), got {tuple(prediction.shape)}"
        )
    if n and conditions != 2 + negatives and (negatives or conditions > 2):
        raise ValueError(
            f"argument `negative_weights`: expected {max(conditions - 2, 0)} a view, for "
            f"{conditions} conditions, got {negatives}"
        )


def gradient(
    guidance,
    z: Tensor,
    t: Tensor,
    seed: Tensor,
    conditions: Conditions,
    schedule: Schedule,
    bad: Tensor,
    negative_weights: Tensor | None = None,
    share: float = 1.0,
) -> Tensor:
    """The SDS gradient with respect to z (B, C, H, W), the guidance's picture of B views.

    conditions: of K * B predictions: the views' own; with a guidance scale, the unconditional ones
    behind them; then negatives, with negative_weights (B, K - 2). The rest as in perturb and guide.
    """
    config, n = schedule.config, len(z)
    copies = len(conditions.text) // n
    noise = None if z.is_cuda else normals(seed, n, z[0].numel())  # once, where it costs
    z_t = perturb(
        z.detach().float().contiguous(), t, seed, schedule.alphas_cumprod, copies,
        getattr(guidance, "dtype", torch.float32), getattr(guidance, "channels_last", False), noise,
    )  # fmt: skip
    prediction = guidance.predict(z_t, t.repeat(copies), conditions)
    return guide(
        prediction, z_t, t, seed, schedule.alphas_cumprod, schedule.weights, bad, config.scale,
        negative_weights, getattr(guidance, "prediction_type", "epsilon"), config.rescale,
        config.clip or math.inf, share, noise,
    )  # fmt: skip
