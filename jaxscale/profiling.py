"""An xprof trace of some steps of a run, for `xprof` or TensorBoard's profile page.

Every process traces the same steps: a trace slows a step down, and one slow process among fast ones
would hold up, or deadlock, the collectives that it shares with the others.
"""

import os
from typing import Any

import jax
from etils import epath

from jaxscale import records


class StepProfiler:
    """Traces the first to the last of `steps` into workdir/profile. Call it on every process."""

    def __init__(self, workdir: str | os.PathLike[str], steps: tuple[int, ...]) -> None:
        """Plan a trace; `steps` is a first and a last step, or empty for none."""
        self.directory = epath.Path(workdir) / records.PROFILE_DIR
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._session: str | None = None
        self._mark: jax.profiler.StepTraceAnnotation | None = None

    def before(self, step: int) -> None:
        """Start the trace with the first step of the range, or where a resumed run enters it."""
        if step not in self._steps:
            return
        if self._session is None:
            self._session = f"steps_{step}_{self._steps[-1]}"
            options = jax.profiler.ProfileOptions()
            options.session_id = f"{self._session}.process_{jax.process_index()}"
            jax.profiler.start_trace(str(self.directory), profiler_options=options)
        self._mark = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._mark.__enter__()

    def after(self, step: int, outputs: Any = None) -> None:
        """End the trace if this was its last step, once the device has computed `outputs`."""
        if self._mark is None:
            return
        last = step == self._steps[-1]
        if last:
            jax.block_until_ready(outputs)
        self._end_mark()
        if last:
            self.close()

    def close(self) -> None:
        """End a trace that is under way, as when a run stops early."""
        if self._session is None:
            return
        self._end_mark()
        jax.profiler.stop_trace()
        self._gather(self._session)
        self._session = None

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _gather(self, session: str) -> None:
        """Move this process's files into the session's one folder, which xprof shows as one run.

        JAX names them after the host alone, and so would the processes of one host overwrite each
        other's.
        """
        process = f"process_{jax.process_index()}"
        sessions = self.directory / "plugins" / "profile"
        (sessions / session).mkdir(parents=True, exist_ok=True)
        for file in (sessions / f"{session}.{process}").iterdir():
            for ending in (".xplane.pb", ".trace.json.gz"):
                if file.name.endswith(ending):
                    host = file.name.removesuffix(ending)
                    file.rename(sessions / session / f"{host}.{process}{ending}")
        (sessions / f"{session}.{process}").rmtree()
