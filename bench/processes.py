"""Child processes with a time limit, for gpu_check.py: whole groups, killed when time is up."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ANSWER = "@@"  # as bench/worker.py begins its answers


def stop(process: subprocess.Popen) -> None:
    """End a child and what it started; children are started in sessions of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(arguments, limit: float, cwd: Path, env: dict | None = None) -> dict:
    """Run a command: exit status (None: not started, or out of time), seconds, output."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            [str(a) for a in arguments], cwd=cwd, env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        return {"status": None, "seconds": 0.0, "output": str(error)}
    status = None
    try:
        output, _ = process.communicate(timeout=max(0.1, limit))
        status = process.returncode
    except subprocess.TimeoutExpired:
        stop(process)
        output = (process.communicate()[0] or "") + f"\n[stopped after {limit:.0f} s]"
    return {"status": status, "seconds": time.monotonic() - start, "output": output}


def run_all(commands: dict, limit: float, cwd: Path, env: dict | None, jobs: int) -> dict:
    """Several commands, `jobs` at a time, within the limit together: name -> result."""
    end = time.monotonic() + limit

    def one(arguments):
        left = end - time.monotonic()
        if left < 1:
            return {"status": None, "seconds": 0.0, "output": "[not started: no time left]"}
        return run(arguments, left, cwd, env)

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        return dict(zip(commands, pool.map(one, commands.values()), strict=True))


def tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


class Worker:
    """A process that answers lines of stdin with lines of JSON."""

    def __init__(self, arguments, cwd: Path, env: dict, log: Path):
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(a) for a in arguments], cwd=cwd, env=env, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, start_new_session=True, text=True,
            )  # fmt: skip
        self.answers = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                self.answers.put(json.loads(line[len(ANSWER) :]))
        self.answers.put(None)  # it has ended

    def send(self, command: str) -> None:
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended: receive() says so

    def receive(self, limit: float):
        """Its next answer. Raises RuntimeError if it ends or lets the limit pass; it is then gone,
        and later calls raise too."""
        try:
            answer = self.answers.get(timeout=max(0.1, limit))
        except queue.Empty:
            self.close()
            raise RuntimeError(f"out of time ({limit:.0f} s)") from None
        if answer is None:
            self.answers.put(None)
            self.process.wait()
            raise RuntimeError(f"ended with status {self.process.returncode}: "
                               + tail(self.log.read_text(errors="replace"), 5))  # fmt: skip
        return answer

    def close(self) -> None:
        stop(self.process)
