"""Seconds of a training step from shapes, data sheets and the torus alone.

One idea: what may run at once costs its maximum, what must wait costs its sum. A block's matmuls,
its HBM traffic and the gathers and reductions of its weights run beside each other, and so do
transfers to host memory. What stands between two matmuls that need it is exposed: collectives of
activations over the tensor and sequence axes, the hand-over between stages, the first gather and
the last reduction. A pipeline's bubble stretches all of it.
"""

# t tokens of a device and microbatch, c bytes of an element in the compute dtype

import dataclasses
import functools

from jaxscale.config import OFFLOAD
from jaxscale.hardware import Chip
from jaxscale.parallel.mesh import AnyMesh
from jaxscale.parallel.pipeline import bubble_share
from jaxscale.parallel.sharding import Rules
from jaxscale.plan.part import FLOAT32, ITEMSIZES, DevicePart, device_part
from jaxscale.plan.shares import SHARES, VECTOR_OPS_PER_SCORE, Shares
from jaxscale.plan.space import Candidate
from jaxscale.plan.torus import Network, Seconds

# Matmuls of the attention kernels per pass: forward (scores, sum), dq, and dk with dv, which both
# compute the scores again.
FORWARD_MATMULS, BACKWARD_MATMULS = 2, 3 + 4
FORWARD_PASSES, BACKWARD_PASSES = 1, 2
# Streams of (t, width) that norms, residuals and rotary positions read or write beside matmuls.
FORWARD_STREAMS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of one step that each resource is busy; they overlap.

    Attributes:
      compute: matmuls and the attention kernel, recomputation included.
      hbm: device memory.
      ici: the torus.
      dcn: the network between slices.
      host: transfers to and from host memory.
      bubble: of all, in which a stage has no microbatch.
      exposed: of ici and dcn, what nothing runs beside.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float
    host: float
    bubble: float
    exposed: float

    @property
    def total(self) -> float:
        """The step."""
        hidden = self.ici + self.dcn - self.exposed
        return max(self.compute, self.hbm, hidden, self.host) + self.exposed + self.bubble

    @property
    def bound(self) -> str:
        """What the step waits for longest: compute, HBM, ICI, DCN or host."""
        busy = {
            "compute": self.compute,
            "HBM": self.hbm,
            "ICI": self.ici,
            "DCN": self.dcn,
            "host": self.host,
        }
        return max(busy, key=lambda name: busy[name])


def closed_seconds(
    candidate: Candidate, chip: Chip, network: Network, shares: Shares = SHARES
) -> Roofline:
    """Return the seconds of a candidate's training step.

    Args:
      candidate: what is trained, and how.
      chip: the kind of chip.
      network: the placement of its mesh; candidates with the same mesh share it.
      shares: achieved over peak.
    """
    part = device_part(candidate)
    hidden, exposed = _communication(_Traffic(candidate, part, network))
    compute = _compute_seconds(part, chip, shares)
    hbm = _hbm_bytes(part) / (chip.hbm_bytes_per_second / chip.devices_per_chip * shares.hbm)
    host_rate = chip.host_bytes_per_second / chip.devices_per_chip
    ici = (hidden.ici + exposed.ici) / shares.ici
    dcn = (hidden.dcn + exposed.dcn) / shares.dcn
    waiting = exposed.ici / shares.ici + exposed.dcn / shares.dcn
    step = max(compute, hbm, ici + dcn - waiting) + waiting
    share = 0.0
    if part.stages > 1:
        rounds = part.config.train.pipeline_rounds
        share = bubble_share(part.stages, part.parts, rounds)
    return Roofline(
        compute=compute,
        hbm=hbm,
        ici=ici,
        dcn=dcn,
        host=_host_bytes(part) / host_rate,
        bubble=step * share / (1 - share),
        exposed=waiting,
    )


def _layer_runs(part: DevicePart) -> int:
    """Return how often the device runs a layer of its own on a microbatch of its own."""
    return part.layers * part.parts


def recomputed_flops(candidate: Candidate) -> float:
    """Return the FLOPs of a device's step that it has done before: of layers, and the loss."""
    part = device_part(candidate)
    attended = part.remat_layers * FORWARD_MATMULS if _is_attended_again(part) else 0
    attention = 2.0 * _num_scores(part) * part.model.head_dim * attended
    layers = 2.0 * part.tokens * _recomputed_products(part) * part.remat_layers
    whole_batch = 1 if part.stages > 1 else part.parts
    head = 2.0 * part.loss_tokens * part.table if part.is_chunked else 0.0
    return (layers + attention) * part.parts + head * whole_batch


def _products(part: DevicePart) -> dict[str, int]:
    """Return the products per token of each matmul of a layer."""
    model = part.model
    D, H = model.width, model.head_dim
    return {
        "query": D * part.heads * H,
        "key": D * part.kv_heads * H,
        "value": D * part.kv_heads * H,
        "attention_out": D * part.heads * H,
        "gate": D * part.hidden if model.mlp == "gated" else 0,
        "up": D * part.hidden,
        "down": D * part.hidden,
    }


def _recomputed_products(part: DevicePart) -> int:
    return sum(size for name, size in _products(part).items() if not _is_kept(part, name))


def _compute_seconds(part: DevicePart, chip: Chip, shares: Shares) -> float:
    peak = chip.bf16_flops_per_second_per_device * shares.matmul
    again = _recomputed_products(part) * part.remat_layers
    flops = 2.0 * part.tokens * (3 * sum(_products(part).values()) * part.layers + again)
    # What a chunk of the loss computes is computed again backward.
    head = 2.0 * part.loss_tokens * part.table * (4 if part.is_chunked else 3)
    whole_batch = 1 if part.stages > 1 else part.parts
    kernel = _kernel_seconds(part, chip, shares) * part.parts
    return (flops * part.parts + head * whole_batch) / peak + kernel


def _is_kept(part: DevicePart, name: str) -> bool:
    """Tell whether a matmul's result needs no second computation, kept or never asked for."""
    return name == "down" or name in part.kept_names or OFFLOAD + name in part.kept_names


def _is_attended_again(part: DevicePart) -> bool:
    """Tell whether layers that recompute run the attention kernel forward again."""
    return not _is_kept(part, "context")


def _kernel_seconds(part: DevicePart, chip: Chip, shares: Shares) -> float:
    """Return the attention of all layers of one microbatch: matmuls or vector units, the slower."""
    model, scores = part.model, _num_scores(part)
    again = part.remat_layers if _is_attended_again(part) else 0
    matmuls = part.layers * (FORWARD_MATMULS + BACKWARD_MATMULS) + again * FORWARD_MATMULS
    passes = part.layers * (FORWARD_PASSES + BACKWARD_PASSES) + again * FORWARD_PASSES
    # Of a matrix unit, a head fills as many rows as it has features.
    filled = min(model.head_dim / (chip.mxu_size or model.head_dim), 1.0)
    flops = 2.0 * scores * model.head_dim * matmuls
    vector = VECTOR_OPS_PER_SCORE * scores * passes * chip.devices_per_chip
    return max(
        flops / (chip.bf16_flops_per_second_per_device * shares.matmul * filled),
        vector / (chip.vector_ops_per_second * shares.vector) if chip.num_mxus else 0.0,
    )


def _num_scores(part: DevicePart) -> float:
    """Return the scores of one layer and microbatch.

    A kernel passes over the masked half of them; dense attention computes all.
    """
    model, L = part.model, part.length
    window = min(model.attention_window or L, L)
    seen = L if model.attention == "dense" else window - window**2 / (2 * L)
    if part.length_shards > 1 and model.sequence_attention == "all_gather":
        # The others wait for the device with the last tokens, which see the most keys.
        seen = min(seen * (2 - 1 / part.length_shards), L)
    return part.tokens * seen * part.heads


def _hbm_bytes(part: DevicePart) -> float:
    """Return what a step reads from and writes to device memory."""
    model, c, t, state = part.model, part.itemsize, part.tokens, part.state
    again = part.remat_layers / part.layers
    passes = 2 + (again if "up" not in part.kept_names else 0)
    inner = 3 if model.mlp == "gated" else 2
    streams = FORWARD_STREAMS * model.width + 3 * part.queries + 2 * part.pairs
    activations = t * c * (streams + 2 * inner * part.hidden) * (1 + passes)
    # Gathered weights are written and read; each gradient is written whole and read to be summed.
    weights = state.whole_block * (c * (passes + 2) + 2 * FLOAT32)
    layers = (activations + weights) * _layer_runs(part)
    # Kept activations are stacked, and copied out of the stack.
    ticks = part.parts if part.stages == 1 else 1
    kept = 4 * part.kept_bytes * ticks
    logits = 5 * part.loss_tokens * part.vocab * FLOAT32 * ticks
    tables = part.table * (4 * c + 6 * FLOAT32) * ticks
    if part.parts > 1 and part.stages == 1:
        layers += 3 * (state.blocks + state.others) * FLOAT32 * part.parts
    update = 2 * (state.params + state.optimizer) + 4 * (state.blocks + state.others) * FLOAT32
    return layers + kept + logits + tables + update


def _host_bytes(part: DevicePart) -> float:
    """Return what comes from host memory and goes there, the larger of the two ways."""
    offload = part.config.train.offload
    state = {
        "none": 0,
        "optimizer": part.state.optimizer,
        "all": part.state.optimizer + part.state.params,
    }[offload]
    return state + part.offloaded_bytes()


@functools.lru_cache(maxsize=4096)
def _mesh_axes(rules: Rules, mesh: AnyMesh) -> dict[str, tuple[str, ...]]:
    """Return the mesh axes of each logical axis."""
    return {name: rules.mesh_axes(name, mesh) for name, _ in rules.table}


class _Traffic:
    """The collectives of a step, by what they are for."""

    def __init__(self, candidate: Candidate, part: DevicePart, network: Network) -> None:
        self.part, self.network, self.model = part, network, part.model
        axes = _mesh_axes(candidate.rules, candidate.mesh)
        self.fsdp, self.length, self.layers = axes["embed"], axes["length"], axes["layers"]
        self.heads, self.hidden, self.vocab = axes["heads"], axes["hidden"], axes["vocab"]
        # Over which devices hold the same shard of a weight, and other tokens.
        tokens = (*axes["batch"], *self.length)
        self.replicas = tuple(axis for axis in tokens if axis not in self.fsdp)
        self.remat_share = part.remat_layers / part.layers
        self.reduce_itemsize = ITEMSIZES[candidate.rules.reduce_dtype]

    def gather(self, elements: float) -> Seconds:
        """Return an all-gather of weights in the compute dtype."""
        return self.network.seconds("all-gather", self.fsdp, elements * self.part.itemsize)

    def reduce(self, elements: float, *, all_replicas: bool) -> Seconds:
        """Return the sum of a gradient over devices, which ends in the weights' shards.

        One reduce-scatter where that is all and lies on one torus dimension; otherwise the TPU
        compiler takes one all-reduce over all devices and cuts its result.
        """
        axes = (*self.fsdp, *(self.replicas if all_replicas else ()))
        if not axes:
            return Seconds()
        is_plain = axes == self.fsdp and not self.network.spans_several_dims(axes)
        kind = "reduce-scatter" if is_plain else "all-reduce"
        return self.network.seconds(kind, axes, elements * self.reduce_itemsize)

    def sums(self, axes: tuple[str, ...]) -> Seconds:
        """Return the all-reduce of a partial sum of the residual stream."""
        payload = self.part.residual_tokens * self.model.width * self.part.itemsize
        return self.network.seconds("all-reduce", axes, payload) if axes else Seconds()

    def tensor(self) -> Seconds:
        """Return what a layer sends of partial sums.

        Forward one of attention and one of the MLP, backward one of each matmul that they enter by.
        """
        again = 0.0 if _is_kept(self.part, "attention_out") else self.remat_share
        ways = 2 if self.model.mlp == "gated" else 1
        return self.sums(self.heads) * (1 + again + 3) + self.sums(self.hidden) * (1 + ways)

    def sequence(self) -> Seconds:
        """Return what a layer sends so that its tokens see the others' keys and values."""
        if not self.length:
            return Seconds()
        part, model, network = self.part, self.model, self.network
        again = self.remat_share if _is_attended_again(part) else 0.0
        head = part.tokens * model.head_dim * part.itemsize
        if model.sequence_attention == "all_gather":
            whole = 2 * head * part.length_shards * part.kv_heads
            gather = network.seconds("all-gather", self.length, whole)
            return gather * (1 + again) + network.seconds("all-reduce", self.length, whole)
        if model.sequence_attention == "ring":
            pair = network.seconds("collective-permute", self.length, 2 * head * part.kv_heads)
            # Backward their gradients go round with them.
            return pair * ((part.length_shards - 1) * (1 + again + 2))
        heads = 2 * head * (part.heads + part.kv_heads)
        return network.seconds("all-to-all", self.length, heads) * (2 + again)

    def stages(self) -> Seconds:
        """Return what a microbatch takes from one stage to the next, forward and backward."""
        if not self.layers:
            return Seconds()
        payload = self.part.residual_tokens * self.model.width * self.part.itemsize
        return self.network.seconds("collective-permute", self.layers, payload) * 2


def _communication(traffic: _Traffic) -> tuple[Seconds, Seconds]:
    """Return what runs beside computation, and what does not."""
    part = traffic.part
    is_deferred = part.parts > 1 and part.stages == 1
    runs = part.layers if part.stages > 1 else _layer_runs(part)
    gather = traffic.gather(part.state.whole_block) if traffic.fsdp else Seconds()
    reduced = traffic.reduce(part.state.whole_block, all_replicas=not is_deferred)
    # In a pipeline, weights are gathered once for all ticks.
    weights = gather * ((1 if part.stages > 1 else 2) * runs) + reduced * runs
    tables = 1 if part.model.tie_embeddings else 2
    table_gather = traffic.gather(part.table) if traffic.fsdp else Seconds()
    table_sum = traffic.reduce(part.table, all_replicas=not is_deferred)
    hidden = weights + table_gather * tables
    # The first gather, and the gradients that come last.
    exposed = gather + table_sum * tables
    if is_deferred and traffic.replicas:
        elements = part.state.blocks + part.state.others
        payload = elements * traffic.reduce_itemsize
        exposed += traffic.network.seconds("all-reduce", traffic.replicas, payload)
    exposed += (traffic.tensor() + traffic.sequence()) * _layer_runs(part)
    exposed += (traffic.sums(traffic.vocab) * 2) * part.parts
    exposed += traffic.stages() * part.ticks
    return hidden, exposed
