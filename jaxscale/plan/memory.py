"""Bytes that a training step needs of each device, from shapes and rules alone.

One idea: a step's peak is in one of three phases, and each has its own list of what must be alive.
In the backward pass of a block: what the forward pass kept, the gradients so far, one block's
working set, and what the loss still owes its head. At the loss: all that is kept, and the logits.
At the end: all gradients, those of the embedding and the head whole, before they are summed and
cut. The lists were read off the TPU compiler's buffers; `compile` gives its own figure.
"""

# t tokens of a device, D width, F hidden, N heads, K kv heads, H head dim, V vocab

import dataclasses

from jaxscale.plan.part import FLOAT32, DevicePart, tile_bytes
from jaxscale.plan.space import Candidate
from jaxscale.train.state import BATCH_DTYPES

# The compiler finds no place for buffers without holes between them, and its figure counts these
# holes twice: so much more than what is alive at the peak.
HOLES = 0.2
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
    step = Phases(candidate)
    phases = (step.forward(), step.loss(), step.backward(), step.end())
    return max(phases, key=lambda phase: phase.total)


class Phases(DevicePart):
    """The phases of a candidate's step, each as the bytes that are alive in it."""

    def _fixed(self) -> dict[str, float]:
        """Return what lies there throughout: the state and the batch."""
        offload = self.config.train.offload
        rows = self.rows * self.parts
        batch = len(BATCH_DTYPES) * tile_bytes((rows, self.tokens // self.rows), FLOAT32)
        return {
            "params": self.state.params,
            "optimizer": 0 if offload != "none" else self.state.optimizer,
            "batch": batch,
        }

    def _copies(self) -> float:
        """Return the blocks' parameters in the compute dtype, which the compiler makes once."""
        same = self.model.param_dtype == self.model.compute_dtype
        return 0 if same else self.state.blocks * self.itemsize

    def _block(self) -> float:
        """Return the working set of one block's backward pass, with its weights gathered.

        The compiler keeps what it can of it in vector memory.
        """
        model, c, t = self.model, self.itemsize, self.tokens
        inner = 3 if model.mlp == "gated" else 2
        activations = t * c * (2 * self.width + 4 * self.queries + inner * self.hidden)
        pairs = 2 * self.key_tokens * self.pairs * c
        scores = 0
        if model.attention == "dense":
            scores = 3 * t * (self.key_tokens // self.rows) * self.heads * FLOAT32
        moving = max(activations + pairs - VECTOR_MEMORY, 0)
        weights = self.state.whole_block * c + self.state.whole_matrix * FLOAT32
        return weights + moving + scores

    def _sums(self) -> float:
        """Return the sums of gradients over microbatches that are worked off one by one."""
        is_summed = self.parts > 1 and self.stages == 1
        return (self.state.blocks + self.state.others) * FLOAT32 if is_summed else 0.0

    def loss(self) -> Bytes:
        """Return the bytes where the logits are computed: in chunks, their head's sum is there."""
        head = self.table * self.itemsize
        logits = self.chunk * self.vocab * FLOAT32
        if self.is_chunked:
            grown = self.table * FLOAT32
            head += grown + max(grown - logits, 0)
        return Bytes(
            **self._fixed(),
            activations=self.kept_bytes(),
            gradients=self._sums(),
            logits=logits + head,
            workspace=self._copies() + self.loss_tokens * self.width * (FLOAT32 + self.itemsize),
        )

    def forward(self) -> Bytes:
        """Return the bytes in a pipeline's forward pass, whose ticks have the weights in common.

        So the compiler gathers those of all of a stage's layers before the first tick.
        """
        gathered = self.state.whole_block * self.itemsize * self.layers
        return Bytes(
            **self._fixed(),
            activations=self.kept_bytes(),
            workspace=self._copies() + (gathered if self.is_gathered and self.stages > 1 else 0),
        )

    def backward(self) -> Bytes:
        """Return the bytes in the first blocks' backward pass.

        The head's gradient is the last thing that the compiler computes, and its logits wait;
        not in one of several microbatches.
        """
        owed = self.table * (FLOAT32 + self.itemsize)
        if not self.is_chunked:
            owed = 0 if self._sums() else self.chunk * self.vocab * FLOAT32
        # A pipeline adds the ticks' gradients up.
        gradients = self.state.blocks * FLOAT32 * (2 if self.stages > 1 else 1)
        return Bytes(
            **self._fixed(),
            activations=self.kept_bytes(),
            gradients=gradients + self._sums(),
            logits=owed,
            workspace=self._copies() + self._block(),
        )

    def end(self) -> Bytes:
        """Return the bytes where the gradients of embedding and head are summed."""
        owed = self.table if self.is_chunked or self._sums() else self.chunk * self.vocab
        fetched = self.config.train.offload != "none"
        return Bytes(
            **self._fixed(),
            gradients=self.state.blocks * FLOAT32 + self._sums() + 2 * self.table * FLOAT32,
            logits=owed * FLOAT32 + self.table * self.itemsize,
            workspace=self.state.optimizer if fetched else 0.0,
        )
