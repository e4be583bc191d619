"""The standard library of the running interpreter as a TensorFlow Datasets corpus.

The embedded default: real code on every machine, without a download. The builder writes
`array_record` files and so never needs TensorFlow. Only `sources.py` imports this module, when the
corpus is opened, because importing TFDS takes a while.
"""

import contextlib
import io
import os
import pathlib
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from jaxscale.config import ConfigError

SPLIT = "train"
# Test suites are larger than the library itself, and generated tables are not code worth learning.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
)


class PythonStdlib(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    """One example per source file: its path inside the library, and its text."""

    VERSION = tfds.core.Version("{}.{}.{}".format(*sys.version_info[:3]))

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Source files of the Python standard library.",
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        for index, (path, text) in enumerate(library_files()):
            yield index, {"path": path, "text": text}


def library_files() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each non-empty UTF-8 file of the library, by path."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in SKIPPED_FOLDERS]
        found += [pathlib.Path(folder, file) for file in files if file.endswith(".py")]
    for path in sorted(found):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text:
            yield path.relative_to(root).as_posix(), text


def open_examples(folder: str | os.PathLike[str]) -> Any:
    """Return a `tfds.data_source` of the examples, written below `folder` on the first call.

    Two processes may call this at once: the first to finish wins, and its files serve both.

    Raises:
      ConfigError: they cannot be written.
    """
    builder = _builder(folder)
    if SPLIT not in builder.info.splits:
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare()
        except (OSError, RuntimeError) as error:
            if SPLIT not in _builder(folder).info.splits:
                reason = str(error).partition(";")[0]
                raise ConfigError(
                    f"{folder} cannot be written ({reason}); free some room there, or set "
                    "data.cache_dir to another folder"
                ) from error
        builder = _builder(folder)
    return builder.as_data_source(split=SPLIT)


def _builder(folder: str | os.PathLike[str]) -> PythonStdlib:
    return PythonStdlib(data_dir=os.fspath(folder), file_format="array_record")
