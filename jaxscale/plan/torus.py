"""The network of a described slice: its devices on their torus, and what collectives cost there.

Of GPUs, a slice is the part of a node that is used: a switch joins them, and all links lead to all.

One idea: a collective over mesh axes is a set of devices with coordinates, so its time follows from
which torus dimensions the set spans, whether it closes a ring there, and who shares the links. No
compiler and no libtpu is needed. Every stage of `plan` prices its collectives here.
"""

import dataclasses
import difflib
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from jaxscale.config import ConfigError
from jaxscale.hardware import CHIPS, Chip
from jaxscale.parallel.mesh import AXES

# A host's chips lie side by side in a square.
HOST_SIDE = 2
# As libtpu numbers the devices of several slices.
SLICE_IDS = 100_000
SWITCH, PLANE = 0, 2
# Nodes of GPUs, up to which a plan is thought on.
MOST_NODES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """Chips that a torus or a switch joins, or several such, which the slow network joins."""

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        """As the TPU compiler calls it, such as "v6e:16x16"; "h100:8" is a node of GPUs."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def words(self) -> str:
        """The name, and how many there are where that is more than one."""
        return (f"{self.num_slices} x " if self.num_slices > 1 else "") + self.name

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return self.num_slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """What JAX calls devices, of all slices."""
        return self.num_chips * self.chip.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each torus dimension is closed to a ring."""
        least = self.chip.ring_size
        if self.chip.torus_dims == SWITCH:
            return (False,) * len(self.shape)
        if self.chip.torus_dims == PLANE:
            return tuple(size >= least for size in self.shape)
        return (all(size % least == 0 for size in self.shape),) * len(self.shape)


def parse_topology(text: str, num_slices: int = 1) -> Slice:
    """Return the slice of a name such as "v6e:16x16".

    Raises:
      ConfigError: there is no such chip, or the chip has no slice of that shape.
    """
    name, _, shape = text.partition(":")
    valid = [chip.name for chip in CHIPS.values() if chip.topologies]
    if name not in valid:
        nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"--topology={text}: no chip {name!r}; did you mean {nearest}? There are "
            f"{', '.join(valid)}, as in {nearest}:{CHIPS[nearest].topologies[-1]}"
        )
    chip = CHIPS[name]
    if shape not in chip.topologies:
        what = "slice of shape" if chip.torus_dims else "node of size"
        raise ConfigError(
            f"--topology={text}: {name} has no {what} {shape!r}; it has "
            f"{', '.join(chip.topologies)}"
        )
    return Slice(chip=chip, shape=dims_of(shape), num_slices=num_slices)


def dims_of(shape: str) -> tuple[int, ...]:
    """Return the dims of a shape such as "4x8"."""
    return tuple(map(int, shape.split("x")))


def family(slice_: Slice) -> list[Slice]:
    """Return what there is of a slice's chip, fewest chips first: as many slices, or more nodes."""
    shapes = [dims_of(shape) for shape in slice_.chip.topologies]
    found = [dataclasses.replace(slice_, shape=shape) for shape in shapes]
    if slice_.chip.torus_dims == SWITCH and shapes:
        nodes = [1 << power for power in range(MOST_NODES.bit_length())]
        whole = max(shapes)
        found = [dataclasses.replace(slice_, shape=shape, num_slices=1) for shape in shapes[:-1]]
        found += [dataclasses.replace(slice_, shape=whole, num_slices=n) for n in nodes]
    return sorted(found, key=lambda other: other.num_chips)


@dataclasses.dataclass(frozen=True)
class DescribedDevice:
    """What placing a device in a mesh needs to know of it."""

    id: int
    coords: tuple[int, ...]
    core_on_chip: int
    slice_index: int
    process_index: int
    device_kind: str
    platform: str = "tpu"


def described_devices(slice_: Slice) -> list[DescribedDevice]:
    """Return a slice's devices in the order in which libtpu lists them.

    That is slice by slice, host by host, x before y before z, and the cores of a chip side by side.
    Of GPUs, node by node.
    """
    if slice_.chip.torus_dims == SWITCH:
        return _nodes(slice_)
    x, y, z = (*slice_.shape, 1, 1)[:3]
    side = (min(HOST_SIDE, x), min(HOST_SIDE, y))
    hosts = itertools.product(range(z), range(y // side[1]), range(x // side[0]))
    places = [
        (host, (hx * side[0] + dx, hy * side[1] + dy, hz))
        for host, (hz, hy, hx) in enumerate(hosts)
        for dy, dx in itertools.product(range(side[1]), range(side[0]))
    ]
    cores, num_hosts = slice_.chip.devices_per_chip, places[-1][0] + 1
    devices = []
    for number in range(slice_.num_slices):
        first = (number + 1) * SLICE_IDS if slice_.num_slices > 1 else 0
        for (host, coords), core in itertools.product(places, range(cores)):
            chip = coords[0] + x * (coords[1] + y * coords[2])
            devices.append(
                DescribedDevice(
                    id=first + chip * cores + core,
                    coords=coords,
                    core_on_chip=core,
                    slice_index=number,
                    process_index=number * num_hosts + host,
                    device_kind=slice_.chip.device_kinds[0],
                )
            )
    return devices


def _nodes(slice_: Slice) -> list[DescribedDevice]:
    (size,) = slice_.shape
    return [
        DescribedDevice(
            id=node * size + place,
            coords=(place,),
            core_on_chip=0,
            slice_index=node,
            process_index=node,
            device_kind=slice_.chip.device_kinds[0],
            platform=slice_.chip.platform,
        )
        for node, place in itertools.product(range(slice_.num_slices), range(size))
    ]


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Time of a collective on each network; they follow one another."""

    ici: float = 0.0
    dcn: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.ici + other.ici, self.dcn + other.dcn)

    def __mul__(self, times: float) -> "Seconds":
        return Seconds(self.ici * times, self.dcn * times)


@dataclasses.dataclass(frozen=True)
class _Span:
    """The part of one torus dimension that a group takes: so many places, `gap` apart."""

    count: int
    gap: int
    is_ring: bool

    @property
    def links(self) -> float:
        """Links one way that are the group's own: both ways round a ring, shared if strided."""
        return (2 if self.is_ring else 1) / self.gap


@dataclasses.dataclass(frozen=True)
class Group:
    """Devices that take part in a collective together.

    Attributes:
      num_slices: that they lie in.
      num_devices: in each slice.
      num_chips: in each slice.
      spans: the torus dimensions in which they differ.
      share: of a chip's links that this group has; others use them on behalf of the other cores.
    """

    num_slices: int
    num_devices: int
    num_chips: int
    spans: tuple[_Span, ...]
    share: float

    @property
    def links(self) -> float:
        """Links, one way, over which a device gets what the others send it."""
        return self.share * sum(span.links for span in self.spans)


class Network:
    """The collectives of one placement of a mesh on a slice, at the peak speed of every link.

    Inside a slice, of n chips: an all-gather brings each chip (n-1)/n of the payload over all links
    that lead along the group's dimensions, as many as both ways round a ring and one way of a line;
    a reduce-scatter is its mirror image, an all-reduce both. In an all-to-all, half of a dimension
    of k places sends half of its payload across the middle: k/4 payloads over that dimension's
    links. A permutation sends the payload over one link. Through a switch all links of a chip lead
    to all others, whatever is sent.

    Across s slices it is hierarchical: each device exchanges only its own part of the slice's.
    """

    def __init__(self, slice_: Slice, grid: np.ndarray) -> None:
        self.slice = slice_
        shape = grid.shape
        places = [(*d.coords, d.core_on_chip, d.slice_index) for d in grid.flat]
        self._places = np.array(places).reshape(*shape, -1)
        self.group = functools.cache(self._group)

    def seconds(self, kind: str, axes: Sequence[str], payload_bytes: float) -> Seconds:
        """Return the time of one collective.

        Args:
          kind: all-gather, reduce-scatter, all-reduce, all-to-all or collective-permute.
          axes: the mesh axes in which the devices of a group differ.
          payload_bytes: of the whole array on one device: what an all-gather yields, what the
            others are given.
        """
        group = self.group(tuple(axes))
        ici = self._inside(kind, group, payload_bytes)
        return Seconds(ici, self._across(kind, group, payload_bytes))

    def spans_several_dims(self, axes: Sequence[str]) -> bool:
        """Tell whether a group lies on more than one torus dimension."""
        return len(self.group(tuple(axes)).spans) > 1

    def _inside(self, kind: str, group: Group, payload: float) -> float:
        link = self.slice.chip.ici_link_bytes_per_second
        if group.num_chips == 1:
            # The cores of a chip share it: what joins them is several times as fast as a link.
            return 0.0
        if self.slice.chip.torus_dims == SWITCH:
            link *= self.slice.chip.ici_links
            parts = {"collective-permute": 1.0, "all-reduce": 2 * _others(group.num_chips)}
            return payload * parts.get(kind, _others(group.num_chips)) / link
        if kind == "all-to-all":
            return max(
                payload * _crossing(span.count) / (group.share * span.links * link)
                for span in group.spans
            )
        if kind == "collective-permute":
            gap = min(span.gap for span in group.spans)
            return payload * gap / (group.share * link)
        once = payload * _others(group.num_chips) / (group.links * link)
        return {"all-gather": once, "reduce-scatter": once, "all-reduce": 2 * once}[kind]

    def _across(self, kind: str, group: Group, payload: float) -> float:
        s, chip = group.num_slices, self.slice.chip
        if s == 1:
            return 0.0
        devices_per_host = chip.chips_per_host * chip.devices_per_chip
        rate = chip.dcn_bytes_per_second_per_host / devices_per_host
        own = payload / group.num_devices * (s - 1) / s
        sent = {
            "all-gather": own,
            "reduce-scatter": own,
            "all-reduce": 2 * own,
            "all-to-all": payload * (s - 1) / s,
            "collective-permute": payload,
        }
        return sent[kind] / rate

    def _group(self, axes: tuple[str, ...]) -> Group:
        """Describe the group of the mesh's first device; the others are alike."""
        index = tuple(slice(None) if axis in axes else 0 for axis in AXES)
        places = self._places[index].reshape(-1, self._places.shape[-1])
        *coords, cores, slices = places.T
        first = places[slices == slices[0]]
        chips = {tuple(place[:-2]) for place in first.tolist()}
        shared = len(set(cores.tolist())) == 1 and self.slice.chip.devices_per_chip > 1
        return Group(
            num_slices=len(set(slices.tolist())),
            num_devices=len(first),
            num_chips=len(chips),
            spans=tuple(self._spans(coords)),
            share=1 / self.slice.chip.devices_per_chip if shared else 1.0,
        )

    def _spans(self, coords: Sequence[np.ndarray]) -> Iterator[_Span]:
        for values, size, wraps in zip(coords, self.slice.shape, self.slice.wraps, strict=False):
            taken = sorted(set(values.tolist()))
            count = len(taken)
            if count > 1:
                gap = max((taken[-1] - taken[0]) // (count - 1), 1)
                yield _Span(count, gap, is_ring=wraps and count * gap == size)


def _others(count: int) -> float:
    """Return the share of a payload that the others of so many have."""
    return (count - 1) / count


def _crossing(count: int) -> float:
    """Return how many payloads of one device cross the middle of so many, one way."""
    return (count // 2) * (count - count // 2) / count
