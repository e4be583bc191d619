"""The files jaxscale writes and reads: the JSON envelope, and the names of metrics and fields.

Every name carries its unit. Verbs write these and reports read them, so the names stand here alone.
"""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxscale.config import ConfigError

FORMAT = 1

# Files of a workdir.
CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
TOKENIZER_FILE = "tokenizer.json"
METRICS_FILE = "metrics.jsonl"
GOODPUT_FILE = "goodput.jsonl"
CHECKPOINTS_DIR = "checkpoints"
PROFILE_DIR = "profile"
SWEEP_DIR = "sweep"
PLAN_DIR = "plan"

# Fields of every line of metrics.jsonl; a later line of the same step replaces an earlier one.
STEP = "step"
KIND = "kind"
TIME = "time"
NONFINITE = "nonfinite"
KIND_TRAIN = "train"
KIND_EVALUATION = "evaluation"
KIND_SAMPLE = "sample"

# Metrics of a training step.
LOSS = "loss"
PERPLEXITY = "perplexity"
BITS_PER_BYTE = "bits_per_byte"
UNIGRAM_BITS_PER_BYTE = "unigram_bits_per_byte"
BIGRAM_BITS_PER_BYTE = "bigram_bits_per_byte"
LEARNING_RATE = "learning_rate"
GRADIENT_NORM = "gradient_norm"
SKIPPED_STEPS = "skipped_steps"
SKIPPED_IN_A_ROW = "skipped_in_a_row"
LOSS_SCALE = "loss_scale"
TOKENS = "tokens"
TOKENS_PER_SECOND = "tokens_per_second"
STEP_SECONDS = "step_seconds"
DATA_WAIT_SHARE = "data_wait_share"
MFU = "mfu"
DEVICE_UTILIZATION = "device_utilization"
HOST_CPU_UTILIZATION = "host_cpu_utilization"
PEAK_BYTES = "peak_bytes"
PEAK_BYTES_SOURCE = "peak_bytes_source"
CHECKPOINT_SECONDS = "checkpoint_seconds"
PEAK_FLOPS_PER_SECOND = "peak_flops_per_second"
PEAK_FLOPS_SOURCE = "peak_flops_source"
BATCH_HASH = "batch_hash"

# Categories of goodput.jsonl, in seconds of wall time; they add up to the life of the process.
INIT_SECONDS = "init_seconds"
COMPILE_SECONDS = "compile_seconds"
DATA_WAIT_SECONDS = "data_wait_seconds"
EVALUATION_SECONDS = "evaluation_seconds"
LOST_SECONDS = "lost_seconds"
GOODPUT_CATEGORIES = (
    INIT_SECONDS,
    COMPILE_SECONDS,
    DATA_WAIT_SECONDS,
    STEP_SECONDS,
    EVALUATION_SECONDS,
    CHECKPOINT_SECONDS,
    LOST_SECONDS,
)
# The other fields of its lines; the last line of a run_id counts.
RUN_ID = "run_id"
STARTED = "started"
WALL_SECONDS = "wall_seconds"

# Fields of a row of verify: one way to run a config, compared with the plainest on one device.
CASE = "case"
MESH = "mesh"
SETTINGS = "settings"
VERDICT = "verdict"
NOTE = "note"
DEVIATIONS = "deviations"
CASE_SECONDS = "case_seconds"


def now() -> str:
    """Return the UTC time as ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def envelope(
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Wrap the rows of a verb's result in the fields that every result file has."""
    return {
        "format": FORMAT,
        "kind": kind,
        "created": now(),
        "command": sys.argv,
        "config": config,
        "environment": environment,
        "rows": [dict(row) for row in rows],
    }


def check_writable(folder: pathlib.Path, setting: str) -> None:
    """Make a folder if need be, and try to write in it.

    Args:
      folder: where files are to go.
      setting: what named it, such as "--workdir=runs/tiny", for the message.

    Raises:
      ConfigError: it cannot be written.
    """
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{setting} cannot be written ({error.strerror}); choose another folder"
        ) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file whole or not at all: to a neighbour first, then renamed over `path`."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")
    os.replace(partial, target)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file."""
    return json.loads(pathlib.Path(path).read_text())


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a JSONL file; a line cut short by a crash is left out."""
    rows = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_line(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Append a row to a JSONL file; a line that a crash cut short is ended first."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            whole = file.read(1) == b"\n"
            file.write(b"" if whole else b"\n")
        file.write(json.dumps(to_json(row), allow_nan=False).encode() + b"\n")


def to_json(value: Any) -> Any:
    """Return a value with nothing in it that JSON does not know.

    A number that is not finite becomes null; its name and text go under `nonfinite` beside it.

    Raises:
      TypeError: a value has no JSON form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        plain = {str(name): to_json(item) for name, item in value.items()}
        bad = {name: str(item) for name, item in plain.items() if _is_nonfinite(item)}
        kept = {name: None if name in bad else item for name, item in plain.items()}
        return {**kept, NONFINITE: bad} if bad else kept
    if isinstance(value, list | tuple):
        return [None if _is_nonfinite(item) else item for item in map(to_json, value)]
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, pathlib.Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
