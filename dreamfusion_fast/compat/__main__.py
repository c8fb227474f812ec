"""python -m dreamfusion_fast.compat script.py arguments...: run a script on our kernels."""

from __future__ import annotations

import os
import runpy
import sys

from . import install


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m dreamfusion_fast.compat script.py [arguments...]")
    install()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as `python script.py` has it
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
