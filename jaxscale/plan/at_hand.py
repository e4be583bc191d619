"""The devices that JAX finds here, as the slice that a plan is for.

TPUs and NVIDIA GPUs are named as if they were only described, and planned for in the same way. CPU
devices have no data sheet: what is known of them is their share of the host's memory.
"""

import math
from collections.abc import Sequence
from typing import Any

import psutil

from jaxscale.config import ConfigError
from jaxscale.hardware import CHIPS, Chip, chip_for
from jaxscale.plan.torus import Slice, dims_of

CPU = "cpu"


def slice_of(devices: Sequence[Any]) -> Slice:
    """Return the slice that devices form.

    Args:
      devices: all of a backend, live ones or records with the same attributes.

    Raises:
      ConfigError: they are no CPU and no chip that is known, or only a part of a slice.
    """
    if devices[0].platform == CPU:
        return cpu_slice(len(devices), psutil.virtual_memory().total)
    kinds = sorted({device.device_kind for device in devices})
    chip = chip_for(kinds[0]) if len(kinds) == 1 else None
    if chip is None:
        raise ConfigError(
            f"the devices at hand are {len(devices)} x {' and '.join(kinds)}, and "
            f"jaxscale/hardware.py has no such chip; name the one that is most like it with "
            f"--topology=CHIP:SHAPE, of {', '.join(CHIPS)}"
        )
    return _torus(chip, devices) if chip.torus_dims else _node(chip, devices)


def cpu_slice(num_devices: int, host_bytes: int) -> Slice:
    """Return so many CPU devices, which share a host's memory; nobody published their speeds."""
    chip = Chip(
        name=CPU,
        platform=CPU,
        device_kinds=(CPU,),
        chips_per_host=num_devices,
        hbm_bytes=host_bytes // num_devices,
        hbm_bytes_per_second=math.nan,
        bf16_flops_per_second=math.nan,
        ici_link_bytes_per_second=math.nan,
        ici_links=0,
        torus_dims=0,
        dcn_bytes_per_second_per_host=math.nan,
    )
    return Slice(chip=chip, shape=(num_devices,))


def _torus(chip: Chip, devices: Sequence[Any]) -> Slice:
    """Return the slice with the coordinates of the devices; it may lie any way round."""
    slices = {device.slice_index for device in devices}
    first = [device.coords for device in devices if device.slice_index == min(slices)]
    sides = [max(places) - min(places) + 1 for places in zip(*first, strict=True)]
    shape = next((shape for shape in chip.topologies if _is_shape(dims_of(shape), sides)), "")
    found = Slice(chip=chip, shape=dims_of(shape or "1"), num_slices=len(slices))
    if not shape or found.num_devices != len(devices):
        raise ConfigError(
            f"the {len(devices)} {devices[0].device_kind} at hand, "
            f"{'x'.join(map(str, sides))} of them in a slice, are no whole slice; name it with "
            f"--topology={chip.name}:SHAPE, of {', '.join(chip.topologies)}"
        )
    return found


def _is_shape(dims: Sequence[int], sides: Sequence[int]) -> bool:
    """Tell whether sides are those of a shape; a plane's chips have a third coordinate too."""
    rest = (1,) * (len(sides) - len(dims))
    return sorted((*dims, *rest)) == sorted(sides)


def _node(chip: Chip, devices: Sequence[Any]) -> Slice:
    if str(len(devices)) not in chip.topologies:
        raise ConfigError(
            f"{len(devices)} x {devices[0].device_kind} at hand are no node of "
            f"{', '.join(chip.topologies)}; choose among them with CUDA_VISIBLE_DEVICES"
        )
    return Slice(chip=chip, shape=(len(devices),))
