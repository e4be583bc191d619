"""Checkpoints: three items per step, written in the background and read onto any mesh (Orbax).

`workdir/checkpoints/STEP/` holds `params` (a plain nested dict), `optimizer` (any pytree) and
`meta` (JSON). A step appears only when all of it is on disk. Neither the model nor the optimizer
library is needed here: a restore is told by abstract arrays what to make, and where.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jaxscale import records
from jaxscale.config import CheckpointConfig, ConfigError

PARAMS, OPTIMIZER, META = "params", "optimizer", "meta"

# Orbax shares the writing of a replicated array among its replicas by slicing it on the devices.
# Each shape compiles a program for that, which is worth its time for large arrays only.
SHARED_WRITE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` found, with the shardings that were asked for."""

    step: int
    params: Any
    optimizer: Any
    meta: dict[str, Any]


class Checkpointer:
    """The checkpoints of one workdir. All processes of a run make the same calls in the same order.

    Close a writer, or use it in a `with`: a save that is under way when Python ends is lost. A
    writer removes what an interrupted save left behind; a second program that looks into the
    workdir of a running one must therefore say `read_only`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        config: CheckpointConfig,
        *,
        read_only: bool = False,
    ) -> None:
        self.directory = _directory(workdir)
        self._manager: ocp.CheckpointManager | None = None
        if not read_only:
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers={
                    PARAMS: _writer(),
                    OPTIMIZER: _writer(),
                    META: ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_keep(config), cleanup_tmp_directories=True
                ),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, *, params: Any, optimizer: Any, meta: Mapping[str, Any]) -> float:
        """Start to save a step, and return the seconds that the caller was held up.

        The arrays may be donated as soon as this returns. A save that is still under way is waited
        for first, and raises here if it failed. A step that has been saved is left as it is.
        """
        assert self._manager is not None, "this Checkpointer is read-only or closed"
        start = time.monotonic()
        # The manager's own list is the same on every process at every moment; the disk is not.
        if step not in self._manager.all_steps():
            items = {
                PARAMS: ocp.args.PyTreeSave(params),
                OPTIMIZER: ocp.args.PyTreeSave(optimizer),
                META: ocp.args.JsonSave(dict(meta)),
            }
            # Without `force` a step below the newest would be skipped in silence.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        return time.monotonic() - start

    def wait(self) -> None:
        """Return when the save under way is on disk; raise what made it fail."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the save under way, and let go of threads and files."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def all_steps(self) -> list[int]:
        """Return the steps on disk, oldest first; a save that is under way is not among them."""
        if not self.directory.exists():
            return []
        names = ocp.path.step.standard_name_format()
        return sorted(found.step for found in names.find_all(self.directory))

    def latest_step(self) -> int | None:
        """Return the newest step on disk, None if there is none."""
        return max(self.all_steps(), default=None)

    def read_meta(self, step: int) -> dict[str, Any]:
        """Read the JSON item of a step."""
        return dict(ocp.JsonCheckpointHandler().restore(self._step_directory(step) / META))

    def restore(self, step: int, *, params: Any, optimizer: Any) -> Restored:
        """Read a step as arrays of the shardings given, whatever mesh wrote it.

        Args:
          step: one of `all_steps()`.
          params: pytree of jax.ShapeDtypeStruct with shardings; values are cast to its dtypes.
          optimizer: the same for the optimizer's state.

        Raises:
          ConfigError: no such step, or other names or shapes than those asked for.
        """
        return Restored(
            step=step,
            params=self._restore_item(step, PARAMS, params),
            optimizer=self._restore_item(step, OPTIMIZER, optimizer),
            meta=self.read_meta(step),
        )

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Read the parameters of a step alone; arguments and errors as for `restore`."""
        return self._restore_item(step, PARAMS, abstract)

    def _restore_item(self, step: int, item: str, abstract: Any) -> Any:
        path = self._step_directory(step) / item
        handler = ocp.PyTreeCheckpointHandler()
        _check_shapes(path, handler.metadata(path).tree, abstract)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        return handler.restore(path, args=ocp.args.PyTreeRestore(abstract, restore_args))

    def _step_directory(self, step: int) -> epath.Path:
        steps = self.all_steps()
        if step not in steps:
            found = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"no checkpoint of step {step} in {self.directory}; found: {found}")
        return self.directory / str(step)


def read_params(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the parameters of `workdir/checkpoints/STEP` as a nested dict of numpy arrays.

    Raises:
      ConfigError: there is no checkpoint at `path`.
    """
    params = epath.Path(path) / PARAMS
    if not params.exists():
        raise ConfigError(f"no checkpoint at {path}; give a folder like WORKDIR/checkpoints/100")
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(params).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return dict(handler.restore(params, args=ocp.args.PyTreeRestore(tree, as_numpy)))


def _directory(workdir: str | os.PathLike[str]) -> epath.Path:
    """Return the checkpoint folder of a workdir that may be local, gs:// or s3://."""
    text = os.fspath(workdir)
    return epath.Path(text if "://" in text else os.path.abspath(text)) / records.CHECKPOINTS_DIR


def _writer() -> ocp.PyTreeCheckpointHandler:
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_WRITE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _keep(config: CheckpointConfig) -> Any:
    policies = ocp.checkpoint_managers
    newest = policies.LatestN(config.keep_last)
    if not config.keep_every:
        return newest
    return policies.AnyPreservationPolicy([newest, policies.EveryNSteps(config.keep_every)])


def _check_shapes(path: epath.Path, saved: Any, wanted: Any) -> None:
    """Raise ConfigError for the first array that is not in both trees with one shape."""
    old, new = _shapes(saved), _shapes(wanted)
    remedy = "restore with the config that made it (config.json of its workdir)"
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        here = f"{new[name]} in this config" if name in new else "unknown to this config"
        there = f"{old[name]} there" if name in old else "missing there"
        raise ConfigError(f"checkpoint {path}: {name} is {there} and {here}; {remedy}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return {"layers/query": (8, 128, 128), ...}, of arrays or of what Orbax notes about them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }
