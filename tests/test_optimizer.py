"""AdamW against its definition, and the schedules."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.config import OptimizerConfig
from jaxscale.optimizer import make_optimizer, make_schedule, schedule_warning, unused_warning


def config(**knobs: object) -> OptimizerConfig:
    shape = {"learning_rate": 1.0, "warmup_steps": 10, "schedule_steps": 110}
    return OptimizerConfig(**{**shape, "final_fraction": 0.1, **knobs})


def test_adamw_equals_its_definition_and_spares_norms() -> None:
    options = config(weight_decay=0.1, clip_norm=1.0)
    params = {"matrix": jnp.full((2, 2), 2.0), "scale": jnp.full((2,), 3.0)}
    axes = {"matrix": ("embed", "hidden"), "scale": ("width",)}
    optimizer = make_optimizer(options, axes)
    state = optimizer.init(params)
    moments = {name: [0.0, 0.0] for name in params}
    for step, size in enumerate([3.0, -1.0, 0.5], start=1):
        gradients = {name: jnp.full_like(value, size) for name, value in params.items()}
        updates, state = optimizer.update(gradients, state, params)
        norm = np.sqrt(6 * size**2)
        clipped = size / max(norm, 1.0)
        for name, decay in (("matrix", 0.1 * 2.0), ("scale", 0.0)):
            m, v = moments[name]
            m = moments[name][0] = 0.9 * m + 0.1 * clipped
            v = moments[name][1] = 0.95 * v + 0.05 * clipped**2
            m, v = m / (1 - 0.9**step), v / (1 - 0.95**step)
            expected = m / (np.sqrt(v) + 1e-8) + decay
            np.testing.assert_allclose(updates[name], expected, rtol=1e-5)


def test_warm_up_starts_above_zero_and_reaches_the_peak() -> None:
    schedule = make_schedule(config())
    assert float(schedule(0)) == pytest.approx(0.1)
    assert float(schedule(9)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "middle"),
    [("constant", 1.0), ("linear", 0.55), ("cosine", 0.55), ("wsd", 1.0)],
)
def test_decay(name: str, middle: float) -> None:
    schedule = make_schedule(config(schedule=name))
    assert float(schedule(60)) == pytest.approx(middle, rel=1e-3)
    final = 1.0 if name == "constant" else 0.1
    assert float(schedule(110)) == pytest.approx(final, rel=1e-3)
    assert float(schedule(1000)) == pytest.approx(final, rel=1e-3)


def test_wsd_decays_over_its_last_share() -> None:
    schedule = make_schedule(config(schedule="wsd", decay_fraction=0.2))
    assert float(schedule(90)) == pytest.approx(1.0)
    assert float(schedule(100)) == pytest.approx(0.55, rel=1e-3)


def test_a_schedule_that_does_not_fit_the_run_is_told() -> None:
    assert schedule_warning(config(), 110) is None
    assert schedule_warning(config(schedule="constant"), 1000) is None
    assert "warmup_steps=10 exceeds train.steps=9" in (schedule_warning(config(), 9) or "")
    longer = schedule_warning(config(), 120) or ""
    assert "from step 110 on the learning rate stays at 0.1: train.steps=120" in longer
    # What it says is what the schedule does.
    schedule = make_schedule(config(warmup_steps=200))
    rates = [float(schedule(step)) for step in range(110)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.55)


def test_knobs_that_a_rule_does_not_use_are_told_if_they_were_set() -> None:
    assert unused_warning(config(beta1=0.5, beta2=0.5, epsilon=1e-4)) is None
    assert unused_warning(config(name="sgd", beta1=0.5)) is None
    told = unused_warning(config(name="sgd", beta2=0.5, epsilon=1e-4))
    assert told == "optimizer.name=sgd does not use optimizer.beta2=0.5, optimizer.epsilon=0.0001"
    told = unused_warning(config(name="adafactor", moment_dtype="bfloat16")) or ""
    assert "does not use optimizer.moment_dtype=bfloat16" in told
