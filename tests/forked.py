"""Programs in processes of their own that need not import torch and diffusers anew: forked, as
multiprocessing's fork server does, from one that has, and that has imported nothing of ours."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch", "torch._dynamo", "diffusers.models.unets"])


def execute(arguments: list[str], output: Path, errors: Path, folder: Path, paths: list) -> None:
    """In the new process: what `python *arguments` does, for a script or -m and a module."""
    assert not any(name.startswith("dreamfusion_fast") for name in sys.modules)
    for stream, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(folder)
    sys.path[:0] = map(str, paths)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def start(arguments, output: Path, errors: Path, folder: Path, paths=()):
    """The started process: has pid, join(timeout), kill() and, afterwards, exitcode."""
    process = FORKED.Process(
        target=execute, args=([*map(str, arguments)], output, errors, folder, [*paths])
    )
    process.start()
    return process


def finish(process, seconds: float) -> int:
    """Its exit code; it is killed if it takes longer."""
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode
