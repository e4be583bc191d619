"""A run's folder: the config it belongs to, and whether another config may go on in it.

`config.json` and `environment.json` stand beside the metrics and checkpoints. Every check here
comes before anything compiles.
"""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from jaxscale import config_source, records
from jaxscale.config import Config, ConfigError


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """Return the resolved config of a workdir.

    Raises:
      ConfigError: the folder holds no run.
    """
    path = pathlib.Path(workdir) / records.CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{workdir} holds no run: it has no {records.CONFIG_FILE}")
    try:
        values = records.read_json(path)
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); take a new workdir, or write it again: "
            f"{records.CHECKPOINTS_DIR}/STEP/meta/metadata has it under `config`"
        ) from error
    return config_source.from_saved(values)


def previous_config(workdir: str | os.PathLike[str]) -> Config | None:
    """Return the resolved config of the run in a workdir, None where there is no run yet."""
    path = pathlib.Path(workdir) / records.CONFIG_FILE
    return read_config(workdir) if path.is_file() else None


def check_writable(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Return the folder, made if need be.

    Raises:
      ConfigError: it cannot be written.
    """
    if "://" in str(workdir):
        raise ConfigError(f"--workdir={workdir} is remote; take a local or a mounted folder")
    path = pathlib.Path(workdir)
    records.check_writable(path, f"--workdir={workdir}")
    return path


@contextlib.contextmanager
def locked(workdir: pathlib.Path, *, work: str = "trains") -> Iterator[None]:
    """Keep a second run out of the folder; the kernel lets go when this process ends, however.

    A file system that cannot lock a folder (some are networks) protects nothing.

    Args:
      workdir: the folder.
      work: what is done there, for the message.

    Raises:
      ConfigError: another process is at work there.
    """
    folder = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--workdir={workdir}: another process {work} there; wait for its end, or take a "
                "new workdir"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(folder)


def check_same_run(previous: Config, config: Config, workdir: str | os.PathLike[str]) -> None:
    """Check that a resolved config may go on with the run in a workdir.

    Raises:
      ConfigError: it differs in a knob that defines the run, with the differences.
    """
    changes = config_source.changes(previous, config, only_fixed=True)
    if changes:
        shown = "; ".join(map(str, changes))
        raise ConfigError(
            f"{workdir} holds a run of another config ({shown}); "
            "take a new workdir, or --allow-config-change to go on all the same"
        )


def write_config(workdir: pathlib.Path, config: Config, environment: dict[str, Any]) -> None:
    """Write the resolved config and what it runs on."""
    records.write_json(workdir / records.CONFIG_FILE, config_source.to_mapping(config))
    records.write_json(workdir / records.ENVIRONMENT_FILE, environment)


def write_tokenizer(workdir: pathlib.Path, text: str) -> None:
    """Write the run's tokenizer.json: readers need no corpus where it was trained on one."""
    (workdir / records.TOKENIZER_FILE).write_text(text, encoding="utf-8")
