"""A corpus, a config of it on eight devices, and a run that nothing interrupted."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from jaxscale import config_source
from jaxscale.config import CheckpointConfig, Config, DataConfig
from jaxscale.train.loop import DONE, train
from tests.programs import RUN_STEPS, tiny_config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return a folder of a few small texts."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for number in range(24):
        words = random.choice(["mesh", "axis", "shard", "step", "\n"], 200)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def make_config(corpus: pathlib.Path) -> Any:
    """Return a function from knobs, written `section__knob=value`, to a config on 8 devices."""

    def make(**knobs: Any) -> Config:
        config = dataclasses.replace(
            tiny_config(
                mesh={"data": 2, "fsdp": 2, "tensor": 2},
                model={"vocab_size": 264, "num_layers": 1},
                train={"steps": RUN_STEPS, "log_every": 1, "eval_batches": 2},
            ),
            data=DataConfig(
                source=f"files:{corpus}/*.txt",
                length=16,
                validation_fraction=0.25,
                cache_dir=str(corpus / "tokens"),
            ),
            checkpoint=CheckpointConfig(every_steps=3),
        )
        for name, value in knobs.items():
            config = config_source.override(config, name.replace("__", "."), str(value))
        return config

    return make


@pytest.fixture(scope="session")
def whole(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return the workdir of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = train(make_config(), folder)
    assert (result.ending, result.step) == (DONE, RUN_STEPS)
    return folder
