"""`make bench`: races of made-up contenders, limits, counted work, results. Asserts no times."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import contenders, limits, peer_torch, race, report, roof, suite, task
from bench.contenders import Contender
from bench.record import load, times
from dreamfusion_fast import ops

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("ours", "eager", "unequal", "gradientless", "absent", "broken", "dies", "hy-phen")
LIMITS = {"fma_gflops": 100.0, "read_gbs": 10.0,
          "gather": [{"bytes": 1 << 14, "g_per_s": 4.0},
                     {"bytes": 1 << 20, "g_per_s": 1.0}]}  # fmt: skip
TINY = limits.SIZES["tiny"]


def double_task() -> task.Task:
    return task.Task("double", make=lambda size: None, run=None, gradients=("x",),
                      flops=lambda a, s, backward: 1000.0 * (1 + backward))  # fmt: skip


def double_problem(seconds=None) -> task.Problem:
    x = np.arange(10, dtype=np.float32)
    return task.Problem(double_task(), {"x": x, "g0": x + 1}, {"seconds": seconds or {}}, x.nbytes)


@pytest.fixture
def fakes(monkeypatch):
    """Entrants by name, whose processes find tests/bench_fakes.py."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    return lambda *names: {n: Contender(n, "bench_fakes", ("double",)) for n in names}


@pytest.fixture
def made(fakes, monkeypatch):
    """Suites of fakes, closed at the end."""
    suites = []

    def make(*names, seconds=None, **budget):
        monkeypatch.setitem(task.TASKS, "double", double_task())
        budget = race.Budget(**{"seconds": 0.01, "cold": False, **budget})
        found = suite.Suite(budget, fakes(*names), lambda name, size: double_problem(seconds))
        found.__dict__["limits"] = LIMITS
        suites.append(found)
        return found

    yield make
    for found in suites:
        found.close()


@pytest.fixture
def raced(made):
    """A suite after a race of every kind of contender, forward+backward at a plain size."""
    found = made(*NAMES)
    found.race(suite.Case("double", "large", suite.BOTH), list(NAMES))
    return found


# ---- races ----
def test_only_equal_contenders_are_timed(raced):
    (rows,) = raced.rows.values()
    assert [n for n, r in rows.items() if times(r)] == ["ours", "eager", "hy-phen"]
    for name in ("ours", "eager", "hy-phen"):
        assert rows[name]["equal"] and rows[name]["error"] == 0 and not rows[name]["problem"]
        assert rows[name]["repeats"] >= race.ROUNDS[0] and not rows[name]["cold"]
    assert rows["unequal"]["equal"] is False and rows["unequal"]["error"] == pytest.approx(0.5)
    assert rows["gradientless"]["equal"] is False and rows["gradientless"]["error"] is None
    problems = {"broken": "ValueError: cannot do this", "dies": "MemoryError: no more"}
    for name, problem in problems.items():
        assert rows[name]["problem"] == problem and not rows[name]["repeats"]
    assert rows["broken"]["equal"] is None


def test_absent_contenders_are_listed_and_the_rest_is_a_result(raced, tmp_path, monkeypatch):
    assert all("absent" not in rows for rows in raced.rows.values())
    record = raced.record()
    (absent,) = (a for a in record["absent"] if a["contender"] == "absent")
    assert absent["reason"] == "ImportError: no module named nothing"
    assert record["contenders"]["hy-phen"] == "1.0 hy-phen"
    row = {"contender": "ours", "pixels": 64}
    record["memory"] = [{**row, "samples": 100, "peak_mb": 12.5}, {**row, "problem": "no <time>"}]
    path = suite.write(record, tmp_path / "new")
    assert load(path) == json.loads(json.dumps(record))
    assert report.main([str(path)]) == 0
    html = (path.with_suffix("") / "report.html").read_text()
    for text in ("hy-phen", "no module named nothing", "12.5", "no &lt;time&gt;"):
        assert text in html


def test_cases_are_raced_once_and_ours_always(made):
    found, case = made("ours", "eager"), suite.Case("double", "paper", suite.FORWARD)
    rows = found.race(case, ["eager"])
    assert list(rows) == ["ours", "eager"] and found.race(case, []) is rows
    assert len(found.times[case, "eager"]) == rows["eager"]["repeats"] > 0
    assert times(rows["ours"], "cold")  # a plain size


def test_slow_contenders_are_not_raced_and_not_tried_again(made):
    found = made("ours", "eager", seconds={"eager": 0.2}, longest=0.1)
    for size, reason in (("small", "a call takes 0."), ("large", "a call would take about 0.")):
        row = found.race(suite.Case("double", size, suite.FORWARD), ["eager"])["eager"]
        assert row["problem"].startswith(reason) and not times(row)


def test_contenders_that_need_more_memory_than_there_is_are_not_tried(made, monkeypatch):
    found = made("ours", "eager")
    found.race(suite.Case("double", "small", suite.FORWARD), ["eager"])
    monkeypatch.setattr(suite, "free_memory", lambda: 1 << 20)
    found.history["eager", "double", False] = suite.Seen(500.0, 0.01, 1 << 30)
    row = found.race(suite.Case("double", "large", suite.FORWARD), ["eager"])["eager"]
    assert row["problem"] == "a call would need about 2.1 GB: 0.001 GB are free"
    assert not times(row) and suite.free_memory() > 0


def test_curves_are_of_the_fastest_others(made):
    names = ("ours", "ours-1-thread", "eager", "hy-phen", "b")
    found = made(*names, seconds={"eager": 0.02})
    assert found.fastest_peers("double", suite.FORWARD) == ["eager", "hy-phen", "b"]  # unknown yet
    found.race(suite.Case("double", "paper", suite.FORWARD), list(names))
    assert set(found.fastest_peers("double", suite.FORWARD)) == {"hy-phen", "b"}


class Recorder:
    """Stands in for a racer: answers at once, and notes who was asked what."""

    def __init__(self, name, turns, seconds=1e-3):
        self.contender, self.turns, self.seconds = Contender(name, ""), turns, seconds
        self.absent = None

    def ask(self, request, limit):
        if request["do"] == "prepare":
            np.savez(request["out"], np.zeros(3))
            return {"again": self.seconds, "peak": 0}
        self.turns.append((self.contender.name, request["flush"] if "flush" in request else False))
        return self.seconds

    def drop(self):
        self.turns.append((self.contender.name, "dropped"))

    close = drop


def test_contenders_take_turns_in_alternating_order(tmp_path):
    turns = []
    racers = [Recorder("ours", turns), Recorder("a", turns), Recorder("b", turns, seconds=0.4)]
    budget = race.Budget(seconds=0.01, cold=True)
    entries = race.Race(double_problem(), False, racers, tmp_path, budget).run()
    names = [name for name, kind in turns if kind is False]
    assert names[:9] == ["ours", "a", "b", "b", "a", "ours", "ours", "a", "b"]
    assert all(len(e.warm) == len(e.cold) == 5 for e in entries.values())
    assert turns[0][1] is False and turns[1][1] is True  # warm, then cold
    assert [t for t in turns if t[1] == "dropped"] == [(n, "dropped") for n in ("ours", "a", "b")]


def test_noise_is_marked():
    steady, jumping = [1.0, 1.01, 1.02, 1.01, 1.0], [1.0, 1.0, 1.5, 2.0, 2.0]
    assert race.is_noisy(race.spread(steady)) is False
    assert race.is_noisy(race.spread(jumping)) is True
    assert race.spread([]) is None and race.is_noisy(None) is None
    assert race.spread([0.001, 0.002, 0.003])["median_ms"] == pytest.approx(2.0)


@pytest.mark.parametrize("a, b, outliers, wanted", [
    ([1.0, 2.0], [1.0, 4.0], 0.0, 0.5), ([0.0] * 99 + [1.0], [1.0] + [0.0] * 99, 0.05, 0.0),
    ([1.0], [1.0, 2.0], 0.0, math.inf), ([math.nan], [1.0], 0.0, math.inf),
    ([math.nan], [math.nan], 0.0, 0.0), ([], [], 0.0, 0.0),
])  # fmt: skip
def test_differences(a, b, outliers, wanted):
    assert race.difference(np.array(a), np.array(b), outliers) == pytest.approx(wanted)


def test_a_stopped_process_answers_again_and_ends_with_its_parent(fakes, tmp_path):
    racer = race.Racer(fakes("ours")["ours"], tmp_path)
    with pytest.raises(RuntimeError, match="KeyError"):
        racer.ask({"do": "prepare", "op": "nothing", "folder": str(tmp_path), "settings": {},
                   "backward": False, "out": ""}, 60)  # fmt: skip
    pid = racer.worker.process.pid
    deadline = time.monotonic() + 10
    while state(pid) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(pid) == "T"  # stopped between its turns
    assert racer.ask({"do": "drop"}, 60) == {}
    racer.close()
    assert racer.ask({"do": "drop"}, 60) == {}  # a new process
    racer.close()


def test_a_process_that_is_killed_while_it_waits_is_said_to_be(fakes, tmp_path):
    racer = race.Racer(fakes("ours")["ours"], tmp_path)
    racer.ask({"do": "drop"}, 60)
    racer.worker.process.kill()
    racer.worker.process.wait()
    with pytest.raises(RuntimeError, match="ended with status -9 while another had its turn"):
        racer.ask({"do": "time", "calls": 1}, 60)
    racer.close()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


# ---- limits ----
def test_measured_limits_are_positive_and_finite():
    found = roof.measure(threads=1, scale=0.002)
    values = [found["fma_gflops"], found["read_gbs"], *(g["g_per_s"] for g in found["gather"])]
    assert all(0 < v < math.inf for v in values)
    sizes = [g["bytes"] for g in found["gather"]]
    assert sizes == sorted(sizes) and sizes[0] == 16 << 10 and sizes[-1] == 64 << 20


def test_floors_name_the_slowest_resource():
    assert roof.gather_rate(LIMITS, 1 << 17) == pytest.approx(2e9)  # half-way by logarithms
    assert roof.gather_rate(LIMITS, 1) == pytest.approx(4e9)
    work = {"bytes": 1e9, "flops": 1e9, "gathers": []}
    assert roof.floor(work, LIMITS) == (pytest.approx(0.1), "memory")
    assert roof.floor(work | {"flops": 2e10}, LIMITS) == (pytest.approx(0.2), "multiply-adds")
    gathers = [(1e9, 1 << 14), (1e9, 1 << 20)]
    assert roof.floor(work | {"gathers": gathers}, LIMITS) == (pytest.approx(1.25), "random reads")


# ---- tasks ----
@pytest.mark.parametrize("name", task.TASKS)
def test_tasks_are_the_same_for_ours_and_the_twin(name):
    """Through the module that their processes run, on a tiny picture; counted work is there."""
    problem = task.build(name, TINY)
    outputs = []
    for contender in ("ours", "eager"):
        peer_torch.start(contender)
        call, results = peer_torch.OPS[name](
            {k: x.copy() for k, x in problem.arrays.items()}, problem.settings,
            bool(problem.task.gradients))  # fmt: skip
        call()
        outputs.append([x.copy() for x in results()])
    gradients = len(problem.task.gradients)
    assert len(outputs[0]) == len(outputs[1]) > gradients
    for a, b in zip(*outputs):
        apart = race.difference(a.ravel(), b.ravel(), problem.task.outliers)
        assert apart <= problem.task.tolerance
    assert all(np.abs(x).max() > 0 for x in outputs[0][len(outputs[0]) - gradients :])
    forward, both = (problem.work(backward) for backward in (False, True))
    assert 0 < forward["bytes"] < both["bytes"] and forward["flops"] > 0
    assert json.loads(json.dumps(problem.settings)) == problem.settings


def test_counted_work_of_known_problems():
    assert task.mlp_flops(10, [2, 3, 1], False) == 10 * 2 * (6 + 3)
    assert task.mlp_flops(10, [2, 3, 1], True) == 3 * 10 * 2 * (6 + 3)
    problem = task.build("hash_encode", TINY)
    rows = np.diff(problem.settings["starts"])
    n = len(problem.arrays["x"])
    assert problem.work(True)["gathers"] == [(16.0 * n, 8 * r) for r in rows]
    x, table, features = 12 * n, 8 * rows.sum(), 4 * n * problem.settings["grid"]["n_levels"] * 2
    assert problem.work(False)["bytes"] == x + table + features


def test_cases_name_every_op_and_what_is_missing():
    cases = suite.plain_cases()
    there, absent = suite.ops_there()
    assert {c.op for c in cases} == set(there)
    assert set(task.TASKS) - set(there) == {a["contender"].split(": ")[1] for a in absent}
    assert ("render" in there) == hasattr(ops, "render")
    assert {c.curve for c in suite.curve_cases()} == {
        "points", "levels", "log2 table size", "rays", "samples"}  # fmt: skip
    assert len({str(c) for c in cases + suite.curve_cases()}) == len(cases + suite.curve_cases())
    known = {name for c in contenders.contenders().values() for name in c.ops}
    assert set(task.TASKS) <= known


def test_peers_have_what_they_are_entered_for():
    """By their source: the libraries need not be there."""
    for c in contenders.contenders().values():
        source = (ROOT / c.module.replace(".", "/")).with_suffix(".py").read_text()
        if c.module != "bench.peer_torch":
            assert all(f"def {op}(" in source for op in c.ops), c.name


# ---- the command ----
def test_a_part_of_the_suite_from_the_command_line(tmp_path):
    """Ours and the twin, in their processes; the results where they were asked for."""
    command = [sys.executable, "-m", "pytest", "bench/bench_ops.py", "-q", "-p", "no:cacheprovider",
               "-k", "generate_rays-small and eager", "--bench-seconds=0.01", "--bench-quick",
               f"--bench-out={tmp_path}", f"--benchmark-json={tmp_path}/pytest-benchmark",
               ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    rows = load(path)["rows"]
    assert [(r["contender"], r["equal"]) for r in rows] == [("ours", True), ("eager", True)]
    assert all(times(r) and times(r, "cold") and r["percent_of_limit"] > 0 for r in rows)
    assert (path.with_suffix("") / "report.html").exists() and str(path) in done.stdout
    (kept,) = json.loads((tmp_path / "pytest-benchmark").read_text())["benchmarks"]
    assert kept["stats"]["median"] == pytest.approx(1e-3 * times(rows[1]).middle)
    assert kept["group"] == "generate_rays-small-forward"


# ---- memory ----
def test_high_water_marks_are_those_of_the_call():
    """In a process of its own: others keep what they free."""
    program = (
        "from bench import runner\n"
        "import numpy as np\n"
        "before = runner.reset_high_water()\n"
        "block = np.ones(8 << 20)\n"
        "assert runner.high_water() - before >= 60e6\n"
        "del block\n"
        "grown = runner.high_water()\n"
        "assert runner.reset_high_water() <= grown\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
