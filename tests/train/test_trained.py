"""A trained model is read on whatever devices there are, with the tokenizer that it learnt."""

import io
import pathlib
import shutil
from typing import Any

import jax
import pytest

from jaxscale import config_source
from jaxscale.bundle.sampling import Sampling
from jaxscale.config import ConfigError
from jaxscale.data.tokenizer import byte_tokenizer_json
from jaxscale.train import trained as trained_module
from jaxscale.train.loop import train
from jaxscale.train.trained import evaluate_trained, generate_text, open_trained
from tests.programs import LOSS_TOLERANCE_F32


def test_a_trained_model_is_read_on_whatever_devices_there_are(
    make_config: Any, whole: pathlib.Path
) -> None:
    here = open_trained(whole)
    assert here.notes == ()
    first = evaluate_trained(here, baselines=True)
    one = config_source.override(make_config(), "mesh.tensor", "1")
    one = config_source.override(one, "mesh.data", "8")
    one = config_source.override(one, "mesh.fsdp", "1")
    second = evaluate_trained(open_trained(whole, one))
    assert second.evaluation.loss == pytest.approx(first.evaluation.loss, rel=LOSS_TOLERANCE_F32)
    assert first.unigram is not None
    assert first.bigram is not None
    assert first.bigram < first.unigram
    assert isinstance(generate_text(here, ["me"], Sampling(temperature=0, max_tokens=4))[0], str)
    with pytest.raises(ConfigError, match="no checkpoint of step 4"):
        open_trained(whole, step=4)


@pytest.mark.parametrize(
    ("count", "num_used"),
    [(4, 4), (3, 1)],
)
def test_a_mesh_that_does_not_fit_is_replaced(
    whole: pathlib.Path, monkeypatch: pytest.MonkeyPatch, count: int, num_used: int
) -> None:
    expected = evaluate_trained(open_trained(whole)).evaluation.loss
    devices = jax.devices()[:count]
    monkeypatch.setattr(trained_module.jax, "devices", lambda: devices)
    here = open_trained(whole)
    assert here.notes == (f"the run's mesh does not fit {count} device(s); using {num_used}",)
    assert here.assembly.mesh.size == num_used
    found = evaluate_trained(here).evaluation.loss
    assert found == pytest.approx(expected, rel=LOSS_TOLERANCE_F32)
    with pytest.raises(ConfigError, match="does not multiply out"):
        open_trained(whole, other_mesh=False)


def test_a_batch_smaller_than_the_devices_is_read_whole_by_each(
    make_config: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"train__global_batch_size": 4, "train__steps": 1}
    train(make_config(**small), tmp_path)
    config = make_config(**small, mesh__tensor=1, mesh__data=1, mesh__fsdp=3)
    here = open_trained(tmp_path, config)
    assert "using 8" in here.notes[0]
    assert here.assembly.mesh.size == len(jax.devices())
    expected = evaluate_trained(open_trained(tmp_path)).evaluation.loss
    assert evaluate_trained(here).evaluation.loss == pytest.approx(expected, rel=LOSS_TOLERANCE_F32)


def test_another_tokenizer_is_refused_and_other_data_told(
    make_config: Any, corpus: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_tokenizer_json())
    knobs = {"data__tokenizer": path, "train__steps": 1}
    config = make_config(**knobs)
    train(config, tmp_path / "run")
    assert evaluate_trained(open_trained(tmp_path / "run")).same_data
    some = config_source.override(config, "data.source", f"files:{corpus}/1*.txt")
    assert not evaluate_trained(open_trained(tmp_path / "run", some)).same_data
    path.write_text(byte_tokenizer_json().replace("<|endoftext|>", "</s>"))
    with pytest.raises(ConfigError, match="is not the tokenizer that the run"):
        open_trained(tmp_path / "run")
    new = make_config(**knobs, checkpoint__init_from=tmp_path / "run")
    with pytest.raises(ConfigError, match="is not the tokenizer that the run"):
        train(new, tmp_path / "new")


def test_another_model_over_the_same_parameters_is_told(
    make_config: Any, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = make_config(model__rope_theta=99.0)
    assert "though with model.rope_theta: 10000.0 -> 99.0" in open_trained(whole, other).notes[0]
    stream = io.StringIO()
    new = make_config(model__rope_theta=99.0, checkpoint__init_from=whole, train__steps=0)
    train(new, tmp_path, stream=stream)
    assert "though with model.rope_theta: 10000.0 -> 99.0" in stream.getvalue()


def test_a_tokenizer_trained_on_the_corpus_goes_with_the_run(
    make_config: Any, corpus: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    own_corpus = shutil.copytree(corpus, tmp_path / "corpus")
    knobs = {
        "data__source": f"0.5 files:{own_corpus}/1*.txt; 0.5 files:{own_corpus}/2*.txt",
        "data__cache_dir": tmp_path / "caches",
        "data__tokenizer": "bpe:264",
    }
    run = tmp_path / "run"
    train(make_config(**knobs, train__steps=1), run)
    train(make_config(**knobs, train__steps=2), run)
    whole = evaluate_trained(open_trained(run), baselines=True)
    assert whole.same_data
    assert whole.bigram is not None
    # Another corpus would train another tokenizer, but the run keeps its own.
    for number in range(100, 110):
        (own_corpus / f"{number}.txt").write_text("zebras " * number)
    with pytest.raises(ConfigError, match=r"data\.source=.* has changed since the run"):
        train(make_config(**knobs, train__steps=2), run)
    before = (run / "tokenizer.json").read_text()
    assert train(make_config(**knobs, train__steps=3), run, allow_config_change=True).step == 3
    assert (run / "tokenizer.json").read_text() == before
    train(make_config(**knobs, train__steps=0), tmp_path / "another")
    assert (tmp_path / "another" / "tokenizer.json").read_text() != before
    # Read without the corpus, and over another one.
    shutil.rmtree(own_corpus)
    shutil.rmtree(tmp_path / "caches")
    here = open_trained(run)
    assert here.tokenizer.size == 264
    assert isinstance(generate_text(here, ["me"], Sampling(max_tokens=4))[0], str)
    other = make_config(**knobs | {"data__source": f"files:{corpus}/1*.txt"})
    found = evaluate_trained(open_trained(run, other))
    assert not found.same_data
    assert found.evaluation.bits_per_byte == pytest.approx(whole.evaluation.bits_per_byte, rel=0.5)
    with pytest.raises(ConfigError, match="bpe:265"):
        open_trained(run, make_config(**knobs | {"data__tokenizer": "bpe:265"}))
    # A new run over other data takes the tokenizer from the workdir.
    new = {**knobs, "data__source": f"files:{corpus}/2*.txt", "checkpoint__init_from": run}
    with pytest.raises(ConfigError, match=r"; take data\.tokenizer=.*/run/tokenizer\.json"):
        train(make_config(**new, train__steps=1), tmp_path / "new")
    new["data__tokenizer"] = run / "tokenizer.json"
    assert train(make_config(**new, train__steps=1), tmp_path / "new").step == 1


def test_a_vocabulary_too_small_is_told_before_a_tokenizer_is_trained(
    make_config: Any, tmp_path: pathlib.Path
) -> None:
    config = make_config(data__tokenizer="bpe:512", data__cache_dir=tmp_path / "caches")
    with pytest.raises(ConfigError, match=r"model\.vocab_size=264 .*at least 512"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "caches").exists()
