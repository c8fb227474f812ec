"""The guard of instruction counts: what it fails, what it lets pass, what it writes."""

import json

import instructions
import pytest

COUNTS = {call: 1_000_000 for call in instructions.CALLS}


@pytest.fixture
def guard(tmp_path, monkeypatch):
    """Runs the guard on counts in the place of a program's: exit status."""
    monkeypatch.setattr(instructions, "COMMITTED", tmp_path / "instructions.json")
    monkeypatch.setattr(instructions.shutil, "which", lambda name: name)
    program = tmp_path / "program"
    program.touch()

    def run(build, counts, *options):
        monkeypatch.setattr(instructions, "count", lambda program: (build, counts))
        monkeypatch.setattr("sys.argv", ["instructions.py", str(program), *options])
        return instructions.main()

    run("gcc-12 x86-64-v3", COUNTS, "--update")
    return run


@pytest.mark.parametrize("change, status", [(0.029, 0), (-0.029, 0), (0.031, 1), (-0.031, 1)])
def test_three_percent(guard, capsys, change, status):
    n = round(1e6 * (1 + change))
    assert guard("gcc-12 x86-64-v3", {**COUNTS, "mlp_backward": n}) == status
    output = capsys.readouterr().out
    assert f"mlp_backward: {n:,} instructions, 1,000,000 committed, {change:+.2%}" in output
    assert output.count("FAILED") == output.count("--update") == status


def test_unknown_compilers_are_reported(guard, capsys):
    assert guard("gcc-99 x86-64-v3", {call: 5 for call in COUNTS}) == 0
    assert "mlp_backward: 5 instructions" in (output := capsys.readouterr().out)
    assert "Held to nothing: instructions.json has gcc-12 x86-64-v3." in output


def test_update_keeps_other_compilers(guard):
    assert guard("clang-14 x86-64-v3", {**COUNTS, "mlp_backward": 7}, "--update") == 0
    saved = json.loads(instructions.COMMITTED.read_text())
    assert saved["gcc-12 x86-64-v3"] == COUNTS
    assert saved["clang-14 x86-64-v3"]["mlp_backward"] == 7


def test_a_call_without_value_fails(guard):
    (line, held), *others = instructions.judge(COUNTS, {"mlp_backward": 1_000_000})
    assert line.endswith("no committed value: FAILED") and not held
    assert [held for _, held in others] == [True, False]


def test_without_valgrind_says_so(guard, monkeypatch, capsys):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert guard("gcc-12 x86-64-v3", {}) == 0
    assert "no valgrind" in capsys.readouterr().out


def test_committed_values_are_of_the_calls():
    for counts in json.loads(instructions.COMMITTED.read_text()).values():
        assert counts.keys() == set(instructions.CALLS) and all(n > 1e5 for n in counts.values())
