"""The command line. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import evaluate

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Text to 3D by score distillation sampling, on our own kernels.",
)
app.add_typer(evaluate.app, name="evaluate")
console = Console()

Out = Annotated[Path, typer.Option(help="folder of the run")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: the best that works")]


def main() -> None:
    """Entry point."""
    run_app(app)


def run_app(commands: typer.Typer) -> None:
    """Run it: an expected error becomes one line and exit code 2."""
    try:
        commands()
    except ValueError as error:
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True, highlight=False).print("error:", message, markup=False)
        sys.exit(2)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help='what to make, e.g. "a red car"')],
    out: Out = Path("runs/latest"),
    steps: Annotated[int | None, typer.Option(help="optimisation steps")] = None,
    seed: Annotated[int | None, typer.Option(help="same seed, same result")] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            help="toybox (embedded), exemplar, clip, sd15, sd21, sdxl, if, or a diffusers "
            "pipeline's folder or hub name"
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="side of the rendered pictures, for latent models")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="text to stay away from")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="as libraries count it: 1 + guidance.scale")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="of the guidance: fp32, fp16, bf16")] = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="for small GPUs")] = False,
    init: Annotated[
        Path | None, typer.Option(help="folder of a run whose scene is the start")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="any setting, e.g. --set guidance.perp_neg=2; see config.py"),
    ] = None,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
) -> None:
    """Make a 3D object from text: turntable.mp4, contact_sheet.png and mesh.glb in --out."""
    from .checkpoint import folder_state

    given = {"prompt": prompt, "steps": steps, "seed": seed, "guidance": guidance}
    changes = {
        "render.image_size": image_size,
        "guidance.negative": negative,
        "guidance.scale": None if guidance_scale is None else guidance_scale - 1.0,
        "guidance.dtype": dtype,
        "guidance.low_memory": low_memory or None,
    }
    changes = {k: v for k, v in changes.items() if v is not None} | parse_settings(set_ or [])
    config = _config(out, resume, given)
    if init is not None:
        changes = {"init": str(init)} | changes
        config.field, config.render = _scene_of(init)
    if changes and folder_state(out) == "run":
        raise ValueError(
            f"argument `--resume`: expected the run's own settings, got {', '.join(changes)}"
        )
    for name, value in changes.items():
        config.change(name, value)
    where = _check(config, device)

    from . import preflight  # these take seconds
    from .train import Trainer

    trainer = Trainer(config, out, device=where, resume=resume)
    line, fits = preflight.report(config, trainer)
    console.print(line, highlight=False, soft_wrap=True, style=None if fits else "bold red")
    _train(trainer)
    _export(trainer.renderer, out)


@app.command()
def export(out: Out = Path("runs/latest"), device: Device = "auto") -> None:
    """Write a run's turntable.mp4, contact_sheet.png and mesh.glb again from its checkpoint."""
    from .doctor import pick_device
    from .train import load_renderer

    _export(load_renderer(out, pick_device(device)), out)


@app.command()
def doctor() -> None:
    """Say what was found on this machine, what will be used, and why not the rest."""
    from .doctor import findings

    table = Table("what", "found", "use", box=None, padding=(0, 2, 0, 0))
    for row in findings():
        table.add_row(*row)
    console.print(table)


def _config(out: Path, resume: bool, given: dict):
    """The run's settings: stored ones if it is resumed, else the guidance's defaults."""
    from .checkpoint import folder_state
    from .config import RunConfig, preset

    state = folder_state(out)
    if state == "foreign":
        raise ValueError(
            f"argument `--out`: expected a new folder or one that holds a run, got "
            f"{out}, which holds something else"
        )
    if state == "run" and not resume:
        raise ValueError(
            f"argument `--out`: expected a new folder, got {out}, which holds a run: "
            f"add --resume to go on with it"
        )
    if state == "new":
        settings = {k: v for k, v in given.items() if v is not None and k != "guidance"}
        return preset(given["guidance"] or "toybox", **settings)
    try:
        config = RunConfig.from_dict(json.loads((out / "config.json").read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"config {out / 'config.json'}: expected a run's settings, got {error}"
        ) from None
    stored = {"prompt": config.prompt, "seed": config.seed, "guidance": config.guidance.name}
    for name, value in stored.items():
        if given[name] not in (None, value):
            raise ValueError(
                f"argument `{name}`: expected {value!r}, as the run in {out} has it, "
                f"got {given[name]!r}"
            )
    config.steps = given["steps"] if given["steps"] is not None else config.steps
    return config


def _check(config, device: str):
    """Refuse what can be refused without diffusers and the trainer. Returns the device."""
    from .checks import check

    check(config)

    from .doctor import pick_device
    from .toybox.world import check_prompt

    if config.guidance.name in ("toybox", "exemplar"):
        check_prompt(config.prompt)
    return pick_device(device)


def _scene_of(folder: Path) -> tuple:
    """The settings of field and renderer of the run in a folder."""
    from .checkpoint import load
    from .config import RunConfig

    config = RunConfig.from_dict(load(folder / "checkpoint.safetensors")[1])
    return config.field, config.render


def parse_settings(texts: list[str]) -> dict:
    """--set name=value, values as in JSON, or else texts."""
    changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"argument `--set`: expected name=value, got {text!r}")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    return changes


def _train(trainer) -> None:
    """Run to the end under a progress bar; Ctrl-C ends the step, saves and leaves."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )

    def stop(*_) -> None:
        trainer.stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C leaves at once

    signal.signal(signal.SIGINT, stop)
    began, start, note = time.perf_counter(), trainer.step, ""
    recent: list[dict] = []
    with Progress(*columns, console=console, refresh_per_second=4) as bar:
        total = trainer.config.steps
        task = bar.add_task(trainer.config.prompt, total=total, completed=start, note="")
        for metrics in trainer.run():
            recent = [*recent[-19:], metrics]
            note = _note(recent, (trainer.step - start) / (time.perf_counter() - began))
            bar.update(task, completed=trainer.step, note=note)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    console.print(note, highlight=False)
    if trainer.stopping:
        console.print(f"stopped at step {trainer.step}, saved: go on with --resume")
        raise typer.Exit(130)


def _note(recent: list[dict], speed: float) -> str:
    """it/s, losses and where the time goes, over the last steps."""
    last, seen = recent[-1], [m for m in recent if m["guidance_share"] is not None]
    note = f"{speed:.1f} it/s  sds {last['sds']:.2f}  opacity {last['mean_opacity']:.2f}"
    if seen:  # inside of a CUDA graph nobody knows
        seconds = sum(m["seconds"] for m in seen)
        share = sum(m["seconds"] * m["guidance_share"] for m in seen) / seconds
        note += f"  guidance {share:.0%}  rest {1 - share:.0%}"
    if last["views_skipped"]:
        note += f"  {last['views_skipped']} views skipped: not finite"
    return note


def _export(renderer, out: Path) -> None:
    from .export import export_run

    with console.status("rendering turntable, contact sheet and mesh"):
        paths = export_run(renderer, out)
    for path in paths:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
