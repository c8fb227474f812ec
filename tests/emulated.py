"""How what `make emulated` builds is run. As a command, runs tests on the emulated kernels, a
process a file, as many at a time as there are CPUs:
python tests/emulated.py BUILD_FOLDER TEST_FILES [pytest options]"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def environment(folder: Path) -> dict[str, str]:
    """For a Python that imports folder's module _emulated: its sanitizers must come first."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libubsan")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(folder),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


CANNOT_START = "ThreadSanitizer: unexpected memory mapping"


def command_of(program: Path, *arguments: str) -> list[str]:
    """Without randomised addresses where the system allows that: ThreadSanitizer (g++ 12) may not
    start otherwise, and says so (CANNOT_START)."""
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    if fixed and subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    return [*fixed, str(program), *arguments]


def pytest_command(*arguments: str) -> list[str]:
    """Without capture of what sanitizers write before they end the process, and without what torch
    makes of an op, which is the same whatever runs it."""
    return [sys.executable, "-m", "pytest", "--capture=sys", "-k", "not registration", *arguments]


def main() -> int:
    variables = environment(Path(sys.argv[1]).resolve())
    files = [x for x in sys.argv[2:] if x.endswith(".py")]
    files.sort(key=lambda x: -os.path.getsize(x))  # the longest first
    options = [x for x in sys.argv[2:] if x not in files]

    def test(file: str) -> tuple[subprocess.CompletedProcess, float]:
        start = time.perf_counter()
        done = subprocess.run(
            pytest_command("-q", file, *options), env=variables, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done, time.perf_counter() - start

    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, (done, seconds) in zip(files, pool.map(test, files)):
            last = done.stdout.strip().splitlines()[-1:]
            print(f"{file}: {seconds:.0f} s: {''.join(last)}", flush=True)
            if done.returncode:
                print(done.stdout, flush=True)
            failed += done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
