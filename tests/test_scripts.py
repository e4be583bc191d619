"""The scripts a newcomer and CI run, and the locks they install from.

Most run in a copy of the repository that holds next to nothing, so that they take seconds; what
installs packages or trains is marked slow.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCKS = sorted((ROOT / "requirements").glob("py*.txt"))
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]


def run(
    script: pathlib.Path, *arguments: str, timeout: float = 60, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with this interpreter's packages and no environment of its own, unless told."""
    variables = {"PYTHON": sys.executable, "JAXSCALE_VENV": "none", "CI": "", **variables}
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def small_copy(tmp_path: pathlib.Path) -> pathlib.Path:
    """Return a copy of the repository with one module, one test and a lock of one package."""
    for folder in ("scripts", ".ci"):
        ignored = shutil.ignore_patterns("*.py", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "jaxscale").mkdir()
    shutil.copy(ROOT / "jaxscale" / "__init__.py", tmp_path / "jaxscale")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(
        '"""One test."""\n\n\ndef test_one() -> None:\n    assert True\n'
    )
    (tmp_path / "tests" / "conftest.py").write_text(
        '"""The option that test.sh passes on."""\n\nimport pytest\n\n\n'
        "def pytest_addoption(parser: pytest.Parser) -> None:\n"
        '    parser.addoption("--slow", action="store_true")\n'
    )
    (tmp_path / "requirements").mkdir()
    for lock in LOCKS:
        pin = next(line for line in lock.read_text().splitlines() if line.startswith("setuptools"))
        (tmp_path / "requirements" / lock.name).write_text(f"{pin}\n")
    return tmp_path


def other_python(*minors: str) -> str:
    """Return an interpreter of one of these versions, or skip."""
    for minor in minors:
        homes = (pathlib.Path.home() / ".pyenv" / "versions").glob(f"{minor}.*/bin/python")
        for candidate in (*map(str, homes), shutil.which(f"python{minor}")):
            if candidate:
                return candidate
    pytest.skip(f"no Python {' or '.join(minors)} on this machine")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_is_executable(script: pathlib.Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_pins_what_pyproject_asks(lock: pathlib.Path) -> None:
    comment, *lines = lock.read_text().splitlines()
    assert comment.startswith("# Python 3.")
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.+!]+", line) for line in lines), "pins and no hosts"
    pins = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{lock.name} lacks {requirement}; run scripts/lock.sh"
        assert requirement.specifier.contains(pin, prereleases=True), f"{requirement} is not {pin}"


def test_each_supported_python_has_its_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    minors = [line.rpartition(" ")[2] for line in project["classifiers"] if "3." in line]
    assert [lock.stem for lock in LOCKS] == [f"py{minor.replace('.', '')}" for minor in minors]
    assert f'PYTHON_MINORS="{" ".join(minors)}"' in (ROOT / "scripts" / "setup.sh").read_text()


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python: no such program"),
        ({"JAXSCALE_VENV": "jaxscale"}, "must begin with .venv"),
        ({"JAXSCALE_VENV": ".venv/../jaxscale"}, "must begin with .venv"),
    ],
)
def test_setup_refuses_in_one_line(
    small_copy: pathlib.Path, variables: dict[str, str], complaint: str
) -> None:
    result = run(small_copy / "scripts" / "setup.sh", **variables)
    assert result.returncode == 2
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (small_copy / "jaxscale" / "__init__.py").exists()


@pytest.mark.parametrize("minor", ["2.7", "3.10"])
def test_setup_refuses_an_old_python(small_copy: pathlib.Path, minor: str) -> None:
    python = other_python(minor)
    result = run(small_copy / "scripts" / "setup.sh", PYTHON=python, JAXSCALE_VENV=".venv")
    assert result.returncode == 2
    assert f"is Python {minor}; jaxscale runs on 3.11 3.12 3.13" in result.stderr
    assert not (small_copy / ".venv").exists()


@pytest.mark.slow
def test_setup_makes_keeps_and_repairs_its_environment(small_copy: pathlib.Path) -> None:
    script, venv = small_copy / "scripts" / "setup.sh", small_copy / ".venv"

    def setup() -> list[str]:
        result = run(script, timeout=600, JAXSCALE_VENV=".venv")
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    assert "creating .venv" in setup()[0]
    assert (venv / "bin" / "jaxscale").exists()
    command = [str(venv / "bin" / "python"), "-c", "import jaxscale; print(jaxscale.__file__)"]
    found = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(small_copy / "jaxscale" / "__init__.py")

    start = time.perf_counter()
    assert setup() == []
    assert time.perf_counter() - start < 5

    kept = venv / "kept"
    kept.touch()
    with (small_copy / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert not any("creating" in line for line in setup())
    assert kept.exists(), "a changed pyproject.toml installs into what is there"

    (venv / "bin" / "python").unlink()
    assert "creating .venv" in setup()[0]
    (venv / ".jaxscale").unlink()
    assert "creating .venv" in setup()[0], "an unfinished environment is made anew"
    assert not kept.exists()
    assert setup() == []


def test_test_script_ends_with_the_summary_of_pytest(small_copy: pathlib.Path) -> None:
    result = run(small_copy / "scripts" / "test.sh")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.fullmatch(r"=+ 1 passed in .*=+", result.stdout.splitlines()[-1])
    assert "skipped without --slow" in result.stdout


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("jaxscale/a.py", '"""A."""\n\nimport os\n', "F401"),
        ("jaxscale/a.py", '"""A."""\n\nx  = 1\n', "would be reformatted"),
        ("jaxscale/a.py", '"""A."""\n\nx: int = ""\n', "Incompatible types"),
        (
            "tests/test_a.py",
            '"""A."""\n\n\ndef test_a() -> None:\n    assert len("") == 1\n',
            "1 failed",
        ),
    ],
)
def test_test_script_fails_with_each_of_its_parts(
    small_copy: pathlib.Path, file: str, content: str, complaint: str
) -> None:
    (small_copy / file).write_text(content)
    result = run(small_copy / "scripts" / "test.sh")
    assert result.returncode == 1
    assert complaint in result.stdout


def test_missing_tool_skips_by_name_and_fails_ci(small_copy: pathlib.Path) -> None:
    script = small_copy / "scripts" / "test.sh"
    needs = 'TOOLS=("no-such-tool no-such-package the tests of pretence")'
    script.write_text(script.read_text().replace("TOOLS=()", needs))
    result = run(script)
    assert "skipped without no-such-tool (package no-such-package): the tests of" in result.stdout
    assert result.returncode == 0
    result = run(script, CI="true")
    assert "no-such-tool is missing and no-such-package did not bring it" in result.stderr
    assert result.returncode == 2


def test_ci_runs_everything_from_the_root(small_copy: pathlib.Path) -> None:
    (small_copy / "scripts" / "test.sh").write_text('echo "$PWD" "$@"\n')
    result = run(small_copy / ".ci" / "run")
    assert result.stdout == f"{small_copy} --slow\n"


@pytest.mark.slow
def test_demo_trains_resumes_and_sums_up(tmp_path: pathlib.Path) -> None:
    result = run(
        ROOT / "scripts" / "demo.sh",
        timeout=600,
        JAXSCALE_DEMO_STEPS="4",
        JAXSCALE_DEMO_RESUME_STEPS="2",
        JAXSCALE_DEMO_WORKDIR=str(tmp_path / "run"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.partition("== Summary")[2]
    assert re.search(r"loss +\d+\.\d{3} at step \d+, \d+\.\d{3} at step 6", summary)
    assert re.search(r"bits per byte +[\d.]+ model, [\d.]+ bigram, [\d.]+ unigram", summary)
