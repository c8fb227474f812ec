"""What a user sees: exit codes, one-line errors, the files of a run."""

import os
import signal
import subprocess
import sys
import time

import forked
import pytest

from dreamfusion_fast import cli
from dreamfusion_fast.checkpoint import folder_state

COMMAND = ("-m", "dreamfusion_fast.cli")
# Fewer features, coarser steps: the pictures and the mesh of a run's end are made in less time.
SMALL = {"field.n_levels": 4, "field.log2_table_size": 12, "render.step": 0.06,
         "render.occupancy_resolution": 16}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a command in a process of its own: its exit code and what it writes."""

    def call(*args):
        folder = tmp_path_factory.mktemp("command")
        output, errors = folder / "stdout", folder / "stderr"
        process = forked.start([*COMMAND, *args], output, errors, folder)
        code = forked.finish(process, 300)
        return subprocess.CompletedProcess(args, code, output.read_text(), errors.read_text())

    return call


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command in this process, which need not import all anew: it must exit with 2. Returns
    its one line on stderr."""

    def refuse(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["dreamfusion-fast", *map(str, args)])
        with pytest.raises(SystemExit) as exited:  # and no other exception
            cli.main()
        assert exited.value.code == 2
        return one_line(capsys.readouterr().err)

    return refuse


def one_line(errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in errors, errors
    return lines[0]


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "car"
    settings = [x for name, value in SMALL.items() for x in ("--set", f"{name}={value}")]
    result = run("generate", "a red car", "--out", folder, "--steps", 3, *settings)
    assert result.returncode == 0, result.stderr
    return folder


def test_generate_leaves_everything(finished):
    for name in (
        "config.json",
        "checkpoint.safetensors",
        "metrics.jsonl",
        "turntable.mp4",
        "contact_sheet.png",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_finished_run_is_not_overwritten(finished, refused):
    before = (finished / "checkpoint.safetensors").read_bytes()
    assert "add --resume" in refused("generate", "a red car", "--out", finished, "--steps", 3)
    assert (finished / "checkpoint.safetensors").read_bytes() == before


def test_resume_goes_on_to_more_steps(finished, run):
    result = run("generate", "a red car", "--out", finished, "--steps", 5, "--resume")
    assert result.returncode == 0, result.stderr
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "args, words",
    [
        ([""], "argument `prompt`: expected a text, got an empty one"),
        (["a red zebra"], "does not know `zebra`"),
        (["a read car"], "did you mean `red`"),
        (["a red car", "--steps", "0"], "argument `steps`: expected at least 1, got 0"),
        (["a red car", "--steps", "-5"], "argument `steps`: expected at least 1, got -5"),
        (["a red car", "--guidance", "no/such"], "guidance `no/such`: expected toybox, exemplar"),
        (
            ["a red car", "--set", "guidance.scael=3"],
            "setting's name, e.g. guidance.scale, got gui",
        ),
        (["a red car", "--set", "views"], "argument `--set`: expected name=value, got 'views'"),
        (
            ["a red car", "--set", "views=many"],
            "config `views`: expected a value like 4, got 'many'",
        ),
        (["a red car", "--image-size", "128"], "`image_size`: expected 64, the size that the guid"),
        (["a red car", "--dtype", "fp8"], "argument `dtype`: expected one of fp32, fp16, bf16"),
        (["a red car", "--negative", "ugly"], "does not know `ugly`"),
        (["a red car", "--device", "tpu"], "argument `--device`: expected cpu, cuda or auto"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, refused, args, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert words in refused("generate", *args, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_late_refusal_is_one_line_and_exit_code_2_of_the_process(tmp_path, run):
    """By the trainer, when all is imported."""
    result = run("generate", "a red car", "--image-size", 128, "--out", tmp_path / "run")
    assert result.returncode == 2 and "`image_size`" in one_line(result.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args, unneeded",
    [
        (["--help"], "torch"),
        (["generate", ""], "torch"),
        (["generate", "a red car", "--steps", "0"], "torch"),
        (["generate", "a red car", "--out", "."], "torch"),
        (["generate", "a red zebra"], "diffusers"),
        (["generate", "a red car", "--device", "tpu"], "diffusers"),
        (["generate", "a red car", "--set", "loss.entropy=-1"], "diffusers"),
        (["doctor"], "diffusers"),
    ],
)
def test_nobody_waits_for_imports_that_are_not_needed(tmp_path, args, unneeded):
    """A refusal takes a moment: torch takes one second to import, diffusers several."""
    (tmp_path / "thesis.txt").write_text("precious")
    program = f"""
import atexit, sys
from dreamfusion_fast.cli import main
atexit.register(lambda: print("imported:", {unneeded!r} in sys.modules))
sys.argv[1:] = {args!r}
main()
"""
    path = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "imported: False" in result.stdout, result.stdout + result.stderr
    assert result.returncode == (2 if "generate" in args else 0)


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path, run):
    (tmp_path / "thesis.txt").write_text("precious")
    result = run("generate", "a red car", "--out", tmp_path)
    assert result.returncode == 2 and "holds something else" in one_line(result.stderr)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    assert folder_state(tmp_path) == "foreign"


@pytest.mark.parametrize("damage", ["truncate", "garbage"])
def test_a_broken_checkpoint_is_refused_and_kept(finished, tmp_path, refused, damage):
    for name in ("config.json", "checkpoint.safetensors", "metrics.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000] if damage == "truncate" else b"garbage")
    before = path.read_bytes()
    said = refused("generate", "a red car", "--out", tmp_path, "--resume")
    assert "truncated or foreign file" in said
    assert path.read_bytes() == before


def test_ctrl_c_saves(tmp_path):
    settings = "--steps", 5000, "--set", "preview_every=2"
    command = [*COMMAND, "generate", "a blue ball", "--out", tmp_path / "run", *settings]
    output = tmp_path / "output.txt"
    process = forked.start(command, output, output, tmp_path)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (log.exists() and (tmp_path / "run/preview.png").exists()):
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    assert forked.finish(process, 60) == 130 and "go on with --resume" in output.read_text()
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_doctor_says_what_is_used_and_why_not():
    result = subprocess.run(
        [sys.executable, *COMMAND, "doctor"], capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for word in ("CPU kernels", "GPU", "CUDA kernels", "Triton", "embedded prior", "scorer"):
        assert word in result.stdout
