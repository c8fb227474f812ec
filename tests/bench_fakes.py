"""Contenders that tests/test_bench.py races: started by name, one of OPS a behaviour."""

import time

STATE = {"name": ""}


def start(name: str) -> str:
    if name == "absent":
        raise ImportError("no module named nothing")
    STATE["name"] = name
    return f"1.0 {name}"


def double(arrays, settings, backward):
    """y = 2 x, and its gradient; what else it does is in its name."""
    name, calls = STATE["name"], []

    def call():
        calls.append(1)
        time.sleep(settings["seconds"].get(name, 0.001))
        if name == "dies" and len(calls) > 4:
            raise MemoryError("no more")

    def outputs():
        factor = 3 if name == "unequal" else 2
        results = [factor * arrays["x"]]
        return results + [factor * arrays["g0"]] * (backward and name != "gradientless")

    if name == "broken":
        raise ValueError("cannot do this")
    return call, outputs


OPS = {"double": double}
