"""Derived values of knobs, and one-line errors for those that do not fit together."""

import pytest

from jaxscale.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RuntimeConfig,
    TrainConfig,
)
from jaxscale.resolve import fill, resolve


def test_resolve_fills_in_what_follows_from_other_knobs() -> None:
    config = resolve(
        Config(
            model=ModelConfig(width=64, num_heads=4, vocab_size=128_000),
            data=DataConfig(length=48),
            train=TrainConfig(steps=200),
        )
    )
    assert (config.model.num_kv_heads, config.model.head_dim) == (4, 16)
    assert config.model.max_length == 48
    assert config.train.loss_chunk_tokens == 2048
    assert config.optimizer.schedule_steps == 200
    assert resolve(config) == config


def test_loss_is_chunked_by_default_only_from_a_large_vocabulary_on() -> None:
    assert resolve(Config(model=ModelConfig(vocab_size=127_999))).train.loss_chunk_tokens == 0


def test_a_run_that_goes_on_keeps_its_schedule() -> None:
    first = resolve(Config(train=TrainConfig(steps=200)))
    longer = fill(Config(train=TrainConfig(steps=300)), first)
    assert longer.optimizer.schedule_steps == 200


WRONG = {
    "model.width=0 is too small; the least is 1": Config(model=ModelConfig(width=0)),
    "model.norm='batch' is not one of rmsnorm, layernorm": Config(model=ModelConfig(norm="batch")),
    "model.num_heads=7 does not divide model.width=128": Config(model=ModelConfig(num_heads=7)),
    "model.num_kv_heads=3 does not divide model.num_heads=8": Config(
        model=ModelConfig(num_kv_heads=3)
    ),
    "model.head_dim=15 is odd": Config(model=ModelConfig(head_dim=15)),
    "data.length=1024 exceeds model.max_length=512": Config(
        model=ModelConfig(positions="learned", max_length=512)
    ),
    "train.accumulation_steps=3 does not divide train.global_batch_size=32": Config(
        train=TrainConfig(accumulation_steps=3)
    ),
    "data.validation_fraction=1.0 is not in [0, 1)": Config(
        data=DataConfig(validation_fraction=1.0)
    ),
    "data.local_cache_dir=s3://b/c is not a folder of this host": Config(
        data=DataConfig(local_cache_dir="s3://b/c")
    ),
    "runtime.profile_steps=(12, 10) is not a first and a last step": Config(
        runtime=RuntimeConfig(profile_steps=(12, 10))
    ),
    "mesh.tensor=0; use 1 for off": Config(mesh=MeshConfig(tensor=0)),
    "mesh.data and mesh.fsdp are both -1": Config(mesh=MeshConfig(fsdp=-1)),
    "model.remat_names names no activation 'queries'; did you mean query?": Config(
        model=ModelConfig(remat="names", remat_names=("queries",))
    ),
    "no activation 'offload:contxt'; did you mean offload:context?": Config(
        model=ModelConfig(remat="names", remat_names=("query", "offload:contxt"))
    ),
    "model.remat_names has both up and offload:up": Config(
        model=ModelConfig(remat="names", remat_names=("up", "offload:up"))
    ),
    "model.remat_every=3 does not divide model.num_layers=8": Config(
        model=ModelConfig(remat_every=3)
    ),
    "model.scan_unroll=2 unrolls in parts": Config(model=ModelConfig(remat_every=2, scan_unroll=2)),
    "model.scan_unroll=3 unrolls in parts": Config(model=ModelConfig(remat="none", scan_unroll=3)),
    "optimizer.epsilon=0.0 is nothing in float32": Config(optimizer=OptimizerConfig(epsilon=0.0)),
    "optimizer.epsilon=1e-50 is nothing in float32": Config(
        optimizer=OptimizerConfig(epsilon=1e-50)
    ),
    "optimizer.decay_fraction=20.0 is not in [0, 1]": Config(
        optimizer=OptimizerConfig(decay_fraction=20.0)
    ),
    "train.seed=4294967296 is too large": Config(train=TrainConfig(seed=2**32)),
    "optimizer.beta2=1.0 is not in [0, 1)": Config(optimizer=OptimizerConfig(beta2=1.0)),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_mistake_is_named_in_one_line(message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(WRONG[message])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
