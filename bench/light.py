"""What light costs: whole training steps with albedo alone, with analytic normals, and with normals
from finite differences, side by side in one run:

    python bench/light.py [--device cuda|cpu] [--guidance toybox] [--warm-up 60] [--rounds 12]

The scene is trained for a while first, so that it is sparse; a round times each kind of step once,
in turn, on the same views. Prints medians, 20th and 80th percentiles and ratios, with and without
the guidance's time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dreamfusion_fast.config import preset
from dreamfusion_fast.train import Trainer

KINDS = {"albedo": None, "lit, analytic": "analytic", "lit, finite differences": "finite"}


def timed(trainer: Trainer, normals: str | None) -> tuple[float, float]:
    """Milliseconds of one step, and of the guidance in it."""
    trainer.config.render.normals = normals or "analytic"
    trainer.guidance.take_seconds(1)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    trainer._advance(normals is not None)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    total = time.perf_counter() - began
    return 1e3 * total, 1e3 * (trainer.guidance.take_seconds(1) or 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--guidance", default="toybox")
    parser.add_argument("--warm-up", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=12)
    o = parser.parse_args()
    config = preset(o.guidance, prompt="a red car", steps=o.warm_up + 1)
    config.preview_every = config.checkpoint_every = o.warm_up + 1
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), device=o.device)
        for _ in range(o.warm_up):
            trainer._step()
            trainer.step += 1
            trainer.renderer.fit_capacity(int(trainer.measured[3]))
        for round in range(o.rounds):
            for name, normals in KINDS.items():
                spent = timed(trainer, normals)
                if round:  # the first warms up
                    times[name].append(spent)
    samples = int(trainer.measured[3])
    card = torch.cuda.get_device_name() if trainer.device.type == "cuda" else "CPU"
    print(f"{card}, {torch.get_num_threads()} threads, {samples} samples, {o.rounds - 1} rounds\n")
    print("| step | median ms | p20 | p80 | x albedo | without guidance, ms | x albedo |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    base = None
    for name, spent in times.items():
        total = torch.tensor([t for t, _ in spent])
        p20, median, p80 = total.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        rest = torch.tensor([t - g for t, g in spent]).median().item()
        base = base or (median, rest)
        print(
            f"| {name} | {median:.1f} | {p20:.1f} | {p80:.1f} | {median / base[0]:.2f} "
            f"| {rest:.1f} | {rest / base[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
