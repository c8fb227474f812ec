"""Will a run fit? Said before hours are spent.

Networks are run once without memory (torch's meta device), while what lives is counted: exact but
for what libraries use inside of a call, and for an allocator's gaps.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .camera import N_NUMBERS
from .config import RunConfig
from .guidance.text import frozen

GAPS = 1.15  # of an allocator, and of libraries' scratch
SAMPLE_BYTES = 120  # positions, t, dt, density, colour, weights and their gradients, of a sample


class Living(TorchDispatchMode):
    """Bytes of the tensors made inside that live, without the module's own, and the most that ever
    did."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.now = self.peak = 0
        own = [*module.parameters(), *module.buffers()]
        self.known = {x.untyped_storage()._cdata for x in own}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self._add(x.untyped_storage())
        return result

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size) -> None:
        self.known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """As flash attention keeps memory: inputs and result, no matrix of all pairs."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


class _Flash(TorchFunctionMode):
    def __init__(self, on: bool):
        super().__init__()
        self.on = on

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.on and function is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args)) | (kwargs or {})
            return _Attention.apply(given["query"], given["key"], given["value"])
        return function(*args, **(kwargs or {}))


def prediction_bytes(guide, views: int, conditions: int, flash: bool = True) -> int:
    """The most that lives while a DiffusersGuidance predicts for all conditions of the views.
    flash: attention keeps no matrix of all pairs."""
    config = guide.unet.config
    with torch.device("meta"):
        unet = frozen(type(guide.unet).from_config(config), "meta", guide.dtype)
        n = views * conditions
        size = config.sample_size
        if guide.vae is not None:
            size = guide.image_size // guide.reduced
        z_t = torch.empty(n, config.in_channels, size, size, dtype=guide.dtype)
        width = config.cross_attention_dim
        width = max(width) if isinstance(width, (tuple, list)) else width
        if config.encoder_hid_dim:
            width = config.encoder_hid_dim
        tokens = torch.empty(n, 77, width, dtype=guide.dtype)
        added = None
        if guide.text.pooled:
            pooled = torch.empty(n, guide.text.pooled_width, dtype=guide.dtype)
            added = {"text_embeds": pooled, "time_ids": torch.empty(n, 6, dtype=guide.dtype)}
        camera = torch.empty(n, N_NUMBERS, dtype=guide.dtype) if guide.takes_camera else None
        with torch.no_grad(), _Flash(flash), Living(unet) as living:
            t = torch.empty(n, dtype=torch.long)
            unet(z_t, t, tokens, class_labels=camera, added_cond_kwargs=added)
    return living.peak


def encoding_bytes(guide, views: int, flash: bool = True) -> int:
    """The most that lives while the VAE encodes, with what its gradient needs."""
    if guide.vae is None:
        return 0
    side = guide.image_size
    with torch.device("meta"):
        vae = frozen(type(guide.vae).from_config(guide.vae.config), "meta", guide.vae.dtype)
        image = torch.empty(views, 3, side, side, dtype=guide.vae.dtype, requires_grad=True)
        with _Flash(flash), Living(vae) as living:
            out = vae.encode(image)
            z = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
            z.sum().backward()
    return living.peak


def estimate(config: RunConfig, trainer) -> dict[str, int]:
    """Bytes that training needs beside the loaded networks, by what for. Networks other than a
    DiffusersGuidance's count nothing."""
    guide, field = trainer.guidance.guide, trainer.renderer.field
    params = sum(p.numel() * p.element_size() for p in field.parameters())
    # With their gradients and Adam's two averages; at first every bin of every ray is a sample.
    rays = config.views * config.render.image_size**2
    samples = int(rays * 2 * config.field.radius / config.render.step * 0.7)
    features = config.field.n_levels * config.field.features
    need = {"field": 4 * params, "samples": samples * (SAMPLE_BYTES + 8 * features)}
    if hasattr(guide, "unet"):
        conditions = 1 if not config.guidance.scale else 4 if config.guidance.perp_neg else 2
        need["U-Net"] = prediction_bytes(guide, config.views, conditions)
        need["VAE"] = encoding_bytes(guide, 1 if config.guidance.low_memory else config.views)
    return {name: int(GAPS * n) for name, n in need.items()}


def free_bytes(device: torch.device) -> int | None:
    """What is free on the device; None where nobody knows."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle  # torch keeps what was freed
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    rows = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    return int(rows["MemAvailable"].split()[0]) * 1024


def report(config: RunConfig, trainer) -> tuple[str, bool]:
    """One line about the memory that a run needs, and whether it fits."""
    need, free = estimate(config, trainer), free_bytes(trainer.device)
    parts = ", ".join(f"{name} {n / 2**30:.2f}" for name, n in need.items())
    total = sum(need.values())
    line = f"memory: about {total / 2**30:.2f} GiB at most ({parts})"
    if free is None:
        return line, True
    line += f", {free / 2**30:.1f} free"
    if total <= free:
        return line, True
    advice = "--low-memory, fewer views (--set views=1), a smaller --image-size, or another model"
    return f"{line}: this will probably not fit; try {advice}", False
