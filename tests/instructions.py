"""A guard of speed that no clock is in: instructions of three kernel calls, `make instructions`.

Counts, under valgrind's callgrind, what one call of each kernel executes on one thread, and holds
it to within 3 % of tests/instructions.json, where there is an entry for this compiler and
instruction set; a compiler without an entry is reported, and nothing is held to. Fewer instructions
than committed fail too: the committed value would no longer guard. `--update` writes the entry.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = Path(__file__).with_suffix(".json")
CALLS = ("hash_encode_forward", "mlp_backward", "composite_backward")
TIMES = 2  # calls in one run, and twice as many in the other: their difference has no start-up
TOLERANCE = 0.03


def run(program: Path, call: str, times: int) -> tuple[str, int]:
    """The program's compiler and instruction set, and the instructions of the whole process."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null",
               str(program), call, str(times)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not collected:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout.strip(), int(collected[1])


def count(program: Path) -> tuple[str, dict[str, int]]:
    """The program's compiler and instruction set, and the instructions of one of each call."""
    counts = {}
    for call in CALLS:
        _, few = run(program, call, TIMES)
        build, many = run(program, call, 2 * TIMES)
        counts[call] = round((many - few) / TIMES)
    return build, counts


def judge(counts: dict[str, int], committed: dict[str, int]) -> list[tuple[str, bool]]:
    """A line for each call, and whether it holds."""
    lines = []
    for call, n in counts.items():
        before = committed.get(call)
        change = n / before - 1 if before else None
        held = change is not None and abs(change) <= TOLERANCE
        text = "no committed value" if change is None else f"{before:,} committed, {change:+.2%}"
        lines.append((f"{call}: {n:,} instructions, {text}{'' if held else ': FAILED'}", held))
    return lines


def update(build: str, counts: dict[str, int]) -> None:
    entries = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    entries[build] = counts
    COMMITTED.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    print(f"{COMMITTED.name}: {build} written; say in the commit why it changed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", type=Path, nargs="?",
                        default=ROOT / "build/cpp/instructions")  # fmt: skip
    parser.add_argument("--update", action="store_true", help="commit to what is counted now")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        print("Instructions were not counted: no valgrind (apt-get install valgrind).")
        return 0
    if not options.program.exists():
        raise SystemExit(f"{options.program}: not built: make instructions")
    build, counts = count(options.program)
    if options.update:
        update(build, counts)
    committed = json.loads(COMMITTED.read_text())
    print(f"Instructions of one call, {build}:")
    if build not in committed:
        print("\n".join(f"{call}: {n:,} instructions" for call, n in counts.items()))
        print(f"Held to nothing: {COMMITTED.name} has {', '.join(committed)}.")
        return 0
    lines = judge(counts, committed[build])
    print("\n".join(line for line, _ in lines))
    if all(held for _, held in lines):
        return 0
    print(f"More than {TOLERANCE:.0%} from what is committed. If that is on purpose:\n"
          f"python tests/instructions.py {options.program} --update")  # fmt: skip
    return 1


if __name__ == "__main__":
    sys.exit(main())
