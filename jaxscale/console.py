"""The console view of a run: a live progress bar on a terminal, plain lines elsewhere.

One `log` per logged step and a `note` for everything else; the same mapping of metrics goes into
metrics.jsonl. Only the primary process shows anything.
"""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TextIO

from jaxscale import records

if TYPE_CHECKING:
    from rich.progress import Progress

# The metrics that people follow, in the order of a plain line, and how they are written.
FORMATS = {
    records.LOSS: "loss {:.4g}",
    records.PERPLEXITY: "ppl {:.4g}",
    records.BITS_PER_BYTE: "bits/byte {:.3f}",
    records.LEARNING_RATE: "lr {:.1e}",
    records.GRADIENT_NORM: "grad {:.3g}",
    records.LOSS_SCALE: "scale {:g}",
    records.TOKENS_PER_SECOND: "{:,.0f} tok/s",
    records.STEP_SECONDS: "{:.3g} s/step",
    records.DATA_WAIT_SHARE: "wait {:.0%}",
    records.MFU: "mfu {:.1%}",
}
# Beside the bar the most important come first: what does not fit into the terminal is cut off.
BESIDE_BAR = (
    records.LOSS,
    records.TOKENS_PER_SECOND,
    records.MFU,
    records.GRADIENT_NORM,
    records.DATA_WAIT_SHARE,
)


def format_metrics(metrics: Mapping[str, Any], names: Sequence[str] = tuple(FORMATS)) -> str:
    """Return metrics as a line like `loss 2.31  ppl 10.1  mfu 31.0%`; absent ones are left out."""
    parts = [FORMATS[name].format(metrics[name]) for name in names if metrics.get(name) is not None]
    if metrics.get(records.SKIPPED_STEPS):
        parts.append(f"skipped {metrics[records.SKIPPED_STEPS]:.0f}")
    return "  ".join(parts)


def format_bytes(count: float) -> str:
    """Return a number of bytes like "1.4 GiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(max(count, 1)) // 10), len(units) - 1)
    return f"{count / 1024**power:.{1 if power else 0}f} {units[power]}"


class Console:
    """Use it in a `with`: however the run ends, the terminal gets its cursor and its line back."""

    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int = 0,
        primary: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """Prepare a view of steps `first_step` to `total_steps`; it goes to stdout by default."""
        self._total_steps = total_steps
        self._first_step = first_step
        self._primary = primary
        self._stream = stream or sys.stdout
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self._primary and is_live(self._stream):
            self._bar = _make_bar(self._stream, "step")
            self._bar.add_task("", total=self._total_steps, completed=self._first_step, line="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, step: int) -> None:
        """Move the bar to a step that is done and not logged."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a step."""
        if self._bar is not None:
            line = format_metrics(metrics, BESIDE_BAR)
            self._bar.update(self._bar.task_ids[0], completed=step, line=line)
        else:
            self.note(f"step {step}/{self._total_steps}  {format_metrics(metrics)}")

    def note(self, text: str) -> None:
        """Show a message that stays; above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._primary:
            try:
                self._stream.write(text + "\n")
                self._stream.flush()
            except BrokenPipeError:
                # Nobody reads any more, as behind `| head`; the run itself goes on.
                self._primary = False


@contextlib.contextmanager
def counting(what: str, stream: TextIO) -> Iterator[Callable[[int, int], None]]:
    """Give a function of (done, total) that shows a bar on a terminal, and nothing elsewhere.

    The bar appears with the first call and goes with the last, when done equals total.
    """
    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and done < total and is_live(stream):
            bar = _make_bar(stream, what)
            bar.add_task(what, line="")
            bar.start()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done, total=total)
            if done >= total:
                bar.stop()
                bar = None

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


def is_live(stream: TextIO) -> bool:
    """Tell whether the stream is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _make_bar(stream: TextIO, what: str) -> "Progress":
    # Imported here because a run without a terminal has no use for it.
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    return Progress(
        TextColumn(what),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True, ratio=1)),
        console=RichConsole(file=stream, force_terminal=True),
        refresh_per_second=4,
        expand=True,
    )
