"""The folder of a run, and its checkpoint: one safetensors file, written beside the old one and
renamed over it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:  # the command line asks for a folder's state before it needs torch
    from torch import Tensor

FORMAT, VERSION = "dreamfusion_fast", 2


def folder_state(folder: Path) -> str:
    """ "new" (absent or empty), "run" (holds a run) or "foreign" (something else)."""
    if not folder.exists():
        return "new"
    if not folder.is_dir():
        return "foreign"
    names = {p.name for p in folder.iterdir()}
    return "new" if not names else "run" if "config.json" in names else "foreign"


def write_atomically(path: Path, write) -> None:
    """Call write(temporary path), flush it to disk and rename it to `path`: a crash at any moment
    leaves the old file or the new one, whole."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    write(temporary)
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def save(path: Path, tensors: dict[str, Tensor], config: dict) -> None:
    """Write tensors and the run's config (JSON)."""
    from safetensors.torch import save_file

    # One key: safetensors writes several in any order, and the same run shall give the same bytes.
    metadata = {FORMAT: json.dumps({"version": VERSION, "config": config})}
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomically(path, lambda p: save_file(contiguous, p, metadata))


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read what save wrote. Raises ValueError, in one line, for a file that is missing, truncated,
    not ours, or of another version."""
    expected = f"checkpoint {path}: expected a {FORMAT} run of version {VERSION}"
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except FileNotFoundError:
        raise ValueError(f"{expected}, got no file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{expected}, got a truncated or foreign file ({error})") from None
    if FORMAT not in metadata:
        raise ValueError(f"{expected}, got a safetensors file of something else")
    header = json.loads(metadata[FORMAT])
    if header["version"] != VERSION:
        raise ValueError(f"{expected}, got version {header['version']}")
    return tensors, header["config"]
