"""The decoder: embedding, blocks run by one scan, final norm, head; and its definition as data.

`define` gives shapes, logical axes and the initialiser without making a weight. Parameters travel
as a plain nested dict; `Definition.bind` turns them into a callable Decoder inside a jitted
function.
"""

# B batch, L query length, D width, V vocab

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from jaxscale.config import ModelConfig
from jaxscale.model.attention.dense import Span
from jaxscale.model.cache import Cache
from jaxscale.model.contract import contract
from jaxscale.model.layers import MLP, Attention, Norm, gathered, looked_up, matrix
from jaxscale.model.remat import run_blocks
from jaxscale.parallel.host_memory import to_device
from jaxscale.parallel.mesh import AnyMesh
from jaxscale.parallel.pipeline import pipelined, stage_order
from jaxscale.parallel.sharding import Axis, Rules, check_divides, map_axes

Params = dict[str, Any]


class Block(nnx.Module):
    """Attention and MLP around the residual stream, one after the other or side by side."""

    def __init__(self, model: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        self.model, self.rules = model, rules
        self.attention_norm = Norm(model, "width", model.width)
        self.attention = Attention(model, rules, rngs)
        serial = model.block == "serial"
        self.mlp_norm = Norm(model, "width", model.width) if serial else None
        self.mlp = MLP(model, rules, rngs)

    def __call__(
        self, x_BLD: jax.Array, span: Span, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Return the residual stream after this block, and the layer's cache."""
        # Kept whatever remat says; by this name it can lie in host memory.
        x_BLD = checkpoint_name(x_BLD, "block_input")
        h_BLD = self._enter(self.attention_norm(x_BLD))
        attended_BLD, cache = self.attention(h_BLD, span, cache)
        if self.mlp_norm is None:
            return x_BLD + attended_BLD + self.mlp(h_BLD), cache
        x_BLD = x_BLD + attended_BLD
        return x_BLD + self.mlp(self._enter(self.mlp_norm(x_BLD))), cache

    def _enter(self, h_BLD: jax.Array) -> jax.Array:
        """Move from the residual region's placement to that of the matmuls."""
        return self.rules.place(h_BLD, "batch", "length", "width")


class Decoder(nnx.Module):
    """A decoder-only transformer; its blocks' parameters are stacked on a leading `layers` axis."""

    def __init__(self, model: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        self.model, self.rules = model, rules
        D, V = model.width, model.vocab_size
        self.embedding = matrix(rngs, model, {"vocab": V, "embed": D}, fan_in=D)
        learned, tied = model.positions == "learned", model.tie_embeddings
        rows: dict[Axis, int] = {None: model.max_length, "embed": D}
        self.positions = matrix(rngs, model, rows, fan_in=D) if learned else None
        keys = jax.random.split(rngs.params(), model.num_layers)
        self.blocks = nnx.data(jax.vmap(self._init_block)(keys))
        self.norm = Norm(model, "width", D)
        self.head = None if tied else matrix(rngs, model, {"embed": D, "vocab": V}, fan_in=D)

    def _init_block(self, key: jax.Array) -> Any:
        return nnx.split(Block(self.model, self.rules, nnx.Rngs(params=key)))[1]

    def __call__(
        self,
        tokens_BL: jax.Array,
        span: Span,
        cache: Cache | None = None,
        *,
        num_microbatches: int = 1,
    ) -> tuple[jax.Array, Cache | None]:
        """Return the normalised last hidden states, (B, L, D), and the cache with these tokens.

        Args:
          tokens_BL: int32 ids.
          span: where they stand.
          cache: keys and values of earlier tokens.
          num_microbatches: parts in which the batch passes through the stages, if there are any.
        """
        model, rules = self.model, self.rules
        dtype = jnp.dtype(model.compute_dtype)
        with jax.named_scope("embedding"):
            x_BLD = looked_up(self.embedding, tokens_BL, rules, dtype)
            if self.positions is not None:
                x_BLD = x_BLD + looked_up(self.positions, span.positions_BL, rules, dtype)
        x_BLD = rules.place(x_BLD, "batch", "residual_length", "width")
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: Block(model, rules, nnx.Rngs(0))))

        def run_block(span: Span, x_BLD: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
            weights, layer_cache = layer
            return nnx.merge(graphdef, weights)(x_BLD, span, layer_cache)

        def run_stage(blocks: Any, x_BLD: jax.Array, span: Span) -> jax.Array:
            run = lambda x_BLD, weights: run_block(span, x_BLD, (weights, None))[0]  # noqa: E731
            return run_blocks(run, x_BLD, blocks, model, rules)

        if cache is not None:
            layers = (self._on_every_stage(), cache)
            run_cached = functools.partial(run_block, span)
            x_BLD, cache = jax.lax.scan(run_cached, x_BLD, layers, unroll=model.scan_unroll)
        elif rules.mesh_axes("layers"):
            x_BLD = pipelined(
                run_stage, self.blocks, x_BLD, span, num_microbatches=num_microbatches, rules=rules
            )
        else:
            x_BLD = run_stage(self.blocks, x_BLD, span)
        return self.norm(x_BLD), cache

    def _on_every_stage(self) -> Any:
        """Return the blocks' parameters whole along the stages, as generating text needs them."""
        if not self.rules.mesh_axes("layers"):
            return self.blocks
        stages = self.rules.num_shards("layers")
        order = stage_order(self.model.num_layers, stages, self.rules.pipeline_rounds)
        return jax.tree.map(lambda stack: _whole(stack)[np.argsort(order)], self.blocks)

    def head_weights(self) -> jax.Array:
        """Return the head's weights, whole along FSDP: (D, V), or (V, D) if tied."""
        param = self.embedding if self.head is None else self.head
        return gathered(param, self.rules, jnp.dtype(self.model.compute_dtype))

    def logits(self, x_BLD: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """Return the float32 logits, (B, L, V), of normalised hidden states.

        Args:
          x_BLD: normalised hidden states.
          weights: from `head_weights`, where they are used several times.
        """
        rules = self.rules
        return contract(
            "bld,vd->blv" if self.head is None else "bld,dv->blv",
            rules.place(x_BLD, "batch", "length", "width"),
            self.head_weights() if weights is None else weights,
            spec=rules.spec("batch", "length", "vocab"),
            dtype=jnp.float32,
        )


def _whole(stack: jax.Array) -> jax.Array:
    _, *rest = jax.typeof(stack).sharding.spec
    return jax.reshard(stack, PartitionSpec(None, *rest))


@dataclasses.dataclass(frozen=True)
class Definition:
    """A decoder without its weights.

    Attributes:
      model: the resolved model section.
      rules: the sharding rules its code was built with.
      graphdef: the structure that `nnx.merge` needs.
      shapes: nested dict of ShapeDtypeStruct, one per parameter.
      axes: nested dict of tuples of logical axes, one per parameter.
    """

    model: ModelConfig
    rules: Rules
    graphdef: Any
    shapes: Params
    axes: Params

    def init(self, key: jax.Array) -> Params:
        """Draw the parameters; the same values on every mesh."""
        decoder = Decoder(self.model, self.rules, nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.split(decoder)[1])

    def bind(self, params: Params) -> Decoder:
        """Return a Decoder that computes with these parameters; for use inside jit.

        Those in host memory are fetched.
        """
        return nnx.merge(self.graphdef, to_device(params))

    def shardings(self, mesh: Mesh) -> Params:
        """Return the NamedSharding of every parameter on `mesh`."""
        return map_axes(lambda axes: self.rules.sharding(mesh, *axes), self.axes)

    def abstract(self, mesh: Mesh) -> Params:
        """Return the parameters as ShapeDtypeStructs with their shardings on `mesh`."""
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            self.shapes,
            self.shardings(mesh),
        )

    def with_rules(self, rules: Rules) -> "Definition":
        """Return the same decoder under other sharding rules, such as those for a small batch."""
        return define(self.model, rules)


def define(model: ModelConfig, rules: Rules) -> Definition:
    """Describe the decoder of a resolved model section, without making a weight."""
    decoder = nnx.eval_shape(lambda: Decoder(model, rules, nnx.Rngs(params=0)))
    graphdef, state = nnx.split(decoder)
    shapes = nnx.to_pure_dict(state)
    axes = jax.tree.map(
        lambda v: ("layers",) * (v.get_value().ndim - len(v.axes)) + tuple(v.axes),
        state,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    return Definition(model, rules, graphdef, shapes, nnx.to_pure_dict(axes))


def check_mesh(model: ModelConfig, rules: Rules, mesh: AnyMesh) -> None:
    """Check that the mesh cuts the model's dimensions evenly.

    Raises:
      ConfigError: naming the mesh axis, the knob and the remedy.
    """
    sizes = {
        "heads": (model.num_heads, "model.num_heads"),
        "kv_heads": (model.num_kv_heads, "model.num_kv_heads"),
        "hidden": (model.hidden, "model.hidden"),
        "vocab": (model.vocab_size, "model.vocab_size"),
        "embed": (model.width, "model.width"),
        "optimizer_embed": (model.width, "model.width"),
        "width": (model.width, "model.width"),
        "layers": (model.num_layers, "model.num_layers"),
    }
    check_divides(rules, mesh, sizes)
