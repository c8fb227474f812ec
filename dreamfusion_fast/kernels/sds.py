"""The arithmetic of score distillation on a GPU: one kernel before the U-Net, one behind it.

dreamfusion_fast/sds.py holds the twins, the formulas and the meaning of every argument. Noise is
never stored: both kernels make it in registers from (seed, view, place), by Philox (Salmon et al.
2011) and Box-Muller. A view of n numbers is cut in four quarters of q = ceil(n / 4): counter
view * q + i gives the four normals of places i, i + q, i + 2 q and i + 3 q, so that nothing made is
thrown away and neighbouring lanes touch neighbouring numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops._backend import on_its_device

PERTURB_BLOCK = 256  # counters a program of perturb takes, four numbers each
GUIDE_BLOCK = 1024  # counters that a program of guide takes at a time: what its registers hold
GUIDE_WARPS = 16
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _places(i, q):
    """Places of the four normals of counters i: (len(i), 2, 2), [k, a, b] in quarter 2 b + a."""
    two = tl.arange(0, 2)
    return i[:, None, None] + q * (two[None, :, None] + 2 * two[None, None, :])


@triton.jit
def _normals(seed, counter):
    """The four normals of each counter, in the order of _places."""
    n0, n1, n2, n3 = tl.randn4x(seed, counter)
    return tl.join(tl.join(n0, n1), tl.join(n2, n3))


@triton.jit
def _address(place, hw, channel_stride, pixel_stride):
    """From a place of a contiguous (C, H, W) to its offset under other strides."""
    return place // hw * channel_stride + place % hw * pixel_stride


@triton.jit
def perturb_kernel(
    z, out, seed_address, t, alphas, n, q, hw, out_view, out_c, out_p,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0)
    i, place, inside = _chunk(tl.program_id(1), n, q, BLOCK)
    alpha2 = tl.load(alphas + tl.load(t + view))
    noise = _normals(tl.load(seed_address), view * q + i)
    clean = tl.load(z + view.to(tl.int64) * n + place, mask=inside, other=0.0)
    noisy = tl.sqrt(alpha2) * clean + tl.sqrt(1.0 - alpha2) * noise
    noisy = noisy.to(out.dtype.element_ty)
    address = _address(place, hw, out_c, out_p)
    for copy in tl.static_range(COPIES):
        row = (copy * tl.num_programs(0) + view).to(tl.int64)
        tl.store(out + row * out_view + address, noisy, mask=inside)


@triton.jit
def _chunk(k, n, q, BLOCK: tl.constexpr):
    """Counters, places and what of them exists, of chunk k of a view."""
    i = k * BLOCK + tl.arange(0, BLOCK)
    place = _places(i, q)
    return i, place, (i < q)[:, None, None] & (place < n)


@triton.jit
def _load(x, copy, stride, address, inside):
    """Of the program's view, in `copy` of the batch, as float32."""
    row = (copy * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    return tl.load(x + row * stride + address, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _directions(prediction, negative_weights, stride, at, inside, NEGATIVES: tl.constexpr):
    """cond, cond - uncond, and the weighted sum of the negatives' directions from uncond."""
    cond = _load(prediction, 0, stride, at, inside)
    uncond = _load(prediction, 1, stride, at, inside)
    negative = tl.zeros_like(cond)
    for k in tl.static_range(NEGATIVES):
        weight = tl.load(negative_weights + tl.program_id(0) * NEGATIVES + k)
        negative += weight * (_load(prediction, 2 + k, stride, at, inside) - uncond)
    return cond, cond - uncond, negative


@triton.jit
def _guided(
    prediction, negative_weights, stride, at, inside, scale, along,
    GUIDED: tl.constexpr, NEGATIVES: tl.constexpr,
):  # fmt: skip
    """cond and what guidance makes of it; along: share of the negative that is not new."""
    if not GUIDED:
        cond = _load(prediction, 0, stride, at, inside)
        return cond, cond
    cond, positive, negative = _directions(
        prediction, negative_weights, stride, at, inside, NEGATIVES
    )
    guided = cond + scale * positive
    if NEGATIVES > 0:
        guided += (1.0 + scale) * (negative - along * positive)
    return cond, guided


@triton.jit
def guide_kernel(
    prediction, z_t, grad, bad, seed_address, t, alphas, weights, negative_weights,
    n, q, hw, prediction_view, prediction_c, prediction_p, z_view, z_c, z_p,
    scale, rescale, clip, share,
    GUIDED: tl.constexpr, NEGATIVES: tl.constexpr, V_PREDICTION: tl.constexpr,
    RESCALE: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a view: what is summed over a view needs no second launch."""
    view = tl.program_id(0)
    step = tl.load(t + view)
    alpha2, weight = tl.load(alphas + step), tl.load(weights + step)
    seed = tl.load(seed_address)
    chunks = tl.cdiv(q, BLOCK)

    along, factor = 0.0, 1.0
    if NEGATIVES > 0:
        dot, square = 0.0, 0.0
        for k in range(chunks):
            _, place, inside = _chunk(k, n, q, BLOCK)
            at = _address(place, hw, prediction_c, prediction_p)
            _, positive, negative = _directions(
                prediction, negative_weights, prediction_view, at, inside, NEGATIVES
            )
            dot += tl.sum(negative * positive)
            square += tl.sum(positive * positive)
        along = tl.where(square > 0.0, dot / square, 0.0)
    if RESCALE:
        sum_cond, sum_cond2, sum_guided, sum_guided2 = 0.0, 0.0, 0.0, 0.0
        for k in range(chunks):
            _, place, inside = _chunk(k, n, q, BLOCK)
            at = _address(place, hw, prediction_c, prediction_p)
            cond, guided = _guided(
                prediction, negative_weights, prediction_view, at, inside, scale, along,
                GUIDED, NEGATIVES,
            )  # fmt: skip
            sum_cond += tl.sum(cond)
            sum_cond2 += tl.sum(cond * cond)
            sum_guided += tl.sum(guided)
            sum_guided2 += tl.sum(guided * guided)
        wanted = sum_cond2 - sum_cond * sum_cond / n
        found = sum_guided2 - sum_guided * sum_guided / n
        factor = rescale * tl.sqrt(wanted / found) + (1.0 - rescale)

    finite = 1
    for k in range(chunks):
        i, place, inside = _chunk(k, n, q, BLOCK)
        at = _address(place, hw, prediction_c, prediction_p)
        _, g = _guided(
            prediction, negative_weights, prediction_view, at, inside, scale, along,
            GUIDED, NEGATIVES,
        )  # fmt: skip
        g *= factor
        if V_PREDICTION:
            noisy = _load(z_t, 0, z_view, _address(place, hw, z_c, z_p), inside)
            g = tl.sqrt(alpha2) * g + tl.sqrt(1.0 - alpha2) * noisy
        g = weight * (g - _normals(seed, view * q + i))
        finite = tl.minimum(finite, tl.min((tl.abs(g) <= LARGEST).to(tl.int32)))
        if CLIP:
            g = tl.minimum(tl.maximum(g, -clip), clip)
        tl.store(grad + view.to(tl.int64) * n + place, share * g, mask=inside)
    if finite == 0:  # never, but for a model that fails: what was written is taken back
        for k in range(chunks):
            _, place, inside = _chunk(k, n, q, BLOCK)
            nothing = tl.zeros((BLOCK, 2, 2), tl.float32)
            tl.store(grad + view.to(tl.int64) * n + place, nothing, mask=inside)
        tl.atomic_add(bad, 1)


@on_its_device
def perturb(
    z: torch.Tensor,
    t: torch.Tensor,
    seed: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See dreamfusion_fast.sds.perturb; out receives the result, in its dtype and strides."""
    n_views, n = len(z), z[0].numel()
    quarter = triton.cdiv(n, 4)
    perturb_kernel[n_views, triton.cdiv(quarter, PERTURB_BLOCK)](
        z, out, seed, t, alphas_cumprod, n, quarter, *_layout(out),
        COPIES=len(out) // n_views, BLOCK=PERTURB_BLOCK,
    )  # fmt: skip


@on_its_device
def guide(
    prediction: torch.Tensor,
    z_t: torch.Tensor,
    t: torch.Tensor,
    seed: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    weights: torch.Tensor,
    bad: torch.Tensor,
    scale: float,
    negative_weights: torch.Tensor | None,
    v_prediction: bool,
    rescale: float,
    clip: float,
    share: float,
) -> torch.Tensor:
    """See dreamfusion_fast.sds.guide."""
    n_views, n = len(t), z_t[0].numel()
    grad = torch.empty((n_views, *z_t.shape[1:]), dtype=torch.float32, device=z_t.device)
    quarter = triton.cdiv(n, 4)
    guided = len(prediction) > n_views
    guide_kernel[(n_views,)](
        prediction, z_t, grad, bad, seed, t, alphas_cumprod, weights,
        weights if negative_weights is None else negative_weights, n, quarter,
        *_layout(prediction), *_layout(z_t)[1:], scale, rescale, clip, share,
        GUIDED=guided, NEGATIVES=0 if negative_weights is None else negative_weights.shape[1],
        V_PREDICTION=v_prediction, RESCALE=rescale > 0, CLIP=clip < float("inf"),
        BLOCK=GUIDE_BLOCK, num_warps=GUIDE_WARPS,
    )  # fmt: skip
    return grad


def _layout(x: torch.Tensor) -> tuple[int, int, int, int]:
    """H * W, and the strides of view, channel and pixel; rows of pixels must touch."""
    view, channel, row, pixel = x.stride()
    height, width = x.shape[2:]
    if height > 1 and row != width * pixel:
        raise ValueError(f"expected a dense layout, got strides {x.stride()} of {tuple(x.shape)}")
    return height * width, view, channel, pixel
