"""Score distillation sampling: the gradient that a frozen diffusion model gives a picture.

Paper, equation 3: grad = E[w(t) (eps_hat(z_t; y, t) - eps) dx/dtheta], no gradient through the
U-Net. Plain torch; the fused kernels of the GPU path replace perturb and guide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import GuidanceConfig


def sample_timesteps(
    n: int, n_steps: int, t_range: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """(n,) int64, uniform over the share `t_range` of a schedule of n_steps (paper: 0.02-0.98)."""
    low, high = (round(t * n_steps) for t in t_range)
    return torch.randint(low, max(high, low + 1), (n,), generator=generator).clamp(0, n_steps - 1)


def t_range_at(config: GuidanceConfig, progress: float) -> tuple[float, float]:
    """The range that t is drawn from at a share `progress` of the run, 0 to 1: shapes are decided
    in much noise, details in little."""
    low, high = config.t_range
    return low, high - progress * max(0.0, high - config.t_high_end)


def perturb(z: Tensor, noise: Tensor, alpha2: Tensor) -> Tensor:
    """z_t = alpha_t z + sigma_t eps, alpha2 = alpha_t² (B,)."""
    a = alpha2[:, None, None, None]
    return a.sqrt() * z + (1.0 - a).sqrt() * noise


def guide(
    cond: Tensor, uncond: Tensor | None, noise: Tensor, scale: float, weight: Tensor
) -> Tensor:
    """w(t) ((1 + omega) eps_cond - omega eps_uncond - eps), weight (B,)."""
    guided = cond if uncond is None else (1.0 + scale) * cond - scale * uncond
    return weight[:, None, None, None] * (guided - noise)


def weight(alpha2: Tensor, weighting: str) -> Tensor:
    """w(t) of (B,) alpha_t²: "sigma2" (paper) or "uniform"."""
    if weighting == "sigma2":
        return 1.0 - alpha2
    if weighting == "uniform":
        return torch.ones_like(alpha2)
    raise ValueError(f"config `weighting`: expected sigma2 or uniform, got {weighting!r}")


def loss(
    guidance,
    image: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    config: GuidanceConfig,
    generator: torch.Generator,
    progress: float = 0.0,
) -> Tensor:
    """A scalar whose gradient with respect to `image` (B, 3, S, S) is the SDS gradient, averaged
    over the B views. cond, uncond: embeddings of B prompts; uncond None: no guidance scale.
    progress: share of the run that is done."""
    z = guidance.encode(image)
    with torch.no_grad():
        n = len(image)
        t_range = t_range_at(config, progress)
        t = sample_timesteps(n, len(guidance.alphas_cumprod), t_range, generator)
        noise = torch.randn(z.shape, generator=generator).to(z)
        t = t.to(z.device)
        alpha2 = guidance.alphas_cumprod[t]
        z_t = perturb(z, noise, alpha2)
        if uncond is None:
            predicted = guidance.predict_noise(z_t, t, cond), None
        else:
            both = guidance.predict_noise(
                torch.cat((z_t, z_t)), torch.cat((t, t)), torch.cat((cond, uncond))
            )
            predicted = both.chunk(2)
        gradient = guide(*predicted, noise, config.scale, weight(alpha2, config.weighting))
    return (z * gradient).sum() / n
