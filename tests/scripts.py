"""Runs the scripts of the project as a user would: without the flags and the cache of the tests."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def check_script(name: str, *arguments: str) -> None:
    """Run `scripts/NAME --check` and fail with all that it says if it does."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), "--check", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
