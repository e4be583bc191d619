"""Goodput: where the wall time of a run went, from the birth of the process on.

At every moment one category is charged, so that the categories add up to the life of the process:
the innermost `measure`, or LOST_SECONDS where nobody claims the time. goodput.jsonl gets one
cumulative line per `write`; `read_goodput` adds up the last lines of all runs of a workdir.
"""

import dataclasses
import datetime
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from jaxscale import records


class Goodput:
    """The ledger of one process; for its main thread alone. Only the primary process writes."""

    def __init__(self, workdir: str | os.PathLike[str], *, primary: bool) -> None:
        born = psutil.Process().create_time()
        self._path = pathlib.Path(workdir) / records.GOODPUT_FILE
        self._primary = primary
        self._run_id = f"{socket.gethostname()}-{os.getpid()}-{born:.2f}"
        self._started = datetime.datetime.fromtimestamp(born, datetime.UTC)
        self._seconds = dict.fromkeys(records.GOODPUT_CATEGORIES, 0.0)
        # Python and its imports have run by now.
        self._seconds[records.INIT_SECONDS] = max(0.0, time.time() - born)
        self._open = [records.LOST_SECONDS]
        self._charged_until = time.monotonic()

    @contextmanager
    def measure(self, category: str) -> Iterator[None]:
        """Charge what happens inside to a category, save what an inner `measure` claims."""
        assert category in self._seconds, category
        self._charge()
        self._open.append(category)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each category so far; their sum is the age of the process."""
        self._charge()
        return dict(self._seconds)

    def write(self, step: int) -> None:
        """Append the totals so far to goodput.jsonl."""
        seconds = self.seconds()
        if not self._primary:
            return
        line = {
            records.STEP: step,
            records.TIME: records.now(),
            records.RUN_ID: self._run_id,
            records.STARTED: self._started.isoformat(timespec="seconds"),
            records.WALL_SECONDS: round(sum(seconds.values()), 3),
            **{category: round(value, 3) for category, value in seconds.items()},
        }
        records.append_line(self._path, line)

    def _charge(self) -> None:
        now = time.monotonic()
        self._seconds[self._open[-1]] += now - self._charged_until
        self._charged_until = now


@dataclasses.dataclass(frozen=True)
class GoodputSummary:
    """The seconds of all runs of a workdir; the time between two runs is in none of them."""

    num_runs: int
    wall_seconds: float
    seconds: dict[str, float]

    @property
    def step_share(self) -> float:
        """Share of the wall time that went into training steps."""
        return self.seconds[records.STEP_SECONDS] / self.wall_seconds if self.wall_seconds else 0.0


def read_goodput(path: str | os.PathLike[str]) -> GoodputSummary:
    """Add up the last line of each run in a goodput.jsonl."""
    last = {row[records.RUN_ID]: row for row in records.read_lines(path)}
    return GoodputSummary(
        num_runs=len(last),
        wall_seconds=sum(row[records.WALL_SECONDS] for row in last.values()),
        seconds={
            category: sum(row[category] for row in last.values())
            for category in records.GOODPUT_CATEGORIES
        },
    )
