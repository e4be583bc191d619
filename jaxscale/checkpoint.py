"""Checkpoints: three items per step, written in the background and read onto any mesh (Orbax).

`workdir/checkpoints/STEP/` holds `params` (a plain nested dict), `optimizer` (any pytree) and
`meta` (JSON). A step appears only when all of it is on disk, and nothing is read of a step that
does not fit its manifest. Neither the model nor the optimizer library is needed here: a restore is
told by abstract arrays what to make, and where.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxscale import manifest, records, runtime
from jaxscale.config import CheckpointConfig, ConfigError

PARAMS, OPTIMIZER, META = "params", "optimizer", "meta"

# Orbax shares the writing of a replicated array among its replicas by slicing it on the devices.
# Each shape compiles a program for that, which is worth its time for large arrays only.
SHARED_WRITE_BYTES = 64 * 2**20
# How long the other processes wait while the primary one reads a checkpoint to verify it.
VERIFY_TIMEOUT_SECONDS = 3600
_STEP = re.compile(r"0|[1-9][0-9]*")
_barriers = itertools.count()
TEMPORARY_SUFFIX = ocp.path.atomicity_types.TMP_DIR_SUFFIX


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` found, with the shardings that were asked for."""

    step: int
    params: Any
    optimizer: Any
    meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Newest:
    """The newest step that is whole, and what is wrong with each newer one."""

    step: int
    damaged: Mapping[int, str]

    def notes(self) -> list[str]:
        """Return a line about each damaged step."""
        return [
            f"checkpoint of step {step} is damaged ({damage}); going on from step {self.step}"
            for step, damage in self.damaged.items()
        ]


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
        self._verify = config.verify
        self._damage: dict[int, str | None] = {}
        self._saving: int | None = None
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
                    preservation_policy=_keep(config),
                    cleanup_tmp_directories=True,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
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
            self._manager.wait_until_finished()
            self._saving = step
            items = {
                PARAMS: ocp.args.PyTreeSave(params),
                OPTIMIZER: ocp.args.PyTreeSave(optimizer),
                META: ocp.args.JsonSave(dict(meta)),
            }
            # Without `force` a step below the newest would be skipped in silence.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        return time.monotonic() - start

    def _seal(self) -> None:
        """Write the manifest of the step under way.

        Orbax calls this on the primary process, in the thread that saves, when all items are on
        disk and before it gives the folder its final name.
        """
        assert self._saving is not None
        final = self.directory / str(self._saving)
        temporary = self.directory / f"{final.name}{TEMPORARY_SUFFIX}"
        # A store that cannot rename has no temporary name.
        folder = temporary if temporary.exists() else final
        manifest.write_manifest(folder, self._saving, self._verify)

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
        """Return the steps on disk, oldest first, whole or damaged; not one that is under way."""
        if not self.directory.exists():
            return []
        names = (path.name for path in self.directory.iterdir())
        return sorted(int(name) for name in names if _STEP.fullmatch(name))

    def newest(self) -> Newest | None:
        """Return the newest step that is whole; None where no step was ever saved.

        Raises:
          ConfigError: there are steps, and all of them are damaged.
        """
        steps: list[int] = _from_primary(self.all_steps)
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            damage = self._find_damage(step)
            if damage is None:
                break
            damaged[step] = damage
        if damaged and _from_primary(self.all_steps)[-1:] != steps[-1:]:
            # A run is writing here: it has saved a newer step, and removed what was being read.
            self._damage.clear()
            return self.newest()
        if len(damaged) < len(steps):
            return Newest(step, damaged)
        if not damaged:
            return None
        found = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
        raise ConfigError(
            f"every checkpoint in {self.directory} is damaged ({found}); put back what is missing, "
            "or take a new workdir, or move them away to start anew"
        )

    def _find_damage(self, step: int) -> str | None:
        """Verify a step once; all processes get the answer of the primary one."""
        if step not in self._damage:
            folder = self.directory / str(step)
            self._damage[step] = _from_primary(
                lambda: manifest.find_damage(folder, step, self._verify)
            )
        return self._damage[step]

    def holds(self, step: int, item: str, name: str) -> bool:
        """Tell whether an item of a step has an entry of this name; errors as for `restore`."""
        with self._reading(step) as folder:
            return name in ocp.PyTreeCheckpointHandler().metadata(folder / item).tree

    def read_meta(self, step: int) -> dict[str, Any]:
        """Read the JSON item of a step; errors as for `restore`."""
        with self._reading(step) as folder:
            return dict(ocp.JsonCheckpointHandler().restore(folder / META))

    def restore(self, step: int, *, params: Any, optimizer: Any) -> Restored:
        """Read a step as arrays of the shardings given, whatever mesh wrote it.

        Args:
          step: one of `all_steps()`.
          params: pytree of jax.ShapeDtypeStruct with shardings; values are cast to its dtypes.
          optimizer: the same for the optimizer's state.

        Raises:
          ConfigError: no such step, a damaged one, or other names or shapes than those asked for.
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
        with self._reading(step) as folder:
            path, handler = folder / item, ocp.PyTreeCheckpointHandler()
            _check_shapes(path, handler.metadata(path).tree, abstract)
            restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
            return handler.restore(path, args=ocp.args.PyTreeRestore(abstract, restore_args))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[epath.Path]:
        """Give the folder of a whole step; one that a running writer removes is a ConfigError."""
        folder = self._step_directory(step)
        try:
            yield folder
        except Exception as error:
            damage = manifest.find_damage(folder, step, "sizes")
            if damage is None:
                raise
            raise ConfigError(
                f"checkpoint {folder} was removed or altered while it was read ({damage}); "
                "a running train keeps the newest steps alone (checkpoint.keep_last): try again"
            ) from error

    def _step_directory(self, step: int) -> epath.Path:
        steps = self.all_steps()
        if step not in steps:
            found = ", ".join(map(str, steps)) or "none"
            raise ConfigError(f"no checkpoint of step {step} in {self.directory}; found: {found}")
        _raise_if(self._find_damage(step), self.directory / str(step))
        return self.directory / str(step)


def set_aside(workdir: str | os.PathLike[str], steps: Iterable[int]) -> list[str]:
    """Rename damaged steps so that they can be saved again, and return what happened, in words.

    Every process calls it, before a writer of the workdir is made; the primary one renames.
    """
    directory = _directory(workdir)

    def rename() -> list[str]:
        done = []
        for step in steps:
            names = (f"{step}.damaged-{number}" for number in itertools.count(1))
            name = next(name for name in names if not (directory / name).exists())
            (directory / str(step)).rename(directory / name)
            done.append(f"{directory / str(step)} has become {name}")
        return done

    return list(_from_primary(rename))


def read_params(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the parameters of `workdir/checkpoints/STEP` as a nested dict of numpy arrays.

    Raises:
      ConfigError: there is no checkpoint at `path`, or a damaged one.
    """
    folder = epath.Path(path)
    if not _STEP.fullmatch(folder.name) or not folder.exists():
        raise ConfigError(f"no checkpoint at {path}; give a folder like WORKDIR/checkpoints/100")
    _raise_if(manifest.find_damage(folder, int(folder.name), "auto"), folder)
    params = folder / PARAMS
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(params).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return dict(handler.restore(params, args=ocp.args.PyTreeRestore(tree, as_numpy)))


def _directory(workdir: str | os.PathLike[str]) -> epath.Path:
    """Return the checkpoint folder of a workdir that may be local, gs:// or s3://."""
    text = os.fspath(workdir)
    return epath.Path(text if "://" in text else os.path.abspath(text)) / records.CHECKPOINTS_DIR


def _raise_if(damage: str | None, folder: epath.Path) -> None:
    if damage is not None:
        raise ConfigError(f"checkpoint {folder} is damaged ({damage}); choose another step")


def _from_primary(make: Callable[[], Any]) -> Any:
    """Return on every process the JSON value that the primary one makes out of the disk."""
    if jax.process_count() == 1:
        return make()
    text = json.dumps(make()).encode() if runtime.is_primary() else b""
    # A collective would not wait for as long as it may take to read a checkpoint.
    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"jaxscale_from_primary_{next(_barriers)}", timeout_ms=VERIFY_TIMEOUT_SECONDS * 1000)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


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
    if path.name == OPTIMIZER:
        remedy += ", or take its parameters alone into a new workdir (checkpoint.init_from)"
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
