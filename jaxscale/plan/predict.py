"""From a compiled step to its predicted time: schedule, placement and prices put together."""

import dataclasses
import functools

from jaxscale.config import MeshConfig
from jaxscale.parallel.mesh import abstract_mesh, device_grid
from jaxscale.plan.compile import Compiled, Job, Options
from jaxscale.plan.kernels import Attention
from jaxscale.plan.schedule import Event, read_schedule
from jaxscale.plan.shares import SHARES, Shares
from jaxscale.plan.timeline import Prices, Timeline, predict
from jaxscale.plan.torus import Network, Slice, described_devices


def predict_step(
    job: Job,
    compiled: Compiled,
    *,
    shares: Shares = SHARES,
    is_causal: bool = True,
    wanted: Options | None = None,
) -> Timeline:
    """Return the predicted time line of a step that the compiler found room for.

    Args:
      job: what was compiled.
      compiled: what came out.
      shares: what of the chip's peaks is achieved.
      is_causal: False where attention is to compute the masked half of its pairs too.
      wanted: the compiler's options that the step is to run with, of which the slow ones, those
        that make matmuls' tiles larger, may have been left out; the chip's own by default.

    Raises:
      ConfigError: the program calls a kernel whose time nobody knows.
    """
    assert compiled.text is not None
    prices = prices_of(job, shares=shares, is_causal=is_causal)
    wanted = job.slice.chip.compiler_options if wanted is None else wanted
    prices = dataclasses.replace(prices, has_small_tiles=job.lacks_slow_options(wanted))
    return predict(schedule_of(compiled.text, job), prices)


def prices_of(job: Job, *, shares: Shares = SHARES, is_causal: bool = True) -> Prices:
    """Return what a job's events cost on its slice."""
    config = job.config
    return Prices(
        chip=job.slice.chip,
        shares=shares,
        network=network(config.mesh, job.slice),
        attention=Attention(config.data.length, config.model.attention_window, is_causal),
    )


@functools.lru_cache(maxsize=64)
def schedule_of(text: str, job: Job) -> tuple[Event, ...]:
    """Return the events of a job's program."""
    return read_schedule(text, abstract_mesh(job.config.mesh, job.slice.num_devices))


@functools.lru_cache(maxsize=4096)
def network(mesh: MeshConfig, slice_: Slice) -> Network:
    """Return the network of a slice with a mesh placed on it."""
    return Network(slice_, device_grid(mesh, described_devices(slice_)))
