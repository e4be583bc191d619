"""A profile of the input pipeline in words, for people and as rows of a result file."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from jaxscale.data.profile import (
    LOAD,
    LOAD_STAGE,
    REPEATS,
    TOKENIZE,
    TOKENIZE_STAGE,
    Rate,
    slowest,
)

MB = 1e6
UNITS = {1e9: " G", 1e6: " M", 1e3: " k"}


def fastest(rates: Sequence[Rate], part: str) -> Rate:
    """Return the fastest of a part."""
    return max((r for r in rates if r.part == part), key=lambda r: r.tokens_per_second)


def step_ratio(rate: Rate, step: Rate) -> tuple[float, float, float]:
    """Return how many times what a training step takes, with the least and the most of it."""
    return (
        rate.tokens_per_second / step.tokens_per_second,
        rate.lowest / step.highest,
        rate.highest / step.lowest,
    )


def to_rows(rates: Sequence[Rate], step: Rate | None) -> list[dict[str, Any]]:
    """Return a row for each rate, those of the slowest stages marked."""
    limits = [slowest(rates, part) for part in (TOKENIZE_STAGE, LOAD_STAGE)]
    rows = []
    for rate in (*rates, *([step] if step else [])):
        row = {**dataclasses.asdict(rate), "is_slowest_stage": rate in limits}
        names = ("step_ratio", "step_ratio_lowest", "step_ratio_highest")
        ratios = step_ratio(rate, step) if step else (None, None, None)
        rows.append({**row, **dict(zip(names, ratios, strict=True))})
    return rows


def render(rates: Sequence[Rate], step: Rate | None) -> Group:
    """Return a table of all rates, and what limits."""
    table = Table(title=f"input pipeline, on this machine now: median of {REPEATS} (range)")
    for name in ("part", "measured", "x step", "tokens/s", "MB/s"):
        table.add_column(name, justify="left" if name in ("part", "measured") else "right")
    part = rates[0].part
    for rate in (*rates, *([step] if step else [])):
        if rate.part != part:
            table.add_section()
            part = rate.part
        speeds = map(short, (rate.tokens_per_second, rate.lowest, rate.highest))
        table.add_row(
            rate.part,
            rate.what,
            _ratio(rate, step) if step else "",
            "{} ({} to {})".format(*speeds),
            short(rate.bytes_per_second / MB) if rate.bytes_per_second else "",
        )
    return Group(table, *verdicts(rates, step))


def verdicts(rates: Sequence[Rate], step: Rate | None) -> list[str]:
    """Return what limits, in sentences."""
    lines = [
        f"tokenizing: the slowest stage is {slowest(rates, TOKENIZE_STAGE).what}; "
        f"{fastest(rates, TOKENIZE).what} did most",
        f"loading: the slowest stage is {slowest(rates, LOAD_STAGE).what}; "
        f"{fastest(rates, LOAD).what} did most",
    ]
    if step:
        best = fastest(rates, LOAD)
        enough = best.tokens_per_second > step.tokens_per_second
        limit = "the step limits training" if enough else "loading limits training"
        lines.append(f"loading gives {_ratio(best, step)} x what a training step takes: {limit}")
    return lines


def short(value: float) -> str:
    """Return a number with two or three digits that count, such as 12.3 M."""
    unit = next((unit for unit in UNITS if value >= 10 * unit), 1.0)
    number = value / unit
    return (f"{number:,.0f}" if number >= 100 else f"{number:.3g}") + UNITS.get(unit, "")


def _ratio(rate: Rate, step: Rate) -> str:
    if rate is step:
        return "1"
    return "{} ({} to {})".format(*map(short, step_ratio(rate, step)))
