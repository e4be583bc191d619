"""Small training programs and the comparison of their results, for the equality tests."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from jaxscale import records
from jaxscale.checkpoint import read_params
from jaxscale.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RulesConfig,
    TrainConfig,
)
from jaxscale.resolve import resolve
from jaxscale.train.state import (
    BATCH_DTYPES,
    Assembly,
    Batch,
    TrainState,
    assemble,
    in_layer_order,
    in_stage_order,
    init_params,
    init_state,
)
from jaxscale.train.step import compile_step, loss_and_gradients

# The bounds of the equality tests are those of `jaxscale verify`, which derives them.
from jaxscale.verify.compare import GRADIENT_TOLERANCE_F32 as GRADIENT_TOLERANCE_F32
from jaxscale.verify.compare import LOSS_TOLERANCE_F32 as LOSS_TOLERANCE_F32

LENGTH, BATCH, VOCAB = 16, 8, 64
# The shapes of decoder that there are, each with other parts.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt": {
        "norm": "layernorm",
        "mlp": "plain",
        "activation": "gelu_tanh",
        "biases": "all",
        "positions": "learned",
        "tie_embeddings": True,
        "num_kv_heads": 0,
    },
    "qwen": {"biases": "qkv", "qk_norm": True, "rope_scaling": "linear", "rope_factor": 4.0},
    "parallel": {"block": "parallel", "activation": "gelu", "biases": "all"},
    "relu": {
        "mlp": "plain",
        "activation": "relu",
        "norm_epsilon": 1e-1,
        "head_dim": 16,
        "attention_window": 5,
    },
}
# Steps of the runs that tests/train/conftest.py makes.
RUN_STEPS = 8


def tiny_config(
    *,
    mesh: dict[str, int] | None = None,
    model: dict[str, Any] | None = None,
    rules: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
) -> Config:
    """Return a resolved config of two layers in float32, on one device unless `mesh` says more."""
    shape = {
        "num_layers": 2,
        "width": 32,
        "num_heads": 8,
        "num_kv_heads": 4,
        "hidden": 64,
        "vocab_size": VOCAB,
        "compute_dtype": "float32",
    }
    return resolve(
        Config(
            model=ModelConfig(**{**shape, **(model or {})}),
            mesh=MeshConfig(**{"data": 1, **(mesh or {})}),
            rules=RulesConfig(**(rules or {})),
            data=DataConfig(length=LENGTH),
            train=TrainConfig(**{"global_batch_size": BATCH, "steps": 100, **(train or {})}),
            optimizer=OptimizerConfig(
                **{"warmup_steps": 2, "learning_rate": 1e-2, **(optimizer or {})}
            ),
        )
    )


def assemble_tiny(**sections: Any) -> Assembly:
    """Assemble `tiny_config(**sections)` on as many devices as its mesh names."""
    config = tiny_config(**sections)
    sizes = dataclasses.asdict(config.mesh)
    del sizes["num_slices"]
    return assemble(config, jax.devices()[: int(np.prod(list(sizes.values())))])


@functools.cache
def _drawn(model: ModelConfig) -> Any:
    config = dataclasses.replace(tiny_config(), model=model)
    return jax.device_get(init_params(assemble(config, jax.devices()[:1])))


def first_state(assembly: Assembly) -> TrainState:
    """Return the state of step 0, its parameters drawn once per model and then placed."""
    shardings = assembly.definition.shardings(assembly.mesh)
    params = jax.device_put(_drawn(assembly.config.model), shardings)
    return init_state(assembly, in_stage_order(assembly, params))


def host_batch(seed: int) -> dict[str, np.ndarray]:
    """Return a batch of random tokens, documents and weights."""
    random = np.random.default_rng(seed)
    shape = (BATCH, LENGTH)
    values = {
        "tokens": random.integers(0, VOCAB, shape),
        "targets": random.integers(0, VOCAB, shape),
        "segments": np.sort(random.integers(1, 4, shape), axis=1),
        "weights": random.integers(0, 4, shape) > 0,
    }
    return {name: value.astype(BATCH_DTYPES[name]) for name, value in values.items()}


def batch_on(assembly: Assembly, seed: int) -> Batch:
    """Return `host_batch(seed)` on the assembly's mesh."""
    return {
        name: jax.device_put(value, assembly.batch_sharding)
        for name, value in host_batch(seed).items()
    }


def train_steps(assembly: Assembly, count: int = 20) -> tuple[list[float], list[int]]:
    """Return loss and batch hash of some steps over five batches, with one compiled program."""
    state, step = first_state(assembly), compile_step(assembly)
    losses, hashes = [], []
    with jax.set_mesh(assembly.mesh):
        for number in range(count):
            state, metrics = step(state, batch_on(assembly, number % 5))
            losses.append(float(metrics[records.LOSS]))
            hashes.append(int(metrics[records.BATCH_HASH]))
    assert int(state.step) == count
    return losses, hashes


def relative_errors(found: Any, expected: Any) -> dict[str, float]:
    """Return max|a - b| / max|b| of every leaf, by its path."""
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(expected)
    ]
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    errors = [np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max() for a, b in pairs]
    return dict(zip(paths, map(float, errors), strict=True))


def last_lines(folder: pathlib.Path) -> dict[int, dict[str, Any]]:
    """Return the train line of each step; the last one wins."""
    lines = records.read_lines(folder / records.METRICS_FILE)
    return {x[records.STEP]: x for x in lines if x[records.KIND] == records.KIND_TRAIN}


def final_params(folder: pathlib.Path, step: int = RUN_STEPS) -> Any:
    return read_params(folder / records.CHECKPOINTS_DIR / str(step))


def first_gradients(assembly: Assembly) -> tuple[float, Any]:
    """Return loss and gradients of the first batch at the initial parameters."""
    params = first_state(assembly).params
    with jax.set_mesh(assembly.mesh):
        compute = jax.jit(functools.partial(loss_and_gradients, assembly))
        loss, gradients = compute(params, batch_on(assembly, 0))
    return float(loss), jax.device_get(in_layer_order(assembly, gradients))


def check_first_gradients(found: tuple[float, Any], expected: tuple[float, Any]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=LOSS_TOLERANCE_F32)
    errors = relative_errors(found[1], expected[1])
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= GRADIENT_TOLERANCE_F32, worst
