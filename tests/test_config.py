"""Knobs: few, typed, documented, and each either free or fixed on resume."""

import dataclasses
import typing

from jaxscale.config import Config, is_free

MAX_KNOBS = 90


def test_knobs_are_few_typed_and_documented() -> None:
    knobs = [
        (section.name, field)
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(section.type)
    ]
    assert len(knobs) <= MAX_KNOBS
    assert all(field.metadata["doc"] for _, field in knobs)
    for section in dataclasses.fields(Config):
        assert set(typing.get_type_hints(section.type)) == {
            field.name for field in dataclasses.fields(section.type)
        }


def test_what_may_change_on_resume() -> None:
    may = ("mesh.data", "rules.embed", "runtime.profile_steps", "model.remat", "train.steps")
    must_not = ("model.width", "data.source", "train.seed", "optimizer.learning_rate")
    assert all(is_free(*key.split(".")) for key in may)
    assert not any(is_free(*key.split(".")) for key in must_not)
