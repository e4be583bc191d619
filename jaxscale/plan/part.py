"""One device's part of a training step: what is left of batch, model and state after the cuts.

The sizes that bytes and seconds are both computed from, at the price of some divisions, so that
thousands of candidates take seconds. Parameters are counted in the tiles that a TPU stores.
"""

import dataclasses
import functools
import math

import jax

from jaxscale.config import OFFLOAD, REMAT_NAMES, ModelConfig, OptimizerConfig, RulesConfig
from jaxscale.model.decoder import define
from jaxscale.muon import is_hidden_matrix
from jaxscale.parallel.mesh import STAGE_AXIS, AnyMesh
from jaxscale.parallel.sharding import Axis, Rules
from jaxscale.plan.space import Candidate

FLOAT32 = 4
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The residual stream as a block takes it up, among the names of remat.
BLOCK_INPUT = "block_input"
# A TPU stores arrays in tiles of 8 x 128 elements.
LANES, SUBLANES = 128, 8


@functools.lru_cache(maxsize=4096)
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
      whole_matrix: of the largest of them.
    """

    params: int
    optimizer: int
    blocks: int
    others: int
    whole_block: int
    whole_matrix: int


@functools.lru_cache(maxsize=64)
def _leaves(model: ModelConfig) -> tuple[tuple[tuple[int, ...], tuple[Axis, ...]], ...]:
    """Return shape and logical axes of every parameter; they depend on no rule."""
    definition = define(model, Rules.make(RulesConfig()))
    shapes = jax.tree.leaves(definition.shapes)
    axes = jax.tree.leaves(definition.axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return tuple((shape.shape, names) for shape, names in zip(shapes, axes, strict=True))


@functools.lru_cache(maxsize=64)
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
        params += elements * ITEMSIZES[model.param_dtype]
        own = tuple("optimizer_embed" if name == "embed" else name for name in names)
        state += _optimizer_bytes(optimizer, part(shape, own), names)
        if names[0] == "layers":
            blocks += elements
            kept = tuple(None if name == "embed" else name for name in names)
            whole.append(tile_bytes(part(shape[1:], kept[1:]), 1))
        else:
            others += elements
    return State(params, state, blocks, others, sum(whole), max(whole))


def _optimizer_bytes(
    config: OptimizerConfig, shape: tuple[int, ...], names: tuple[Axis, ...]
) -> int:
    """Return the bytes of the optimizer's state of one parameter, by its part on a device."""
    elements = tile_bytes(shape, 1)
    first = elements * ITEMSIZES[config.moment_dtype]
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


@functools.lru_cache(maxsize=4096)
def num_shards(rules: Rules, mesh: AnyMesh) -> dict[str, int]:
    """Return in how many parts each logical axis is cut."""
    return {name: rules.num_shards(name, mesh) for name, _ in rules.table}


@functools.lru_cache(maxsize=1)
def device_part(candidate: Candidate) -> "DevicePart":
    """Return one device's part of a candidate's step; bytes and seconds are asked for in turn."""
    return DevicePart(candidate)


class DevicePart:
    """One device's part of a step: tokens, dims and parameters after the mesh has cut them."""

    def __init__(self, candidate: Candidate) -> None:
        config, rules, mesh = candidate.config, candidate.rules, candidate.mesh
        model = config.model

        shards = num_shards(rules, mesh)

        def cut(name: str, size: int) -> int:
            return -(-size // shards[name])

        self.config, self.model = config, model
        self.state = device_state(shape_of_model(model), config.optimizer, rules, mesh)
        self.itemsize = ITEMSIZES[model.compute_dtype]
        self.stages, self.parts = mesh.shape[STAGE_AXIS], config.train.accumulation_steps
        self.length, self.length_shards = config.data.length, shards["length"]
        self.rows = cut("batch", config.train.global_batch_size) // self.parts
        self.tokens = self.rows * cut("length", self.length)
        self.residual_tokens = self.rows * cut("residual_length", self.length)
        # A pipeline looks up and scores the whole batch at once.
        self.loss_tokens = self.tokens * (self.parts if self.stages > 1 else 1)
        whole = self.length_shards > 1 and model.sequence_attention != "ring"
        self.key_tokens = self.rows * self.length if whole else self.tokens
        self.width, self.hidden = cut("width", model.width), cut("hidden", model.hidden)
        self.heads, self.kv_heads = (
            cut("heads", model.num_heads),
            cut("kv_heads", model.num_kv_heads),
        )
        # A head's features lie along the lanes.
        lanes = _up(model.head_dim, LANES)
        self.queries, self.pairs = self.heads * lanes, self.kv_heads * lanes
        self.vocab, self.layers = cut("vocab", model.vocab_size), cut("layers", model.num_layers)
        self.table = self.vocab * model.width
        self.is_gathered = shards["embed"] > 1

    @property
    def ticks(self) -> int:
        """How often the device runs its layers: once a microbatch, and in a pipeline's bubble."""
        if self.stages == 1:
            return self.parts
        return self.parts * self.config.train.pipeline_rounds + self.stages - 1

    @property
    def remat_layers(self) -> int:
        """Of the device's layers, those that recompute."""
        every = self.model.remat_every if self.model.remat != "none" else 1
        return -(-self.layers // every)

    @functools.cached_property
    def kept_names(self) -> frozenset[str]:
        """The named activations that a recomputing layer keeps, "offload:" before some of them.

        Its input it keeps in any case.
        """
        model = self.model
        if model.remat == "names":
            kept = frozenset(model.remat_names)
            return kept if OFFLOAD + BLOCK_INPUT in kept else kept | {BLOCK_INPUT}
        every = frozenset(REMAT_NAMES)
        kinds = {"full": {BLOCK_INPUT}, "dots": every - {"context"}, "none": every}
        return frozenset(kinds[model.remat])

    @property
    def chunk(self) -> int:
        """Tokens whose logits exist at once."""
        return min(self.config.train.loss_chunk_tokens or self.loss_tokens, self.loss_tokens)

    @property
    def is_chunked(self) -> bool:
        """Whether the loss is computed in parts."""
        return self.chunk < self.loss_tokens

    def name_bytes(self) -> dict[str, int]:
        """Return the bytes of each activation that `model.remat_names` may list, of one layer."""
        t, c = self.tokens, self.itemsize
        pairs = t * self.pairs * c
        return {
            BLOCK_INPUT: self.residual_tokens * self.width * c,
            "query": t * self.queries * c,
            "key": pairs,
            "value": pairs,
            "context": t * self.queries * c + t * self.heads * FLOAT32,
            "attention_out": self.residual_tokens * self.width * c,
            "gate": t * self.hidden * c if self.model.mlp == "gated" else 0,
            "up": t * self.hidden * c,
        }

    @functools.cached_property
    def kept_bytes(self) -> float:
        """Return what the forward pass keeps of all layers: in a pipeline, of every tick."""
        model = self.model
        sizes = self.name_bytes()
        own = sum(sizes[name] for name in self.kept_names if not name.startswith(OFFLOAD))
        recomputing = self._everything() if model.remat == "none" else own
        keeping = (self.layers - self.remat_layers) * self._everything()
        blocks = self.remat_layers * recomputing + keeping
        if self.stages == 1:
            return blocks
        # What enters and what has left waits in queues.
        queues = 2 * self.parts * sizes[BLOCK_INPUT]
        return blocks * self.ticks / self.config.train.pipeline_rounds + queues

    def offloaded_bytes(self) -> float:
        """Return the bytes of activations that go to host memory and come back, of all layers."""
        sizes = self.name_bytes()
        names = [name for name in self.kept_names if name.startswith(OFFLOAD)]
        own = sum(sizes[name.removeprefix(OFFLOAD)] for name in names)
        return own * self.remat_layers * self.ticks

    def _everything(self) -> float:
        """Return the bytes that a layer keeps which recomputes nothing.

        Normalised and float32 copies of the stream, what the kernel reads and writes, and what the
        nonlinearity's derivative needs.
        """
        c, t = self.itemsize, self.tokens
        wide, narrow = (1, 3) if self.model.mlp == "gated" else (4, 2)
        return (
            self.residual_tokens * self.width * (5 * FLOAT32 + 3 * c)
            + t * self.heads * (self.model.head_dim * c + FLOAT32)
            + 2 * t * self.queries * c
            + 2 * self.key_tokens * self.pairs * c
            + t * self.hidden * (wide * FLOAT32 + narrow * c)
        )
