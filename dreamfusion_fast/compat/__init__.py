"""Programs written for other libraries, run on our kernels.

`install()` puts our packages under the names that such programs import. `python -m
dreamfusion_fast.compat script.py arguments...` does that and then runs the script, unedited.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

NAMES = ("nerfacc", "tinycudann")
_CHILDREN = Path(__file__).resolve().parent / "children"


def install(*names: str, force: bool = False) -> None:
    """Make `import nerfacc` and `import tinycudann` find ours, with all their submodules.

    Calling it again changes nothing. Either all the names are installed or, on an error, none.
    Processes that multiprocessing starts, by whatever method, find ours too, by sys.path.

    Args:
        names: which of NAMES; none given: all of them.
        force: take the place of an original that is installed, or that is imported already. What
            a program took from it by `from ... import` before stays the original's.
    Raises:
        ValueError: a name that is none of NAMES.
        RuntimeError: an original is there, and force is False.
    """
    names = names or NAMES
    for name in names:
        if name not in NAMES:
            raise ValueError(f"argument `names`: expected some of {', '.join(NAMES)}, got {name!r}")
    packages = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    packages = {name: p for name, p in packages.items() if sys.modules.get(name) is not p}
    for name in packages:
        origin = _original(name)
        if origin and not force:
            raise RuntimeError(
                f"{name} itself is installed ({origin}): uninstall it, or pass force=True to use "
                f"{__name__}.{name} in its place"
            )
    aliases = [_aliases(name, package) for name, package in packages.items()]
    for name, modules in zip(packages, aliases, strict=True):
        for key in [k for k in sys.modules if k == name or k.startswith(f"{name}.")]:
            del sys.modules[key]
        sys.modules.update(modules)
    for name in names:
        folder = str(_CHILDREN / name)
        if folder not in sys.path:
            sys.path.insert(0 if force else len(sys.path), folder)


def _original(name: str) -> str | None:
    """Where a package or module of this name comes from that is not ours; None: from nowhere."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) or "already imported"
    spec = importlib.util.find_spec(name)
    # A folder of that name without an __init__.py, somewhere on the path, is no package.
    if spec is None or spec.origin is None or _CHILDREN in Path(spec.origin).resolve().parents:
        return None
    return spec.origin


def _aliases(name: str, package) -> dict:
    """Every module of the package, under the name that programs import it by."""
    modules = {name: package}
    prefix = f"{package.__name__}."
    for info in pkgutil.walk_packages(package.__path__, prefix):
        modules[f"{name}.{info.name.removeprefix(prefix)}"] = importlib.import_module(info.name)
    return modules
