"""How far predictions are from published step times, and the constants that bring them nearest.

Beside a predictor stands the baseline that anyone could make: one MFU per chip. Both are also
scored on chips that they were not fitted to. `scripts/backtest.py` prints the result.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxscale.plan.published import Run

# A dataclass of at most five floats.
Shares = TypeVar("Shares")
# Shares of a peak that hardware can reach.
LEAST_SHARE, LARGEST_SHARE = 0.3, 0.95
# How much of a constant's distance from the guess, in logarithms, counts as an error: one that is
# off by a third weighs as a row that is off by a tenth.
PULL = 0.3
# Errors beyond it count by their size and no longer by its square (Huber).
LARGE_ERROR = 0.1
# Of the fit: difference quotients are taken over so much of a share's logarithm; it ends when a
# step improves the loss by less than such a part, or after so many steps.
QUOTIENT_STEP, LEAST_GAIN, MOST_STEPS = 0.02, 1e-3, 20
DAMPING, MOST_DAMPING = 1e-3, 1e3
# Published MFUs nearer than this are alike.
ALIKE = 0.05


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of a step on one of the run's devices.

    Attributes:
      seconds: of the step.
      fits: whether its bytes fit the device's memory.
      bytes: of HBM.
      bound: what the step waits for most: compute, HBM, ICI, DCN or host.
    """

    seconds: float
    fits: bool
    bytes: int
    bound: str


# Predicts a run's step with given constants; cheap once the run is compiled.
Predict = Callable[[Run, Shares], Prediction]


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of predicted seconds, as shares of the published ones.

    Attributes:
      median: of absolute errors.
      within_30: share of rows whose absolute error is at most 30%.
    """

    median: float
    within_30: float


def error(predicted: float, published: float) -> float:
    """Return the error as a share of what was published; above 0 is too slow."""
    return predicted / published - 1


def errors(pairs: Iterable[tuple[float, float]]) -> Errors:
    """Sum up pairs of (predicted, published) seconds, at least one."""
    sizes = [abs(error(*pair)) for pair in pairs]
    return Errors(statistics.median(sizes), sum(size <= 0.3 for size in sizes) / len(sizes))


def mfu_order(runs: Sequence[Run], predicted: Sequence[float]) -> tuple[int, int]:
    """Return how many same-chip pairs of unlike published MFU have it in the right order, and all.

    Args:
      runs: as published.
      predicted: seconds of each. Both MFUs count the row's own FLOPs, whatever its convention.
    """
    right = total = 0
    for (a, a_seconds), (b, b_seconds) in itertools.combinations(
        zip(runs, predicted, strict=True), 2
    ):
        published = _row_flops(a) / a.published_seconds / (_row_flops(b) / b.published_seconds)
        if a.chip != b.chip or max(published, 1 / published) <= 1 + ALIKE:
            continue
        ours = _row_flops(a) / a_seconds / (_row_flops(b) / b_seconds)
        total += 1
        right += (ours > 1) == (published > 1)
    return right, total


def _row_flops(run: Run) -> float:
    return run.row.model_teraflops * 1e12 if run.row.model_teraflops else run.model_flops


def published_mfu(run: Run) -> float:
    """Return the published MFU, its FLOPs counted our way."""
    return run.model_flops / run.published_seconds / run.chip.bf16_flops_per_second


def constant_mfu(
    runs: Sequence[Run], known: Sequence[Run], *, left_out: bool = False
) -> list[float]:
    """Return seconds of each run at the median MFU of the known runs on its chip.

    Args:
      runs: to predict.
      known: to take medians of.
      left_out: take the median of the runs on all other chips instead.

    A run has NaN where there is nothing to take the median of.
    """
    seconds = []
    for run in runs:
        mfus = [published_mfu(r) for r in known if (r.chip == run.chip) != left_out]
        mfu = statistics.median(mfus) if mfus else math.nan
        seconds.append(run.model_flops / mfu / run.chip.bf16_flops_per_second)
    return seconds


def left_out(
    predict: Predict[Shares], runs: Sequence[Run], known: Sequence[Run], start: Shares
) -> list[float]:
    """Return seconds of each run, predicted with the constants that fit other chips best.

    Args:
      predict: prices a run.
      runs: to predict.
      known: to fit to, those on other chips than the run's.
      start: constants from which the fit starts; those of a run if there is nothing to fit to.
    """
    fitted = {}
    for chip in {run.chip.name for run in runs}:
        others = [run for run in known if run.chip.name != chip]
        fitted[chip] = fit(predict, others, start) if others else start
    return [predict(run, fitted[run.chip.name]).seconds for run in runs]


def fit(predict: Predict[Shares], runs: Sequence[Run], start: Shares) -> Shares:
    """Return the constants, not far from `start`, whose predictions are nearest to the published.

    Least are the logarithms of predicted / published, those of misses by their size alone (Huber),
    by damped Gauss-Newton steps (Levenberg-Marquardt) on the logarithms of the constants, each
    within its limits. Every constant is moved alone once a step: predictions are few.
    """
    fields: Any = dataclasses.fields(start)  # type: ignore[arg-type]
    names = [field.name for field in fields]

    def shares_at(x: np.ndarray) -> Shares:
        values = dict(zip(names, map(float, np.exp(x)), strict=True))
        return dataclasses.replace(start, **values)  # type: ignore[type-var]

    def residuals(x: np.ndarray) -> np.ndarray:
        shares = shares_at(x)
        ratios = [predict(run, shares).seconds / run.published_seconds for run in runs]
        # What no row tells of stays as it was guessed.
        return np.concatenate([np.log(np.array(ratios)), PULL * (x - guess)])

    guess = np.log([getattr(start, name) for name in names])
    return shares_at(_least(residuals, guess.copy()))


def _least(residuals: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return the x within its limits at which the Huber loss of the residuals is least."""
    low, high = math.log(LEAST_SHARE), math.log(LARGEST_SHARE)
    x, damping = np.clip(x, low, high), DAMPING
    r = residuals(x)
    for _ in range(MOST_STEPS):
        slopes = _slopes(residuals, x, r)
        weights = 1 / np.maximum(1, np.abs(r) / LARGE_ERROR)
        gradient = slopes.T @ (weights * r)
        # What its limit holds back does not sway the others.
        free = ~((x >= high) & (gradient < 0) | (x <= low) & (gradient > 0))
        squares = (slopes.T * weights) @ slopes
        before = _huber(r)
        while damping <= MOST_DAMPING:
            step = np.zeros_like(x)
            damped = squares[np.ix_(free, free)] + damping * np.eye(int(free.sum()))
            step[free] = -np.linalg.solve(damped, gradient[free])
            moved = np.clip(x + step, low, high)
            moved_r = residuals(moved)
            if _huber(moved_r) < before:
                break
            damping *= 10
        else:
            return x
        x, r, damping = moved, moved_r, damping / 10
        if before - _huber(r) < LEAST_GAIN * before:
            return x
    return x


def _slopes(
    residuals: Callable[[np.ndarray], np.ndarray], x: np.ndarray, r: np.ndarray
) -> np.ndarray:
    """Return the derivative of each residual, (runs, constants); downwards, to stay in limits."""
    columns = []
    for i in range(len(x)):
        nearby = x.copy()
        nearby[i] -= QUOTIENT_STEP
        columns.append((r - residuals(nearby)) / QUOTIENT_STEP)
    return np.stack(columns, axis=1)


def _huber(r: np.ndarray) -> float:
    sizes = np.abs(r)
    linear = LARGE_ERROR * (sizes - LARGE_ERROR / 2)
    return float(np.sum(np.where(sizes <= LARGE_ERROR, r**2 / 2, linear)))
