"""Bytes that a training step needs of each device, from shapes and rules alone.

One idea: a step's peak is in one of few phases, and each has its own list of what must be alive.
In the backward pass of a block: what the forward pass kept, the gradients so far, one block's
working set, and what the loss still owes its head. At the loss: all that is kept, and the logits.
At the end: all gradients, those of the embedding and the head whole, before they are summed and
cut. A pipeline has its forward pass too. The lists were read off the TPU compiler's buffers.
"""

# t tokens of a device, D width, F hidden, N heads, K kv heads, H head dim, V vocab

import dataclasses

from jaxscale.plan.part import FLOAT32, device_part
from jaxscale.plan.space import Candidate
from jaxscale.train.state import BATCH_DTYPES

# The compiler's `temp_size_in_bytes` counts a second time what of its heap lies idle, or in a
# loop's hands, where the program outside of loops is largest: on average so much of what is alive.
HOLES = 0.25
# Of a chip's vector memory, what holds a block's activations.
VECTOR_MEMORY = 2**26


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
        """What `program_bytes` has on top on a TPU; no device needs it."""
        return HOLES * self.temporaries

    @property
    def live(self) -> float:
        """All that is alive at the peak: what a device must have, within some percent."""
        return self.params + self.optimizer + self.batch + self.temporaries

    @property
    def total(self) -> float:
        """The bytes of the step as `program_bytes` would have them."""
        return self.live + self.holes


def closed_bytes(candidate: Candidate) -> Bytes:
    """Return the bytes of a candidate's training step on each device, on a TPU."""
    step = Phases(candidate)
    phases = (step.forward(), step.loss(), step.backward(), step.end())
    return max(phases, key=lambda phase: phase.temporaries)


class Phases:
    """The phases of a candidate's step, each as the bytes that are alive in it."""

    def __init__(self, candidate: Candidate) -> None:
        self.part = p = device_part(candidate)
        self.is_offloaded = p.config.train.offload != "none"
        # The blocks' parameters in the compute dtype, which the compiler makes once.
        same = p.model.param_dtype == p.model.compute_dtype
        self.copies = 0 if same else p.state.blocks * p.itemsize
        # Of gradients over microbatches that are worked off one by one.
        is_summed = p.parts > 1 and p.stages == 1
        self.sums = (p.state.blocks + p.state.others) * FLOAT32 if is_summed else 0
        # The head's gradient is the last thing that the compiler computes, and its logits wait: not
        # where it is added to a sum as it is.
        waits = not is_summed or p.is_gathered
        self.waiting = p.chunk * p.vocab * FLOAT32 if waits else 0

    def forward(self) -> Bytes:
        """Return the bytes in a pipeline's forward pass, whose ticks have the weights in common.

        So the compiler gathers those of all of a stage's layers before the first tick.
        """
        p = self.part
        is_gathered = p.is_gathered and p.stages > 1
        gathered = p.state.whole_block * p.itemsize * p.layers if is_gathered else 0
        return self._bytes(activations=p.kept_bytes, workspace=self.copies + gathered)

    def loss(self) -> Bytes:
        """Return the bytes where the logits are computed: in chunks, their head's sum is there."""
        p = self.part
        head, logits = p.table * p.itemsize, p.chunk * p.vocab * FLOAT32
        if p.is_chunked:
            # The sum, and either a chunk's logits or what it adds to the sum.
            head += p.table * FLOAT32
            logits = max(logits, p.table * FLOAT32)
        normalised = p.loss_tokens * p.width * (FLOAT32 + p.itemsize)
        return self._bytes(
            activations=p.kept_bytes,
            gradients=self.sums,
            logits=logits + head,
            workspace=self.copies + normalised,
        )

    def backward(self) -> Bytes:
        """Return the bytes in the first blocks' backward pass."""
        p = self.part
        # A pipeline adds the gradients of its ticks up.
        gradients = p.state.blocks * FLOAT32 * (2 if p.stages > 1 else 1)
        return self._bytes(
            activations=p.kept_bytes,
            gradients=gradients + self.sums,
            logits=p.table * (FLOAT32 + p.itemsize) if p.is_chunked else self.waiting,
            workspace=self.copies + self._block(),
        )

    def end(self) -> Bytes:
        """Return the bytes where the gradients of embedding and head are summed."""
        p = self.part
        owed = 0 if p.is_chunked else self.waiting
        # Of one microbatch, the next one needs the parameters' copies too.
        copies = self.copies if self.sums else 0
        return self._bytes(
            gradients=(p.state.blocks + 2 * p.table) * FLOAT32 + self.sums,
            logits=(owed or p.table * FLOAT32) + p.table * p.itemsize,
            workspace=copies + (p.state.optimizer if self.is_offloaded else 0),
        )

    def _bytes(self, **temporaries: float) -> Bytes:
        """Return what is alive in a phase, and what lies there throughout."""
        p = self.part
        return Bytes(
            params=p.state.params,
            optimizer=0 if self.is_offloaded else p.state.optimizer,
            batch=len(BATCH_DTYPES) * p.tokens * p.parts * FLOAT32,
            **temporaries,
        )

    def _block(self) -> float:
        """Return the working set of one block's backward pass, with its weights gathered.

        The compiler keeps what it can of it in vector memory.
        """
        p = self.part
        inner = 3 if p.model.mlp == "gated" else 2
        features = 2 * p.width + 4 * p.queries + inner * p.hidden
        streams = (p.tokens * features + 2 * p.key_tokens * p.pairs) * p.itemsize
        scores = 0
        if p.model.attention == "dense":
            scores = 3 * p.tokens * (p.key_tokens // p.rows) * p.heads * FLOAT32
        weights = p.state.whole_block * p.itemsize + p.state.whole_matrix * FLOAT32
        return weights + max(streams - VECTOR_MEMORY, 0) + scores
