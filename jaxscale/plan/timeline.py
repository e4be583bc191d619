"""How long a compiled step takes on a device: its events in order, each at its price.

Cores compute one thing after the other. Transfers over the links inside a slice, between slices and
to the host each go on beside that, one after the other in their own queue, and cost what is waited
for them at their end.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable

from jaxscale.hardware import Chip
from jaxscale.parallel.program import Collective
from jaxscale.plan.kernels import Attention, kernel_seconds
from jaxscale.plan.schedule import SLOW, Event, Kernel, Loop, Operation, Send, Wait
from jaxscale.plan.shares import Shares
from jaxscale.plan.torus import Network

COMPUTE, HBM, ICI, DCN, LINK_HOST = "compute", "HBM", "ICI", "DCN", "host"
# What a step is spent on: named scopes of the model, and what stands outside of them.
PARTS = ("attention", "mlp", "embedding", "head", "optimizer")
OTHER = "other"
# Passes, by what JAX writes into the names of operations; the first that is found counts.
PASSES = (("rematted_computation", "recompute"), ("transpose(", "backward"), ("jvp(", "forward"))
UPDATE = "update"
# A message's way over a link.
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over the same mesh axes, per device and step.

    Attributes:
      kind: as XLA calls it; "host" for copies from and to the host.
      axes: mesh axes that it goes over.
      number: how often one runs.
      payload_bytes: of their arrays together.
      busy_seconds: that the links are taken.
      waited_seconds: of these, not hidden behind computation.
    """

    kind: str
    axes: tuple[str, ...]
    number: int
    payload_bytes: int
    busy_seconds: float
    waited_seconds: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A predicted step.

    Attributes:
      seconds: of the whole.
      by_resource: seconds that computation, memory and each kind of link account for; they add up.
      by_part: seconds of computation by (part of the model, pass).
      traffic: what is sent, the longest waited for first.
      matmul_flops: of the program's matmuls, kernels aside.
    """

    seconds: float
    by_resource: dict[str, float]
    by_part: dict[tuple[str, str], float]
    traffic: tuple[Traffic, ...]
    matmul_flops: float

    @property
    def bound(self) -> str:
        """What most of the step is spent on."""
        return max(self.by_resource, key=lambda name: self.by_resource[name])


@dataclasses.dataclass(frozen=True)
class Prices:
    """What events cost on a chip.

    Attributes:
      chip: its peaks.
      shares: what of them is achieved.
      network: of the slice, with the mesh placed on it.
      attention: which pairs attention kernels compute.
      has_small_tiles: whether the program lacks an option that makes the tiles of matmuls larger.
    """

    chip: Chip
    shares: Shares
    network: Network
    attention: Attention
    has_small_tiles: bool = False

    def operation(self, event: Operation) -> tuple[float, str]:
        """Return the seconds of an operation, and what bounds it.

        With small tiles the compiler has a large matmul at 60% of the matrix units' peak that is at
        95% with large ones; then it takes no longer than at the share of it that is achieved.
        """
        chip, shares = self.chip, self.shares
        memory = event.hbm_bytes * chip.devices_per_chip / chip.hbm_bytes_per_second / shares.hbm
        matmul = event.flops / chip.bf16_flops_per_second_per_device / shares.matmul
        compute = matmul if event.cycles is None else event.cycles / chip.clock_hertz
        if event.flops and self.has_small_tiles:
            compute = min(compute, matmul)
        return max(compute, memory), HBM if memory > compute else COMPUTE

    def kernel(self, event: Kernel) -> float:
        """Return the seconds of a kernel."""
        return kernel_seconds(event, self.attention, self.chip, self.shares)

    def send(self, event: Send) -> tuple[float, str]:
        """Return the seconds that a transfer takes its links, and which they are."""
        shares = self.shares
        if event.collective is None:
            rate = self.chip.host_bytes_per_second / self.chip.devices_per_chip
            return event.host_bytes / rate, LINK_HOST
        one = event.collective
        if one.kind.startswith(SLOW):
            return self._between_slices(one) / shares.dcn, DCN
        cost = self.network.seconds(one.kind, one.axes, one.payload_bytes)
        ici, dcn = cost.ici / shares.ici, cost.dcn / shares.dcn
        return ici + dcn + HOP_SECONDS, DCN if dcn > ici else ICI

    def _between_slices(self, one: Collective) -> float:
        """Return the seconds at peak: every device sends its own part, and hosts share a link."""
        chip, slices = self.chip, self.network.slice.num_slices
        per_device = chip.dcn_bytes_per_second_per_host / chip.chips_per_host
        per_device /= chip.devices_per_chip
        times = {"all-reduce": 2.0, "all-gather": float(slices)}.get(
            one.kind.removeprefix(SLOW), 1.0
        )
        return times * (slices - 1) / slices * one.payload_bytes / per_device


def predict(events: tuple[Event, ...], prices: Prices) -> Timeline:
    """Return the time line of a step that a device works off."""
    run = _Run(prices)
    run.play(events, 1)
    traffic = [
        Traffic(kind, axes, *run.counts[kind, axes], run.busy[kind, axes], run.waited[kind, axes])
        for kind, axes in run.busy
    ]
    return Timeline(
        seconds=run.now,
        by_resource={name: run.by_resource[name] for name in (COMPUTE, HBM, ICI, DCN, LINK_HOST)},
        by_part=dict(run.by_part),
        traffic=tuple(sorted(traffic, key=lambda row: -row.waited_seconds)),
        matmul_flops=run.flops,
    )


Kind = tuple[str, tuple[str, ...]]


class _Run:
    """A device on its way through a program; `now` is the time."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.now, self.flops = 0.0, 0.0
        self.by_resource: dict[str, float] = defaultdict(float)
        self.by_part: dict[tuple[str, str], float] = defaultdict(float)
        self.busy: dict[Kind, float] = defaultdict(float)
        self.waited: dict[Kind, float] = defaultdict(float)
        self.counts: dict[Kind, tuple[int, int]] = {}
        # When each kind of link is free again, and when each transfer under way has arrived.
        self._free: dict[str, float] = {}
        self._arrivals: dict[str, tuple[float, str, Kind]] = {}

    def play(self, events: tuple[Event, ...], times: int) -> None:
        """Work off events of which each stands for so many."""
        steps: dict[type, Callable[..., None]] = {
            Operation: self._operation,
            Kernel: self._kernel,
            Send: self._send,
            Wait: self._wait,
            Loop: self._loop,
        }
        for event in events:
            steps[type(event)](event, times)

    def _loop(self, loop: Loop, times: int) -> None:
        """Go round once and count it for all rounds, which are alike."""
        started = self.now
        self.play(loop.body, times * loop.count)
        skipped = (self.now - started) * (loop.count - 1)
        self.now += skipped
        self._free = {name: free + skipped for name, free in self._free.items()}

    def _spend(self, seconds: float, times: int, resource: str, source: str) -> None:
        self.now += seconds
        self.by_resource[resource] += times * seconds
        self.by_part[part_of(source), pass_of(source)] += times * seconds

    def _operation(self, event: Operation, times: int) -> None:
        seconds, resource = self.prices.operation(event)
        self.flops += times * event.flops
        self._spend(seconds, times, resource, event.source)

    def _kernel(self, event: Kernel, times: int) -> None:
        self._spend(self.prices.kernel(event), times, COMPUTE, event.source)

    def _send(self, event: Send, times: int) -> None:
        seconds, link = self.prices.send(event)
        self._free[link] = max(self.now, self._free.get(link, 0.0)) + seconds
        kind = _kind(event.collective)
        self._arrivals[event.key] = (self._free[link], link, kind)
        number, payload = self.counts.get(kind, (0, 0))
        size = event.collective.payload_bytes if event.collective else event.host_bytes
        self.counts[kind] = (number + times, payload + times * size)
        self.busy[kind] += times * seconds

    def _wait(self, event: Wait, times: int) -> None:
        if event.key not in self._arrivals:
            return
        arrival, link, kind = self._arrivals.pop(event.key)
        waited = max(0.0, arrival - self.now)
        self.now += waited
        self.waited[kind] += times * waited
        self.by_resource[link] += times * waited


def _kind(collective: Collective | None) -> Kind:
    return (collective.kind, collective.axes) if collective else (LINK_HOST, ())


def part_of(source: str) -> str:
    """Return the part of the model that an operation belongs to, by the scopes in its name."""
    steps = source.replace("(", "/").replace(")", "/").split("/")
    return next((part for part in PARTS if part in steps), OTHER)


def pass_of(source: str) -> str:
    """Return which pass an operation belongs to, by what JAX writes in its name."""
    return next((name for mark, name in PASSES if mark in source), UPDATE)
