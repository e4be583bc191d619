"""Rows of a table of published training runs, as they stand.

The header is that of docs/published_tpu_runs.csv. `published.py` rebuilds the runs.
"""

import csv
import dataclasses
import os
from typing import Any

from jaxscale.config import ConfigError


def _column(name: str) -> Any:
    return dataclasses.field(metadata={"column": name})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A published run, as its table states it; an empty cell is "", or None for a number."""

    id: str
    completeness: str
    chip: str
    num_chips: int | None = _column("n_chips")
    num_devices: int | None = _column("n_jax_devices")
    topology: str
    num_slices: int | None = _column("n_slices")
    model: str
    arch_notes: str
    num_layers: int | None = _column("n_layers")
    width: int | None = _column("d_model")
    num_heads: int | None = _column("n_heads")
    num_kv_heads: int | None = _column("n_kv_heads")
    head_dim: int | None
    hidden: int | None = _column("d_ff")
    mlp_matmuls: int | None
    vocab: int | None
    tied_embeddings: str
    billion_parameters: float | None = _column("params_B")
    length: int | None = _column("seq_len")
    per_device_batch: float | None
    global_batch: int | None = _column("global_batch_seqs")
    accumulation: int | None = _column("grad_accum")
    tokens_per_chip: float | None = _column("tokens_per_chip_per_step")
    param_dtype: str
    moment_dtype: str = _column("opt_state_dtype")
    compute_dtype: str
    quantization: str
    optimizer: str
    grad_clip: str
    remat_policy: str
    remat_meaning: str
    attention_kernel: str
    scan_layers: str
    num_vocab_tiling: int | None
    mesh_ici: str
    mesh_dcn: str
    xla_flags: str
    host_offload: str
    step_seconds: float | None = _column("step_time_s")
    tokens_per_second: float | None = _column("tokens_per_s_per_chip")
    mfu_percent: float | None = _column("mfu_pct")
    flop_convention: str
    model_teraflops: float | None = _column("check_model_tflop_per_chip_step")

    @property
    def seconds(self) -> float | None:
        """Of a step, or what follows from tokens per second."""
        if self.step_seconds or not (self.tokens_per_second and self.tokens_per_chip):
            return self.step_seconds
        return self.tokens_per_chip / self.tokens_per_second


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows of a table.

    Raises:
      ConfigError: it lacks a column.
    """
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        columns = [field.metadata.get("column", field.name) for field in dataclasses.fields(Row)]
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(
                f"{os.fspath(path)} has no column {missing[0]}; its header must be that of "
                "docs/published_tpu_runs.csv"
            )
        return [_row(cells) for cells in reader]


def _row(cells: dict[str, str]) -> Row:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Row):
        cell = (cells[field.metadata.get("column", field.name)] or "").strip()
        values[field.name] = cell if field.type is str else _number(cell, field.type)
    return Row(**values)


def _number(cell: str, kind: Any) -> float | int | None:
    """Return a cell's number; None where it is empty or no number."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if kind == float | None else round(number)
