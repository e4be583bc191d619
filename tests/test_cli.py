"""The command line: every mistake in one line with exit code 2 before any compile; signals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import jax
import pytest

from jaxscale import records
from jaxscale.cli import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ["--config", str(ROOT / "configs" / "lm.py") + ":tiny", "--devices=cpu:8"]
SMALL = [
    "--config.model.num_layers=1",
    "--config.data.length=32",
    "--config.train.global_batch_size=8",
    "--config.optimizer.warmup_steps=1",
]


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Collect what is compiled; leave JAX's settings as they were."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        del duration_secs
        if "backend_compile" in event:
            seen.append(event)

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"document {number} " * 50)
    return folder


def knobs(**values: object) -> list[str]:
    """Return overrides from `section__knob=value`."""
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in values.items()]


MISTAKES = {
    "an unknown key": (["--config.model.widht=64"], "did you mean model.width?"),
    "a wrong type": (["--config.train.steps=many"], "train.steps='many' has a wrong type"),
    "a mesh that does not multiply out": (
        ["--config.mesh.data=3"],
        "mesh (data=3) does not multiply out to 8 devices; these would: data=8",
    ),
    "heads that do not divide": (
        ["--config.mesh.data=1", "--config.mesh.tensor=8", "--config.model.num_kv_heads=4"],
        "mesh.tensor=8 does not divide model.num_kv_heads=4",
    ),
    "rounds that the layers do not divide into": (
        knobs(mesh__data=4, mesh__stage=2, train__pipeline_rounds=3, train__accumulation_steps=2),
        "train.pipeline_rounds=3 x mesh.stage=2 does not divide model.num_layers=8",
    ),
    "rounds without enough microbatches": (
        knobs(mesh__data=4, mesh__stage=2, train__pipeline_rounds=2),
        "raise train.accumulation_steps=1 to 2",
    ),
    "heads that all_to_all cannot part": (
        knobs(
            mesh__data=1,
            mesh__sequence=8,
            model__num_heads=4,
            model__sequence_attention="all_to_all",
        ),
        "mesh.sequence=8 does not divide the 4 heads of model.num_heads=4",
    ),
    "a length that no ring can part": (
        knobs(mesh__data=1, mesh__sequence=8, data__length=24, model__sequence_attention="ring"),
        "twice mesh.sequence=8 does not divide data.length=24; take a multiple of 16",
    ),
    "a batch that does not divide": (
        ["--config.train.global_batch_size=12"],
        "mesh.data=8 does not divide train.global_batch_size / train.accumulation_steps=12",
    ),
    "an unwritable workdir": (["--workdir=/proc/run"], "--workdir=/proc/run cannot be written"),
    "a missing corpus": (["--config.data.source=files:/no/*.txt"], "data.source='files:/no/*.txt'"),
    "an unknown source": (["--config.data.source=cloud"], "data.source='cloud'"),
    "a tokenizer larger than the vocabulary": (
        ["--config.model.vocab_size=128", "--config.data.source=synthetic"],
        "model.vocab_size=128",
    ),
    "a missing tokenizer": (["--config.data.tokenizer=/nothing.json"], "data.tokenizer=/nothing"),
    "layers that stages do not divide": (
        knobs(mesh__data=1, mesh__stage=8, model__num_layers=4),
        "mesh.stage=8 does not divide model.num_layers=4",
    ),
    "an override without a value": (["--config.train.steps"], "--config.train.steps has no value"),
    "wrong devices": (["--devices=gpu:2"], "--devices=gpu:2 is not of the form cpu:N"),
    "a remote workdir": (
        ["--workdir=gs://bucket/run"],
        "bucket/run is remote; take a local or a mounted folder",
    ),
    "rules that cannot work": (
        ["--config.rules.hidden=tensor,sequence"],
        "rules.hidden and rules.length both take mesh axis sequence",
    ),
    "a sample without a prompt": (
        ["--config.train.sample_prompt=", "--config.data.source=synthetic"],
        "train.sample_prompt is empty",
    ),
    "a missing config file": (["--config=nothing.py"], "--config=nothing.py: no such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2_before_any_compile(
    name: str,
    tmp_path: pathlib.Path,
    compiled: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, message = MISTAKES[name]
    assert main(["train", *TINY, "--workdir", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert compiled == []
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_an_empty_corpus_is_named(
    tmp_path: pathlib.Path, compiled: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    source = f"--config.data.source=files:{tmp_path}/*.txt"
    assert main(["train", *TINY, "--workdir", str(tmp_path / "run"), source]) == 2
    error = capsys.readouterr().err
    assert "data.source" in error
    assert error.count("\n") == 1
    assert compiled == []


def test_a_workdir_of_another_config_is_refused_with_the_difference(
    tmp_path: pathlib.Path,
    corpus: pathlib.Path,
    compiled: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    source = f"--config.data.source=files:{corpus}/*.txt"
    arguments = ["train", *TINY, *SMALL, source, "--workdir", str(folder)]
    assert main([*arguments, "--config.train.steps=0"]) == 0
    compiled.clear()
    capsys.readouterr()
    assert main([*arguments, "--config.model.width=64", "--config.train.steps=0"]) == 2
    error = capsys.readouterr().err
    assert "model.width: 128 -> 64" in error
    assert error.count("\n") == 1
    assert compiled == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", *TINY], "--workdir is missing"),
        (["train", "--workdir", "runs/nothing"], "--config is missing"),
        (["evaluate", "--workdir", "runs/nothing"], "holds no run"),
        (["generate", "--prompt", "x", "--workdir", "runs/nothing", "--top-p=2"], "top_p=2.0"),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str],
    message: str,
    compiled: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert compiled == []


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--stpes=3"], []])
def test_a_wrong_flag_or_verb_exits_2_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_print_config_shows_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--config.mesh.tensor=2", "--print-config"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["mesh"]["tensor"] == 2
    assert config["model"]["head_dim"] == 16


def test_print_config_of_a_workdir_is_that_of_its_resume(
    tmp_path: pathlib.Path, corpus: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"--config.data.source=files:{corpus}/*.txt"
    arguments = ["train", *TINY, *SMALL, source, "--workdir", str(tmp_path / "run")]
    assert main([*arguments, "--config.train.steps=1"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--config.train.steps=9", "--print-config"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["train"]["steps"], config["optimizer"]["schedule_steps"]) == (9, 1)


def test_output_that_nobody_reads_or_can_show_ends_no_run(
    tmp_path: pathlib.Path, corpus: pathlib.Path
) -> None:
    source = f"--config.data.source=files:{corpus}/*.txt"
    arguments = [
        "train",
        *TINY,
        *SMALL,
        source,
        "--workdir",
        str(tmp_path),
        "--config.train.steps=20",
    ]
    process = start(*arguments, "--config.train.log_every=1")
    wait_for(process, "step 1/")
    assert process.stdout is not None
    process.stdout.close()
    process.wait(timeout=120)
    assert [path.name for path in (tmp_path / records.CHECKPOINTS_DIR).iterdir()] == ["20"]
    generate = ["generate", "--workdir", str(tmp_path), "--max-tokens=2", "--devices=cpu:8"]
    shown = subprocess.run(
        [sys.executable, "-m", "jaxscale", *generate, "--prompt=\u00e9"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert shown.stdout.startswith(b"?")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxscale", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def wait_for(process: subprocess.Popen[str], text: str) -> list[str]:
    """Read lines until one has `text`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


@pytest.mark.smoke
def test_train_stops_on_sigterm_goes_on_and_is_read(
    tmp_path: pathlib.Path, corpus: pathlib.Path
) -> None:
    folder = tmp_path / "run"
    source = f"--config.data.source=files:{corpus}/*.txt"
    arguments = ["train", *TINY, *SMALL, source, "--workdir", str(folder)]
    schedule = ["--config.optimizer.schedule_steps=1000", "--config.train.log_every=1"]
    process = start(*arguments, *schedule, "--config.train.steps=100000")
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "saved; the same command goes on" in output
    saved = max(int(path.name) for path in (folder / records.CHECKPOINTS_DIR).iterdir())
    assert saved >= 3
    end = f"--config.train.steps={saved + 2}"
    process = start(*arguments, *schedule, end, "--json", str(tmp_path / "result.json"))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert f"starting from checkpoint of step {saved}" in output
    result = records.read_json(tmp_path / "result.json")
    assert (result["kind"], result["rows"][0]["step"]) == ("train", saved + 2)
    read = start("generate", "--workdir", str(folder), "--prompt", "document", "--max-tokens=8")
    output = read.communicate(timeout=120)[0]
    assert read.returncode == 0, output
    assert "document" in output


def test_the_first_interrupt_saves(tmp_path: pathlib.Path, corpus: pathlib.Path) -> None:
    source = f"--config.data.source=files:{corpus}/*.txt"
    arguments = ["train", *TINY, *SMALL, source, "--config.train.log_every=1"]
    process = start(*arguments, "--workdir", str(tmp_path), "--config.train.steps=100000")
    wait_for(process, "step 1/")
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert list((tmp_path / records.CHECKPOINTS_DIR).iterdir())


def test_an_interrupt_that_insists_exits_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxscale.data.corpus.prepare_corpus", interrupted)
    assert main(["prepare", *TINY]) == 130
    assert capsys.readouterr().err == "jaxscale: interrupted\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--workdir=x", "--batches=-1"],
        ["prepare", "--workers=-1"],
        ["generate", "--workdir=x", "--prompt=x", "--max-tokens=0"],
    ],
)
def test_a_number_out_of_its_limits_is_named(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "is no whole number from" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "--force"], "leave out --workers and --force"),
        (["--profile", "--workers=2"], "leave out --workers and --force"),
        (["--step-tokens-per-second=9"], "--step-tokens-per-second is for --profile"),
    ],
)
def test_options_of_prepare_that_do_not_go_together_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *TINY, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_said_before_the_work(
    compiled: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--workdir=x", "--config.train.steps=0", "--json=/proc/none/result.json"]
    assert main(["train", *TINY, *arguments]) == 2
    assert "--json=/proc/none/result.json cannot be written" in capsys.readouterr().err
    assert main(["train", *TINY, *arguments, f"--json={ROOT}"]) == 2
    assert f"--json={ROOT} is a folder" in capsys.readouterr().err
    assert compiled == []


def test_a_prompt_that_is_no_text_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--workdir=x", "--prompt=\udcff"]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_prepare_shows_each_part_of_a_mixture_and_what_it_left_out(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 20)
    (tmp_path / "bad.txt").write_bytes(b"\xe9")
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 9 + "[]\n" * 7)
    sources = [f"files:{tmp_path}/*.txt", f"files:{tmp_path}/a.jsonl"]
    arguments = [
        *TINY,
        f"--config.data.source=0.7 {sources[0]}; 0.3 {sources[1]}",
        f"--config.data.cache_dir={tmp_path}/caches",
        f"--json={tmp_path}/result.json",
    ]
    assert main(["prepare", *arguments]) == 0
    output = capsys.readouterr().out
    for source in sources:
        assert f"token cache of {source} written in " in output
    assert f"  skipped: 1 not UTF-8 ({tmp_path}/bad.txt)\n" in output
    names = ", ".join(f"{tmp_path}/a.jsonl:{line}" for line in range(10, 15))
    assert f"  skipped: 7 not a JSON object ({names}, ...)\n" in output
    rows = records.read_json(tmp_path / "result.json")["rows"]
    assert [row["source"] for row in rows] == sources
    assert [row["skipped_documents"] for row in rows] == [1, 7]
    assert rows[0]["skipped"] == {"not UTF-8": {"documents": 1, "names": [f"{tmp_path}/bad.txt"]}}
