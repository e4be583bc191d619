"""Published training runs as jaxscale configs, to hold predictions against.

A row of a table with the header of docs/published_tpu_runs.csv becomes a `Run`, or is `Skipped`
with the feature that we lack. What differs from the published program stands in
`Run.approximations`. `scripts/backtest.py` predicts the runs.
"""

import dataclasses
import math
import re
from typing import Any

from jax.sharding import AbstractMesh

from jaxscale.config import (
    Config,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RulesConfig,
    TrainConfig,
)
from jaxscale.hardware import TPUS, Chip
from jaxscale.model.attention.attend import check_attention
from jaxscale.model.cost import num_matmul_parameters, train_flops_per_token
from jaxscale.model.decoder import check_mesh
from jaxscale.parallel.mesh import AXES, BATCH_AXES, SLOW_AXES, axis_sizes
from jaxscale.parallel.sharding import Rules, check_divides
from jaxscale.plan import words
from jaxscale.plan.rows import Row
from jaxscale.resolve import resolve

CHIPS = {chip.name: chip for chip in TPUS}
_LISTED_SLOW_AXES = " or ".join(SLOW_AXES)
# How far the parameters of the rebuilt model may be from the published number.
PARAMETERS_TOLERANCE = 0.02

# What we lack, and the words that tell of it. "no sliding window" tells of nothing.
_LACKING = (
    ("mixture of experts", r"\bmoe\b|expert|mixtral|mixture|deepseek"),
    ("soft-capped logits", r"soft[- ]?cap"),
    (
        "local and global layers in turn",
        r"(?<!no )(alternat|interleav|5:1|local[ -/](and )?global)",
    ),
    ("multi-token prediction", r"\bmtp\b|multi-token"),
)
_DTYPES = {"float32": ("fp32", "f32"), "bfloat16": ("bf16",)}
_UPDATE_RULES = ("adamw", "adafactor", "lion", "muon", "sgd")
_APPROXIMATED = (
    (r"qk\(v\)-norm", "values are not normalised"),
    (r"fused_qkv", "query, key and value are three matmuls"),
    (r"t5 .*bias", "no relative bias is added to the scores"),
)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A row that we cannot rebuild, and why."""

    id: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A published run as we would do it.

    Attributes:
      row: where it comes from.
      config: resolved.
      topology: of a slice, like "v6e:16x16".
      options: of the TPU compiler, some of which it may refuse (`words.refused_option`).
      kernel: how attention was computed; `Config` has no knob for most of it.
      extra_host_bytes: what a device sent to host memory in a step, and read back, beyond what
        our program does: outputs of MLPs.
      approximations: how our program differs.
    """

    row: Row
    config: Config
    topology: str
    options: tuple[tuple[str, str], ...]
    kernel: words.Kernel
    extra_host_bytes: int
    approximations: tuple[str, ...]

    @property
    def id(self) -> str:
        """The row's."""
        return self.row.id

    @property
    def chip(self) -> Chip:
        """The hardware."""
        return CHIPS[self.row.chip.lower()]

    @property
    def num_slices(self) -> int:
        """Slices joined by the slow network."""
        return self.config.mesh.num_slices

    @property
    def full_square_attention(self) -> bool:
        """Whether the published kernel computed what the mask hides."""
        return not self.kernel.causal

    @property
    def published_seconds(self) -> float:
        """Of a step."""
        assert self.row.seconds
        return self.row.seconds

    @property
    def model_flops(self) -> float:
        """Model FLOPs of a step per chip, counted our way."""
        config, chips = self.config, self.row.num_chips or 1
        tokens = config.train.global_batch_size * config.data.length / chips
        return tokens * train_flops_per_token(config.model, config.data.length)


class _LackError(Exception):
    """A row needs what we lack, or does not say enough."""


def to_run(row: Row) -> Run | Skipped:
    """Rebuild a published run, or say why it cannot be."""
    try:
        return _run(row)
    except (_LackError, ConfigError) as error:
        return Skipped(row.id, str(error))


def _run(row: Row) -> Run:
    _check_row(row)
    topology = _topology(row)
    kernel = words.read_kernel(row.attention_kernel)
    kept = words.kept_activations(row.remat_policy, row.remat_meaning)
    if kept is None:
        raise _LackError(f"remat policy {row.remat_policy or '(none stated)'} is unknown")
    model = _model(row, kernel, kept)
    mesh = _mesh(row)
    batch, accumulation = _batch(row), row.accumulation or 1
    sharding = math.prod(getattr(mesh, axis) for axis in BATCH_AXES)
    shards = sharding * getattr(mesh, AXES[3])  # of tokens
    # A fraction where the batch does not divide, which `_check_fit` then refuses.
    tokens = batch * (row.length or 0) / accumulation / shards
    config = resolve(
        Config(
            model=model,
            mesh=mesh,
            rules=_rules(mesh),
            data=DataConfig(length=row.length or 0, document_mask=kernel.segments),
            train=TrainConfig(
                global_batch_size=batch,
                accumulation_steps=accumulation,
                # The published tiles are of the vocabulary, ours of tokens: as many logits at once.
                loss_chunk_tokens=math.ceil(tokens / row.num_vocab_tiling)
                if (row.num_vocab_tiling or 1) > 1
                else 0,
                # The frameworks cast weights before they gather them, so that gradients are summed
                # over devices in the compute dtype.
                gradient_reduce_dtype=model.compute_dtype,
            ),
            optimizer=_optimizer(row),
        )
    )
    _check_fit(config, row.num_devices or 1)
    _check_parameters(config.model, row)
    # Of all blocks: an output has a feature of two bytes, or four, per token and width.
    itemsize = 2 if model.compute_dtype == "bfloat16" else 4
    outputs = int(model.num_layers / getattr(mesh, AXES[0]) * tokens * model.width * itemsize)
    return Run(
        row=row,
        config=config,
        topology=topology,
        options=words.compiler_options(row.xla_flags),
        kernel=kernel,
        extra_host_bytes=outputs * accumulation * kept.has_outputs_on_host,
        approximations=tuple(_approximations(row, config)),
    )


def _check_row(row: Row) -> None:
    if row.chip.lower() not in CHIPS:
        raise _LackError(f"chip {row.chip} is no TPU that we know; there are {', '.join(CHIPS)}")
    for name, pattern in _LACKING:
        if re.search(pattern, f"{row.id} {row.model} {row.arch_notes}".lower()):
            raise _LackError(f"we lack {name}")
    if row.quantization.lower() not in ("", "none", "no", "bf16", "bfloat16"):
        raise _LackError(f"we lack quantized training ({row.quantization})")
    if not row.seconds:
        raise _LackError("it publishes no step time")
    needed = ("num_chips", "num_layers", "width", "num_heads", "hidden", "vocab", "length")
    for field in dataclasses.fields(row):
        if field.name in needed and not getattr(row, field.name):
            raise _LackError(f"it does not state {field.metadata.get('column', field.name)}")


def _model(row: Row, kernel: words.Kernel, kept: words.Kept) -> ModelConfig:
    notes = row.arch_notes.lower()
    gated = row.mlp_matmuls != 2
    layernorm = "layernorm" in notes and "rmsnorm" not in notes
    gelu = "gelu" in notes or "geglu" in notes
    rotary_rows = re.search(r"learned positions(?: (\d+))?", notes)
    window = re.search(r"(?<!no )sliding[- ]window[^\d]*(\d+)", notes)
    if re.search(r"(?<!no )sliding[- ]window", notes) and not window:
        raise _LackError("we lack its sliding windows, whose size it does not state")
    names = tuple(n for n in kept.names if gated or not n.endswith("gate"))
    return ModelConfig(
        num_layers=row.num_layers or 0,
        width=row.width or 0,
        num_heads=row.num_heads or 0,
        num_kv_heads=row.num_kv_heads or 0,
        head_dim=row.head_dim or 0,
        hidden=row.hidden or 0,
        vocab_size=row.vocab or 0,
        block="parallel" if re.search(r"(?<!no )(?<!not )\bparallel\b", notes) else "serial",
        norm="layernorm" if layernorm else "rmsnorm",
        mlp="gated" if gated else "plain",
        activation="gelu_tanh" if gelu else "relu" if re.search(r"\brelu\b", notes) else "silu",
        biases=_biases(notes),
        positions="learned" if rotary_rows else "rotary",
        max_length=int(rotary_rows[1] or 0) if rotary_rows else 0,
        qk_norm=bool(re.search(r"(?<!no )\bqk(\(v\))?[- ]?norm", notes)),
        tie_embeddings=row.tied_embeddings.lower() in ("true", "yes", "1"),
        attention=kernel.attention,
        sequence_attention="all_to_all" if kernel.is_balanced else ModelConfig().sequence_attention,
        attention_window=int(window[1]) if window else 0,
        compute_dtype=_dtype(row.compute_dtype or "bfloat16"),
        param_dtype=_dtype(row.param_dtype or "float32"),
        remat=kept.remat,
        remat_names=names or ModelConfig().remat_names,
        scan_unroll=(row.num_layers or 1) if row.scan_layers.lower() in ("no", "false") else 1,
    )


def _biases(notes: str) -> str:
    if re.search(r"(?<!no )\b(qkv[- ]?bias|bias(es)? (on|of|in) (q|qkv))", notes):
        return "qkv"
    return "all" if re.search(r"(?<!no )(?<!without )\bbiases\b", notes) else "none"


def _dtype(text: str) -> str:
    """Return the dtype that a cell begins with.

    Raises:
      _LackError: we have none such.
    """
    for name, short in _DTYPES.items():
        if text.lower().split()[0].strip(",;") in (name, *short):
            return name
    raise _LackError(f"we lack dtype {text}")


def _optimizer(row: Row) -> OptimizerConfig:
    name = row.optimizer.lower()
    rule = next((rule for rule in _UPDATE_RULES if rule in name), "")
    if not rule and "adam" not in name:
        raise _LackError(f"optimizer {row.optimizer or '(none stated)'} is unknown")
    clip = re.search(r"\d+(\.\d+)?", row.grad_clip)
    first = re.search(r"bf(?:loat)?16|fp?(?:loat)?32", row.moment_dtype.lower())
    return OptimizerConfig(
        # Pax's Adam has AdamW's moments and decay.
        name=rule or "adamw",
        moment_dtype="bfloat16" if first and first[0].startswith("b") else "float32",
        clip_norm=float(clip[0]) if clip else 0.0,
    )


def _mesh(row: Row) -> MeshConfig:
    inside, across = words.axis_sizes(row.mesh_ici), words.axis_sizes(row.mesh_dcn)
    slices, devices = row.num_slices or 1, row.num_devices or row.num_chips or 1
    if not inside:
        raise _LackError("it states no mesh")
    for axis, size in (*inside.items(), *across.items()):
        if axis not in AXES and size != 1:
            raise _LackError(f"we lack its mesh axis {axis}={size}")
    for axis, size in across.items():
        if size != 1 and axis not in SLOW_AXES:
            raise _LackError(f"its {axis}={size} spans slices, as only {_LISTED_SLOW_AXES} can")
    if rest := [axis for axis, size in inside.items() if size == -1]:
        inside[rest[0]] = devices // slices // -math.prod(inside.values())
    if math.prod(across.values()) == 1 and math.prod(inside.values()) * slices == devices:
        across = {SLOW_AXES[0]: slices}
    sizes = {axis: inside.get(axis, 1) * across.get(axis, 1) for axis in AXES}
    return MeshConfig(**sizes, num_slices=slices)


def _rules(mesh: MeshConfig) -> RulesConfig:
    """Return MaxText's rules where they are not ours.

    It cuts the width of the residual stream over the tensor axis, and parameters over the axis of
    the length too.
    """
    rules, (_, _, fsdp, length, tensor) = RulesConfig(), AXES
    if getattr(mesh, tensor) > 1:
        rules = dataclasses.replace(rules, residual_length=f"{length},{tensor}")
    if getattr(mesh, length) > 1:
        both = f"{fsdp},{length}"
        rules = dataclasses.replace(rules, embed=both, optimizer_embed=both)
    return rules


def _batch(row: Row) -> int:
    """Return sequences per step; the tokens that were counted, where they are stated, decide."""
    if row.tokens_per_chip:
        return round(row.tokens_per_chip * (row.num_chips or 0) / (row.length or 1))
    if row.global_batch:
        return row.global_batch
    raise _LackError("it states no batch")


def _topology(row: Row) -> str:
    """Return the name of a slice's topology, the first of its size where none is stated."""
    chip, chips = CHIPS[row.chip.lower()], (row.num_chips or 0) // (row.num_slices or 1)
    stated = re.search(r"\d+(x\d+)+", row.topology)
    fitting = [t for t in chip.topologies if math.prod(map(int, t.split("x"))) == chips]
    if stated:
        shape = sorted(map(int, stated[0].split("x")))
        fitting = [t for t in fitting if sorted(map(int, t.split("x"))) == shape]
    if not fitting:
        raise _LackError(f"{chip.name} has no slice {row.topology} of {chips} chips")
    return f"{chip.name}:{fitting[0]}"


def _check_fit(config: Config, num_devices: int) -> None:
    """Raise ConfigError where the mesh fits neither the devices nor the model nor the batch."""
    sizes = axis_sizes(config.mesh, num_devices)
    mesh: Any = AbstractMesh(tuple(sizes.values()), AXES)
    rules = Rules.make(config.rules)
    check_mesh(config.model, rules, mesh)
    rows = config.train.global_batch_size / config.train.accumulation_steps
    check_divides(rules, mesh, {"batch": (rows, "train.global_batch_size")})  # type: ignore[dict-item]
    check_attention(config.model, rules, mesh, config.data.length)


def _check_parameters(model: ModelConfig, row: Row) -> None:
    """Raise _LackError where the published model must have parts that ours has not."""
    ours, theirs = num_parameters(model) / 1e9, row.billion_parameters
    if theirs and abs(ours / theirs - 1) > PARAMETERS_TOLERANCE:
        raise _LackError(f"we lack a part: its {theirs:g}B parameters are {ours:.3g}B as rebuilt")


def _approximations(row: Row, config: Config) -> list[str]:
    notes = row.arch_notes.lower()
    said = [said for pattern, said in _APPROXIMATED if re.search(pattern, notes)]
    if getattr(config.mesh, AXES[3]) > 1 and config.model.sequence_attention == "all_to_all":
        said.append("a part of the length has its heads' pairs in place of a balanced part of all")
    if getattr(config.mesh, AXES[4]) > 1:
        said.append("the tensor axis cuts the residual stream's tokens, not its width")
    return said


def num_parameters(model: ModelConfig) -> int:
    """Return the parameters of a resolved model, without norms and biases."""
    tables = 0 if model.tie_embeddings else model.vocab_size * model.width
    positions = model.max_length * model.width if model.positions == "learned" else 0
    return num_matmul_parameters(model) + tables + positions
