"""A step that lost, gained or changed anything is found out, by the file that differs."""

import json
import pathlib

import jax
import numpy as np
import pytest
from etils import epath

from jaxscale import manifest
from jaxscale.checkpoint import Checkpointer, read_params
from jaxscale.config import CheckpointConfig, ConfigError
from tests.damage import flip_byte, largest


def save_large(folder: pathlib.Path, verify: str) -> pathlib.Path:
    """Save step 1 with an array that is larger than what is always hashed; return its folder."""
    array = np.random.default_rng(0).standard_normal(manifest.SMALL_FILE_BYTES)
    arrays = {"w": jax.numpy.asarray(array, np.float32)}
    with Checkpointer(folder, CheckpointConfig(verify=verify)) as checkpointer:
        checkpointer.save(1, params=arrays, optimizer=arrays, meta={"step": 1})
    return folder / "checkpoints" / "1"


def damage(step: pathlib.Path, verify: str) -> str | None:
    return manifest.find_damage(epath.Path(step), int(step.name), verify)


@pytest.mark.parametrize("verify", ["auto", "sizes", "full"])
def test_a_step_fits_its_manifest(tmp_path: pathlib.Path, verify: str) -> None:
    step = save_large(tmp_path, verify)
    assert damage(step, verify) is None
    files = json.loads((step / manifest.MANIFEST_FILE).read_text())["files"]
    on_disk = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert on_disk == {*files, manifest.MANIFEST_FILE, *manifest.LATE_FILES}
    for item, name in (("params", "_METADATA"), ("optimizer", "_sharding"), ("meta", "metadata")):
        assert files[f"{item}/{name}"]["sha256"]
    unhashed = [name for name, file in files.items() if file["sha256"] is None]
    assert bool(unhashed) == (verify == "sizes")


def test_sizes_see_what_is_cut_short_and_small_files_that_changed(tmp_path: pathlib.Path) -> None:
    step = save_large(tmp_path, "full")
    flip_byte(largest(step))
    assert damage(step, "sizes") is None
    assert "another checksum" in str(damage(step, "full"))
    assert "another checksum" in str(damage(step, "auto"))
    flip_byte(largest(step))
    flip_byte(step / "params" / "_METADATA")
    assert str(damage(step, "sizes")).startswith("params/_METADATA has another checksum")
    flip_byte(step / "params" / "_METADATA")
    largest(step).write_bytes(largest(step).read_bytes()[:-1])
    assert "bytes instead of" in str(damage(step, "sizes"))


def test_a_step_saved_with_sizes_alone_has_nothing_more_to_check(tmp_path: pathlib.Path) -> None:
    step = save_large(tmp_path, "sizes")
    flip_byte(largest(step))
    assert damage(step, "full") is None


def test_auto_checks_sizes_alone_where_a_checkpoint_is_large(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = save_large(tmp_path, "full")
    flip_byte(largest(step))
    total = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    monkeypatch.setattr(manifest, "SMALL_CHECKPOINT_BYTES", total // 2)
    assert damage(step, "auto") is None
    monkeypatch.setattr(manifest, "SMALL_CHECKPOINT_BYTES", total)
    assert "another checksum" in str(damage(step, "auto"))


def test_what_other_programs_hide_in_a_step_is_no_damage(tmp_path: pathlib.Path) -> None:
    step = save_large(tmp_path, "full")
    (step / "params" / ".nfs0001").touch()
    assert damage(step, "full") is None


def test_a_manifest_of_another_version_is_said_to_be_one(tmp_path: pathlib.Path) -> None:
    step = save_large(tmp_path, "full")
    path = step / manifest.MANIFEST_FILE
    content = json.loads(path.read_text())
    del content["sha256"]
    content["format"] = 2
    path.write_text(json.dumps({**content, "sha256": manifest._sha256_of(content)}))
    assert "has format 2; this version reads 1" in str(damage(step, "full"))


def test_parameters_read_by_their_path_are_verified(tmp_path: pathlib.Path) -> None:
    step = save_large(tmp_path, "full")
    read_params(step)
    flip_byte(largest(step))
    with pytest.raises(ConfigError, match="is damaged .*another checksum"):
        read_params(step)
