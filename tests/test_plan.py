"""`jaxscale plan`: one line for a mistake, a ranked table, and a command that does as it says."""

import dataclasses
import gzip
import json
import pathlib
import shlex
from typing import Any

import jax
import pytest

from jaxscale.cli import main
from jaxscale.config import Stopped
from jaxscale.config_source import from_saved, load, to_mapping
from jaxscale.parallel.program import program_bytes
from jaxscale.plan import compile as compiling
from jaxscale.plan.boundary import Search
from jaxscale.plan.child import _failure
from jaxscale.plan.compile import Compiled, Job, compile_all
from jaxscale.plan.predict import predict_step
from jaxscale.plan.rank import AS_TRAINED, Options, Row, shortlist
from jaxscale.plan.run import Plan, Request, make_options
from jaxscale.plan.space import REMATS
from jaxscale.plan.timeline import predict
from jaxscale.plan.torus import parse_topology
from jaxscale.resolve import resolve
from jaxscale.train.state import assemble
from jaxscale.train.step import compile_step

CONFIG = "--config=configs/lm.py:small,length=512,batch=16"
FLASH = "--config.model.attention=flash"
CLOSED = ("--topology=v5e:2x2", "--closed-form")

MISTAKES = {
    "chip": (["--topology=v7:2x2"], "no chip 'v7'; did you mean v4? There are v4, v5e"),
    "chip of no vendor": (["--topology=rtx:8"], "tpu7x, a100, a100-40gb, h100, h200, b200, as in"),
    "node": (["--topology=h100:6"], "h100 has no node of size '6'; it has 1, 2, 4, 8"),
    "twice": (["--topology=h100:8", "--devices=cpu:8"], "--devices=cpu:8: give one of them"),
    "slices of what": (["--devices=cpu:8", "--num-slices=2"], "--num-slices=2 needs --topology"),
    "too large for a node": (
        ["--topology=h100:8", "--closed-form", "--length=1048576", "--batch=8"],
        "the leanest candidate needs",
    ),
    "too large for the host": (
        ["--devices=cpu:8", "--closed-form", "--length=4194304", "--batch=8"],
        "lower --batch or --length, or name a --topology",
    ),
    "shape": (["--topology=v6e:3x4"], "has no slice of shape '3x4'; it has 1x1, 2x2"),
    "mesh too small": ([*CLOSED, "--meshes=fsdp=2"], "has 2 devices, and v5e:2x2 4"),
    "mesh too large": ([*CLOSED, "--meshes=fsdp=8"], "more devices than the 4 there are"),
    "axis": ([*CLOSED, "--meshes=expert=4"], "is not AXIS=SIZE with an axis of stage, data"),
    "mesh does not cut the model": ([*CLOSED, "--batch=3", "--meshes=fsdp=4"], "does not divide"),
    "remat": ([*CLOSED, "--remat=most"], "is not one of auto, none, names, dots, full"),
    "batch": ([*CLOSED, "--batch=many"], "--batch=many is neither auto nor a number"),
    "both": ([*CLOSED, "--batch=auto", "--length=auto"], "one of them must be a number"),
    "nothing fits": (
        [*CLOSED, "--length=4194304", "--batch=4"],
        "--topology=v5e:2x2 is too small: the leanest candidate needs",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_a_line_before_any_compile(
    mistake: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, complaint = MISTAKES[mistake]
    monkeypatch.setattr(compiling, "COMMAND", ("false",))
    assert main(["plan", CONFIG, *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_more_nodes_are_named_where_one_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--config=configs/lm.py:70b,batch=64,length=2048", "--closed-form"]
    assert main([*arguments, "--topology=h100:8"]) == 2
    error = capsys.readouterr().err
    remedy = error.split("the smallest that would be is ")[1].strip().replace(" with ", " ")
    assert "--num-slices=" in remedy
    assert main([*arguments, *f"--topology={remedy}".split()]) == 0


def test_what_is_too_large_is_told_with_the_smallest_slice_that_would_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["plan", "--config=configs/lm.py:8b,batch=16", "--closed-form"]
    assert main([*arguments, "--topology=v5e:2x2"]) == 2
    error = capsys.readouterr().err
    name = error.split("the smallest that would be is ")[1].strip()
    # It is so: nothing smaller does, and it does.
    shapes = [shape.rpartition(":")[2] for shape in (name, "v5e:2x2")]
    order = parse_topology(name).chip.topologies
    between = order[order.index(shapes[1]) : order.index(shapes[0])]
    for shape in between:
        assert main([*arguments, f"--topology=v5e:{shape}"]) == 2
    assert main([*arguments, f"--topology={name}"]) == 0


def rows_of(file: pathlib.Path, phase: str) -> list[dict[str, Any]]:
    """Return the rows of a result file that are of one kind."""
    result = json.loads(file.read_text())
    assert result["kind"] == "plan"
    return [row for row in result["rows"] if row["phase"] == phase]


def test_the_closed_form_ranks_and_its_command_is_the_winner(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    moments = "--config.optimizer.moment_dtype=bfloat16"
    arguments = ["plan", CONFIG, FLASH, moments, *CLOSED, "--price=1.2"]
    arguments.append(f"--workdir={tmp_path / 'run'}")
    assert main([*arguments, f"--json={file}"]) == 0
    text = capsys.readouterr().out
    kept = json.loads((tmp_path / "run" / "plan" / "plan.json").read_text())
    assert kept["rows"] == json.loads(file.read_text())["rows"]
    rows = rows_of(file, "candidate")
    rates = [row["tokens_per_second_per_chip"] for row in rows]
    assert rates == sorted(rates, reverse=True) and all(row["fits"] for row in rows)
    assert {row["known_by"] for row in rows} == {"closed form"}
    assert "closed form alone" in text and "dollars for a million tokens" in text
    # The command, read back, is the config of the first row.
    words = shlex.split(next(line for line in text.splitlines() if "jaxscale train" in line))
    knobs = [word.removeprefix("--config.").partition("=") for word in words if "config." in word]
    config = resolve(load("configs/lm.py:small,length=512,batch=16", [(k, v) for k, _, v in knobs]))
    best = rows[0]
    assert to_mapping(config) == best["config"]


@pytest.mark.parametrize("knob", ["batch", "length"])
def test_the_boundary_fits_and_the_next_size_does_not(
    knob: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    arguments = ["plan", CONFIG, FLASH, *CLOSED, "--meshes=fsdp=4", f"--json={file}"]
    remats = ["--remat=full", "--remat=none"]
    assert main([*arguments, *remats, f"--{knob}=auto"]) == 0
    assert "the most that fits" in capsys.readouterr().out
    full, none = rows_of(file, "boundary")
    assert full["size"] > none["size"] > 0
    for edge in (full, none):
        asked = [f"--remat={edge['remat']}", f"--{knob}={edge['size']}", "--top=1"]
        assert main([*arguments, *asked]) == 0
        (row,) = rows_of(file, "candidate")
        assert row["needed_bytes"] <= row["available_bytes"]
        # More microbatches make room for any batch, but not for any length.
        asked[1] = f"--{knob}={edge['next_size']}"
        if main([*arguments, *asked]) == 0:
            (row,) = rows_of(file, "candidate")
            assert not row["fits"] or row["accumulation_steps"] > 1


def test_a_boundary_is_found_where_few_sizes_can_be_cut(tmp_path: pathlib.Path) -> None:
    """192 chips cut no power of two; one mesh cuts only multiples of its shards."""
    for config, topology, *more in (
        ("1b,length=2048", "v5p:4x4x12"),
        ("1b,length=8192", "v5e:4x4", "--meshes=fsdp=16"),
    ):
        file = tmp_path / "plan.json"
        arguments = [f"--config=configs/lm.py:{config}", f"--topology={topology}", *more]
        asked = ["--batch=auto", "--remat=full", "--closed-form", f"--json={file}"]
        assert main(["plan", *arguments, *asked]) == 0
        (edge,) = rows_of(file, "boundary")
        search = Search(
            resolve(load(f"configs/lm.py:{config}")),
            make_options(Request(topology, meshes=tuple(m.partition("=")[2] for m in more))),
            of_length=False,
        )
        remat = REMATS[-1]
        fitting = [s for s in search.ladder if (row := search.leanest(remat, s)) and row.fits]
        assert edge["size"] == max(fitting) > 0


def test_a_compile_that_fails_is_no_boundary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "COMMAND", ("false",))
    monkeypatch.setattr("jaxscale.plan.run.compiler", lambda platform: "libtpu 0")
    arguments = ["plan", CONFIG, FLASH, "--topology=v5e:2x2", "--meshes=fsdp=4", "--remat=full"]
    assert main([*arguments, "--batch=auto"]) == 2
    assert "could not be compiled: exit code 1" in capsys.readouterr().err
    # Without a boundary to find, it is told in the table, and there is no winner.
    assert main([*arguments, "--price=1"]) == 1
    text = capsys.readouterr().out
    assert "exit code 1" in text and "jaxscale train" not in text and "dollars" not in text


@pytest.mark.parametrize("damage", [b"", b"[]", b"null", b'{"argument_bytes": null}', b"{"])
def test_a_damaged_cache_is_compiled_anew(
    damage: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path))
    job = Job(small(("mesh.data", "4")), parse_topology("v5e:2x2"))
    report, text = compiling._paths(job)
    report.parent.mkdir(parents=True)
    whole = dict.fromkeys(("argument_bytes", "temporary_bytes", "output_bytes"), 1)
    report.write_text(json.dumps(whole))
    text.write_bytes(gzip.compress(b"HloModule m"))
    assert compiling._read(job) is not None
    text.write_bytes(gzip.compress(b"HloModule m")[:-9])
    assert compiling._read(job) is None
    text.write_bytes(gzip.compress(b"HloModule m"))
    report.write_bytes(damage)
    assert compiling._read(job) is None


@pytest.mark.parametrize(
    "words",
    [
        "the total memory required for HLO temporaries (18.98G) exceeds available HBM (15.75G).",
        "Ran out of memory in memory space hbm. Used 18.98G of 15.75G hbm. Exceeded hbm capacity",
    ],
)
def test_the_compiler_says_in_two_ways_that_there_is_no_room(words: str) -> None:
    assert _failure(words) == {"needed_bytes": int(18.98 * 2**30)}
    assert _failure("INTERNAL: it broke\nsomewhere") == {"error": "INTERNAL: it broke"}


def test_finalists_that_fail_leave_what_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(load("configs/lm.py:1b,batch=64", [("model.remat", "full")]))
    plan = Plan(config, Request("v5e:4x4", top=4))
    known = plan.shortlist().rows

    def compiled(rows: list[Row], _: Any, *, as_trained: bool = False, **__: Any) -> list[Row]:
        if not as_trained:
            return rows
        failed, faster = (dataclasses.replace(row, known_by=AS_TRAINED) for row in rows)
        twice = 2 * faster.tokens_per_second_per_chip
        line = predict((), None)  # type: ignore[arg-type]
        return [
            dataclasses.replace(faster, timeline=line, tokens_per_second_per_chip=twice),
            dataclasses.replace(failed, error="exit code 1"),
        ]

    monkeypatch.setattr("jaxscale.plan.run.compile_rows", compiled)
    ranked = plan.compile(lambda line: None)
    assert [row.known_by for row in ranked] == [AS_TRAINED, *["closed form"] * 3]
    assert ranked[0].candidate is known[1].candidate
    assert ranked[1:] == [known[0], *known[2:]]


def small(*knobs: tuple[str, str]) -> Any:
    """Return a small config, resolved."""
    overrides = [("model.attention", "flash"), ("model.num_layers", "2"), *knobs]
    return resolve(load("configs/lm.py:tiny", overrides))


def test_a_step_without_its_slow_options_is_priced_as_if_it_had_them() -> None:
    slice_ = parse_topology("v6e:2x2")
    dot = (
        "ENTRY %main (p: bf16[64,64]) -> bf16[64,64] {\n  %p = bf16[64,64]{1,0} parameter(0)\n"
        "  ROOT %d = bf16[64,64]{1,0} dot(%p, %p), lhs_contracting_dims={1}, "
        'rhs_contracting_dims={0}, backend_config={"estimated_cycles":"900000"}\n}\n'
    )
    compiled = Compiled(dot, 0, 0, 0, 0, 0, 0.0)
    config, trained = small(("mesh.data", "4")), slice_.chip.compiler_options
    whole, lacking = (Job(config, slice_, o) for o in (trained, compiling.quick(trained)))
    full = predict_step(whole, compiled).seconds
    assert full == pytest.approx(900_000 / slice_.chip.clock_hertz)
    assert predict_step(lacking, compiled).seconds < full
    assert predict_step(lacking, compiled, wanted=()).seconds == full


def test_the_compiler_has_the_last_word(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path))
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config=configs/lm.py:tiny", FLASH, "--topology=v5e:2x2", "--top=3"]
    assert main([*arguments, "--explain", f"--json={file}"]) == 0
    shown = capsys.readouterr()
    assert "3/3 compiled" in shown.err and "compiled in" in shown.err
    assert "seconds of computation" in shown.out and "winner: " in shown.out
    rows = rows_of(file, "candidate")
    # The two best once more, with every option that training uses.
    assert sorted(row["known_by"] for row in rows) == ["as trained", "as trained", "compiled"]
    for row in rows:
        spent = sum(row["seconds_by_resource"].values())
        assert spent == pytest.approx(row["step_seconds"])
        assert row["needed_bytes"] > 0 and row["seconds_by_part"]
    # The second time nothing is compiled.
    monkeypatch.setattr(compiling, "COMMAND", ("false",))
    assert main(arguments) == 0
    assert "(known)" in capsys.readouterr().err


def test_programs_are_compiled_once_by_content(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path))
    slice_ = parse_topology("v5e:2x2")
    job = Job(small(("mesh.data", "4")), slice_)
    ((_, first),) = compile_all([job])
    assert first.has_room and not first.is_known and not first.error
    # Nothing that leaves the program alone makes it another one.
    monkeypatch.setattr(compiling, "COMMAND", ("false",))
    neutral = (("train.steps", "7"), ("optimizer.learning_rate", "0.1"), ("train.log_every", "3"))
    ((_, second),) = compile_all([Job(small(("mesh.data", "4"), *neutral), slice_)])
    assert second.is_known and second.text == first.text
    more = Job(small(("mesh.data", "4"), ("optimizer.moment_dtype", "bfloat16")), slice_)
    for other in (more, Job(job.config, slice_, (("xla_an_option", "true"),))):
        assert other.key != job.key
    (found,) = compile_all([Job(job.config, parse_topology("v5e:2x4"))])
    assert "exit code 1" in found[1].error


def test_a_stop_keeps_what_is_compiled(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libtpu", reason="the extra `tpu` is not installed")
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path))
    slice_ = parse_topology("v5e:2x2")
    jobs = [Job(small(("mesh.data", "4")), slice_), Job(small(("mesh.fsdp", "4")), slice_)]
    found: list[Job] = []
    with pytest.raises(Stopped):
        found.extend(job for job, _ in compile_all(jobs, num_processes=1, stop=lambda: bool(found)))
    kept = [job for job in jobs if compiling._read(job)]
    assert len(kept) == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_a_shortlist_has_no_more_than_a_few_of_each_mesh() -> None:
    options = Options(slice=parse_topology("v5e:4x4"), top=6)
    config = resolve(load("configs/lm.py:1b,batch=64"))
    rows = shortlist(config, options).rows
    meshes = [row.candidate.mesh for row in rows]
    assert len(rows) == 6 and max(meshes.count(mesh) for mesh in meshes) <= 2


def test_cpu_devices_at_hand_are_judged_by_bytes(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path))
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config=configs/lm.py:tiny", "--devices=cpu:8", f"--json={file}"]
    chosen = ["--meshes=fsdp=8", "--remat=none", "--remat=full", "--top=2"]
    assert main([*arguments, *chosen, "--price=1", "--explain"]) == 0
    shown = capsys.readouterr()
    assert "cpu:8: 8 devices" in shown.out and "no seconds" in shown.out
    assert "--price shows nothing" in shown.err and "--explain shows nothing" in shown.err
    assert "scaling" not in shown.out and "jaxscale train" in shown.out
    first, second = rows_of(file, "candidate")
    # What computes nothing twice is first, whatever it needs.
    assert (first["remat"], second["remat"]) == ("none", "full")
    for row in (first, second):
        assert row["known_by"] == "bytes compiled" and row["fits"]
        assert row["step_seconds"] is row["mfu"] is row["tokens_per_second_per_chip"] is None
    # It is what training would compile on these devices.
    assembly = assemble(resolve(from_saved(first["config"])), jax.devices())
    assert first["needed_bytes"] == program_bytes(compile_step(assembly))
