"""Writes the scene of a run for the C++ example: python export_field.py runs/car car.field

The file: a line of magic, lines "name numbers...", an empty line; then hash table and weights
(float32) and the occupancy bits, as they lie in memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dreamfusion_fast.field import LOG_DENSITY_MAX, Field
from dreamfusion_fast.ops import hash_table_rows
from dreamfusion_fast.render import Renderer


def write_field(path: str | Path, renderer: Renderer) -> None:
    """Raises ValueError for a field that the example does not render."""
    field, c = renderer.field, renderer.field.config
    if not isinstance(field, Field) or c.channels != 3 or field.level_share is not None:
        raise ValueError(
            "argument `renderer`: expected a field with field.name=hash, field.channels=3 and all "
            f"levels from the start, got {c}"
        )
    resolutions, offsets = hash_table_rows(**field.grid)
    cone = c.blob == "magic3d"
    header = {
        "resolutions": resolutions,
        "offsets": offsets,
        "features": [c.features],
        "smoothstep": [int(c.interpolation == "smoothstep")],
        "widths": field.widths,
        "silu": [int(c.activation == "silu")],
        "cone": [int(cone)],
        "blob_density": [c.cone_density if cone else c.blob_density],
        "blob_size": [c.cone_radius if cone else c.blob_std],
        "density_bias": [c.density_bias],
        "log_density_max": [LOG_DENSITY_MAX],
        "radius": [c.radius],
        "step": [renderer.config.step],
        "early_stop": [renderer.config.early_stop],
        "backdrop": renderer.config.backdrop,
        "occupancy_resolution": [renderer.config.occupancy_resolution],
    }
    lines = [" ".join([name, *map(str, numbers)]) for name, numbers in header.items()]
    text = "\n".join(["dreamfusion_fast field 1", *lines, "", ""])
    arrays = field.table, field.weights, renderer.bitfield
    data = b"".join(a.detach().cpu().numpy().tobytes() for a in arrays)
    Path(path).write_bytes(text.encode() + data)


if __name__ == "__main__":
    import torch

    from dreamfusion_fast.train import load_renderer

    if len(sys.argv) != 3:
        sys.exit("usage: python export_field.py RUN FILE")
    write_field(sys.argv[2], load_renderer(Path(sys.argv[1]), torch.device("cpu")))
