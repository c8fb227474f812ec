"""What this machine has, what will be used, and why not the rest."""

from __future__ import annotations

import importlib.util
import platform

import torch

from . import __version__, _cpu, toybox
from .ops import _backend


def cuda_obstacle() -> str | None:
    """Why CUDA cannot be used; None if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if _backend._cuda is None:
        return "dreamfusion_fast was built without CUDA kernels (reinstall with nvcc on the PATH)"
    return None


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda where it works, else cpu. Raises ValueError."""
    if name == "auto":
        return torch.device("cpu" if cuda_obstacle() else "cuda")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"argument `--device`: expected cpu, cuda or auto, got {name!r}")
    if name.startswith("cuda") and cuda_obstacle():
        raise ValueError(
            f"argument `--device`: expected a usable device, got {name!r}: {cuda_obstacle()}"
        )
    return torch.device(name)


def findings() -> list[tuple[str, str, str]]:
    """Rows (what, found, used or why not)."""
    isa = _cpu.isa()
    device = pick_device("auto")
    rows = [
        (
            "dreamfusion_fast",
            __version__,
            f"Python {platform.python_version()}, {platform.system()}",
        ),
        ("torch", torch.__version__, f"used, {torch.get_num_threads()} threads"),
        (
            "CPU kernels",
            f"{', '.join(_cpu.isas())}",
            f"{isa} used"
            + ("" if isa != "portable" else "; no AVX2, FMA, BMI2 and F16C here")
            + f", {_cpu.max_threads()} threads",
        ),
        ("GPU", _gpu(), "used" if device.type == "cuda" else f"not used: {cuda_obstacle()}"),
        (
            "CUDA kernels",
            f"built for {_backend._cuda.architectures}" if _backend._cuda else "not built",
            "used" if device.type == "cuda" else f"not used: {cuda_obstacle()}",
        ),
        (
            "Triton",
            "installed" if importlib.util.find_spec("triton") else "not installed",
            "used" if device.type == "cuda" else "not used: a CPU takes the kernels' torch twins",
        ),
    ]
    for name, folder, file in (
        ("embedded prior", toybox.PRIOR, "model_index.json"),
        ("embedded scorer", toybox.SCORER, "config.json"),
    ):
        there = (folder / file).exists()
        rows.append(
            (
                name,
                "found" if there else "missing",
                "used" if there else f"not used: no {file} in {folder}",
            )
        )
    return rows


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
