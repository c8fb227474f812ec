"""Generate toybox objects under variants of the method and measure them against their true shapes.

Runs are kept: OUT/<guidance>/<variant>/<colour>-<object>-<seed>. What was measured of a run lies in
it as result.json, and is used again while config.json and the checkpoint are what they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import checkpoint, export, metrics
from .checkpoint import folder_state
from .checks import check
from .config import RunConfig, preset
from .results import Result
from .toybox import shapes, world
from .toybox.scorer import FOLDER as SCORER
from .toybox.scorer import Scorer
from .train import Trainer, load_guidance

GUIDANCES = ("toybox", "exemplar", "clip")
WORDS = {"guidance.camera": False, "shading.lit": 0.5}  # the paper's guidance: no camera
WIDE = {**WORDS, "guidance.view_text": "none", "shading.lit": 0.0}
VARIANTS: dict[str, dict] = {  # name -> settings; the paper's ablation from "wide" on
    "full": {},
    "narrow": {"camera.elevation": [0.0, 30.0], "camera.azimuth": [-45.0, 45.0], **WIDE},
    "wide": WIDE,
    "+views": {**WORDS, "shading.lit": 0.0},
    "+lighting": {**WORDS, "shading.textureless": 0.0},
    "+textureless": WORDS,  # the paper's full method
    "+camera": {**WORDS, "guidance.camera": True},  # beyond the paper: the network is told it
    "dream-fields": {"guidance.name": "clip"},
    "paper-field": {"field.name": "paper"},
}
MEASURES = 4  # version of the measures: another one makes stored results out of date
VIEWS_SIZE = 96  # pixels, of a picture in the overview


@dataclass
class Job:
    """One run to make and measure."""

    variant: str
    colour: str
    name: str
    config: RunConfig
    folder: Path

    def views(self) -> Path:
        """The PNG of this run for the overview."""
        return self.folder / "views.png"


COLOURS = ("trained", "held-out", "half")


def default_pairs(colours: str = "trained") -> list[tuple[str, str]]:
    """The pairs that are measured: every object, each in one colour. trained: in a colour that the
    prior's training saw with it; held-out: in one that it never saw; half: every second object in
    the first and every fourth in the second, which was the default before all objects were.
    Raises ValueError for another word."""
    if colours not in COLOURS:
        raise ValueError(
            f"argument `--colours`: expected one of {', '.join(COLOURS)}, got {colours!r}"
        )
    trained, unseen = [], []
    for k, name in enumerate(shapes.OBJECTS):
        seen = [c for c in world.COLOURS if not world.is_held_out(c, name)]
        trained.append((seen[(3 * k) % len(seen)], name))
        unseen.append((next(c for c in world.COLOURS if world.is_held_out(c, name)), name))
    if colours == "half":
        return trained[:24:2] + unseen[1:24:4]
    return trained if colours == "trained" else unseen


def pairs_of(texts: list[str] | None, colours: str = "trained") -> list[tuple[str, str]]:
    """(colour, object) of each prompt; without prompts the default ones."""
    if not texts:
        return default_pairs(colours)
    pairs = [world.parse(t) for t in texts]
    for text, (colour, _name) in zip(texts, pairs):
        world.check_prompt(text)
        if colour is None:
            raise ValueError(f"argument `--prompt`: expected a colour and an object, got {text!r}")
    return list(dict.fromkeys(pairs))


def settings_of(variant: str) -> dict:
    if variant not in VARIANTS:
        raise ValueError(
            f"argument `--variant`: expected one of {', '.join(VARIANTS)}, got {variant!r}"
        )
    return VARIANTS[variant]


def plan(
    guide: str,
    pairs: list[tuple[str, str]],
    variants: list[str],
    seeds: list[int],
    steps: int | None,
    changes: dict,
    out: Path,
) -> list[Job]:
    """All runs, in order: variant, pair, seed. changes: settings on top of each variant's. Raises
    ValueError for what cannot run, before anything does."""
    if guide not in GUIDANCES:
        raise ValueError(
            f"argument `--guidance`: expected one of {', '.join(GUIDANCES)}, got {guide!r}"
        )
    if not seeds:
        raise ValueError("argument `--seeds`: expected at least 1, got 0")
    jobs = []
    for variant in dict.fromkeys(variants):
        settings = settings_of(variant) | changes
        for colour, name in pairs:
            for seed in seeds:
                folder = out / guide / variant / f"{colour}-{name}-{seed}"
                config = _config(guide, world.prompt(colour, name), seed, steps, settings)
                jobs.append(Job(variant, colour, name, config, folder))
    for job in jobs:
        check(job.config)
        _check_folder(job)
    return jobs


def _config(guide: str, prompt: str, seed: int, steps: int | None, settings: dict) -> RunConfig:
    given = {"prompt": prompt, "seed": seed} | ({} if steps is None else {"steps": steps})
    config = preset(settings.get("guidance.name", guide), **given)
    for name, value in settings.items():
        config.change(name, value)
    return config


def _check_folder(job: Job) -> None:
    """Raise ValueError where the job's folder holds something else than this very run."""
    state = folder_state(job.folder)
    if state == "new":
        return
    wanted = f"argument `--out`: expected a new folder or the same runs, got {job.folder}, which"
    if state == "foreign":
        raise ValueError(f"{wanted} holds something else")
    try:
        stored = RunConfig.from_dict(json.loads((job.folder / "config.json").read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{wanted} holds no run's settings ({error})") from None
    mine, other = _flat(job.config.to_dict()), _flat(stored.to_dict())
    different = [k for k in mine if mine[k] != other.get(k)]
    if different:
        raise ValueError(f"{wanted} holds a run with another {', '.join(different)}")


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{key}": value} if inner is None else inner
    return flat


def run(
    jobs: list[Job], device="cpu", tick: Callable[[int], None] = lambda steps: None
) -> Iterator[Result]:
    """Each job's result: the stored one, or that of a run made, or gone on with, now. tick: called
    with steps that are done."""
    guides, scorer = {}, Scorer(device=device)
    for job in jobs:
        result = stored_result(job)
        if result is None:
            name = job.config.guidance.name
            if name not in guides:
                guides[name] = load_guidance(job.config, torch.device(device))
            trainer = Trainer(job.config, job.folder, guides[name], device, resume=True)
            tick(trainer.step)
            for _ in trainer.run():
                tick(1)
            result = measure(job, trainer.renderer, scorer)
            _store(job, result)
        else:
            tick(job.config.steps)
        yield result


def stored_result(job: Job) -> Result | None:
    """What was measured of exactly this run, if it was and the overview's picture is there."""
    path = job.folder / "result.json"
    if not path.exists() or not job.views().exists():
        return None
    try:
        stored = json.loads(path.read_text())
        return Result(**stored["result"]) if stored["of"] == _fingerprint(job.folder) else None
    except (json.JSONDecodeError, KeyError, TypeError):
        return None  # by another version, or damaged: measured again


def _store(job: Job, result: Result) -> None:
    text = json.dumps({"of": _fingerprint(job.folder), "result": asdict(result)}, indent=1)
    checkpoint.write_atomically(job.folder / "result.json", lambda p: p.write_text(text))


def _fingerprint(folder: Path) -> str:
    """Of all that a result depends on: settings, checkpoint, scorer, measures."""
    digest = hashlib.sha256(str(MEASURES).encode())
    for path in (folder / "config.json", folder / "checkpoint.safetensors"):
        digest.update(path.read_bytes() if path.exists() else b"")
    digest.update((SCORER / "model.safetensors").read_bytes())
    return digest.hexdigest()


def measure(job: Job, renderer, scorer: Scorer) -> Result:
    """Measure a finished run, and write its contact sheet and its picture for the overview. A
    field without a surface, or that is not finite, has None for what needs one, and a note."""
    field, radius, notes = renderer.field, job.config.field.radius, {}

    def attempt(function, *args):
        try:
            return function(*args)
        except ValueError as error:  # export's: no surface, or not finite
            notes[str(error)] = None
            return None

    true = metrics.true_mesh(job.name)
    step = job.config.render.step
    mesh = attempt(export.mesh, field, radius, metrics.GRID, None, step)
    near = (None, None) if mesh is None else metrics.surfaces(mesh, true)
    turn, truth = metrics.turn(renderer), metrics.true_turn(job.colour, job.name)
    psnr, ssim = metrics.pictures(renderer, job.colour, job.name)
    precision = metrics.colour_precision(renderer, scorer, job.colour, job.name)
    clay, place = metrics.clay_prompts(), list(shapes.OBJECTS).index(job.name)
    export.contact_sheet(renderer, job.folder / "contact_sheet.png")
    export.write_png(_views(renderer), job.views())
    return Result(
        prompt=job.config.prompt,
        held_out=world.is_held_out(job.colour, job.name),
        iou=attempt(metrics.volume_iou, field, radius, job.name, step),
        precision=precision.all,
        seconds=_seconds(job.folder),
        variant=job.variant,
        seed=job.config.seed,
        chamfer=near[0],
        normals=near[1],
        fronts=metrics.fronts(turn, truth),
        view_error=metrics.view_error(turn, truth),
        geometry=metrics.geometry_precision(renderer, scorer, clay, place),
        note="; ".join(notes),
        f_score=None if mesh is None else metrics.f_score(mesh, true),
        psnr=psnr,
        ssim=ssim,
        same_colour=precision.same_colour,
        same_object=precision.same_object,
        guide_judges=job.config.guidance.name == "clip" and job.config.guidance.model is None,
    )


def _views(renderer) -> torch.Tensor:
    """(3, S, 3 S): front and back in colour, and the front textureless."""
    cameras = metrics.camera.orbit([30.0, 210.0], 15.0, export.DISTANCE, export.FOCAL)
    colour = export.render_views(renderer, cameras, VIEWS_SIZE)
    white = export.render_views(renderer, cameras, VIEWS_SIZE, mode="textureless")
    return export.tiled(torch.cat((colour, white[:1])), 3)


def _seconds(folder: Path) -> float:
    with open(folder / "metrics.jsonl") as log:
        return sum(json.loads(line)["seconds"] for line in log)
