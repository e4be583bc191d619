"""Errors, baselines and pairs as by hand; the fit finds the constants that made the times."""

import dataclasses
import math

import pytest

from jaxscale.plan import score
from jaxscale.plan.published import Run, to_run
from jaxscale.plan.rows import read_rows
from jaxscale.plan.score import Prediction
from tests.conftest import ROOT

ROWS = read_rows(ROOT / "docs" / "published_tpu_runs.csv")
RUNS = [run for run in map(to_run, ROWS) if isinstance(run, Run)]
# Steps of the fit are differences of logarithms; where they end is known to three digits.
TOLERANCE = 2e-3


@dataclasses.dataclass(frozen=True)
class Shares:
    """Constants as a planner might have them."""

    compute: float = 0.7
    hbm: float = 0.7
    link: float = 0.7


def predict(run: Run, shares: Shares) -> Prediction:
    """Price a run by sums that differ in kind from one row to the next."""
    peak = run.model_flops / run.chip.bf16_flops_per_second
    tokens = run.config.train.global_batch_size * run.config.data.length
    moved = 12e9 * (run.row.billion_parameters or 0) / (run.row.num_chips or 1)
    wait = 4 * moved / run.chip.ici_link_bytes_per_second
    read = tokens / (run.row.num_chips or 1) * run.config.model.width * 2e3
    seconds = peak / shares.compute + wait / shares.link
    return Prediction(
        seconds + read / run.chip.hbm_bytes_per_second / shares.hbm, True, 2**30, "compute"
    )


def published(run: Run, seconds: float) -> Run:
    """Return a run as if it had been published with another time."""
    return dataclasses.replace(run, row=dataclasses.replace(run.row, step_seconds=seconds))


def test_errors() -> None:
    found = score.errors([(1.1, 1.0), (2.0, 1.0), (0.8, 1.0)])
    assert found.median == pytest.approx(0.2)
    assert found.within_30 == pytest.approx(2 / 3)


def test_fit_finds_planted_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "PULL", 0.0)
    planted = Shares(compute=0.83, hbm=0.5, link=0.62)
    made = [published(run, predict(run, planted).seconds) for run in RUNS]
    found = score.fit(predict, made, Shares())
    for name, value in dataclasses.asdict(planted).items():
        assert getattr(found, name) == pytest.approx(value, rel=TOLERANCE)


def test_what_no_row_tells_of_stays_as_guessed() -> None:
    planted, guess = Shares(compute=0.83, hbm=0.5, link=0.62), Shares(link=0.41)

    def blind(run: Run, shares: Shares) -> Prediction:
        return predict(run, dataclasses.replace(shares, link=planted.link))

    made = [published(run, predict(run, planted).seconds) for run in RUNS]
    found = score.fit(blind, made, guess)
    assert found.link == pytest.approx(guess.link)
    assert found.compute == pytest.approx(planted.compute, rel=0.05)


def test_fit_bears_an_outlier() -> None:
    planted = Shares(compute=0.83, hbm=0.5, link=0.62)
    made = [published(run, predict(run, planted).seconds) for run in RUNS]
    made[3] = published(made[3], 3 * made[3].published_seconds)
    found = score.fit(predict, made, Shares())
    left = [predict(run, found).seconds / run.published_seconds for run in made]
    assert sorted(abs(math.log(x)) for x in left)[len(left) // 2] < 0.02


@pytest.mark.parametrize(
    ("planted", "limit"),
    [
        (Shares(compute=1.3, hbm=0.5, link=0.6), {"compute": score.LARGEST_SHARE}),
        (Shares(compute=0.8, hbm=0.5, link=0.2), {"link": score.LEAST_SHARE}),
    ],
)
def test_fit_stays_within_what_hardware_can_do(planted: Shares, limit: dict[str, float]) -> None:
    made = [published(run, predict(run, planted).seconds) for run in RUNS]
    found = dataclasses.asdict(score.fit(predict, made, Shares()))
    assert {name: found[name] for name in limit} == pytest.approx(limit)


def test_left_out_chip_is_not_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "PULL", 0.0)
    planted, start = Shares(compute=0.83, hbm=0.5, link=0.62), Shares()
    made = [published(run, predict(run, planted).seconds) for run in RUNS]
    # One chip's times are absurd; no fit may see them, but those of other chips do.
    wrong = [published(r, 9 * r.published_seconds) if r.chip.name == "v5e" else r for r in made]
    seconds = score.left_out(predict, wrong, wrong, start)
    for run, predicted, honest in zip(wrong, seconds, made, strict=True):
        if run.chip.name == "v5e":
            assert predicted == pytest.approx(honest.published_seconds, rel=TOLERANCE)
    alone = [run for run in made if run.chip.name == "v5e"]
    expected = [predict(run, start).seconds for run in alone]
    assert score.left_out(predict, alone, alone, start) == expected


def test_constant_mfu() -> None:
    one, two, three = RUNS[:3]
    other = next(run for run in RUNS if run.chip != one.chip)

    def at(run: Run, mfu: float) -> Run:
        return published(run, run.model_flops / mfu / run.chip.bf16_flops_per_second)

    runs = [at(one, 0.2), at(two, 0.4), at(three, 0.5), at(other, 0.8)]
    assert [score.published_mfu(run) for run in runs] == pytest.approx([0.2, 0.4, 0.5, 0.8])
    own = score.constant_mfu(runs, runs)
    assert [run.published_seconds / s for run, s in zip(runs, own, strict=True)] == pytest.approx(
        [0.4 / 0.2, 1, 0.4 / 0.5, 1]
    )
    others = score.constant_mfu(runs, runs, left_out=True)
    ratios = [run.published_seconds / s for run, s in zip(runs, others, strict=True)]
    assert ratios == pytest.approx([0.8 / 0.2, 0.8 / 0.4, 0.8 / 0.5, 0.4 / 0.8])
    assert math.isnan(score.constant_mfu(runs[:3], runs[:3], left_out=True)[0])


def test_mfu_order() -> None:
    """Of three runs on one chip two are alike; a fourth is on another chip."""
    one, two, three = RUNS[:3]
    other = next(run for run in RUNS if run.chip != one.chip)

    def seconds(run: Run, mfu: float) -> float:
        assert run.row.model_teraflops
        return run.row.model_teraflops / mfu

    runs = [
        published(run, seconds(run, mfu))
        for run, mfu in ((one, 0.40), (two, 0.41), (three, 0.5), (other, 0.9))
    ]
    right = [seconds(run, mfu) for run, mfu in zip(runs, (0.4, 0.3, 0.5, 0.1), strict=True)]
    assert score.mfu_order(runs, right) == (2, 2)
    one_wrong = [seconds(run, mfu) for run, mfu in zip(runs, (0.4, 0.6, 0.5, 0.1), strict=True)]
    assert score.mfu_order(runs, one_wrong) == (1, 2)
