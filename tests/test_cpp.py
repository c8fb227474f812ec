"""The C++ library and examples/cpp: by `make cpp`, which installs the library without Python."""

import ctypes
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dreamfusion_fast
from dreamfusion_fast import _cpu
from dreamfusion_fast.camera import orbit
from dreamfusion_fast.config import FieldConfig, RenderConfig
from dreamfusion_fast.export import DISTANCE, FOCAL
from dreamfusion_fast.field import Field
from dreamfusion_fast.render import Renderer

PREFIX = Path(os.environ.get("CMAKE_PREFIX_PATH", "/nonexistent"))
if not list(PREFIX.glob("lib*/cmake/dreamfusion_fast")):
    pytest.skip("runs in `make cpp`", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/cpp"
sys.path.insert(0, str(EXAMPLE))
write_field = importlib.import_module("export_field").write_field

SHARED = """
#include <dreamfusion_fast/kernels.h>
extern "C" int threads(int n) { df::set_num_threads(n); return df::max_threads(); }
"""
OWN_PROJECT = """
cmake_minimum_required(VERSION 3.16)
project(own LANGUAGES CXX)
find_package(dreamfusion_fast {version} CONFIG REQUIRED)
message(STATUS "found in ${{dreamfusion_fast_DIR}}")
add_compile_options(-Wall -Wextra -Wpedantic -Werror)
add_executable(documented documented.cpp)
add_library(shared SHARED shared.cpp)
foreach(target documented shared)
  target_link_libraries(${{target}} PRIVATE dreamfusion_fast::cpu)
endforeach()
"""
SMALL = dict(n_levels=4, base_resolution=4, finest_resolution=40, log2_table_size=12, hidden=16)


def output(*command, status: int = 0) -> str:
    """What a command prints (both streams); it must exit with `status`."""
    done = subprocess.run(
        [*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def configure(source: Path, build: Path, folder: Path, status: int = 0) -> str:
    """CMake, which finds the library by the folder of its CMake files and by nothing else."""
    found = f"-Ddreamfusion_fast_DIR={folder}"
    return output("cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=", found, status=status)


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> Path:
    """The CMake files of the installed library, in another place than it was installed to."""
    prefix = tmp_path_factory.mktemp("moved") / "library"
    shutil.copytree(PREFIX, prefix)
    return next(prefix.glob("lib*/cmake/dreamfusion_fast"))


@pytest.fixture(scope="module")
def render(moved, tmp_path_factory) -> Path:
    """The example's program, built apart from the sources."""
    build = tmp_path_factory.mktemp("example")
    configure(EXAMPLE, build, moved)
    output("cmake", "--build", build)
    return build / "render"


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """Build folder of a project of one's own, with the library of the Python package: the program
    of docs/cpp.md and a shared library."""
    source = tmp_path_factory.mktemp("own")
    code = re.search(r"```cpp\n(#include.*?)```", (ROOT / "docs/cpp.md").read_text(), re.DOTALL)
    (source / "documented.cpp").write_text(code[1])
    (source / "shared.cpp").write_text(SHARED)
    project = OWN_PROJECT.format(version=dreamfusion_fast.__version__)
    (source / "CMakeLists.txt").write_text(project)
    folder = Path(output(sys.executable, "-m", "dreamfusion_fast", "--cmakedir").strip())
    assert f"found in {folder}" in configure(source, source / "build", folder)
    output("cmake", "--build", source / "build")
    return source / "build"


@pytest.fixture(params=["gaussian", "cone"])
def renderer(request, rng) -> Renderer:
    """Of a small field with parameters as large as trained ones."""
    settings = dict(blob="magic3d", activation="silu", interpolation="linear", hidden_layers=2)
    config = FieldConfig(**SMALL, **(settings if request.param == "cone" else {}))
    renderer = Renderer(
        Field(config, rng), RenderConfig(image_size=48, backdrop=(0.2, 0.5, 0.9)), rng
    )
    with torch.no_grad():
        renderer.field.table.mul_(1e4)  # uniform in [-1, 1]
    renderer.config.background = "solid"
    renderer.update_occupancy(0, decay=0.0)
    return renderer


def test_same_picture_as_python(render, renderer, tmp_path):
    write_field(tmp_path / "a.field", renderer)
    for azimuth, elevation in ((30, 20), (-135, -40)):
        cameras = orbit([float(azimuth)], elevation, DISTANCE, FOCAL)
        renderer.make_room(cameras, 0)
        with torch.no_grad():
            image = renderer(cameras, 0, jitter=False).image[0]
        want = (255 * image.clamp(0, 1)).round().permute(1, 2, 0).numpy()
        options = "--field", tmp_path / "a.field", "--azimuth", azimuth, "--elevation", elevation
        output(render, tmp_path / "a.png", *options, "--size", 48)
        got = np.asarray(Image.open(tmp_path / "a.png")).astype(float)
        assert got.shape == (48, 48, 3) and np.abs(got - want).max() <= 1
        assert np.ptp(want, (0, 1)).max() > 50  # something is to be seen


def test_a_scene_made_up(render, tmp_path):
    """Larger than a block of deflate; the same on every instruction set and number of threads."""
    said = output(render, tmp_path / "a.png", "--size", 160)
    assert f"dreamfusion_fast {dreamfusion_fast.__version__}, {_cpu.isas()[-1]}, " in said
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (160, 160, 3)
    corner, middle = picture[:8, :8].reshape(-1, 3), picture[64:96, 64:96].reshape(-1, 3)
    assert np.abs(corner.astype(int) - 128).max() <= 1 and middle.std(0).min() > 20


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "usage: render OUT.png"),
        (["a.png", "--size", "0"], "argument `--size`: expected 1 to 4096, got 0"),
        (["a.png", "--azimuth", "left"], "argument `--azimuth`: expected -360 to 360, got left"),
        (["a.png", "--size"], "argument `--size`: expected 1 to 4096, got"),
        (["a.png", "--colour", "red"], "argument `--colour`: expected --field, --azimuth"),
        (["a.png", "--field", "missing.field"], "missing.field: cannot be read"),
        (["missing/a.png"], "missing/a.png: cannot be written"),
    ],
)
def test_bad_arguments(render, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output(render, *arguments, status=2).startswith(f"error: {said}")


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("dreamfusion_fast field 1", "ply", "expected a file of export_field.py, which begins"),
        ("\nradius 0.75", "", "`radius`: expected 1 to 1 numbers, got 0"),
        ("radius 0.75", "radius -1", "`radius`: expected 1e-06 to 1e+06, got -1"),
        ("radius 0.75", "radius nan", "line `radius nan`: expected numbers"),
        ("features 2", "features 3", "`features`: expected 8 to 8, got 3"),
        ("smoothstep 1", "smoothstep yes", "line `smoothstep yes`: expected numbers"),
        ("widths 8 ", "widths 9 ", "`widths`: expected 8 to 8, got 9"),
        ("occupancy_resolution 48", "occupancy_resolution 64", "bytes, got"),
    ],
)
@pytest.mark.parametrize("renderer", ["gaussian"], indirect=True)
def test_bad_fields(render, renderer, old, new, said, tmp_path):
    field = tmp_path / "a.field"
    write_field(field, renderer)
    data = field.read_bytes()
    assert data.count(old.encode()) == 1
    field.write_bytes(data.replace(old.encode(), new.encode()))
    message = output(render, tmp_path / "a.png", "--field", field, status=2)
    assert message.startswith(f"error: {field}: ") and said in message
    assert not (tmp_path / "a.png").exists()


def test_fields_that_cannot_be_exported(rng, tmp_path):
    latent = Renderer(Field(FieldConfig(**SMALL, channels=4), rng), RenderConfig(), rng)
    with pytest.raises(ValueError, match=r"argument `renderer`: expected .*channels=3"):
        write_field(tmp_path / "a.field", latent)


def test_documented_program(own):
    documented = re.search(r"It prints\n```\n(.*?)```", (ROOT / "docs/cpp.md").read_text(), re.S)
    assert output(own / "documented") == documented[1]


def test_beside_the_python_module(own):
    """A library that holds the kernels exports none of them, and has settings of its own."""
    library = own / "libshared.so"
    for path in (library, Path(_cpu.__file__)):
        assert " df::" not in output("nm", "-DC", "--defined-only", path)
    threads = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).threads
    _cpu.set_num_threads(3)
    assert threads(2) == 2 and _cpu.max_threads() == 3
    _cpu.set_num_threads(0)


def test_instruction_sets_share_no_code(moved):
    """Of what two objects define the linker keeps either, so none may come from both sets."""
    library = next(moved.parents[1].glob("libdreamfusion_fast.a"))
    member, shared = "", []
    for line in output("nm", "-C", "--defined-only", library).splitlines():
        member = line if line.endswith(".o:") else member
        symbol = re.match(r"\w+ [WVuC] (.*)", line)
        if symbol and "dispatch" not in member and not re.search(r"\bdf::(base|v\d)::", symbol[1]):
            shared.append(symbol[1])
    data = {"DW.ref.__gxx_personality_v0", ".gomp_critical_user_df_march"}
    assert set(shared) <= data


@pytest.mark.parametrize("version", ["0.0.1", "9.0", f"{dreamfusion_fast.__version__}.1"])
def test_another_version_is_refused(moved, version, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(OWN_PROJECT.format(version=version))
    said = output(
        "cmake", "-S", tmp_path, "-B", tmp_path / "build",
        f"-DCMAKE_PREFIX_PATH={moved.parents[2]}", status=1,
    )  # fmt: skip
    said = " ".join(said.split())
    assert f'compatible with requested version "{version}"' in said
    assert f"version: {dreamfusion_fast.__version__}" in said


def test_names_no_absolute_path(moved):
    for file in moved.glob("*.cmake"):
        text = file.read_text()
        assert str(PREFIX) not in text and str(ROOT) not in text, file
