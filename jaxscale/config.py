"""Every knob of jaxscale, stated once: its type, default, unit and limits.

A `Config` is a tree of frozen dataclasses, one per section; each function takes the smallest
section it needs. `resolve.py` fills in and checks a config; `config_source.py` reads config files,
command-line overrides and JSON.
"""

import dataclasses
from typing import Any


class ConfigError(ValueError):
    """A user's mistake, in one line that names the knob, its value and the remedy. Exit code 2."""


class Stopped(Exception):  # noqa: N818, for it is no error
    """A stop request came first; what is done is kept, and the same command goes on. Code 75."""


def knob(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    free: bool = False,
) -> Any:
    """Declare a knob. `free` knobs may change when a run resumes; the others define the run."""
    metadata = {"doc": doc, "choices": choices, "minimum": minimum, "free": free}
    return dataclasses.field(default=default, metadata=metadata)


DTYPES = ("float32", "bfloat16")
# A random key takes the last 32 bits of a seed.
MAX_SEED = 2**32 - 1
# What a block computes, by the names that `model.remat_names` may list.
REMAT_NAMES = (
    "block_input",
    "query",
    "key",
    "value",
    "context",
    "attention_out",
    "gate",
    "up",
)
# Before a name: kept in host memory.
OFFLOAD = "offload:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and arithmetic of the decoder."""

    num_layers: int = knob(8, "transformer blocks", minimum=1)
    width: int = knob(128, "features of the residual stream", minimum=1)
    num_heads: int = knob(8, "query heads", minimum=1)
    num_kv_heads: int = knob(0, "key/value heads; 0 = num_heads", minimum=0)
    head_dim: int = knob(0, "features per head; 0 = width / num_heads", minimum=0)
    hidden: int = knob(384, "features inside the MLP", minimum=1)
    vocab_size: int = knob(384, "rows of the embedding; at least the tokenizer's size", minimum=2)
    max_length: int = knob(0, "rows of learned positions, tokens; 0 = data.length", minimum=0)
    block: str = knob(
        "serial", "attention before or beside the MLP", choices=("serial", "parallel")
    )
    norm: str = knob("rmsnorm", "normalisation", choices=("rmsnorm", "layernorm"))
    norm_epsilon: float = knob(1e-5, "added to the variance before its root", minimum=0)
    mlp: str = knob("gated", "act(gate) * up, or act(up)", choices=("gated", "plain"))
    activation: str = knob(
        "silu", "MLP nonlinearity", choices=("silu", "gelu", "gelu_tanh", "relu")
    )
    biases: str = knob(
        "none", "which projections and norms have biases", choices=("none", "qkv", "all")
    )
    positions: str = knob("rotary", "position encoding", choices=("rotary", "learned"))
    rope_theta: float = knob(10_000.0, "base period of rotary positions", minimum=1)
    rope_scaling: str = knob(
        "none", "stretching of rotary positions", choices=("none", "linear", "llama3")
    )
    rope_factor: float = knob(1.0, "how much longer than rope_original_length", minimum=1)
    rope_original_length: int = knob(8192, "context before stretching, tokens (llama3)", minimum=1)
    qk_norm: bool = knob(False, "normalise queries and keys per head")
    tie_embeddings: bool = knob(False, "the head reads the transposed embedding")
    attention: str = knob(
        "dense", "attention algorithm", choices=("dense", "chunked", "flash"), free=True
    )
    attention_window: int = knob(
        0, "tokens that a token sees, itself among them; 0 = all before it", minimum=0
    )
    sequence_attention: str = knob(
        "all_gather",
        "how attention crosses the sequence axis",
        choices=("all_gather", "all_to_all", "ring"),
        free=True,
    )
    compute_dtype: str = knob(
        "bfloat16",
        "dtype of activations and gathered weights",
        choices=(*DTYPES, "float16"),
    )
    param_dtype: str = knob(
        "float32",
        "dtype of stored parameters; bfloat16 loses updates below 1/256 of a weight",
        choices=DTYPES,
    )
    remat: str = knob(
        "full",
        "activations kept for the backward pass: all, block inputs, matmul outputs, or remat_names",
        choices=("none", "full", "dots", "names"),
        free=True,
    )
    remat_names: tuple[str, ...] = knob(
        ("query", "key", "value", "context", "attention_out", "gate", "up"),
        "named activations that remat=names keeps; offload:NAME keeps one in host memory",
        free=True,
    )
    remat_every: int = knob(
        1,
        "one block in so many recomputes, as remat says; the others keep everything",
        minimum=1,
        free=True,
    )
    scan_unroll: int = knob(1, "blocks per iteration of the layer scan", minimum=1, free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes, outermost first; 1 is off, and one axis may be -1 (what is left)."""

    stage: int = knob(1, "pipeline stages", minimum=-1)
    data: int = knob(-1, "replicas of the parameters", minimum=-1)
    fsdp: int = knob(1, "shards of parameters, optimizer and batch", minimum=-1)
    sequence: int = knob(1, "shards of the sequence length", minimum=-1)
    tensor: int = knob(1, "shards of heads, hidden and vocabulary", minimum=-1)
    num_slices: int = knob(
        1, "slices joined by the slow network; data or stage spans them", minimum=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """Mesh axes of each logical axis: names joined by commas, or None for not sharded."""

    batch: str | None = knob("data,fsdp", "rows of a batch")
    length: str | None = knob("sequence", "tokens of a sequence")
    residual_length: str | None = knob("sequence", "tokens, between the blocks' matmuls")
    width: str | None = knob(None, "features of the residual stream (activations)")
    heads: str | None = knob("tensor", "query heads")
    kv_heads: str | None = knob("tensor", "key/value heads")
    hidden: str | None = knob("tensor", "features inside the MLP")
    vocab: str | None = knob("tensor,stage", "vocabulary of embedding and head")
    embed: str | None = knob("fsdp", "width dimension of parameters")
    optimizer_embed: str | None = knob("fsdp", "width dimension of optimizer state")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from and how batches are cut from them."""

    source: str = knob(
        "python_stdlib", "python_stdlib, synthetic, files:GLOB, tfds:NAME, or a mixture"
    )
    tokenizer: str = knob("bytes", "bytes, bpe:SIZE, or the path of a tokenizer.json")
    length: int = knob(1024, "tokens per sequence", minimum=1)
    window_stride: int = knob(
        0, "tokens from one window's start to the next; 0 = data.length", minimum=0
    )
    validation_fraction: float = knob(0.05, "share of documents held apart", minimum=0)
    document_mask: bool = knob(True, "tokens attend only within their document")
    cache_dir: str = knob("", "folder of token caches; empty = ~/.cache/jaxscale/tokens", free=True)
    local_cache_dir: str = knob(
        "", "folder of this host that token caches are copied into; empty = none", free=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The step and the loop."""

    steps: int = knob(
        1000, "optimizer steps of the whole run (may grow on resume)", minimum=0, free=True
    )
    global_batch_size: int = knob(
        32, "sequences per step, over all devices and accumulation steps", minimum=1
    )
    accumulation_steps: int = knob(
        1,
        "microbatches whose gradients are summed; with mesh.stage > 1 they fill the pipeline",
        minimum=1,
        free=True,
    )
    pipeline_rounds: int = knob(
        1, "times that a microbatch goes round the stages (circular schedule)", minimum=1, free=True
    )
    seed: int = knob(0, "seed of initialisation and batch order", minimum=0)
    loss_chunk_tokens: int = knob(
        -1,
        "tokens per device whose logits exist at once; 0 = all; -1 = 2048 if vocab_size >= 128000",
        minimum=-1,
        free=True,
    )
    offload: str = knob(
        "none",
        "what lies in host memory between uses: nothing, optimizer state, or parameters too",
        choices=("none", "optimizer", "all"),
        free=True,
    )
    gradient_reduce_dtype: str = knob(
        "float32", "dtype in which devices sum the gradients of matrices", choices=DTYPES
    )
    loss_scale: float = knob(
        0.0, "factor of the loss in float16's backward pass; 0 = dynamic, from 32768", minimum=0
    )
    log_every: int = knob(10, "steps between metrics", minimum=1, free=True)
    eval_every: int = knob(
        0, "steps between evaluations; 0 = only at the end", minimum=0, free=True
    )
    eval_batches: int = knob(
        16, "batches per evaluation; 0 = the whole validation set", minimum=0, free=True
    )
    sample_every: int = knob(0, "steps between text samples; 0 = never", minimum=0, free=True)
    sample_prompt: str = knob("def ", "prompt of the text samples", free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule and its schedule."""

    name: str = knob("adamw", "update rule", choices=("adamw", "lion", "adafactor", "muon", "sgd"))
    learning_rate: float = knob(3e-4, "peak learning rate", minimum=0)
    schedule: str = knob(
        "cosine", "decay after warm-up", choices=("constant", "cosine", "linear", "wsd")
    )
    schedule_steps: int = knob(
        0, "steps the schedule spans; 0 = train.steps of the first run", minimum=0
    )
    warmup_steps: int = knob(100, "steps of linear warm-up", minimum=0)
    decay_fraction: float = knob(0.2, "wsd: last share of the schedule that decays", minimum=0)
    final_fraction: float = knob(0.1, "learning rate at the end, as a share of the peak", minimum=0)
    beta1: float = knob(0.9, "decay of the first moment, or momentum", minimum=0)
    beta2: float = knob(0.95, "decay of the second moment", minimum=0)
    epsilon: float = knob(1e-8, "added to the root of the second moment", minimum=0)
    moment_dtype: str = knob(
        "float32", "dtype of stored first moments; second ones are float32", choices=DTYPES
    )
    weight_decay: float = knob(0.1, "decoupled decay of matrices (not norms, biases)", minimum=0)
    clip_norm: float = knob(1.0, "largest global gradient norm; 0 = off", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, what to keep, where to start from."""

    every_steps: int = knob(
        500, "steps between saves; the last step is always saved", minimum=1, free=True
    )
    keep_last: int = knob(3, "newest checkpoints kept", minimum=1, free=True)
    keep_every: int = knob(
        0, "also keep each multiple of so many steps; 0 = none", minimum=0, free=True
    )
    verify: str = knob(
        "auto",
        "what is hashed at a save and checked before a read; auto = full up to 1 GiB, then sizes",
        choices=("auto", "sizes", "full"),
        free=True,
    )
    restore_from: str = knob("", "workdir to continue from where this one is empty", free=True)
    init_from: str = knob("", "workdir whose parameters alone are taken at step 0", free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """The machine around the step."""

    compile_cache_dir: str = knob(
        "", "folder of compiled programs; empty = ~/.cache/jaxscale/xla, none = off"
    )
    start_timeout_seconds: int = knob(120, "wait for all processes at start", minimum=1)
    profile_steps: tuple[int, ...] = knob((), "first and last step of an xprof trace")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The whole of a run."""

    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    rules: RulesConfig = RulesConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = RuntimeConfig()


# Sections whose every knob may change when a run resumes.
FREE_SECTIONS = ("mesh", "rules", "runtime")


def is_free(section: str, name: str) -> bool:
    """Tell whether a knob may change when a run resumes."""
    if section in FREE_SECTIONS:
        return True
    fields = {f.name: f for f in dataclasses.fields(getattr(Config(), section))}
    return bool(fields[name].metadata["free"])
