"""CLIP R-Precision of finished runs, as Dream Fields and DreamFusion report it (table 1)."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from . import judges, metrics
from .checkpoint import folder_state, write_atomically
from .config import RunConfig
from .toybox import shapes, world
from .train import load_renderer

EMBEDDED = "toybox"  # the name of the embedded scorer in tables


@dataclass
class Score:
    """R-Precision of one run by one judge, each in [0, 1]: of colour, of textureless geometry."""

    run: str
    prompt: str
    judge: str
    colour: float
    geometry: float


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines and repetitions are left out."""
    if not path.is_file():
        raise ValueError(f"argument `--prompts`: expected a text file, got {path}, which is none")
    prompts = list(dict.fromkeys(filter(None, map(str.strip, path.read_text().splitlines()))))
    if not prompts:
        raise ValueError(f"argument `--prompts`: expected a prompt a line, got {path}, empty")
    return prompts


def prompt_of(folder: Path, prompts: list[str]) -> str:
    """The prompt of the run in `folder`, which must be one of `prompts`."""
    if folder_state(folder) != "run":
        raise ValueError(f"argument `RUN`: expected a run's folder, got {folder}, which holds none")
    try:
        text = RunConfig.from_dict(json.loads((folder / "config.json").read_text())).prompt.strip()
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"argument `RUN`: expected a run's folder, got {folder}, whose config.json holds no "
            f"settings ({error})"
        ) from None
    if text not in prompts:
        raise ValueError(
            f"argument `--prompts`: expected the prompt of {folder} among the file's "
            f"{len(prompts)}, got none that is {text!r}"
        )
    return text


def score(
    runs: list[Path], prompts: list[str], clips: list[str] | None = None, device="cpu"
) -> list[Score]:
    """R-Precision of each run by each judge (judges.load's names; without any the embedded scorer).

    All `prompts` are candidates; of textureless pictures too, but for the embedded scorer, which
    is asked for the object in clay (metrics.clay_prompts)."""
    if not runs:
        raise ValueError("argument `RUN`: expected at least one run's folder, got none")
    texts = [prompt_of(folder, prompts) for folder in runs]
    scores = []
    for clip in clips or [None]:
        judge = judges.load(clip, device)
        clay_texts = metrics.clay_prompts() if clip is None else prompts
        for folder, text in zip(runs, texts):
            renderer, place = load_renderer(folder, device), prompts.index(text)
            colour = metrics.r_precision(
                judge, metrics.judged_views(renderer, judge), prompts, place
            )
            place = _object(text) if clip is None else place
            geometry = metrics.geometry_precision(renderer, judge, clay_texts, place)
            scores.append(Score(str(folder), text, clip or EMBEDDED, colour, geometry))
    return scores


def _object(text: str) -> int:
    world.check_prompt(text)
    return list(shapes.OBJECTS).index(world.parse(text)[1])


def markdown(scores: list[Score], n_prompts: int) -> str:
    """A table of runs and, below it, each judge's means."""
    lines = ["| run | prompt | CLIP | R-Precision colour | geometry |", "|---|---|---|---|---|"]
    lines += [
        f"| {s.run} | {s.prompt} | {s.judge} | {s.colour:.1%} | {s.geometry:.1%} |" for s in scores
    ]
    lines += ["", f"Of {n_prompts} prompts. Means over runs:", ""]
    for judge in dict.fromkeys(s.judge for s in scores):
        mine = [s for s in scores if s.judge == judge]
        colour, geometry = (statistics.fmean(getattr(s, k) for s in mine)
                            for k in ("colour", "geometry"))  # fmt: skip
        lines.append(f"- {judge}: colour {colour:.1%}, geometry {geometry:.1%}, {len(mine)} runs")
    return "\n".join(lines) + "\n"


def write(scores: list[Score], n_prompts: int, base: Path) -> None:
    """Write <base>.md and <base>.json."""
    base.parent.mkdir(parents=True, exist_ok=True)
    rows = json.dumps([vars(s) for s in scores], indent=1)
    for suffix, text in ((".md", markdown(scores, n_prompts)), (".json", rows)):
        path = base.with_name(base.name + suffix)
        write_atomically(path, lambda p, text=text: p.write_text(text))
