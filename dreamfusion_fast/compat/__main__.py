"""python -m dreamfusion_fast.compat [--only NAME] script.py arguments...

Runs a script on our packages, all or one of them, as `python script.py arguments...` would.
"""

from __future__ import annotations

import os
import runpy
import sys

from . import NAMES, install


def main() -> None:
    arguments, names = sys.argv[1:], NAMES
    if arguments[:1] == ["--only"]:
        names, arguments = arguments[1:2], arguments[2:]
    if not arguments:
        sys.exit(f"usage: {__doc__.splitlines()[0]}")
    install(*names)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))  # as the script would have it
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
