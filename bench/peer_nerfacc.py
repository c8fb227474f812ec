"""nerfacc on a GPU: compositing of packed samples. Its packed scans need CUDA: absent on a CPU."""

import nerfacc
import torch


def start(name: str) -> str:
    if not torch.cuda.is_available():
        raise RuntimeError("its packed samples need CUDA, and torch sees no GPU")
    return nerfacc.__version__


def composite(arrays: dict, settings: dict, backward: bool):
    tensors = {k: torch.from_numpy(x).cuda() for k, x in arrays.items()}
    inputs = [tensors[k].requires_grad_() for k in ("sigma", "rgb") if backward]
    cotangents = [tensors[f"g{i}"] for i in range(4)] if backward else []
    packed, t, dt = tensors["packed"].long(), tensors["t"], tensors["dt"]
    rays = len(packed)
    ray = torch.repeat_interleave(torch.arange(rays, device=t.device), packed[:, 1])
    last = []

    def call():
        last.clear()
        with torch.set_grad_enabled(backward):
            sigma, rgb = tensors["sigma"], tensors["rgb"]
            weights, T, _ = nerfacc.render_weight_from_density(
                t - 0.5 * dt, t + 0.5 * dt, sigma, ray_indices=ray, n_rays=rays
            )
            weights = torch.where(T < settings["early_stop"], 0.0, weights)
            results = [nerfacc.accumulate_along_rays(weights, values, ray, rays)
                       for values in (rgb, None, t[:, None])]  # fmt: skip
            results = [results[0], results[1][:, 0], results[2][:, 0], weights]
            grads = torch.autograd.grad(results, inputs, cotangents) if backward else ()
        last.extend(x.detach() for x in (*results, *grads))
        torch.cuda.synchronize()

    return call, lambda: [x.cpu().numpy() for x in last]


OPS = {"composite": composite}
