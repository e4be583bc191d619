"""The update rules and the learning-rate schedule, as optax transformations.

The schedule is a function of the step alone and is applied by the step, so that the optimizer's
state holds moments and nothing that a resume could get wrong.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxscale.adafactor import scale_by_adafactor
from jaxscale.config import OptimizerConfig
from jaxscale.muon import is_hidden_matrix, scale_by_muon
from jaxscale.parallel.sharding import map_axes

Schedule = Callable[[Any], jax.Array]

# Only matrices decay: parameters with one of these logical axes contract with activations.
MATRIX_AXES = frozenset({"embed"})
# Knobs that a rule does not read.
UNUSED = {
    "lion": ("epsilon",),
    "adafactor": ("beta1", "moment_dtype"),
    "sgd": ("beta2", "epsilon"),
}


def make_optimizer(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Return the update rule, before the learning rate.

    Args:
      config: the resolved optimizer section.
      axes: pytree of tuples of logical axes, one per parameter; they say what decays, and which
        dims form a matrix.
    """
    decays = map_axes(lambda names: bool(MATRIX_AXES.intersection(names)), axes)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        _make_rule(config, axes),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def _make_rule(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    beta1, beta2, dtype = config.beta1, config.beta2, config.moment_dtype
    if config.name == "lion":
        return optax.scale_by_lion(beta1, beta2, mu_dtype=dtype)
    if config.name == "sgd":
        return optax.trace(beta1, accumulator_dtype=dtype)
    if config.name == "adafactor":
        return scale_by_adafactor(beta2, config.epsilon, axes)
    # Second moments stay in float32: in bfloat16, beta2 of one would round to itself.
    adam = optax.scale_by_adam(beta1, beta2, config.epsilon, mu_dtype=dtype)
    if config.name == "adamw":
        return adam
    hidden = map_axes(lambda names: names if is_hidden_matrix(names) else optax.MaskedNode(), axes)
    labels = map_axes(lambda names: "muon" if is_hidden_matrix(names) else "adamw", axes)
    muon = scale_by_muon(beta1, config.epsilon, hidden, dtype=dtype)
    return optax.partition({"muon": muon, "adamw": adam}, labels)


def make_schedule(config: OptimizerConfig) -> Schedule:
    """Return step -> learning rate: linear warm-up, then the configured decay to final_fraction.

    After `schedule_steps` the final rate stays.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    decay_steps = max(config.schedule_steps - config.warmup_steps, 1)

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        # Step 0 already learns: the first rate is peak / warmup_steps, not 0.
        warm = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
        progress = jnp.clip((step - config.warmup_steps) / decay_steps, 0.0, 1.0)
        return jnp.where(warm < 1.0, peak * warm, final + (peak - final) * _decay(config, progress))

    return schedule


def schedule_warning(config: OptimizerConfig, steps: int) -> str | None:
    """Tell what is odd about the learning rate of a run of so many steps, if anything is."""
    if 0 < steps < config.warmup_steps:
        return (
            f"the learning rate only rises: optimizer.warmup_steps={config.warmup_steps} "
            f"exceeds train.steps={steps}"
        )
    if steps > config.schedule_steps and config.schedule != "constant":
        return (
            f"from step {config.schedule_steps} on the learning rate stays at "
            f"{config.learning_rate * config.final_fraction:.3g}: train.steps={steps} goes beyond "
            f"optimizer.schedule_steps={config.schedule_steps}"
        )
    return None


def unused_warning(config: OptimizerConfig) -> str | None:
    """Name the knobs that were set and that the update rule does not read, if there are any."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    unused = [
        f"optimizer.{knob}={getattr(config, knob)}"
        for knob in UNUSED.get(config.name, ())
        if getattr(config, knob) != defaults[knob]
    ]
    return f"optimizer.name={config.name} does not use {', '.join(unused)}" if unused else None


def _decay(config: OptimizerConfig, progress: jax.Array) -> jax.Array:
    """Return the share of the way from the final to the peak rate that is left."""
    if config.schedule == "constant":
        return jnp.ones_like(progress)
    if config.schedule == "linear":
        return 1.0 - progress
    if config.schedule == "cosine":
        return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    # wsd (warm-up, stable, decay): hold the peak, then fall linearly over the last share.
    share = max(config.decay_fraction, 1e-9)
    return jnp.clip((1.0 - progress) / share, 0.0, 1.0)
