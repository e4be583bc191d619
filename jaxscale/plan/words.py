"""What the free text in a published row says: meshes, kept activations, kernels, compiler flags.

Each function reads one cell, in the words of the frameworks that people publish with (MaxText,
AXLearn, Levanter), and knows nothing of rows. `published.py` makes a config of the answers.
"""

import dataclasses
import re
from collections.abc import Iterator

from jaxscale.config import OFFLOAD
from jaxscale.parallel.mesh import AXES, SLOW_AXES, STAGE_AXIS

# Axes that others call otherwise; further names are ours.
_AXIS_NAMES = {
    "pipeline": STAGE_AXIS,
    "replica": SLOW_AXES[0],
    "context": AXES[3],
    "model": AXES[4],
}

# What frameworks call the activations of a block, and what `model.remat_names` calls them.
CARRY = "block_input"  # kept on the device in any case
MLP_OUTPUT = "mlp_output"  # no name of ours
_QUERY, _KEY, _VALUE = ("query",), ("key",), ("value",)
_ATTENTION_OUT, _GATE, _UP = ("attention_out",), ("gate",), ("up",)
_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("decoder_layer_input", "layer_input", "carry"), (CARRY,)),
    **dict.fromkeys(("q", "query", "q_proj", "query_proj"), _QUERY),
    **dict.fromkeys(("k", "key", "k_proj", "key_proj"), _KEY),
    **dict.fromkeys(("v", "value", "v_proj", "value_proj"), _VALUE),
    **dict.fromkeys(("qkv", "qkv_proj"), _QUERY + _KEY + _VALUE),
    "context": ("context",),
    **dict.fromkeys(("o", "o_proj", "out_proj", "attention_out"), _ATTENTION_OUT),
    **dict.fromkeys(("wi", "mlpwi"), _GATE + _UP),
    **dict.fromkeys(("wi_0", "mlpwi_0", "gate"), _GATE),
    **dict.fromkeys(("wi_1", "mlpwi_1", "up"), _UP),
    **dict.fromkeys(("wo", "mlpwo"), (MLP_OUTPUT,)),
}
_HOST, _DEVICE, _AGAIN = "host", "device", "recomputed"
_PLACES = {
    **dict.fromkeys(("host", "pinned_host", "offload", "offloaded"), _HOST),
    **dict.fromkeys(("device", "saved", "kept"), _DEVICE),
    **dict.fromkeys(("remat", "recompute", "recomputed", "rematerialized"), _AGAIN),
}
_ALL_DOTS = "q, k, v, out_proj, mlpwi, mlpwo"
# Policies by name, in the words that `kept_activations` reads.
_FULL = ("full", "gradient_checkpointing=true")
_DOTS = ("minimal", "dots_saveable", "checkpoint_dots_with_no_batch_dims")
_POLICIES = {
    "minimal_flash": f"{_ALL_DOTS}, context saved",
    "minimal_with_context": f"{_ALL_DOTS}, context saved",
    "minimal_offloaded": f"{_ALL_DOTS} offloaded",
    "offload_dots_saveable": f"{_ALL_DOTS} offloaded",
    "offload_attention_proj_policy": "q, k, v, out_proj, context offloaded",
    "save_dot_except_mlp": "q, k, v, out_proj saved",
    "save_dot_except_mlpwi": "q, k, v, out_proj, mlpwo saved",
    "save_dot_with_context_except_mlp": "q, k, v, context, out_proj saved",
    "save_qkv_proj": "q, k, v saved",
    "save_out_proj": "out_proj saved",
    "qkv_proj_offloaded": "q, k, v offloaded",
}

# Compiler flags that change the schedule; others set up logs, random bits or the runtime.
_SCHEDULING_FLAGS = (
    "xla_tpu_",
    "xla_sc_",
    "xla_jf_",
    "xla_lhs_",
    "xla_latency_hiding_scheduler_",
    "xla_enable_async_",
    "xla_max_concurrent_",
    "xla_should_",
)
_NO_SCHEDULING = ("_dump", "_log", "_trace", "_spmd_rng_")


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a block's forward pass leaves for the backward pass.

    Attributes:
      remat: `model.remat`.
      names: `model.remat_names`, if `remat` is names.
      has_outputs_on_host: whether the published program kept `MLP_OUTPUT` in host memory.
    """

    remat: str
    names: tuple[str, ...] = ()
    has_outputs_on_host: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How attention was computed.

    Attributes:
      attention: `model.attention`.
      causal: whether the kernel leaves out what the mask hides.
      segments: whether documents are kept apart.
      fused_backward: whether one kernel computes all gradients.
      is_balanced: whether devices that share a length have as many pairs each.
      blocks: tokens of each kind of block, as far as told; `all` stands for those not told.
    """

    attention: str
    causal: bool
    segments: bool
    fused_backward: bool
    is_balanced: bool
    blocks: tuple[tuple[str, int], ...]


def axis_sizes(text: str) -> dict[str, int]:
    """Return our mesh axes, and those we lack, of text like "fsdp=64,context=8 (a remark)"."""
    plain = re.sub(r"\(.*?\)", "", text.lower())
    pairs = re.findall(r"([a-z_]+)\s*=\s*(-?\d+)", plain)
    sizes: dict[str, int] = {}
    for name, size in pairs:
        axis = _AXIS_NAMES.get(name, name)
        sizes[axis] = sizes.get(axis, 1) * int(size)
    return sizes


def kept_activations(policy: str, meaning: str) -> Kept | None:
    """Return what a rematerialisation policy keeps; None where neither name nor words tell.

    Args:
      policy: its name.
      meaning: what it does, where the name is "custom" or unknown.
    """
    name = policy.lower().partition("(")[0].strip()
    if name in _FULL:
        return Kept("full")
    if name in _DOTS:
        return Kept("dots")
    if name in ("none", "no"):
        return Kept("none")
    places = _places(_POLICIES.get(name, meaning))
    if not places:
        return None
    order = [n for names in _ACTIVATIONS.values() for n in names]
    on_device = {name for name, place in places.items() if place == _DEVICE} - {CARRY, MLP_OUTPUT}
    on_host = {name for name, place in places.items() if place == _HOST}
    names = sorted(on_device | on_host - {MLP_OUTPUT}, key=order.index)
    kept = tuple(f"{OFFLOAD}{name}" if name in on_host else name for name in names)
    return Kept("names" if kept else "full", kept, MLP_OUTPUT in on_host)


def _places(text: str) -> dict[str, str]:
    """Return where each activation is, of text like "q, k -> pinned_host; v saved" or "q=device".

    A word of place speaks of the names before it in its clause, or of those behind it if it is the
    first; "saved on host" means host.
    """
    found: dict[str, str] = {}
    for clause in re.split(r"[;.]\s", text.lower()):
        waiting: list[str] = []
        group: list[str] = []
        place = ""
        for word in re.findall(r"[a-z0-9_]+", clause):
            if word in _ACTIVATIONS:
                waiting += _ACTIVATIONS[word]
            elif word in _PLACES:
                place = _PLACES[word]
                group, waiting = waiting or group, []
                found.update(dict.fromkeys(group, place))
        if place:
            found.update(dict.fromkeys(waiting, place))
    return found


def read_kernel(text: str) -> Kernel:
    """Return what the cell says of attention; a causal kernel with documents if it is mute."""
    words = text.lower()
    is_kernel = re.search(r"pallas|flash|splash", words)
    dense = not is_kernel and re.search(r"\bxla\b|dot_product|\bdense\b|einsum", words)
    return Kernel(
        attention="dense" if dense else "flash",
        causal=not re.search(r"causal\s*=\s*false|non-causal", words),
        segments=not re.search(r"(no|without) segment", words),
        fused_backward=bool(re.search(r"fused[ _](bwd|backward)", words)),
        is_balanced=bool(re.search(r"load[ -]?balanc", words)),
        blocks=tuple(_blocks(words)),
    )


def _blocks(words: str) -> Iterator[tuple[str, int]]:
    for name, size in re.findall(r"\b(?:sa_block_)?((?:q|kv)(?:_[a-z]+)*)=(\d+)", words):
        yield name, int(size)
    if three := re.search(r"blocks (\d+)/(\d+)/(\d+)", words):
        yield from zip(("q", "kv", "kv_compute"), map(int, three.groups()), strict=True)
    elif same := re.search(r"(?:blocks |block_\*=)(\d+)", words):
        yield "all", int(same[1])


def compiler_options(flags: str) -> tuple[tuple[str, str], ...]:
    """Return those of "--name=value ..." that change the schedule of a TPU program, last wins."""
    pairs = re.findall(r"--(\w+)=(\S+)", flags)
    return tuple(
        {
            name: value
            for name, value in pairs
            if name.startswith(_SCHEDULING_FLAGS) and not any(n in name for n in _NO_SCHEDULING)
        }.items()
    )


def refused_option(message: str) -> str | None:
    """Return the option that the compiler does not know, of its error's message."""
    refused = re.search(r"No such compile option: '(\w+)'", message)
    return refused[1] if refused else None
