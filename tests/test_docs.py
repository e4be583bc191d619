"""The pages of docs/ say what is so: generated ones fit the code, written ones name what exists."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest

from jaxscale.config import Config
from jaxscale.config_source import flatten
from tests.conftest import ROOT

DOCS = ROOT / "docs"
GENERATED = ("config.md", "cli.md")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
MAX_LINES = 150
KNOB = re.compile(rf"\b(?:{'|'.join(vars(Config()))})\.(?!py\b|md\b)[a-z]\w*")


def run_docs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "docs.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_generated_pages_fit_the_code() -> None:
    result = run_docs("--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_page_that_drifted_is_named(tmp_path: pathlib.Path) -> None:
    folder = ("--folder", str(tmp_path))
    assert run_docs(*folder).returncode == 0
    assert run_docs("--check", *folder).returncode == 0
    page = tmp_path / "config.md"
    page.write_text(page.read_text().replace("transformer blocks", "building blocks"))
    (tmp_path / "cli.md").unlink()
    result = run_docs("--check", *folder)
    assert result.returncode == 1
    assert re.findall(r"(\w+\.md): no longer fits", result.stdout) == ["config.md", "cli.md"]
    assert run_docs(*folder).returncode == 0
    assert page.read_text() == (DOCS / "config.md").read_text()


def test_generated_pages_are_whole() -> None:
    knobs = re.findall(r"^\| `(\w+\.\w+)`", (DOCS / "config.md").read_text(), re.MULTILINE)
    assert knobs == list(flatten(Config()))
    text = (DOCS / "cli.md").read_text()
    for word in ("## train", "## generate", "`--workdir DIR`", "`--top-k", "| 75 |", "required"):
        assert word in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_what_exists(page: pathlib.Path) -> None:
    text = page.read_text()
    unknown = {name for name in KNOB.findall(text) if name not in flatten(Config())}
    assert not unknown, "knobs that there are not"
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:jaxscale|tests|scripts|configs|docs)/[\w./]+)`", text)
    paths = [page.parent / link for link in links] + [ROOT / name for name in named]
    assert not [path for path in paths if not path.exists()]


def test_page_of_the_design_has_every_module() -> None:
    rows = re.findall(r"^\| F\d .*", (DOCS / "design.md").read_text(), re.MULTILINE)
    words = " ".join(re.findall(r"`([^`]+)`", "".join(rows))).split()
    package = ROOT / "jaxscale"
    assert {path.name for path in package.glob("*.py")} - {"__init__.py"} <= set(words)
    assert {path.parent.name for path in package.glob("*/__init__.py")} <= {
        word.partition("/")[0] for word in words
    }
    assert not [word for word in words if not (package / word).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_written_page_is_short(page: pathlib.Path) -> None:
    if page.name not in GENERATED:
        assert len(page.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture_is_drawn(tmp_path: pathlib.Path, ending: str) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "picture.py"))
    point = script["Point"]
    picture = script["Picture"](
        training=[point(1, 8.0), point(2, 6.0), point(4, 5.0)],
        validation=[point(2, 6.5), point(4, 5.5)],
        baselines={"unigram": 4.6, "bigram": 3.5},
        meshes=[(0, "data=2"), (2, "tensor=2")],
        title="a run",
    )
    path = tmp_path / f"run.{ending}"
    script["draw"](picture, path)
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
    assert path.read_bytes().startswith(start)


def test_picture_needs_a_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "picture.py"))
    assert script["main"]([str(tmp_path), str(tmp_path / "run.png")]) == 2
    assert "metrics.jsonl: no such file" in capsys.readouterr().out
