"""What of bench/gpu_check.py works without a GPU: its cases, its processes, its report."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import cases, gpu_build, gpu_check, gpu_report, gpu_stages, limits, model, processes
from bench.step import Step
from bench.timing import Clock
from bench.worker import backward_call, relative_error
from dreamfusion_fast import ops
from dreamfusion_fast.ops import reference

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", cases.CASES)
def test_cases(name):
    """Op and twin agree on the benchmark's inputs, and the model knows what is measured."""
    case, scene = cases.build(name, "tiny", CPU)
    assert case.comparable == (name != "march")
    assert not case.comparable or relative_error(case) < 1e-4
    assert {case.forward, case.backward or "march"} <= model.KERNELS.keys()
    if case.backward:
        assert all(x.isfinite().all() for x in backward_call(case.op, case.tensors)())
    wanted = limits.SIZES["tiny"].samples
    assert wanted / 2 < scene.size.samples < 2 * wanted
    assert 0 <= scene.capacity - scene.size.samples * scene.size.rays < 128


def test_steps_of_ops_and_twins_agree():
    steps = [Step(module, "tiny", CPU, False) for module in (ops, reference)]
    before = [x.detach().clone() for x in steps[0].params]
    for step in steps:
        step()
    for old, a, b in zip(before, steps[0].params, steps[1].params, strict=True):
        moved = (a - old).abs() > 0
        assert moved.any()
        # Adam's first step is lr times the gradient's sign, which rounding may decide.
        assert ((a - b).abs() < 1e-4).float().mean() > 0.99


def test_clock():
    times = Clock(CPU, 0.05).measure(lambda: time.sleep(0.002))
    assert 2000 <= times["p20_us"] <= times["median_us"] <= times["p80_us"]
    assert times["repeats"] >= 7


def test_processes_end_in_time(tmp_path):
    result = processes.run([sys.executable, "-c", "print(1); raise SystemExit(3)"], 60, tmp_path)
    assert (result["status"], result["output"]) == (3, "1\n")
    result = processes.run(["sleep", "60"], 0.2, tmp_path)
    assert result["status"] is None and "stopped after" in result["output"]
    assert processes.run(["no-such-program"], 1, tmp_path)["status"] is None


def test_worker(tmp_path):
    code = (
        "import sys\nprint('@@1', flush=True)\n"
        "for line in sys.stdin: print('noise'); print('@@' + line.strip(), flush=True)\n"
        "sys.exit('gone')"
    )
    worker = processes.Worker([sys.executable, "-c", code], tmp_path, {}, tmp_path / "log")
    worker.send("[2]")
    assert [worker.receive(60), worker.receive(60)] == [1, [2]]
    worker.process.stdin.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="status 1: gone"):
            worker.receive(60)
    late = processes.Worker(["sleep", "60"], tmp_path, None, tmp_path / "log")
    with pytest.raises(RuntimeError, match="out of time"):
        late.receive(0.2)
    assert late.process.poll() is not None


def fresh_check(tmp_path, rehearsal=False):
    record = {"rehearsal": rehearsal, "card": "NVIDIA H200", "date": "2030-01-02", "stages": []}
    end = time.monotonic() + 100
    return gpu_check.Check(ROOT, tmp_path, tmp_path / "results", rehearsal, end, 1, record)


def test_a_failed_stage_is_recorded_and_the_next_runs(tmp_path):
    check = fresh_check(tmp_path)

    def broken(check, limit):
        raise OSError("no GPU today")

    gpu_check.run_stage(check, "one", 50, broken)
    gpu_check.run_stage(check, "two", 1, broken)
    gpu_check.run_stage(check, "three", 50, lambda check, limit: {"ok": True, "note": "fine"})
    saved = json.loads((tmp_path / "results/NVIDIA-H200-2030-01-02.json").read_text())
    assert [s["ok"] for s in saved["stages"]] == [False, False, True]
    assert "OSError: no GPU today" in saved["stages"][0]["error"]
    assert "no time left" in saved["stages"][1]["error"]
    assert gpu_check.STAGES and {s[0] for s in gpu_check.STAGES} == gpu_stages.STAGES.keys()


def test_pytest_summary():
    output = "FAILED tests/a.py::b - E\n1 failed, 2 passed, 3 skipped, 1 error in 4.50s\n"
    report = gpu_stages.summary({"output": output, "status": 1, "seconds": 5.0})
    assert {"failed": 1, "passed": 2, "skipped": 3, "errors": 1}.items() <= report.items()
    assert not report["ok"] and report["error"] == "tests/a.py::b - E"
    nothing = gpu_stages.summary({"output": "9 deselected in 1s", "status": 5, "seconds": 1.0})
    assert nothing["error"] == "no test selected"


def test_report(tmp_path):
    """Predictions stand beside the op's own times only, as a share of them."""
    times = {"median_us": 200.0, "p20_us": 150.0, "p80_us": 250.0, "samples_per_ray": 64.0}
    row = {"op": "composite", "size": "paper", "precision": "fp32", "direction": "forward",
           "kernel": "composite_forward", **times}  # fmt: skip
    check = fresh_check(tmp_path)
    check.record |= {
        "benchmarks": [
            {**row, "implementation": "op", "relative_error": 1e-6},
            {**row, "implementation": "twin", "median_us": 900.0},
            {"op": "mlp", "size": "paper", "precision": "half", "error": "out | of memory"},
        ],
        "compile": [{**row, "error": "not compiled: no time left"}],
        "steps": [{"variant": "ops", "size": "paper", "precision": "half", "wall_us": 3e3, **times},
                  {"variant": "twins", "size": "paper", "precision": "fp32", "error": "x"}],
        "tests": {"mlp": {"passed": 3, "seconds": 1.0}},
    }  # fmt: skip
    gpu_report.add_predictions(check.record)
    op, twin, _ = check.record["benchmarks"]
    card, size = limits.card_named("NVIDIA H200"), limits.SIZES["paper"]
    predicted = model.predict("composite_forward", size, card)["prediction_us"]
    assert op["percent_of_prediction"] == pytest.approx(100 * predicted / 200)
    assert "prediction_us" not in twin and check.record["steps"][0]["prediction_us"] > 0
    text = gpu_report.markdown(check.record)
    assert "| 200.0 (150.0 to 250.0) | 900.0 | – | 4.5 | – |" in text
    assert "- mlp paper half  : out / of memory" in text and "no time left" in text
    assert "REHEARSAL" not in text
    check.record["rehearsal"] = True
    assert gpu_report.markdown(check.record).splitlines()[0].startswith("# gpu-check, REHEARSAL")


def test_direct_build_agrees_with_cmake():
    """The same flags, and every stem."""
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for flag in gpu_build.CXX:
        if flag.startswith("-f") and flag != "-fPIC" and "visibility" not in flag:
            assert flag in cmake
    listed = cmake.split("set(DF_STEMS")[1].split(")")[0].split()
    assert gpu_build.stems(ROOT) == listed
    assert gpu_build.compute_capability("9.0\n") == "90"
    assert gpu_build.compute_capability("12.0") == "120"
    assert gpu_build.compute_capability("none") is None
