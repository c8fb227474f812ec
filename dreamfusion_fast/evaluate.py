"""The commands of `dreamfusion-fast evaluate`, also `python -m dreamfusion_fast.evaluate`.

`toybox` makes objects whose true shapes are known and measures them; `runs` judges finished runs by
a CLIP, as the paper does. The work is in evaluate_toybox, evaluate_runs, metrics and results.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure text to 3D: against true shapes, or by CLIP R-Precision.",
)
console = Console()

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: the best that works")]


@app.command()
def toybox(
    guide: Annotated[
        str, typer.Option("--guidance", help="toybox, exemplar, or clip: Dream Fields")
    ] = "toybox",
    out: Annotated[Path, typer.Option(help="folder for runs and results")] = Path("runs/evaluate"),
    prompt: Annotated[list[str] | None, typer.Option(help="only this pair; repeatable")] = None,
    colours: Annotated[
        str,
        typer.Option(
            help="without --prompt: trained, every object in a colour that training saw with it; "
            "held-out, in one that it never saw; half, twelve and six of both"
        ),
    ] = "trained",
    steps: Annotated[int | None, typer.Option(help="steps of a run")] = None,
    seed: Annotated[int, typer.Option(help="the first one")] = 0,
    seeds: Annotated[int, typer.Option(help="runs of each pair")] = 1,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="full, narrow, wide, +views, +lighting, +textureless, +camera, dream-fields or "
            "paper-field; repeatable"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any setting of all runs, as of generate")
    ] = None,
    device: Device = "auto",
) -> None:
    """Generate toybox objects and measure them against their true shapes.

    Runs are kept in OUT/<guidance>/<variant>/<colour>-<object>-<seed>, and reused; results are
    OUT/<guidance>.md, .json and .png.
    """
    from . import evaluate_toybox as work
    from . import metrics, results
    from .cli import parse_settings
    from .doctor import pick_device
    from .judges import load

    began, where = time.perf_counter(), pick_device(device)
    pairs, variants = work.pairs_of(prompt, colours), variant or ["full"]
    every = list(range(seed, seed + seeds))
    jobs = work.plan(guide, pairs, variants, every, steps, parse_settings(set_ or []), out)
    rows: list[results.Result] = []
    with Progress(console=console) as bar:
        task = bar.add_task(guide, total=sum(job.config.steps for job in jobs))
        for result in work.run(jobs, where, lambda n: bar.advance(task, n)):
            rows.append(result)
            label = f"{result.variant}: " if len(variants) > 1 else ""
            number = f", seed {result.seed}" if seeds > 1 else ""
            bar.console.print(label + result.line() + number, markup=False, highlight=False)
    settings = {v: work.settings_of(v) | parse_settings(set_ or []) for v in variants}
    table = results.write(rows, metrics.true_geometry(load(device=where)), settings, out / guide)
    pictures: dict[tuple[str, str], Path] = {}
    for job in jobs:  # the first seed's
        pictures.setdefault((job.config.prompt, job.variant), job.views())
    results.overview(pictures, out / f"{guide}.png")
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(f"total {time.perf_counter() - began:.0f} s", highlight=False)


@app.command()
def runs(
    run: Annotated[list[Path], typer.Argument(help="folders of finished runs")],
    prompts: Annotated[
        Path, typer.Option(help="text file, one prompt a line: the candidates, the runs' own among")
    ],
    clip: Annotated[
        list[str] | None,
        typer.Option(
            help="folder or hub name of a CLIP, e.g. openai/clip-vit-base-patch32, or "
            "open_clip:MODEL/PRETRAINED; repeatable; without it the embedded scorer"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write OUT.md and OUT.json")] = None,
    device: Device = "auto",
) -> None:
    """CLIP R-Precision of finished runs, of colour and of textureless geometry.

    The paper's 153 prompts are the object-centric COCO captions that Dream Fields (Jain et al.
    2022) released; they are not shipped: put them into the file of --prompts.
    """
    from . import evaluate_runs as work
    from .doctor import pick_device

    candidates = work.read_prompts(prompts)
    scores = work.score(run, candidates, clip, pick_device(device))
    console.print(
        work.markdown(scores, len(candidates)), markup=False, highlight=False, soft_wrap=True
    )
    if out is not None:
        work.write(scores, len(candidates), out)


if __name__ == "__main__":
    from .cli import run_app

    run_app(app)
