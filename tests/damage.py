"""Ways to damage a saved step, each with what is said about it."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable

from jaxscale import manifest


def flip_byte(path: pathlib.Path, place: int = -1) -> None:
    """Invert one byte of a file, by default the one in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place < 0 else place] ^= 0xFF
    path.write_bytes(content)


def largest(step: pathlib.Path, pattern: str = "params/**/d/*") -> pathlib.Path:
    """Return the largest file of a step: array data."""
    return max(step.glob(pattern), key=lambda path: (path.stat().st_size, path.name))


def cut_short(path: pathlib.Path, size: int = 10) -> None:
    path.write_bytes(path.read_bytes()[:size])


def swap(one: pathlib.Path, other: pathlib.Path) -> None:
    """Exchange two files of equal size and different content."""
    first, second = one.read_bytes(), other.read_bytes()
    assert len(first) == len(second)
    assert first != second
    one.write_bytes(second)
    other.write_bytes(first)


def claim_size(step: pathlib.Path) -> None:
    path = step / manifest.MANIFEST_FILE
    content = json.loads(path.read_text())
    content["files"]["meta/metadata"]["bytes"] += 1
    path.write_text(json.dumps(content))


def copy_from(name: str) -> Callable[[pathlib.Path, pathlib.Path], None]:
    return lambda step, older: shutil.copy(older / name, step / name) and None


def replace_by_file(step: pathlib.Path) -> None:
    shutil.rmtree(step)
    step.touch()


def replace_by_older(step: pathlib.Path, older: pathlib.Path) -> None:
    shutil.rmtree(step)
    shutil.copytree(older, step)


@dataclasses.dataclass(frozen=True)
class Damage:
    """What is done to a step, given an older one too, and a pattern of what is said about it."""

    do: Callable[[pathlib.Path, pathlib.Path], None]
    said: str


CHECKSUM = " has another checksum than when it was saved"
DAMAGES = {
    "an array file cut short": Damage(
        lambda step, _: cut_short(largest(step)), r"params/[\w./]+ has 10 bytes instead of \d+"
    ),
    "an array file emptied": Damage(
        lambda step, _: cut_short(largest(step, "optimizer/d/*"), 0),
        r"optimizer/d/\w+ has 0 bytes instead of \d+",
    ),
    "a byte of array data flipped": Damage(
        lambda step, _: flip_byte(largest(step)), rf"params/[\w./]+{CHECKSUM}"
    ),
    "a byte of a shard flipped": Damage(
        lambda step, _: flip_byte(largest(step, "optimizer/ocdbt.process_0/d/*")),
        rf"optimizer/ocdbt.process_0/d/\w+{CHECKSUM}",
    ),
    "a byte of an ocdbt manifest flipped": Damage(
        lambda step, _: flip_byte(step / "params/manifest.ocdbt"),
        rf"params/manifest.ocdbt{CHECKSUM}",
    ),
    "a byte of the arrays' names flipped": Damage(
        lambda step, _: flip_byte(step / "params/_METADATA"), f"params/_METADATA{CHECKSUM}"
    ),
    "a byte of the shardings flipped": Damage(
        lambda step, _: flip_byte(step / "optimizer/_sharding"), f"optimizer/_sharding{CHECKSUM}"
    ),
    "a byte of the JSON item flipped": Damage(
        lambda step, _: flip_byte(step / "meta/metadata"), f"meta/metadata{CHECKSUM}"
    ),
    "a byte of Orbax's label flipped": Damage(
        lambda step, _: flip_byte(step / manifest.METADATA_FILE, 0),
        "_CHECKPOINT_METADATA is missing or cut short",
    ),
    "Orbax's label emptied": Damage(
        lambda step, _: cut_short(step / manifest.METADATA_FILE, 0),
        "_CHECKPOINT_METADATA is missing or cut short",
    ),
    "a shard deleted": Damage(
        lambda step, _: largest(step, "params/ocdbt.process_0/d/*").unlink(),
        r"params/ocdbt.process_0/d/\w+ is missing",
    ),
    "the arrays' names emptied": Damage(
        lambda step, _: cut_short(step / "optimizer/_METADATA", 0),
        r"optimizer/_METADATA has 0 bytes instead of \d+",
    ),
    "an item deleted": Damage(
        lambda step, _: shutil.rmtree(step / "params"), "params/_METADATA is missing"
    ),
    "the commit mark deleted": Damage(
        lambda step, _: (step / manifest.COMMIT_FILE).unlink(), "commit_success.txt is missing"
    ),
    "an item's commit mark deleted": Damage(
        lambda step, _: (step / "params" / manifest.COMMIT_FILE).unlink(),
        "params/commit_success.txt is missing",
    ),
    "a file exchanged with that of another step": Damage(
        lambda step, older: swap(step / "params/manifest.ocdbt", older / "params/manifest.ocdbt"),
        rf"params/manifest.ocdbt{CHECKSUM}",
    ),
    "the JSON item of another step": Damage(
        copy_from("meta/metadata"), rf"meta/metadata{CHECKSUM}"
    ),
    "the manifest deleted": Damage(
        lambda step, _: (step / manifest.MANIFEST_FILE).unlink(), "manifest.json is missing"
    ),
    "the manifest cut short": Damage(
        lambda step, _: cut_short(step / manifest.MANIFEST_FILE, 100),
        "manifest.json is cut short or altered",
    ),
    "the manifest altered": Damage(
        lambda step, _: claim_size(step), "manifest.json has been altered"
    ),
    "the manifest of another step": Damage(
        copy_from(manifest.MANIFEST_FILE), "manifest.json is that of step 6"
    ),
    "another step under this name": Damage(replace_by_older, "manifest.json is that of step 6"),
    "a file added": Damage(
        lambda step, _: (step / "params/d/stray").touch(), "params/d/stray was not saved with it"
    ),
    "a file in place of the folder": Damage(
        lambda step, _: replace_by_file(step), "it is a file and no folder"
    ),
}
# One that is deleted, one that is altered, and one that Orbax does not even list.
CONTINUED = ("an item deleted", "a byte of array data flipped", "a file in place of the folder")
