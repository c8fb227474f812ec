"""The page of benchmark results, and the comparison of two: on made-up results."""

import base64
import copy
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from synthetic_result import MACHINE, full_record, record, row, spread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import compare, report, stages
from bench.record import check, load, speedups
from dreamfusion_fast import ops

PNG = b"\x89PNG\r\n\x1a\n"


def save(path: Path, content: dict) -> str:
    path.write_text(json.dumps(content))
    return str(path)


# ---- the file ----
def test_a_complete_record_is_let_through_with_what_it_has_beside(tmp_path):
    whole = full_record() | {"quick": False}
    whole["rows"][0]["gathers"] = 3
    assert load(save(tmp_path / "a.json", whole)) == whole


def without(content: dict, name: str) -> None:
    del content[name]


WRONG = {
    "`version`: expected 1, got 2": lambda r: r.update(version=2),
    "expected `absent`, got version": lambda r: without(r, "absent"),
    "machine: expected `cpu`": lambda r: without(r["machine"], "cpu"),
    "limits: expected an object, got list": lambda r: r.update(limits=[]),
    "rows[1]: expected `flops`, `equal`, got op": lambda r: (
        without(r["rows"][1], "flops"), without(r["rows"][1], "equal")),
    "rows[0]: warm: expected `p80_ms`, got": lambda r: without(r["rows"][0]["warm"], "p80_ms"),
    "rows[0]: cold: expected times > 0": lambda r: r["rows"][0]["cold"].update(p20_ms=0.0),
    "rows[144]: expected one row of": lambda r: r["rows"].append(r["rows"][0]),
    "absent[0]: expected `reason`, got contender": lambda r: without(r["absent"][0], "reason"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_incomplete_records_are_refused(message):
    whole = full_record()
    WRONG[message](whole)
    with pytest.raises(ValueError, match=f"x.json: .*{re.escape(message)}"):
        check(whole, "x.json")


@pytest.mark.parametrize("text, message", [("[1]", "one JSON object, got list"), ("{", "got")])
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.json")
    with pytest.raises(SystemExit, match=message):
        report.main([str(tmp_path / "a.json")])


def test_speedups_have_the_widest_bounds():
    rows = [row(ms=10.0, share=0.1), row(contender="jax", ms=50.0, share=0.2),
            row(contender="jax", size="large"), row(contender="drjit", ms=None)]  # fmt: skip
    ((case, found),) = speedups(rows).items()
    assert case == ("hash_encode", "paper", "forward", "float32") and found.keys() == {"jax"}
    assert found["jax"][:3] == pytest.approx((5.0, 40 / 11, 60 / 9)) and not found["jax"].noisy
    rows[0]["noisy"] = True  # a noisy divisor makes a noisy ratio
    assert speedups(rows)[case]["jax"].noisy


# ---- the page ----
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page of full_record(), and its pictures."""
    folder = tmp_path_factory.mktemp("report")
    save(folder / "result.json", full_record())
    assert report.main([str(folder / "result.json")]) == 0
    return folder / "result"


def cells(html: str) -> list[list[str]]:
    """Table rows as texts."""
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.DOTALL)
    return [[re.sub(r"<[^>]*>", " ", c).strip() for c in re.findall(r"<td[^>]*>(.*?)</td>", x)]
            for x in lines]  # fmt: skip


def test_the_page_stands_alone(folder):
    html = (folder / "report.html").read_text()
    pictures = sorted(path.stem for path in folder.glob("*.png"))
    ops = ("composite", "hash_encode", "mlp", "render")
    assert pictures == sorted([*(f"speedup-{op}" for op in ops), "growth", "overview", "roofline",
                               "stages"])  # fmt: skip
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert len(sources) == len(pictures)
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    for picture in folder.glob("*.png"):
        png = picture.read_bytes()
        assert png.startswith(PNG) and base64.b64encode(png).decode() in html
    assert not re.search(r"<script|<link|@import|url\(|https?:", html)


def test_the_page_has_every_row(folder):
    html = (folder / "report.html").read_text()
    for op in {r["op"] for r in full_record()["rows"]}:
        section = html[html.index("<h2>Every row") :].split(f"<h3>{op}</h3>")[1].split("<h3>")[0]
        shown = [tuple(c[:4]) for c in cells(section) if c]
        wanted = [tuple(r[k] for k in ("contender", "size", "direction", "dtype"))
                  for r in full_record()["rows"] if r["op"] == op]  # fmt: skip
        assert shown == wanted
    for value in (*MACHINE.values(), "80 GFLOP/s", "3 (16 KB), 1.6 (1 MB) G/s"):
        assert str(value) in html


def test_the_page_says_what_to_doubt(folder):
    html = (folder / "report.html").read_text()
    assert ("Gave other results and were not timed: 1. Failed: 1. Noisy: 1. Contenders absent: 1."
            in html)  # fmt: skip
    doubts = html[html.index("<h2>What to doubt") : html.index("<h2>Pictures")]
    assert [c for c in cells(doubts) if c] == [
        ["hash_encode", "taichi", "paper", "forward", "float32",
         "other results than ours (error 0.25): not timed"],
        ["mlp", "drjit", "large", "forward", "float32",
         "not timed: ended with status -9: out of memory"],
        ["mlp", "warp", "paper", "forward", "float32", "noisy: spread over 30 %"],
        ["warp", "not importable &lt;here&gt;"],
    ]  # fmt: skip
    summary = cells(html[: html.index("<h2>What to doubt")])
    (line,) = (c for c in summary if c[:3] == ["hash_encode", "paper", "forward"])
    assert "unequal" in line and any(c.startswith("22×") for c in line)
    (line,) = (c for c in summary if c[:3] == ["mlp", "paper", "forward"])
    assert [c.endswith("noisy") for c in line] == [False] * (len(line) - 1) + [True]  # warp


def test_nothing_to_doubt_is_said_too():
    html = report.page(record(), {})
    assert html.count("<p>None.</p>") == 4 and "Failed: 0." in html


def test_without_peers_or_times_there_is_nothing_to_draw():
    from bench import plots

    assert plots.draw(record([row(ms=None)])) == {}
    assert plots.draw(record()).keys() == {"roofline"}


# ---- the comparison ----
def compared(tmp_path, capsys, base, new, *options) -> tuple[int, str]:
    """Exit status and what was printed."""
    paths = save(tmp_path / "base.json", base), save(tmp_path / "new.json", new)
    status = compare.main([*paths, *options])
    printed = capsys.readouterr()
    return int(status), printed.out + printed.err


@pytest.mark.parametrize("ms, share, verdict", [
    (11.0, 0.04, "slower"), (9.0, 0.04, "faster"), (10.5, 0.04, "same"),
    (12.0, 0.25, "same"),  # far, within a wide spread
    (10.15, 0.001, "same"), (10.3, 0.001, "slower"),  # near, by narrow spreads
])  # fmt: skip
def test_verdicts(tmp_path, capsys, ms, share, verdict):
    base, new = record(), record()
    base["rows"][0]["warm"], new["rows"][0]["warm"] = spread(10.0, share), spread(ms, share)
    status, text = compared(tmp_path, capsys, base, new)
    (line,) = (x for x in text.splitlines() if " warm " in x)
    assert line.split()[0] == verdict and f"{ms / 10:.3f}" in line
    assert status == (verdict == "slower")
    assert ("Overall SLOWER" if status else "Overall not slower") in text


def test_cold_times_count_and_others_do_not(tmp_path, capsys):
    rows = [row(), row(contender="jax", ms=50.0)]
    base, new = record(rows), copy.deepcopy(record(rows))
    new["rows"][1] |= {"warm": spread(100.0), "cold": spread(130.0)}
    status, text = compared(tmp_path, capsys, base, new)
    assert status == 0 and "2 same; ours: 1.000" in text
    assert "other contenders, that is the machine: 2.000" in text
    new["rows"][0]["cold"] = spread(20.0)
    assert compared(tmp_path, capsys, base, new)[0] == 1


def test_rows_of_one_result_only_are_named(tmp_path, capsys):
    base, new = record([row(), row(size="large")]), record([row(), row("mlp")])
    status, text = compared(tmp_path, capsys, base, new)
    assert status == 0 and "2 lost, 2 gained, 2 same" in text
    status, text = compared(tmp_path, capsys, record(), record([row(ms=None, equal=None)]))
    assert status == 1 and "Overall SLOWER: 2 failed" in text


@pytest.mark.parametrize("change, reason", [
    ({"version": 2}, "version: NEW has 2, this compares 1"),
    ({"machine": MACHINE | {"cpu": "Other"}}, "machine: cpu: BASE has Test CPU, NEW has Other"),
    ({"machine": MACHINE | {"threads": 1}}, "machine: threads: BASE has 2, NEW has 1"),
])  # fmt: skip
def test_unlike_results_are_refused_unless_forced(tmp_path, capsys, change, reason):
    status, text = compared(tmp_path, capsys, record(), record() | change)
    assert status == 2 and text == f"Not compared (--force would):\n{reason}\n"
    status, text = compared(tmp_path, capsys, record(), record() | change, "--force")
    assert status == 0 and f"Forced, though: {reason}" in text and "2 same" in text


def test_incomplete_results_are_refused_even_if_forced(tmp_path, capsys):
    broken = record([{k: v for k, v in row().items() if k != "warm"}])
    status, text = compared(tmp_path, capsys, record(), broken, "--force")
    assert status == 2 and "rows[0]: expected `warm`" in text


def test_the_newest_other_result_is_compared(tmp_path, capsys):
    base = save(tmp_path / "2030-01-01-a.json", record())
    assert compare.main([base]) == 2
    assert "expected another result than 2030-01-01-a.json" in capsys.readouterr().err
    save(tmp_path / "2030-01-02-b.json", record() | {"version": 7})
    save(tmp_path / "2030-01-03-c.json", record())
    assert compare.main([base]) == 0
    assert "2030-01-03-c.json" in capsys.readouterr().out


# ---- the shares of a step ----
def test_shares_of_a_profile():
    def event(key, own, total=0.0):
        return SimpleNamespace(key=key, self_cpu_time_total=1e6 * own, cpu_time_total=1e6 * total)

    events = [
        event("dreamfusion_fast::hash_encode_second", 1.5), event("hash_encode", 0.5),
        event("aten::mul", 0.5),
        event("GeneratedBackwardFor_dreamfusion_fast_hash_encode_defaultBackward", 1.0),
        event("autograd::engine::evaluate_function: GeneratedBackwardFor_dreamfusion_fast_mlp"
              "_backward_defaultBackward", 1.5),
        event("dreamfusion_fast::adam_step", 0.05), event(stages.GUIDANCE, 0.0, 4.0),
        event("aten::convolution", 3.9),  # a part of the guidance
    ]  # fmt: skip
    found = stages.shares(events, 10.0)
    assert found == pytest.approx({"guidance": 4.0, "hash_encode": 3.0, "mlp": 1.5,
                                   stages.REST: 1.5})  # fmt: skip
    assert next(iter(found)) == "guidance"


def test_torch_names_kernels_as_expected():
    """Forward and backward of an op are found in a profile, under its name."""
    x = torch.rand(50, 3, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.spherical_harmonics(x, 3).sum().backward()
    names = [e.key for e in profile.key_averages() if "dreamfusion_fast" in e.key]
    assert any("ackward" in name for name in names)
    assert {stages.kernel_of(name) for name in names} == {"spherical_harmonics"}


def test_stages_are_put_into_a_result(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "a.json", full_record())
    for ms in (20.0, 30.0):
        made = row("training step", ms=ms, stages={"mlp": ms}, bytes=None, flops=None)
        monkeypatch.setattr(stages, "measure", lambda steps, made=made: made)
        assert stages.main([path]) == 0
    assert "mlp" in capsys.readouterr().out
    (kept,) = (r for r in load(path)["rows"] if r["op"] == "training step")
    assert kept["stages"] == {"mlp": 30.0} and len(load(path)["rows"]) == 145
    assert report.main([path]) == 0
