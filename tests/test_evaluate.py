"""Evaluations: what is run, kept, reused, refused and written. The measures: test_metrics.py."""

import json
import re
import runpy
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from dreamfusion_fast import (
    cli,
    evaluate_toybox,
    export,
    metrics,
    results,
)
from dreamfusion_fast.config import preset
from dreamfusion_fast.results import Result
from dreamfusion_fast.toybox import shapes, world

PAIR = [("red", "car")]


def plan(out, guide="exemplar", pairs=PAIR, variants=("full",), seeds=(0,), steps=1, **changes):
    return evaluate_toybox.plan(guide, pairs, list(variants), list(seeds), steps, changes, out)


@pytest.fixture
def cheap(monkeypatch):
    """Grey pictures in place of rendered ones, and coarse grids."""

    def render_views(renderer, cameras, size=None, background=None, mode="albedo"):
        assert mode in ("albedo", "textureless")
        return torch.full((len(cameras.focal), 3, size or 64, size or 64), 0.5)

    monkeypatch.setattr(export, "render_views", render_views)
    monkeypatch.setattr(export, "contact_sheet", lambda renderer, path: path.write_bytes(b"png"))
    monkeypatch.setattr(metrics, "GRID", 24)
    monkeypatch.setattr(metrics, "POINTS", 500)
    monkeypatch.setattr(metrics, "AZIMUTHS", 2)
    monkeypatch.setattr(metrics, "EYES", 3)


def no_training(*_args, **_options):
    raise AssertionError("a run that was measured must not be made again")


def test_default_pairs():
    """Every object once, in colours that training saw or in such as it did not."""
    for colours, held_out in (("trained", False), ("held-out", True)):
        pairs = evaluate_toybox.default_pairs(colours)
        assert [o for _, o in pairs] == list(shapes.OBJECTS)
        assert all(world.is_held_out(*p) == held_out for p in pairs)
    half = evaluate_toybox.default_pairs("half")
    assert len(half) == 18 and sum(world.is_held_out(*p) for p in half) == 6
    with pytest.raises(ValueError, match="`--colours`: expected one of trained, held-out, half"):
        evaluate_toybox.default_pairs("all")


def test_pairs_of_prompts():
    assert evaluate_toybox.pairs_of(["a red car", "the red car"]) == PAIR
    with pytest.raises(ValueError, match="`--prompt`: expected a colour and an object, got 'a car"):
        evaluate_toybox.pairs_of(["a car"])
    with pytest.raises(ValueError, match="does not know `zebra`"):
        evaluate_toybox.pairs_of(["a red zebra"])


def test_plan(tmp_path):
    jobs = plan(tmp_path, seeds=(3, 4), steps=7, **{"guidance.scale": 2})
    folder = tmp_path / "exemplar" / "full"
    assert [j.folder for j in jobs] == [folder / "red-car-3", folder / "red-car-4"]
    assert [j.config.seed for j in jobs] == [3, 4]
    assert all(j.config.guidance.scale == 2.0 and j.config.steps == 7 for j in jobs)
    assert not tmp_path.joinpath("exemplar").exists()


def test_dream_fields_is_guidance_by_clip(tmp_path):
    for guide, variant in (("clip", "full"), ("toybox", "dream-fields")):
        [job] = plan(tmp_path, guide, variants=[variant])
        assert job.config == preset("clip", prompt="a red car", seed=0, steps=1)


@pytest.mark.parametrize("variant", evaluate_toybox.VARIANTS)
def test_variants_are_settings(variant, tmp_path):
    settings = evaluate_toybox.VARIANTS[variant]
    [job] = plan(tmp_path, variants=[variant])
    changed = evaluate_toybox._flat(job.config.to_dict())
    for name, value in settings.items():
        assert changed[name] == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ["wdie"]}, r"`--variant`: expected one of full, narrow, .*, got 'wdie'"),
        ({"guide": "sd15"}, "`--guidance`: expected one of toybox, exemplar, clip, got 'sd15'"),
        ({"seeds": ()}, "`--seeds`: expected at least 1, got 0"),
        ({"steps": 0}, "`steps`: expected at least 1, got 0"),
        ({"guidance.scael": 1}, "expected a setting's name"),
    ],
)
def test_bad_plans(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, **options)


def test_runs_are_kept_and_reused(tmp_path, cheap, monkeypatch):
    jobs, ticks = plan(tmp_path, seeds=(0, 1)), []
    running = evaluate_toybox.run(jobs, tick=ticks.append)
    first = next(running)
    running.close()  # interrupted
    folder = jobs[0].folder
    for name in ("config.json", "checkpoint.safetensors", "result.json", "views.png"):
        assert (folder / name).stat().st_size > 0
    assert first.prompt == "a red car" and 0 <= first.iou <= 1 and first.seconds > 0
    assert not jobs[1].folder.exists()
    both = list(evaluate_toybox.run(plan(tmp_path, seeds=(0, 1)), tick=ticks.append))
    assert both[0] == first and both[1].seed == 1

    monkeypatch.setattr(evaluate_toybox, "Trainer", no_training)
    assert list(evaluate_toybox.run(jobs, tick=ticks.append)) == both
    with open(folder / "checkpoint.safetensors", "ab") as file:
        file.write(b" ")
    with pytest.raises(AssertionError, match="must not be made again"):
        next(evaluate_toybox.run(jobs))


def test_damaged_results_are_measured_again(tmp_path, cheap):
    jobs = plan(tmp_path)
    [result] = evaluate_toybox.run(jobs)
    (jobs[0].folder / "result.json").write_text('{"of"')
    assert evaluate_toybox.stored_result(jobs[0]) is None
    assert list(evaluate_toybox.run(jobs)) == [result]


def test_runs_of_other_settings_are_refused(tmp_path, cheap):
    list(evaluate_toybox.run(plan(tmp_path)))
    with pytest.raises(ValueError, match=r"got .*red-car-0, .* another views, guidance\.scale"):
        plan(tmp_path, views=2, **{"guidance.scale": 3.0})
    (tmp_path / "exemplar/full/red-car-1").mkdir()
    (tmp_path / "exemplar/full/red-car-1/thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="red-car-1, which holds something else"):
        plan(tmp_path, seeds=(1,))


@pytest.mark.parametrize("density", [0.0, float("nan")])
def test_without_a_surface_the_rest_is_measured(tmp_path, cheap, density):
    [job] = plan(tmp_path)
    job.folder.mkdir(parents=True)
    (job.folder / "metrics.jsonl").write_text('{"seconds": 1.5}\n{"seconds": 2}\n')

    def field(positions):
        return torch.full((len(positions),), density), torch.ones_like(positions)

    renderer = types.SimpleNamespace(field=field)
    result = evaluate_toybox.measure(job, renderer, evaluate_toybox.Scorer())
    assert result.chamfer is None and result.normals is None and result.seconds == 3.5
    assert result.iou == (None if density else 0.0)
    assert ("not finite" if density else "no surface") in result.note
    assert result.note in results.markdown([result], {"car": 0.5}) and result.note in result.line()


ROWS = [
    Result("a red car", False, 0.8, 1.0, 10.0, seed=0, fronts=1, geometry=0.5),
    Result("a red car", False, 0.6, 1.0, 10.0, seed=1, fronts=3, geometry=0.0),
    Result("a blue ball", True, 0.4, 0.5, 40.0, seed=0, chamfer=0.02, normals=0.9, f_score=0.9),
    Result("a red car", False, None, 0.0, 5.0, variant="wide", note="no surface"),
]


def test_table_and_means():
    full = results.summary(ROWS)["full"]
    assert full["iou"].mean == pytest.approx(0.6) and full["iou"].std == pytest.approx(0.2)
    assert full["iou"].seeds == pytest.approx(0.02**0.5)
    assert (full["one_front"].n, full["one_front"].mean) == (2, 0.5)
    assert full["precision_trained"].mean == 1.0 and full["precision_held_out"].mean == 0.5
    assert results.summary(ROWS)["wide"]["iou"].mean is None
    table = results.markdown(ROWS, {"car": 0.5, "ball": 0.25})
    first = "| full | 3 | 0.600 ± 0.200 (seeds 0.141) | 0.900 | – | – | 0.020 | 0.900 | 0.500 ± 0.7"
    assert first in table
    assert "| wide | 1 | – | – |" in table and "the true shapes themselves have 0.375" in table
    row = "| full | a blue ball | 0 | held out | 0.400 | 0.900 | – | – | 0.0200 | 0.900 | – |"
    assert row in table
    assert "full: objects 3, mean_iou 0.600, mean_f_score 0.900, mean_psnr –, r_precision" in table


def test_what_the_guide_judges_stands_in_parentheses():
    row = Result("a red car", False, 0.8, 1.0, 10.0, geometry=0.5, guide_judges=True)
    table = results.markdown([row], {"car": 0.5})
    assert "(1.000)" in table and "(0.500)" in table and "(0.800)" not in table
    assert "the judge of these figures was the guide, too" in table


def test_results_are_written(tmp_path):
    results.write(ROWS, {"car": 0.5}, {"full": {}, "wide": {"views": 1}}, tmp_path / "new" / "toy")
    stored = json.loads((tmp_path / "new/toy.json").read_text())
    assert [Result(**r) for r in stored["results"]] == ROWS
    assert stored["summary"]["full"]["iou"]["n"] == 3 and stored["true_geometry"] == {"car": 0.5}
    assert (tmp_path / "new/toy.md").read_text().startswith("| variant | runs | IoU")


def test_overview_has_a_row_an_object_and_a_column_a_variant(tmp_path):
    pictures = {}
    for i, key in enumerate([("car", "full"), ("ball", "full"), ("car", "wide")]):
        pictures[key] = tmp_path / f"{i}.png"
        export.write_png(torch.full((3, 20, 60), i / 2), pictures[key])
    results.overview(pictures, tmp_path / "all.png")
    sheet = results.Image.open(tmp_path / "all.png")
    assert sheet.size == (120, 16 + 2 * 36)
    assert [sheet.getpixel(at) for at in ((30, 45), (30, 81), (90, 45), (90, 81))] == [
        (0, 0, 0), (128, 128, 128), (255, 255, 255), (128, 128, 128)]  # fmt: skip


def test_command(tmp_path, cheap):
    options = ["--guidance", "exemplar", "--prompt", "a red car", "--steps", "1", "--seeds", "2"]
    result = CliRunner().invoke(cli.app, ["evaluate", "toybox", *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "a red car: IoU " in result.output and "full: objects 2" in result.output
    for suffix in (".md", ".json", ".png"):
        assert (tmp_path / f"exemplar{suffix}").stat().st_size > 0


def test_help_names_every_variant(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = CliRunner().invoke(cli.app, ["evaluate", "toybox", "--help"]).output
    words = re.split(r"[\s,;│]+", text)
    assert set(evaluate_toybox.VARIANTS) <= set(words)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "toybox", "--variant", "wdie"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("dreamfusion_fast.evaluate", run_name="__main__")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument `--variant`: expected one of full, narrow")
    assert error.count("\n") == 1
