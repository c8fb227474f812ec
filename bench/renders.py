"""One picture of finished runs: a row each; albedo, lit, textureless, normals, depth.

python bench/renders.py runs/car runs/duck --out renders.png [--azimuth 30] [--size 192]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dreamfusion_fast import export
from dreamfusion_fast.camera import orbit
from dreamfusion_fast.train import load_renderer


def row(run: Path, azimuth: float, size: int) -> torch.Tensor:
    """(M, 3, S, S), a picture a mode."""
    renderer = load_renderer(run)
    camera = orbit([azimuth], 15.0, export.DISTANCE, export.FOCAL)
    return torch.cat([export.render_views(renderer, camera, size, mode=m) for m in export.MODES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--azimuth", type=float, default=30.0, help="degrees, 0 is the front")
    parser.add_argument("--size", type=int, default=192, help="pixels of a picture")
    o = parser.parse_args()
    pictures = torch.cat([row(run, o.azimuth, o.size) for run in o.runs])
    export.write_png(export.tiled(pictures, len(export.MODES)), o.out)


if __name__ == "__main__":
    main()
