"""The README says what is so: its commands run, its paths exist, its tree is the tree.

Each block of commands runs as it stands, with a PATH that holds nothing but what a reader has: any
other word is "command not found". `jaxscale` gets a few knobs more there, so that a training takes
seconds. The two scripts are run by `test_scripts.py`; what pip would install is resolved
and not fetched.
"""

import json
import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch

import pytest

from jaxscale import records
from jaxscale.verbs.common import WRONG
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
MAX_LINES = 120
# The port in the README may be taken on this machine.
PORT = "29500"
STEPS, MORE_STEPS = 4, 6

# What the commands do in the test: real processes of the real program, with less to do.
JAXSCALE = f"""#!{sys.executable}
import os, sys

steps = {MORE_STEPS} if any("train.steps" in argument for argument in sys.argv) else {STEPS}
reduced = {{
    "train": [
        "--config.model.num_layers=2",
        "--config.data.length=32",
        "--config.train.global_batch_size=8",
        "--config.train.eval_batches=1",
        f"--config.train.steps={{steps}}",
        "--config.optimizer.warmup_steps=1",
    ],
    "evaluate": ["--batches=2"],
    "generate": ["--max-tokens=4"],
    "sweep": ["--to=32", "--config.model.num_layers=1"],
    "verify": ["--layers=1", "--length=16", "--limit=1", "--only=meshes"],
}}
with open("verbs", "a") as file:
    file.write(sys.argv[1] + "\\n")
os.environ["PATH"] = {os.environ["PATH"]!r}
arguments = sys.argv[1:] + reduced.get(sys.argv[1], [])
os.execv(sys.executable, [sys.executable, "-m", "jaxscale", *arguments])
"""
BASH = '#!/bin/bash\ntest -f "$1"\n'
PIP = f"""#!{sys.executable}
import sys, tomllib

project = tomllib.load(open({str(ROOT / "pyproject.toml")!r}, "rb"))["project"]
extras = project["optional-dependencies"]
extra = sys.argv[-1].removeprefix(".[").removesuffix("]")
sys.exit(sys.argv[1:3] != ["install", "--editable"] or extra not in extras)
"""

Run = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Run:
    """Return a function that runs shell commands in a new folder, as a reader would."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").touch()
    for name, text in {"jaxscale": JAXSCALE, "bash": BASH, "pip": PIP}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for folder in ("configs", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)

    def run(commands: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", "-e", "-c", commands],
            cwd=tmp_path,
            env={**os.environ, "PATH": str(programs), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )

    return run


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_commands_run(run: Run, tmp_path: pathlib.Path) -> None:
    for block in BLOCKS:
        result = run(block.replace(PORT, free_port()))
        assert result.returncode == 0, f"{block}\n{result.stdout}"
    verbs = set((tmp_path / "verbs").read_text().split())
    others = {"doctor", "prepare", "verify", "plan", "sweep", "evaluate", "generate"}
    assert verbs == {"train", *others}

    tiny, two = tmp_path / "runs" / "tiny", tmp_path / "runs" / "two"
    assert checkpoints(tiny) == [STEPS, MORE_STEPS], "the second mesh went on where the first ended"
    assert records.read_json(tiny / "config.json")["mesh"]["sequence"] == 2
    score = records.read_json(tiny / "evaluate.json")["rows"][0]
    assert {records.UNIGRAM_BITS_PER_BYTE, records.BIGRAM_BITS_PER_BYTE} <= score.keys()
    assert checkpoints(two) == [STEPS], result.stdout
    assert records.read_json(two / "environment.json")["num_processes"] == 2
    check_files_are_explained(tiny)
    check_picture_is_read(tiny)


def checkpoints(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / records.CHECKPOINTS_DIR).glob("*"))


def check_files_are_explained(workdir: pathlib.Path) -> None:
    """Each field of a run's metrics and goodput stands in the page on training."""
    explained = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "figures.md").read_text()))
    for file in (records.METRICS_FILE, records.GOODPUT_FILE):
        fields = {name for line in records.read_lines(workdir / file) for name in line}
        assert not fields - explained, f"docs/figures.md does not explain these of {file}"


def check_picture_is_read(workdir: pathlib.Path) -> None:
    """The script of the picture finds losses, scores, and where the mesh changed."""
    picture = runpy.run_path(str(ROOT / "scripts" / "picture.py"))["read_run"](workdir)
    assert picture.meshes == [(0, "data=2, fsdp=2, tensor=2"), (STEPS, "sequence=2, tensor=4")]
    assert [point.step for point in picture.training] == [STEPS, MORE_STEPS]
    assert [point.step for point in picture.validation] == [STEPS, MORE_STEPS]
    assert 0 < picture.baselines["bigram"] < picture.baselines["unigram"] < 8


@pytest.mark.parametrize(
    ("commands", "code", "complaint"),
    [
        ("python train.py", 127, "command not found"),
        ("jaxscale launch", WRONG, "invalid choice"),
        ("jaxscale doctor --gpu", WRONG, "unrecognized arguments"),
        (
            "jaxscale train --config=configs/lm.py:huge --print-config",
            WRONG,
            "no preset huge",
        ),
        ("bash scripts/play.sh\njaxscale doctor", 1, ""),
        ("pip install --editable '.[abacus]'", 1, ""),
        ("source .venv/bin/deactivate", 1, "No such file"),
    ],
)
def test_wrong_commands_fail(run: Run, commands: str, code: int, complaint: str) -> None:
    result = run(commands)
    assert result.returncode == code, result.stdout
    assert complaint in result.stdout


# What each extra is for: a package that it must bring.
EXTRAS = {"cuda": "jax-cuda12-plugin", "tpu": "libtpu"}


@pytest.mark.slow
@pytest.mark.parametrize("extra", re.findall(r"'\.\[(\w+)\]'", README))
def test_extras_can_be_installed(extra: str) -> None:
    command = ["install", "--dry-run", "--quiet", "--ignore-installed", "--report=-"]
    report = subprocess.run(
        [sys.executable, "-m", "pip", *command, f"{ROOT}[{extra}]"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = {item["metadata"]["name"] for item in json.loads(report.stdout)["install"]}
    assert EXTRAS[extra] in found


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def test_every_block_of_code_is_run_or_the_tree() -> None:
    languages = re.findall(r"^```(\w*)\n", README, re.MULTILINE)
    assert sorted(set(languages) - {""}) == ["sh", "text"]
    assert README.count("```text") == 1


def named_paths() -> set[str]:
    """Return what the README links to, or names as a path of the repository in backticks."""
    links = re.findall(r"\]\(([^)#]+)\)", README)
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    code = re.findall(r"`([\w./]+)`", prose)
    return {name for name in [*links, *code] if "/" in name or name.endswith(".md")}


def test_paths_exist() -> None:
    missing = [name for name in sorted(named_paths()) if not (ROOT / name).exists()]
    assert not missing


def tree() -> set[str]:
    """Return the folders in the README's tree: "docs", "jaxscale", "jaxscale/train"."""
    found, parent = set(), ""
    for line in README.split("```text\n")[1].split("```")[0].splitlines():
        indented, name = re.match(r"( *)([\w.]+)/ +\S", line).groups()
        parent = parent if indented else name
        found.add(f"{parent}/{name}" if indented else name)
    return found


def has_files(folder: pathlib.Path) -> bool:
    return any(path.is_file() and path.suffix != ".pyc" for path in folder.rglob("*"))


def test_tree_is_the_tree() -> None:
    patterns = [
        ".?*",
        *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()),
    ]
    folders = [path.name for path in ROOT.iterdir() if path.is_dir() and has_files(path)]
    ours = {name for name in folders if not any(fnmatch(name, p) for p in patterns)} | {".ci"}
    packages = {path.parent for path in (ROOT / "jaxscale").glob("*/__init__.py")}
    assert tree() == ours | {path.relative_to(ROOT).as_posix() for path in packages}
