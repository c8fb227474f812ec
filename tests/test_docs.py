"""What the documents say is so: their programs run, their links lead somewhere, their names are."""

import importlib
import re
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
SHORTEST = 5  # lines of a block that is a program; shorter ones are fragments
SHORTER = {"steps=300": "steps=2"}  # what would run for a minute


def blocks() -> list:
    """A parameter (page, first line, program) for each python block of README and docs."""
    found = []
    for page in (ROOT / "README.md", *DOCS):
        text = page.read_text()
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
            line = text.count("\n", 0, match.start()) + 2
            if match[1].count("\n") >= SHORTEST:
                found.append(pytest.param(page, line, match[1], id=f"{page.name}:{line}"))
    return found


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def names(text: str) -> set[str]:
    """`dreamfusion_fast.x.y` in backticks."""
    return set(re.findall(r"`(dreamfusion_fast(?:\.\w+)+)", without_code(text)))


@pytest.mark.parametrize("page, line, program", blocks())
def test_programs_run(page, line, program, tmp_path):
    """Each in a process forked from one that has imported torch, and nothing of ours."""
    script, output = tmp_path / "program.py", tmp_path / "output.txt"
    for long, short in SHORTER.items():
        program = program.replace(long, short)
    script.write_text("\n" * (line - 1) + program)  # a traceback then has the page's line numbers
    process = forked.start([script], output, output, tmp_path, [tmp_path, ROOT])
    assert forked.finish(process, 300) == 0, f"{page.name}, line {line}:\n{output.read_text()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    links = [link for link in links if not re.match(r"[a-z]+:|#", link)]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_can_be_imported(page):
    missing = []
    for name in sorted(names(page.read_text())):
        try:
            resolve(name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    assert not missing


def resolve(name: str):
    """The module, or an attribute of the longest prefix that is one."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def test_these_tests_can_fail(tmp_path):
    """The page of examples is found whole, and a name or a program that is wrong is refused."""
    assert sum(p.values[0].name == "torch.md" for p in blocks()) >= 6
    assert names("`dreamfusion_fast.ops.mlp(x)` ```") == {"dreamfusion_fast.ops.mlp"}
    with pytest.raises((ImportError, AttributeError)):
        resolve("dreamfusion_fast.ops.nothing")
    with pytest.raises(AssertionError, match=r"torch.md, line 3:\n(.|\n)*line 3, in <module>"):
        test_programs_run(Path("torch.md"), 3, "assert False", tmp_path)
