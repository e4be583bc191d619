"""What verbs share: exit codes, the config that the arguments mean, results and remarks."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jaxscale import config_source, records
from jaxscale.config import Config, ConfigError
from jaxscale.resolve import resolve

# Exit codes.
DONE, FAILED, WRONG, PREEMPTED, INTERRUPTED = 0, 1, 2, 75, 130
Rows = list[dict[str, Any]]


def given_config(args: argparse.Namespace) -> Config | None:
    """Return the config of --config, or that of the workdir with overrides; None for neither."""
    if args.config:
        return config_source.load(args.config, args.overrides)
    if not args.overrides:
        return None
    from jaxscale import workdir

    config = workdir.read_config(args.workdir) if args.workdir else Config()
    for key, value in args.overrides:
        config = config_source.override(config, key, value)
    return config


def gives_mesh(args: argparse.Namespace) -> bool:
    """Tell whether the user chose the mesh, which then must fit."""
    return bool(args.config) or any(key.startswith("mesh.") for key, _ in args.overrides)


def needed_config(args: argparse.Namespace) -> Config:
    """Return the given config, else that of the run in the workdir."""
    from jaxscale import workdir

    if not args.config and not args.workdir:
        raise ConfigError("--config is missing; try --config=configs/lm.py:tiny")
    if not args.config and workdir.previous_config(args.workdir) is None:
        raise ConfigError(f"--config is missing, and --workdir={args.workdir} holds no run yet")
    return given_config(args) or workdir.read_config(args.workdir)


def needed_workdir(args: argparse.Namespace) -> str:
    """Return --workdir.

    Raises:
      ConfigError: it was not given.
    """
    if not args.workdir:
        raise ConfigError("--workdir is missing; name the folder of the run")
    return str(args.workdir)


def print_config(args: argparse.Namespace) -> None:
    """Print the resolved config."""
    import json

    config = needed_config(args)
    if args.workdir:
        from jaxscale.train.start import resolve_for

        config = resolve_for(config, args.workdir).config
    else:
        config = resolve(config)
    print(json.dumps(config_source.to_mapping(config), indent=2))


def write_result(
    args: argparse.Namespace, config: Config, rows: Rows, *, kind: str = "", environment: Any = None
) -> None:
    """Write the rows to --json, if it was given, in the envelope of all results."""
    if args.json:
        from jaxscale import runtime

        result = records.envelope(
            kind or args.verb,
            rows,
            config=config_source.to_mapping(config),
            environment=environment or runtime.describe(),
        )
        records.write_json(args.json, result)


def show_notes(notes: Sequence[str]) -> None:
    """Print remarks beside a result, where they do not mix with it."""
    from jaxscale import runtime

    if runtime.is_primary():
        for note in notes:
            print(f"jaxscale: {note}", file=sys.stderr)


def fake_devices() -> str:
    """Return what must stand behind a speed that was measured on fake devices."""
    import jax

    fake = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    return "; fake devices: mechanics, not speed" if fake else ""
