"""What the loop tells of itself: metrics.jsonl, TensorBoard, goodput.jsonl and the person watching.

Figures of time cover the steps since the last line; what interrupts training is taken out of them
and stands in the goodput ledger.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self, TextIO

import jax

from jaxscale import records, runtime
from jaxscale.console import Console
from jaxscale.goodput import Goodput
from jaxscale.metrics import MetricsWriter, SystemMonitor, peak_flops, perplexity
from jaxscale.model.cost import num_parameters, train_flops_per_token
from jaxscale.optimizer import schedule_warning, unused_warning
from jaxscale.parallel.mesh import STAGE_AXIS
from jaxscale.parallel.pipeline import bubble_words
from jaxscale.parallel.program import program_bytes
from jaxscale.train.evaluate import Evaluation
from jaxscale.train.memory import memory_of_device, sharding_warning
from jaxscale.train.start import Run


class StepLog:
    """The log of one run in one process; only the primary process writes."""

    def __init__(self, run: Run, program: Any, goodput: Goodput, stream: TextIO | None) -> None:
        """Open the files.

        Args:
          run: the run.
          program: the compiled step; tells its bytes.
          goodput: the ledger of wall time.
          stream: where progress is shown; None shows nothing.
        """
        config = run.assembly.config
        primary, first_step = runtime.is_primary(), int(run.state.step)
        self.run, self.goodput = run, goodput
        self.loss: float | None = None
        self._console = Console(
            total_steps=config.train.steps,
            first_step=first_step,
            primary=primary and stream is not None,
            stream=stream,
        )
        devices = list(run.assembly.mesh.devices.flat)
        self._writer = MetricsWriter(run.folder, primary=primary)
        self._monitor = SystemMonitor(devices)
        self._program_bytes = program_bytes(program)
        self._tokens_per_step = config.train.global_batch_size * config.data.length
        self._flops_per_token = train_flops_per_token(config.model, config.data.length)
        self._peak = peak_flops(devices, config.model.compute_dtype)
        self._checkpoint_seconds: float | None = None
        # Notes that belong below the line of a step which is not logged yet.
        self._notes: list[str] = []
        self._read_step = first_step
        self._mark(first_step, time.perf_counter())

    def __enter__(self) -> Self:
        self._console.__enter__()
        config, loader = self.run.assembly.config, self.run.loader
        for note in self.run.notes:
            self.note(note)
        self.note(f"{self.run.folder}: starting from {self.run.origin}")
        self.note(
            f"{num_parameters(self.run.state.params):,} parameters, "
            f"{loader.windows.num_tokens:,} tokens to learn from, "
            f"{loader.validation_windows.num_tokens:,} held apart"
        )
        if not len(loader.validation_windows):
            self.note("no evaluation: no window of data.length tokens is held apart")
        train, num_stages = config.train, self.run.assembly.mesh.shape[STAGE_AXIS]
        for warning in (
            schedule_warning(config.optimizer, config.train.steps),
            unused_warning(config.optimizer),
            bubble_words(num_stages, train.accumulation_steps, train.pipeline_rounds),
            sharding_warning(self.run.assembly, memory_of_device(self.run.assembly.mesh)),
        ):
            if warning:
                self.note(warning)
        return self

    def __exit__(self, *_: object) -> None:
        self._show_notes()
        self.goodput.write(self._marked_step)
        self._writer.close()
        self._console.__exit__()

    def _mark(self, step: int, moment: float) -> None:
        """Begin a new interval of measurement before `step`."""
        self._marked_step, self._marked_time = step, moment
        self._marked_wait = self.goodput.seconds()[records.DATA_WAIT_SECONDS]
        self._aside_seconds = 0.0

    @contextlib.contextmanager
    def interruption(self, category: str, newest: jax.Array) -> Iterator[None]:
        """Account for something that is no step, after the steps before it are done.

        Args:
          category: of goodput.
          newest: any result of the newest step.
        """
        with self.goodput.measure(records.STEP_SECONDS):
            jax.block_until_ready(newest)
        start = time.perf_counter()
        with self.goodput.measure(category):
            yield
        self._aside_seconds += time.perf_counter() - start

    def step(self, step: int, metrics: Mapping[str, jax.Array], *, last: bool = False) -> int:
        """Read the metrics of a step, log them where due, and return the bad steps in a row.

        Args:
          step: the step, counted from 0; lines show it counted from 1, as steps done.
          metrics: as the step returned them.
          last: whether the run ends here.
        """
        values = {name: value.item() for name, value in jax.device_get(dict(metrics)).items()}
        # The next step runs while this one is written down.
        moment = time.perf_counter()
        self.loss = values[records.LOSS]
        done = step + 1
        bad_steps: int = values.pop(records.SKIPPED_IN_A_ROW)
        if done % self.run.assembly.config.train.log_every == 0 or last or bad_steps:
            values |= self._figures(done, values, moment)
            self._writer.write(done, records.KIND_TRAIN, values)
            self.goodput.write(done)
            self._console.log(done, values)
            self._mark(done, moment)
        else:
            self._console.advance(done)
        self._read_step = done
        self._show_notes()
        return bad_steps

    def _figures(self, done: int, values: Mapping[str, Any], moment: float) -> dict[str, Any]:
        steps = max(done - self._marked_step, 1)
        seconds = max(moment - self._marked_time - self._aside_seconds, 1e-9)
        wait = self.goodput.seconds()[records.DATA_WAIT_SECONDS] - self._marked_wait
        tokens_per_second = steps * self._tokens_per_step / seconds
        checkpoint, self._checkpoint_seconds = self._checkpoint_seconds, None
        return {
            records.PERPLEXITY: perplexity(values[records.LOSS]),
            records.TOKENS: done * self._tokens_per_step,
            records.TOKENS_PER_SECOND: tokens_per_second,
            records.STEP_SECONDS: seconds / steps,
            records.DATA_WAIT_SHARE: min(wait / seconds, 1.0),
            records.MFU: tokens_per_second * self._flops_per_token / self._peak.flops_per_second,
            records.PEAK_FLOPS_PER_SECOND: self._peak.flops_per_second,
            records.PEAK_FLOPS_SOURCE: self._peak.source,
            records.CHECKPOINT_SECONDS: checkpoint,
            **self._monitor.read(compiled_peak_bytes=self._program_bytes),
        }

    def checkpoint(self, seconds: float) -> None:
        """Note how long a save held the loop up; the next line tells."""
        self._checkpoint_seconds = seconds

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Log an evaluation after `step` steps."""
        values = {
            records.LOSS: result.loss,
            records.PERPLEXITY: result.perplexity,
            records.BITS_PER_BYTE: result.bits_per_byte,
            records.TOKENS: result.tokens,
        }
        self._writer.write(step, records.KIND_EVALUATION, values)
        self._note_after(
            step,
            f"validation after step {step}: loss {result.loss:.4f}  "
            f"perplexity {result.perplexity:.2f}  bits per byte {result.bits_per_byte:.3f}",
        )

    def sample(self, step: int, text: str) -> None:
        """Log a text sample after `step` steps."""
        self._writer.write(step, records.KIND_SAMPLE, {"text": text})
        self._note_after(step, f"sample after step {step}:\n{text}")

    def note(self, text: str) -> None:
        """Show a message, if anyone watches."""
        self._console.note(text)

    def _note_after(self, step: int, text: str) -> None:
        """Show a message below the line of a step, which is read one step late."""
        self._notes.append(text)
        if step <= self._read_step:
            self._show_notes()

    def _show_notes(self) -> None:
        for text in self._notes:
            self.note(text)
        self._notes.clear()
