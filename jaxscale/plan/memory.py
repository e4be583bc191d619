"""Bytes that a training step needs of each device, from shapes and rules alone.

One idea: a step's peak is in one of three phases, and each has its own list of what must be alive.
In the backward pass of a block: what the forward pass kept, the gradients so far, one block's
working set, and what the loss still owes its head. At the loss: all that is kept, and the logits.
At the end: all gradients, those of the embedding and the head whole, before they are summed and
cut. The lists were read off the TPU compiler's buffers; `compile` gives its own figure.
"""

# t tokens of a device, D width, F hidden, N heads, K kv heads, H head dim, V vocab

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxscale.config import OFFLOAD, ModelConfig, OptimizerConfig, RulesConfig
from jaxscale.model.decoder import define
from jaxscale.muon import is_hidden_matrix
from jaxscale.parallel.mesh import STAGE_AXIS, AnyMesh
from jaxscale.parallel.sharding import Axis, Rules
from jaxscale.plan.space import Candidate
from jaxscale.train.state import BATCH_DTYPES

FLOAT32 = 4
# A TPU stores arrays in tiles of 8 x 128 elements.
LANES, SUBLANES = 128, 8
# The compiler finds no place for buffers without holes between them, and its figure counts these
# holes twice: so much more than what is alive at the peak.
HOLES = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """Device memory at the peak of a step, in bytes per device.

    Attributes:
      params: the parameters as they are stored.
      optimizer: the optimizer's state.
      batch: tokens, targets, segments and weights.
      activations: kept by the forward pass for the backward pass.
      gradients: of all parameters, and their sums over microbatches.
      logits: of the tokens whose loss is computed together, and what their head needs.
      workspace: of one block forward and backward, with its gathered weights.
      holes: between the buffers, as the compiler counts them.
    """

    params: float
    optimizer: float
    batch: float
    activations: float = 0.0
    gradients: float = 0.0
    logits: float = 0.0
    workspace: float = 0.0

    @property
    def temporaries(self) -> float:
        """What is alive at the peak beside the state and the batch."""
        return self.activations + self.gradients + self.logits + self.workspace

    @property
    def holes(self) -> float:
        """What the compiler counts for holes between buffers."""
        return HOLES * self.temporaries

    @property
    def live(self) -> float:
        """All without the holes."""
        return self.params + self.optimizer + self.batch + self.temporaries

    @property
    def total(self) -> float:
        """The bytes of the step, as the compiler adds them up."""
        return self.live + self.holes


def closed_bytes(candidate: Candidate) -> Bytes:
    """Return the bytes of a candidate's training step on each device, on a TPU."""
    step = _Step(candidate)
    return max((step.backward(), step.loss(), step.end()), key=lambda phase: phase.total)


def tile_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Return the bytes of an array in tiles of 8 x 128, in the order of dims that wastes least."""
    size = math.prod(shape)
    best = min(
        (
            size // (minor * second) * _up(minor, LANES) * _up(second, min(SUBLANES, second))
            for i, minor in enumerate(shape)
            for j, second in enumerate(shape or (1,))
            if i != j
        ),
        default=_up(size, LANES),
    )
    return best * itemsize


def _up(size: int, multiple: int) -> int:
    return -(-size // max(multiple, 1)) * max(multiple, 1)


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes of one device's part of the parameters, and of what is shaped like them.

    Attributes:
      params: as stored.
      optimizer: of the optimizer's state.
      blocks: elements of the blocks' parameters, in tiles.
      others: elements of the others.
      whole_block: elements of one block's parameters, whole along FSDP.
      whole_matrices: of the two largest of them.
    """

    params: int
    optimizer: int
    blocks: int
    others: int
    whole_block: int
    whole_matrices: int


@functools.lru_cache(maxsize=64)
def _leaves(model: ModelConfig) -> tuple[tuple[tuple[int, ...], tuple[Axis, ...]], ...]:
    """Return shape and logical axes of every parameter; they depend on no rule."""
    definition = define(model, Rules.make(RulesConfig()))
    shapes = jax.tree.leaves(definition.shapes)
    axes = jax.tree.leaves(definition.axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return tuple((shape.shape, names) for shape, names in zip(shapes, axes, strict=True))


def shape_of_model(model: ModelConfig) -> ModelConfig:
    """Return the model section without the knobs that change no parameter."""
    return dataclasses.replace(model, remat="full", remat_names=(), remat_every=1, scan_unroll=1)


@functools.lru_cache(maxsize=4096)
def device_state(
    model: ModelConfig, optimizer: OptimizerConfig, rules: Rules, mesh: AnyMesh
) -> State:
    """Return the state's bytes on each device.

    Args:
      model: from `shape_of_model`, so that candidates share the answer.
      optimizer: the optimizer section.
      rules: the sharding rules.
      mesh: the sizes of its axes.
    """

    def part(shape: tuple[int, ...], names: tuple[Axis, ...]) -> tuple[int, ...]:
        return tuple(
            -(-size // rules.num_shards(name, mesh))
            for size, name in zip(shape, names, strict=True)
        )

    params = state = blocks = others = 0
    whole = []
    for shape, names in _leaves(model):
        elements = tile_bytes(part(shape, names), 1)
        params += elements * jnp.dtype(model.param_dtype).itemsize
        own = tuple("optimizer_embed" if name == "embed" else name for name in names)
        state += _optimizer_bytes(optimizer, part(shape, own), names)
        if names[0] == "layers":
            blocks += elements
            kept = tuple(None if name == "embed" else name for name in names)
            whole.append(tile_bytes(part(shape[1:], kept[1:]), 1))
        else:
            others += elements
    return State(params, state, blocks, others, sum(whole), sum(sorted(whole)[-2:]))


def _optimizer_bytes(
    config: OptimizerConfig, shape: tuple[int, ...], names: tuple[Axis, ...]
) -> int:
    """Return the bytes of the optimizer's state of one parameter, by its part on a device."""
    elements = tile_bytes(shape, 1)
    first = elements * jnp.dtype(config.moment_dtype).itemsize
    if config.name in ("lion", "sgd") or (config.name == "muon" and is_hidden_matrix(names)):
        return first
    if config.name in ("adamw", "muon"):
        return first + elements * FLOAT32
    if "embed" not in names:
        return elements * FLOAT32
    rows = tuple(size for size, name in zip(shape, names, strict=True) if name != "embed")
    columns = tuple(
        size for size, name in zip(shape, names, strict=True) if name in ("layers", "embed")
    )
    return tile_bytes(rows, FLOAT32) + tile_bytes(columns, FLOAT32)


class _Step:
    """The phases of a candidate's step, each as the bytes that are alive in it."""

    def __init__(self, candidate: Candidate) -> None:
        config, rules, mesh = candidate.config, candidate.rules, candidate.mesh
        model, train = config.model, config.train
        self.config, self.model = config, model

        def cut(name: str, size: int) -> int:
            return -(-size // rules.num_shards(name, mesh))

        self.state = device_state(shape_of_model(model), config.optimizer, rules, mesh)
        self.c = jnp.dtype(model.compute_dtype).itemsize
        self.stages = mesh.shape[STAGE_AXIS]
        self.parts = train.accumulation_steps
        rows, length = cut("batch", train.global_batch_size), cut("length", config.data.length)
        self.rows = rows // self.parts
        self.t = self.rows * length
        self.t_residual = self.rows * cut("residual_length", config.data.length)
        # A pipeline looks up and scores the whole batch at once.
        self.t_loss = rows * length if self.stages > 1 else self.t
        self.keys = self.rows * self._num_keys(length)
        self.D, self.F = cut("width", model.width), cut("hidden", model.hidden)
        # A head's features lie along the lanes.
        lanes = _up(model.head_dim, LANES)
        self.queries = cut("heads", model.num_heads) * lanes
        self.pairs = cut("kv_heads", model.num_kv_heads) * lanes
        self.num_heads = cut("heads", model.num_heads)
        self.V = cut("vocab", model.vocab_size)
        self.table = self.V * model.width
        self.layers = cut("layers", model.num_layers)
        self.is_gathered = rules.num_shards("embed", mesh) > 1

    def _num_keys(self, length: int) -> int:
        """Return how many keys of a sequence a device attends to at a time."""
        is_cut = length < self.config.data.length
        return self.config.data.length if is_cut and self._gathers_keys() else length

    def _gathers_keys(self) -> bool:
        return self.model.sequence_attention != "ring"

    def _fixed(self) -> dict[str, float]:
        """Return what lies there throughout: the state and the batch."""
        offload = self.config.train.offload
        rows = self.rows * self.parts
        batch = len(BATCH_DTYPES) * tile_bytes((rows, self.t // self.rows), FLOAT32)
        return {
            "params": self.state.params,
            "optimizer": 0 if offload != "none" else self.state.optimizer,
            "batch": batch,
        }

    def _copies(self) -> float:
        """Return the blocks' parameters in the compute dtype, which the compiler makes once."""
        same = self.model.param_dtype == self.model.compute_dtype
        return 0 if same else self.state.blocks * self.c

    def _kept_by_block(self) -> tuple[float, float]:
        """Return the bytes that a block keeps on the device: (recomputing, keeping all)."""
        model, c, t = self.model, self.c, self.t
        carry = self.t_residual * self.D * c
        scores = t * self.num_heads * FLOAT32
        name_bytes = {
            "query": t * self.queries * c,
            "key": t * self.pairs * c,
            "value": t * self.pairs * c,
            "context": t * self.queries * c + scores,
            "attention_out": self.t_residual * self.D * c,
            "gate": t * self.F * c if model.mlp == "gated" else 0,
            "up": t * self.F * c,
        }
        # Normalised and float32 copies of the stream, what the kernel reads and writes, and what
        # the nonlinearity's derivative needs.
        wide, narrow = (1, 3) if model.mlp == "gated" else (4, 2)
        everything = (
            self.t_residual * self.D * (5 * FLOAT32 + 3 * c)
            + t * model.head_dim * self.num_heads * c
            + 2 * t * self.queries * c
            + 2 * self.keys * self.pairs * c
            + scores
            + t * self.F * (wide * FLOAT32 + narrow * c)
        )
        if model.remat == "none":
            return everything, everything
        if model.remat == "full":
            return carry, everything
        kept = set(name_bytes) - {"context"} if model.remat == "dots" else set(model.remat_names)
        own = sum(name_bytes[name] for name in kept if not name.startswith(OFFLOAD))
        return carry + own, everything

    def _kept(self) -> float:
        """Return what the forward pass keeps of all blocks: in a pipeline, of every tick."""
        recomputing, keeping = self._kept_by_block()
        every = self.model.remat_every if self.model.remat != "none" else 1
        num_remat = -(-self.layers // every)
        blocks = num_remat * recomputing + (self.layers - num_remat) * keeping
        if self.stages == 1:
            return blocks
        rounds = self.config.train.pipeline_rounds
        ticks = self.parts * rounds + self.stages - 1
        queues = 2 * self.parts * self.t_residual * self.D * self.c
        return blocks * ticks / rounds + queues

    def _block(self) -> float:
        """Return the working set of one block's backward pass."""
        model, c, t = self.model, self.c, self.t
        weights = self.state.whole_block * c + self.state.whole_matrices * FLOAT32
        inner = 5 if model.mlp == "gated" else 2
        activations = t * c * (4 * self.D + 4 * self.queries + inner * self.F)
        pairs = 2 * self.keys * self.pairs * c
        scores = 0
        if model.attention == "dense":
            scores = 3 * t * (self.keys // self.rows) * self.num_heads * FLOAT32
        return weights + activations + pairs + scores

    @property
    def _chunk(self) -> int:
        """Tokens whose logits exist at once."""
        return min(self.config.train.loss_chunk_tokens or self.t_loss, self.t_loss)

    @property
    def _is_chunked(self) -> bool:
        return self._chunk < self.t_loss

    def _sums(self) -> float:
        """Return the sums of gradients over microbatches that are worked off one by one."""
        is_summed = self.parts > 1 and self.stages == 1
        return (self.state.blocks + self.state.others) * FLOAT32 if is_summed else 0.0

    def loss(self) -> Bytes:
        """Return the bytes where the logits are computed: in chunks, their head's sum is there."""
        head = self.table * self.c
        logits = self._chunk * self.V * FLOAT32
        if self._is_chunked:
            grown = self.table * FLOAT32
            head += grown + max(grown - logits, 0)
        return Bytes(
            **self._fixed(),
            activations=self._kept(),
            gradients=self._sums(),
            logits=logits + head,
            workspace=self._copies() + self.t_loss * self.D * (FLOAT32 + self.c),
        )

    def backward(self) -> Bytes:
        """Return the bytes in the first blocks' backward pass.

        The head's gradient is the last thing that the compiler computes, and its logits wait.
        """
        owed = self.table if self._is_chunked else self._chunk * self.V
        return Bytes(
            **self._fixed(),
            activations=self._kept(),
            gradients=self.state.blocks * FLOAT32 + self._sums(),
            logits=owed * FLOAT32 + (self.table * self.c if self._is_chunked else 0),
            workspace=self._copies() + self._block(),
        )

    def end(self) -> Bytes:
        """Return the bytes where the gradients of embedding and head are summed."""
        owed = self.table if self._is_chunked else self._chunk * self.V
        fetched = self.config.train.offload != "none"
        return Bytes(
            **self._fixed(),
            gradients=self.state.blocks * FLOAT32 + self._sums() + 2 * self.table * FLOAT32,
            logits=owed * FLOAT32 + self.table * self.c,
            workspace=self.state.optimizer if fetched else 0.0,
        )
