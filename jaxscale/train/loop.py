"""The training loop, whose order is a contract.

Save -> next batch -> step -> log the previous step. The host never waits for the step that it has
just given to the device; all that it reads is one step old.
"""

import contextlib
import dataclasses
import os
from collections.abc import Generator as Generated
from typing import Any, TextIO

import jax

from jaxscale import records, runtime, workdir
from jaxscale.bundle.sampling import Sampling
from jaxscale.config import Config, Stopped
from jaxscale.data.prepare import Progress
from jaxscale.goodput import Goodput
from jaxscale.inference import Generator
from jaxscale.profiling import StepProfiler
from jaxscale.train.evaluate import Evaluation, compile_evaluation, evaluate
from jaxscale.train.log import StepLog
from jaxscale.train.preemption import StopRequest
from jaxscale.train.start import Run, open_run, save_state
from jaxscale.train.state import TrainState
from jaxscale.train.step import compile_step

DONE, PREEMPTED, NON_FINITE = "done", "preempted", "non-finite"
SAMPLE_TOKENS = 96
# Steps in a row without a finite loss and gradient, after which a run has no hope.
MOST_BAD_STEPS = 10


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      ending: "done", "preempted" (saved; the same command goes on) or "non-finite".
      step: steps done.
      loss: training loss of the last step, nats per token; None if no step ran.
      evaluation: of the last state; None without validation documents or when preempted.
    """

    ending: str
    step: int
    loss: float | None
    evaluation: Evaluation | None


def train(
    config: Config,
    folder: str | os.PathLike[str],
    *,
    allow_config_change: bool = False,
    stream: TextIO | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train or resume in a workdir until `train.steps`, a stop request or too many bad steps.

    Args:
      config: as the user gave it; `runtime.start` has been called.
      folder: the workdir.
      allow_config_change: go on in a workdir whose config differs.
      stream: where progress is shown to a person; None shows nothing.
      progress: told of the documents prepared.

    Raises:
      ConfigError: a user's mistake, before anything compiles; so is a workdir in use.
      Stopped: a signal came while the corpus was tokenized.
    """
    folder = workdir.check_writable(folder)
    goodput = Goodput(folder, primary=runtime.is_primary())
    with contextlib.ExitStack() as stack:
        if runtime.is_primary():
            stack.enter_context(workdir.locked(folder))
        # Before the corpus is tokenized and the step compiled, which may take long.
        stop = stack.enter_context(StopRequest(in_group=jax.process_count() > 1))
        with goodput.measure(records.INIT_SECONDS):
            run = open_run(
                config,
                folder,
                allow_config_change=allow_config_change,
                progress=progress,
                stop=stop.asked,
            )
        stack.enter_context(run.checkpointer)
        with goodput.measure(records.COMPILE_SECONDS):
            program = compile_step(run.assembly)
        with goodput.measure(records.INIT_SECONDS):
            log = stack.enter_context(StepLog(run, program, goodput, stream))
        return _loop(run, program, log, stop)


def _loop(run: Run, program: Any, log: StepLog, stop: StopRequest) -> TrainResult:
    config, goodput = run.assembly.config, log.goodput
    state, first = run.state, int(run.state.step)
    aside = Aside(run, log, stop)
    previous: dict[str, jax.Array] | None = None
    batches: Generated[Any] = run.loader.batches(first)
    ending, step, bad_steps = DONE, first, 0
    with (
        jax.set_mesh(run.assembly.mesh),
        contextlib.closing(batches),
        contextlib.closing(StepProfiler(run.folder, config.runtime.profile_steps)) as profiler,
    ):
        while step < config.train.steps:
            if stop.agreed(step):
                ending = PREEMPTED
                break
            if step > first and step % config.checkpoint.every_steps == 0:
                aside.save(state, step, unless_bad=True)
            with goodput.measure(records.DATA_WAIT_SECONDS):
                batch = next(batches)
            profiler.before(step)
            with goodput.measure(records.STEP_SECONDS):
                state, metrics = program(state, batch)
                bad_steps = log.step(step - 1, previous) if previous else 0
            profiler.after(step, metrics)
            previous, step = metrics, step + 1
            if bad_steps >= MOST_BAD_STEPS:
                break
            aside.look(state, step)
        if previous:
            with goodput.measure(records.STEP_SECONDS):
                bad_steps = log.step(step - 1, previous, last=True)
    if bad_steps >= MOST_BAD_STEPS:
        ending = NON_FINITE
    if ending != NON_FINITE:
        aside.save(state, step)
    final = None
    if ending == DONE:
        try:
            final = aside.evaluate(state, step)
        except Stopped:
            ending = PREEMPTED
    with goodput.measure(records.CHECKPOINT_SECONDS):
        run.checkpointer.wait()
    return TrainResult(ending, step, log.loss, final)


class Aside:
    """What interrupts training: saves, evaluations and samples."""

    def __init__(self, run: Run, log: StepLog, stop: StopRequest) -> None:
        self.run, self.log, self.stop = run, log, stop
        assembly = run.assembly
        self._score = compile_evaluation(assembly)
        self._generator = Generator(
            assembly.definition,
            assembly.mesh,
            num_ids=run.tokenizer.size,
            eos_id=run.tokenizer.eos_id,
        )

    def save(self, state: TrainState, step: int, *, unless_bad: bool = False) -> None:
        """Start to save a step, unless it is there already.

        Args:
          state: after `step` steps.
          step: steps done.
          unless_bad: leave a state whose last step was skipped unsaved, so that a bad streak does
            not push out the checkpoints from before it.
        """
        with self.log.interruption(records.CHECKPOINT_SECONDS, state.step):
            if unless_bad and int(state.skipped_in_a_row):
                return
            seconds = save_state(self.run, state, step)
        self.log.checkpoint(seconds)

    def look(self, state: TrainState, step: int) -> None:
        """Evaluate and sample where it is due after `step` steps."""
        train = self.run.assembly.config.train
        if train.eval_every and step % train.eval_every == 0 and step < train.steps:
            # The loop sees the request before its next step.
            with contextlib.suppress(Stopped):
                self.evaluate(state, step)
        if train.sample_every and step % train.sample_every == 0:
            self._sample(state, step)

    def evaluate(self, state: TrainState, step: int) -> Evaluation | None:
        """Score the validation windows, if there are any, and log the result.

        Raises:
          Stopped: a stop was asked for; nothing is logged.
        """
        run = self.run
        if not len(run.loader.validation_windows):
            return None
        with self.log.interruption(records.EVALUATION_SECONDS, state.step):
            result = evaluate(
                run.assembly,
                state.params,
                run.loader,
                score=self._score,
                num_batches=run.assembly.config.train.eval_batches,
                before_batch=self.stop.check,
            )
        self.log.evaluation(step, result)
        return result

    def _sample(self, state: TrainState, step: int) -> None:
        config, prompt = self.run.assembly.config, self.run.assembly.config.train.sample_prompt
        ids = self.run.tokenizer.encode(prompt)
        # Learned positions end somewhere; then the sample does too.
        room = config.model.max_length - len(ids)
        rotary = config.model.positions == "rotary"
        max_tokens = SAMPLE_TOKENS if rotary else min(SAMPLE_TOKENS, room)
        if max_tokens < 1:
            return
        with self.log.interruption(records.EVALUATION_SECONDS, state.step):
            tokens = self._generator.generate(
                state.params,
                [ids],
                Sampling(temperature=0.7, max_tokens=max_tokens),
            )
        self.log.sample(step, prompt + self.run.tokenizer.continuation(ids, tokens[0]))
