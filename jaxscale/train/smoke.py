"""A baseline of a machine within a minute: learn one small batch by heart.

The model, mesh, optimizer and compiled step are the config's own; only the batch is small, and the
same at every step. A program whose loss does not fall on it is broken somewhere, whatever the data.
`jaxscale train --smoke` runs it.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np

from jaxscale import records, runtime
from jaxscale.config import Config
from jaxscale.metrics import PeakFlops, peak_flops
from jaxscale.model.cost import train_flops_per_token
from jaxscale.train.state import BATCH_DTYPES, Assembly, Batch, assemble, init_state
from jaxscale.train.step import compile_step

SECONDS = 60.0
# However slow the machine is.
MIN_STEPS = 5
WARMUP_STEPS = 5
# Tokens that one shard of the residual stream holds, at most.
SHARD_TOKENS = 128
# Shares of the first loss, or of a guess's where that is lower, for a model that has diverged may
# end at a guess: below the one the batch counts as learnt; where time ran out, a loss above the
# other has not fallen.
LEARNT, FALLEN = 0.5, 0.9


@dataclasses.dataclass(frozen=True)
class SmokeResult:
    """How a smoke test ended.

    Attributes:
      passed: whether the loss fell.
      first_loss: training loss before the first step, nats per token.
      last_loss: the same before the last step.
      num_steps: steps that ran.
      rows: sequences of the batch.
      length: tokens of each.
      step_seconds: median time of a step, the first one left out.
      tokens_per_second: rows x length per step_seconds.
      mfu: model FLOPs per second / peak FLOPs per second.
      peak: that peak, and where it comes from.
    """

    passed: bool
    first_loss: float
    last_loss: float
    num_steps: int
    rows: int
    length: int
    step_seconds: float
    tokens_per_second: float
    mfu: float
    peak: PeakFlops


def smoke(config: Config, *, seconds: float) -> SmokeResult:
    """Train a resolved config on one small batch of random tokens until it knows them.

    Args:
      config: of it, data, steps, schedule and batch size do not count.
      seconds: time for all of it with the compile, usually SECONDS; five steps run in any case.

    Raises:
      ConfigError: the mesh does not fit the devices, the model or the batch.
    """
    deadline = time.perf_counter() + seconds
    assembly = _with_small_batch(config)
    program, state, batch = compile_step(assembly), init_state(assembly), random_batch(assembly)
    losses: list[float] = []
    times: list[float] = []
    before = math.log(config.model.vocab_size)
    while len(losses) < MIN_STEPS or runtime.agreed(time.perf_counter() < deadline):
        start = time.perf_counter()
        with jax.set_mesh(assembly.mesh):
            state, metrics = program(state, batch)
        losses.append(float(metrics[records.LOSS]))
        times.append(time.perf_counter() - start)
        before = min(before, losses[0])
        if not math.isfinite(losses[-1]) or losses[-1] < LEARNT * before:
            break
    train, length = assembly.config.train, assembly.config.data.length
    step_seconds = float(np.median(times[1:] or times))
    tokens_per_second = train.global_batch_size * length / step_seconds
    peak = peak_flops(list(assembly.mesh.devices.flat), config.model.compute_dtype)
    flops = tokens_per_second * train_flops_per_token(config.model, length)
    return SmokeResult(
        passed=losses[-1] < FALLEN * before,
        first_loss=losses[0],
        last_loss=losses[-1],
        num_steps=len(losses),
        rows=train.global_batch_size,
        length=length,
        step_seconds=step_seconds,
        tokens_per_second=tokens_per_second,
        mfu=flops / peak.flops_per_second,
        peak=peak,
    )


def _with_small_batch(config: Config) -> Assembly:
    """Assemble the config with one row on each shard of the batch, and few tokens on it."""
    whole = assemble(config)
    rules, mesh = whole.rules, whole.mesh
    parts = config.train.accumulation_steps
    shards = (rules.num_shards(name, mesh) for name in ("length", "residual_length"))
    length = min(config.data.length, SHARD_TOKENS * math.lcm(*shards))
    small = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, length=length),
        train=dataclasses.replace(
            config.train, global_batch_size=parts * rules.num_shards("batch", mesh)
        ),
        optimizer=dataclasses.replace(
            config.optimizer,
            schedule="constant",
            warmup_steps=min(config.optimizer.warmup_steps, WARMUP_STEPS),
        ),
    )
    return assemble(small)


def random_batch(assembly: Assembly) -> Batch:
    """Return a batch of random tokens, each row one document."""
    config = assembly.config
    rows, length = config.train.global_batch_size, config.data.length
    dice = np.random.default_rng(config.train.seed)
    stream = dice.integers(0, config.model.vocab_size, (rows, length + 1))
    arrays: dict[str, Any] = {
        "tokens": stream[:, :-1],
        "targets": stream[:, 1:],
        "segments": np.ones((rows, length)),
        "weights": np.ones((rows, length)),
    }
    sharding = assembly.batch_sharding

    def place(name: str) -> jax.Array:
        values = arrays[name].astype(BATCH_DTYPES[name])
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return {name: place(name) for name in arrays}
