"""A few steps of a training program, and how far their numbers are from those of another program.

The steps are SGD in float32: Adam would divide by the rounding of a gradient that vanishes. What is
compared lies where it was computed, so that replicas that drifted apart are seen as well.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxscale import records
from jaxscale.config import Config, OptimizerConfig
from jaxscale.parallel.program import program_bytes
from jaxscale.train.memory import bytes_on_device
from jaxscale.train.state import (
    BATCH_DTYPES,
    Assembly,
    abstract_state,
    in_layer_order,
    in_stage_order,
    init_state,
)
from jaxscale.train.step import compile_step
from jaxscale.train.step_speed import check_room

# f32 sums in another order: each of the ~10 sums over some 100 terms between a weight and its
# gradient may lose a few units in the last place, 1.2e-7 of the largest term. The figure is the
# project's goal. Parameters move by a part of their gradients, and a bias from 0 by nothing else.
GRADIENT_TOLERANCE_F32 = 2e-5
# One device or eight, the loss is a mean of the same 128 numbers. One after the other, each of n
# equal numbers may cost half a unit in the last place of the sum so far, which add up like a random
# walk to sqrt(n) / 6 units; four deviations of that are 9e-7 for 128.
LOSS_TOLERANCE_F32 = 1e-6
LOSS_TOLERANCE_TOKENS = 128
# A tensor below this share of those beside it is 0 but for rounding, like the gradient of a key's
# bias without rotary positions, and has no relative error: the largest beside it is the measure.
VANISHED = 1e-5

# Momentum starts at 0: after one step it is that step's gradient. No clipping, which would hide a
# gradient that is wrong by a factor.
SGD = OptimizerConfig(
    name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0
)
# Documents that a row of a batch has on average, but for chance.
NUM_DOCUMENTS = 4

# What is compared.
BATCH, LOSS, GRADIENT_NORM = "batch", "loss", "gradient norm"
TENSORS = INITIAL, GRADIENT, PARAMETER = "initial parameter", "gradient", "parameter"

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a program computed in some steps, the layers in their own order.

    Attributes:
      initial: parameters before the first step.
      gradients: of the first step.
      params: parameters after the last step.
      losses: before each step.
      gradient_norms: of each step.
      hashes: of each step's batch.
    """

    initial: Any
    gradients: Any
    params: Any
    losses: list[float]
    gradient_norms: list[float]
    hashes: list[int]


@dataclasses.dataclass(frozen=True)
class Deviation:
    """The largest relative error of one quantity.

    Attributes:
      quantity: what was compared.
      where: the tensor's path or the step.
      relative_error: max|a - b| / max|b|.
      tolerance: of the error.
    """

    quantity: str
    where: str
    relative_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.relative_error <= self.tolerance

    @property
    def severity(self) -> float:
        """How many tolerances the error is; infinite where it is no number."""
        if not math.isfinite(self.relative_error):
            return math.inf
        return self.relative_error / self.tolerance if self.tolerance else self.relative_error


def make_batches(config: Config, num_steps: int) -> list[Arrays]:
    """Return a batch for each step: tokens some of which are frequent, documents, weights."""
    shape = (config.train.global_batch_size, config.data.length)
    vocab, batches = config.model.vocab_size, []
    for step in range(num_steps):
        dice = np.random.default_rng([config.train.seed, step])
        values: dict[str, Any] = {
            "tokens": vocab * dice.random(shape) ** 3,
            "targets": vocab * dice.random(shape) ** 3,
            "segments": 1 + np.cumsum(dice.random(shape) < (NUM_DOCUMENTS - 1) / shape[1], axis=1),
            "weights": dice.random(shape) < 0.75,
        }
        batches.append({name: v.astype(BATCH_DTYPES[name]) for name, v in values.items()})
    return batches


def run_steps(assembly: Assembly, batches: Sequence[Arrays], params: Any = None) -> Numbers:
    """Train on the batches, from given parameters or from those of the config's seed.

    Raises:
      ConfigError: a device has no room for it.
    """
    check_room(bytes_on_device(abstract_state(assembly)), assembly.mesh)
    with jax.default_matmul_precision("highest"):
        program = compile_step(assembly)
    check_room(program_bytes(program) or 0, assembly.mesh)
    if params is not None:
        params = jax.device_put(params, assembly.definition.shardings(assembly.mesh))
        params = in_stage_order(assembly, params)
    state = init_state(assembly, params)
    # Each step takes the state before it apart.
    initial = gradients = jax.tree.map(jnp.copy, state.params)
    metrics: list[Any] = []
    with jax.set_mesh(assembly.mesh):
        for batch in batches:
            state, step_metrics = program(state, _placed(assembly, batch))
            if not metrics:
                momentum = optax.tree.get(state.optimizer, "trace")
                gradients = jax.tree.map(jnp.copy, momentum)
            metrics.append(jax.device_get(step_metrics))
    return Numbers(
        initial=in_layer_order(assembly, initial),
        gradients=in_layer_order(assembly, gradients),
        params=in_layer_order(assembly, state.params),
        losses=[float(m[records.LOSS]) for m in metrics],
        gradient_norms=[float(m[records.GRADIENT_NORM]) for m in metrics],
        hashes=[int(m[records.BATCH_HASH]) for m in metrics],
    )


def _placed(assembly: Assembly, batch: Arrays) -> dict[str, jax.Array]:
    sharding = assembly.batch_sharding

    def place(values: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return {name: place(values) for name, values in batch.items()}


def on_host(numbers: Numbers) -> Numbers:
    """Return the numbers of one device as arrays of the host, to compare others with."""
    trees = jax.device_get((numbers.initial, numbers.gradients, numbers.params))
    return dataclasses.replace(
        numbers, **dict(zip(("initial", "gradients", "params"), trees, strict=True))
    )


def loss_tolerance(num_tokens: int) -> float:
    """Return the tolerance of a mean over so many tokens."""
    return LOSS_TOLERANCE_F32 * max(1.0, num_tokens / LOSS_TOLERANCE_TOKENS) ** 0.5


def compare(found: Numbers, expected: Numbers, num_tokens: int) -> list[Deviation]:
    """Return the largest error of each quantity.

    Args:
      found: numbers on any devices.
      expected: those of one device, on the host.
      num_tokens: of a batch.
    """
    tensors = (
        (INITIAL, found.initial, expected.initial),
        (GRADIENT, found.gradients, expected.gradients),
        (PARAMETER, found.params, expected.params),
    )
    scalars = (
        (LOSS, found.losses, expected.losses, loss_tolerance(num_tokens)),
        (
            GRADIENT_NORM,
            found.gradient_norms,
            expected.gradient_norms,
            GRADIENT_TOLERANCE_F32,
        ),
    )
    deviations = [_batches(found.hashes, expected.hashes)]
    for quantity, values, right, tolerance in scalars:
        errors = {
            f"step {step}": _relative(abs(a - b), abs(b))
            for step, (a, b) in enumerate(zip(values, right, strict=True), start=1)
        }
        deviations.append(_largest(quantity, errors, tolerance))
    for quantity, tree, right_tree in tensors:
        errors = relative_errors(tree, right_tree)
        deviations.append(_largest(quantity, errors, GRADIENT_TOLERANCE_F32))
    return deviations


def _batches(found: Sequence[int], expected: Sequence[int]) -> Deviation:
    other = [step for step, (a, b) in enumerate(zip(found, expected, strict=True), 1) if a != b]
    where = f"step {other[0]}" if other else ""
    return Deviation(BATCH, where, math.inf if other else 0.0, 0.0)


def _largest(quantity: str, errors: dict[str, float], tolerance: float) -> Deviation:
    where = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return Deviation(quantity, where, errors[where], tolerance)


def relative_errors(found: Any, expected: Any) -> dict[str, float]:
    """Return max|a - b| / max|b| of every leaf by its path, over all shards and replicas of a."""
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    largest = {path: float(np.abs(leaf).max()) for path, leaf in leaves}
    beside: dict[Any, float] = {}
    for path, value in largest.items():
        beside[path[:-1]] = max(value, beside.get(path[:-1], 0.0))
    errors = {}
    for (path, leaf), values in zip(leaves, jax.tree.leaves(found), strict=True):
        scale, around = largest[path], beside[path[:-1]]
        scale = scale if scale > VANISHED * around else around
        difference = max(_differences(values, leaf))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        errors[name] = _relative(difference, scale)
    return errors


def _relative(difference: float, scale: float) -> float:
    """Return difference / scale; no difference is no error, though everything be 0."""
    return difference / scale if scale else (math.inf if difference else 0.0)


def _differences(values: jax.Array, expected: np.ndarray) -> Iterator[float]:
    """Yield the largest difference of each device's part; infinite where one is no number."""
    for shard in values.addressable_shards:
        largest = float(np.abs(np.asarray(shard.data) - expected[shard.index]).max())
        yield largest if math.isfinite(largest) else math.inf
