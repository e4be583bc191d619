"""The back-test's script, with a predictor of pretence: what it prints, writes and refuses."""

import csv
import dataclasses
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

import pytest

from jaxscale import records
from jaxscale.plan import compile, predict, timeline
from jaxscale.plan.published import Run, to_run
from jaxscale.plan.rows import read_rows
from jaxscale.plan.score import LARGEST_SHARE, Prediction
from tests.conftest import ROOT

FILE = ROOT / "docs" / "published_tpu_runs.csv"
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "backtest.py"), run_name="backtest")
DOCS_PAGE = ROOT / "docs" / "backtest.md"


@dataclasses.dataclass(frozen=True)
class Shares:
    compute: float = LARGEST_SHARE


def planner_of(factor: float, fits: bool = True, reasons: dict[str, str] | None = None) -> Any:
    """Return a planner whose constant at its limit gives `factor` times the published seconds.

    Rows of completeness C it misses by far.
    """

    def predict(run: Run, shares: Shares) -> Prediction:
        far = 10 if run.row.completeness == "C" else factor
        seconds = far * run.published_seconds * LARGEST_SHARE / shares.compute
        return Prediction(seconds, fits, 2**30, "ICI")

    def planner(runs: Sequence[Run]) -> Any:
        return SCRIPT["Planned"](predict, Shares(), reasons or {})

    return planner


def run(*arguments: str, planner: Any = None, rows: pathlib.Path = FILE) -> int:
    return SCRIPT["main"]([f"--rows={rows}", *arguments], planner or planner_of(1.1))


def test_rows_are_shown_and_written(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = tmp_path / "rows.csv", tmp_path / "out.json"
    rows.write_text(FILE.read_text().replace("v6e-mistral-7b-8,A", "mixtral-8x7b,A"))
    assert run(f"--json={out}", "--fit", rows=rows) == 0
    shown = capsys.readouterr().out
    assert "mixtral-8x7b" in shown and "skipped: we lack mixture of experts" in shown
    line = next(line for line in shown.splitlines() if line.startswith("v6e-llama3.1-8b-8 "))
    assert line.split()[1:-2] == ["3.44", "s", "3.79", "s", "+10%", "ICI", "yes", "1.0", "GiB"]
    assert f"fits best: Shares(compute={LARGEST_SHARE:g}" in shown
    result = records.read_json(out)
    assert result["kind"] == "backtest"
    assert len(result["rows"]) == 20
    first = result["rows"][0]
    assert first["id"] == "v6e-llama3.1-8b-8"
    assert first["predicted_seconds"] == pytest.approx(1.1 * first["published_seconds"])
    assert (first["fits"], first["bytes"], first["bound"]) == (True, 2**30, "ICI")
    assert [row["id"] for row in result["skipped"]] == ["mixtral-8x7b"]


def test_baseline_is_as_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Its median error on the rows' own chips is known to be about 5%."""
    run()
    lines = capsys.readouterr().out.splitlines()
    own = next(line for line in lines if line.startswith("one MFU per chip"))
    assert 0.03 < float(own.split()[-2].rstrip("%")) / 100 < 0.08


@pytest.mark.parametrize(
    ("planner", "missed"),
    [
        (planner_of(1.05), None),
        (planner_of(1.2), "median absolute error 20.0%"),
        (planner_of(1.4), "0% of rows within 30%"),
        (planner_of(1.05, fits=False), "all fit: not v6e-llama3.1-8b-8,"),
    ],
)
def test_check_fails_where_a_bound_is_missed(
    planner: Any, missed: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--check", planner=planner) == (1 if missed else 0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISSED")]
    assert bool(lines) == bool(missed)
    assert missed is None or any(missed in line for line in lines)


def test_too_many_skipped_rows_miss_a_bound(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(FILE.read_text().replace(",v5e,", ",H100,"))
    assert run("--check", rows=rows) == 1
    assert "MISSED  16 of 21 rows predicted" in capsys.readouterr().out


def test_what_does_not_compile_is_skipped_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    run(planner=planner_of(1.1, reasons={"v6e-mistral-7b-8": "no room for 40.0 GiB"}))
    shown = capsys.readouterr().out
    assert "v6e-mistral-7b-8                  skipped: no room for 40.0 GiB" in shown
    assert "20 of 21 rows predicted" in shown


def test_partial_rows_do_not_count(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FILE.open() as file:
        cells = list(csv.DictReader(file))
    cells[0].update(completeness="C")
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(cells[0]))
        writer.writeheader()
        writer.writerows(cells)
    run(rows=rows, planner=planner_of(1.25))
    one = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("planner  "))
    assert one.split()[1:] == ["25.0%", "100%"]


def test_only_some_rows(capsys: pytest.CaptureFixture[str]) -> None:
    run("--only=v6e-mistral-7b-8")
    shown = capsys.readouterr().out
    assert "v6e-mistral-7b-8 " in shown and shown.count("skipped: not asked for by --only") == 20
    assert "MISSED  1 of 21 rows predicted" in shown
    assert run("--only=no-such-row") == 2
    assert "has no row no-such-row" in capsys.readouterr().err


def test_table_and_plot(tmp_path: pathlib.Path) -> None:
    page, plot = tmp_path / "page.md", tmp_path / "plots" / "backtest.png"
    page.write_text(DOCS_PAGE.read_text())
    for _ in range(2):
        assert run(f"--table={page}", f"--plot={plot}") == 0
    text = page.read_text()
    assert text.count("| v6e-llama3.1-8b-8 | 3.44 s | 3.79 s | +10% | ") == 1
    assert text.split("<!-- table")[0] == DOCS_PAGE.read_text().split("<!-- table")[0]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_page_without_markers_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Back-test\n")
    assert run(f"--table={page}") == 2
    assert "has no line <!-- table" in capsys.readouterr().err


def test_options_and_logits_that_the_compiler_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown option is left out; logits without room come in parts; what fails is named."""
    rows = {row.id: row for row in read_rows(FILE)}
    names = ("v6e-llama3.1-8b-8", "v6e-mistral-7b-8", "v6e-gpt3-175b-256-bf16")
    runs = [run for run in (to_run(rows[name]) for name in names) if isinstance(run, Run)]

    def outcome(job: compile.Job) -> compile.Compiled:
        error, text = "", "a program"
        if "xla_sc_disjoint_spmem" in dict(job.options):
            error, text = "INVALID: No such compile option: 'xla_sc_disjoint_spmem'", ""
        elif job.config.model.tie_embeddings:
            error, text = "it broke", ""
        elif job.config.model.vocab_size > 100_000 and not job.config.train.loss_chunk_tokens:
            text = ""
        return compile.Compiled(text or None, 2**30, 2**30, 0, 0, 0, 1.0, error)

    def compile_all(jobs: Sequence[Any], *, num_processes: int) -> list[Any]:
        return [(job, outcome(job)) for job in jobs]

    monkeypatch.setattr(compile, "compile_all", compile_all)
    programs, reasons = SCRIPT["compile_runs"](runs)
    assert reasons == {"v6e-gpt3-175b-256-bf16": "it broke"}
    chunks = {id: job.config.train.loss_chunk_tokens for id, (job, _) in programs.items()}
    assert chunks == {"v6e-llama3.1-8b-8": 2048, "v6e-mistral-7b-8": 0}
    assert all("xla_sc_disjoint_spmem" not in dict(job.options) for job, _ in programs.values())
    assert all(
        "xla_tpu_scoped_vmem_limit_kib" not in dict(job.options) for job, _ in programs.values()
    )
    slow = SCRIPT["compile_runs"](runs, slow_options=True)[0].values()
    assert all("xla_tpu_scoped_vmem_limit_kib" in dict(job.options) for job, _ in slow)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("id", ["tpu7x-llama3.1-405b-256-bf16", "v5e-maxtext-16b-1x256"])
def test_what_only_the_published_program_offloads_is_waited_for(
    id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is no shorter than its copies to the host and back."""
    row = next(row for row in read_rows(FILE) if row.id == id)
    run = to_run(row)
    assert isinstance(run, Run)
    seen = []

    def step(job: Any, compiled: Any, **known: Any) -> timeline.Timeline:
        seen.append((known["is_causal"], job.lacks_slow_options(known["wanted"])))
        return timeline.Timeline(1.0, {"ICI": 1.0, "host": 0.0}, {}, (), 0.0)

    def predicted(text: str | None) -> Prediction:
        outcome = compile.Compiled(text, 2**30, 2**30, 0, 0, 0, 1.0)

        def compile_all(jobs: Sequence[Any], *, num_processes: int) -> list[Any]:
            return [(job, outcome) for job in jobs]

        monkeypatch.setattr(compile, "compile_all", compile_all)
        plan = SCRIPT["real_planner"]([run])
        return plan.predict(run, plan.shares)

    monkeypatch.setattr(predict, "predict_step", step)
    copies = 2 * run.extra_host_bytes / (run.chip.host_bytes_per_second / 2)
    found = predicted("a program")
    assert (found.fits, found.bytes) == (True, 2**30)
    assert found.seconds == pytest.approx(max(1.0, copies))
    assert found.bound == ("host" if copies else "ICI")
    without_room = predicted(None)
    assert not without_room.fits and without_room.seconds > 1
    # The published v5e runs attend to the full square, and took no slow options.
    assert set(seen) == {(id.startswith("tpu7x"),) * 2}


def test_an_interrupt_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def planner(runs: Sequence[Run]) -> Any:
        raise KeyboardInterrupt

    assert run(planner=planner) == 130
    assert "what is compiled is kept" in capsys.readouterr().out
