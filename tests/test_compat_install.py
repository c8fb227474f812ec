"""compat.install(): in processes of their own, as it changes what `import` finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dreamfusion_fast

ROOT = Path(dreamfusion_fast.__file__).resolve().parents[1]


def run(folder, *arguments):
    """A Python process that sees this package, and what lies in the folder."""
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def check(folder, code):
    done = run(folder, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def original(tmp_path):
    """A folder with another package of that name."""
    package = tmp_path / "nerfacc"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = 'another'\n")
    (package / "cuda.py").write_text("")
    return tmp_path


def test_imports_find_ours(tmp_path):
    check(
        tmp_path,
        """
import sys
from dreamfusion_fast import compat
assert "nerfacc" not in sys.modules
compat.install("nerfacc")
import nerfacc
import nerfacc.estimators.occ_grid as by_path
from nerfacc import OccGridEstimator, rendering
from nerfacc.cameras import opencv_lens_undistortion
from nerfacc.estimators.prop_net import PropNetEstimator, get_proposal_requires_grad_fn
from nerfacc.grid import ray_aabb_intersect, traverse_grids
from nerfacc.losses import distortion
from nerfacc.volrend import accumulate_along_rays_, render_weight_from_density
import nerfacc.data_specs, nerfacc.pack, nerfacc.pdf, nerfacc.scan, nerfacc.version
from dreamfusion_fast.compat import nerfacc as ours
assert nerfacc is ours and nerfacc.__version__ == "0.5.3"
assert by_path.OccGridEstimator is OccGridEstimator is ours.OccGridEstimator
assert all(hasattr(nerfacc, name) for name in nerfacc.__all__)
before = dict(sys.modules)
compat.install("nerfacc")
assert sys.modules == before
# No module of ours is there twice.
names = [n for n in sys.modules if n.split(".")[0] == "nerfacc"]
assert all(sys.modules[n] is sys.modules["dreamfusion_fast.compat." + n] for n in names)
try:
    compat.install("nerfacc", "numpy")
except ValueError as error:
    assert "numpy" in str(error)
else:
    raise AssertionError
""",
    )


@pytest.mark.parametrize("imported", [False, True])
def test_an_original_is_not_shadowed_unless_forced(original, imported):
    before = "import nerfacc.cuda\n" if imported else ""
    check(
        original,
        before
        + """
import sys
from dreamfusion_fast import compat
try:
    compat.install("nerfacc")
except RuntimeError as error:
    assert "nerfacc" in str(error) and "force=True" in str(error) and "__init__.py" in str(error)
else:
    raise AssertionError
import nerfacc
assert nerfacc.__version__ == "another"
compat.install("nerfacc", force=True)
import nerfacc
assert nerfacc.__version__ == "0.5.3" and "nerfacc.cuda" not in sys.modules
compat.install("nerfacc")  # it is ours already
""",
    )


def test_a_folder_of_that_name_is_no_original(tmp_path):
    (tmp_path / "nerfacc").mkdir()
    (tmp_path / "nerfacc" / "notes.txt").write_text("")
    check(
        tmp_path,
        """
from dreamfusion_fast import compat
compat.install("nerfacc")
import nerfacc
assert nerfacc.__version__ == "0.5.3"
""",
    )


def test_a_script_runs_unedited(tmp_path):
    (tmp_path / "beside.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
import beside, nerfacc.volrend
assert __name__ == "__main__" and sys.argv[1:] == ["--scene", "lego"]
print(nerfacc.__name__, sys.argv[0] == __file__)
"""
    )
    done = run(tmp_path, "-m", "dreamfusion_fast.compat", "--only", "nerfacc", str(script),
               "--scene", "lego")  # fmt: skip
    assert done.stdout == "dreamfusion_fast.compat.nerfacc True\n", done.stderr
    done = run(tmp_path, "-m", "dreamfusion_fast.compat")
    assert done.returncode != 0 and "usage" in done.stderr


SPAWNING = """
import multiprocessing
import sys
import nerfacc.volrend
from tinycudann import Encoding

def report(queue):
    same = nerfacc.volrend.rendering is nerfacc.rendering
    queue.put((nerfacc.__name__, Encoding.__module__, same))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=report, args=(queue,))
    process.start()
    process.join()
    assert process.exitcode == 0
    print(*queue.get())
"""


def test_spawned_processes_find_ours(tmp_path):
    """As the workers of a DataLoader do that is told to spawn them: nerfstudio has one."""
    script = tmp_path / "script.py"
    script.write_text(SPAWNING)
    done = run(tmp_path, "-m", "dreamfusion_fast.compat", str(script))
    ours = "dreamfusion_fast.compat"
    assert done.stdout == f"{ours}.nerfacc {ours}.tinycudann.modules True\n", done.stderr


def test_path_of_spawned_processes(original):
    """It holds what was installed and nothing else; an original goes first, unless forced."""
    check(
        original,
        """
import importlib.util, sys
from dreamfusion_fast import compat
before = list(sys.path)
try:
    compat.install("tinycudann", "nerfacc")
except RuntimeError:
    assert sys.path == before
compat.install("tinycudann")
compat.install("tinycudann")
assert sys.path[:-1] == before and "children" not in importlib.util.find_spec("nerfacc").origin
compat.install("nerfacc", force=True)
assert sys.path[1:-1] == before
del sys.modules["nerfacc"]
import nerfacc.grid
assert nerfacc.__name__ == "dreamfusion_fast.compat.nerfacc"
""",
    )
