"""Datasets of TensorFlow Datasets, read at random and without TensorFlow.

A prepared dataset is read by its files and metadata alone; one that TFDS can generate without
TensorFlow is prepared first. Only `sources.py` imports this module, when such a source is opened,
because importing TFDS takes a while.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters, read_only_builder, registered

from jaxscale.config import ConfigError
from jaxscale.data.documents import Document, Skipped, document_of, split_fields

SPLIT = "train"
PREFERRED_FIELD = "text"
MESSAGE_CHARACTERS = 200


def open_tfds(spec: str, argument: str) -> "TfdsSource":
    """Open `tfds:NAME`, `tfds:NAME#FIELD` or `tfds:NAME#PROMPT,ANSWER`.

    Raises:
      ConfigError: no such dataset, or one that cannot be prepared or read at random; a field that
        is none of its texts.
    """
    name, fields = split_fields(spec, argument)
    builder = _find(spec, name) or _prepare(spec, name)
    if file_adapters.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise ConfigError(
            f"data.source={spec!r} is prepared as {builder.info.file_format.value}, which cannot "
            f"be read at random; tfds build {name} --file_format=array_record --overwrite"
        )
    if SPLIT not in builder.info.splits:
        splits = ", ".join(builder.info.splits)
        raise ConfigError(
            f"data.source={spec!r} has no split {SPLIT!r} but {splits}; take another dataset"
        )
    return TfdsSource(os.fspath(builder.data_dir), _check_fields(spec, builder, fields))


class TfdsSource:
    """The examples of a prepared dataset's `train` split."""

    def __init__(self, folder: str, fields: tuple[str, ...]) -> None:
        self._folder, self._fields = folder, fields
        self._builder = tfds.builder_from_directory(folder)
        split = self._builder.info.splits[SPLIT]
        files = [(os.path.basename(p), os.stat(p)) for p in split.filepaths]
        words = [
            self._builder.info.full_name,
            list(split.shard_lengths),
            [[name, status.st_size, status.st_mtime_ns] for name, status in files],
            fields,
        ]
        self.fingerprint = f"tfds {hashlib.sha256(json.dumps(words).encode()).hexdigest()}"
        self.num_bytes = sum(status.st_size for _, status in files)

    def __reduce__(self) -> tuple[Any, ...]:
        return TfdsSource, (self._folder, self._fields)

    @functools.cached_property
    def _examples(self) -> Any:
        return self._builder.as_data_source(
            SPLIT,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
            file_format=file_adapters.FileFormat.ARRAY_RECORD,
        )

    @functools.cached_property
    def _features(self) -> Any:
        """The fields alone: the rest may need TensorFlow, such as images."""
        every = self._builder.info.features
        return tfds.features.FeaturesDict({field: every[field] for field in self._fields})

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Document | Skipped:
        example = self._features.deserialize_example_np(self._examples[index])
        return document_of(f"{self._builder.info.full_name}:{index}", example, self._fields)


def _places() -> dict[str, Any]:
    # TFDS itself reads the variable only when it is imported.
    folder = os.environ.get("TFDS_DATA_DIR")
    return {"data_dir": folder} if folder else {}


def _find(spec: str, name: str) -> Any:
    """Return a builder of the files of a dataset, None where it is not prepared."""
    try:
        return read_only_builder.builder_from_files(name, **_places())
    except registered.DatasetNotFoundError:
        return None
    except Exception as error:
        raise _refused(spec, error, "check the name, as in my_set/config:1.0.0") from error


def _prepare(spec: str, name: str) -> Any:
    """Prepare a dataset whose code TFDS knows. Of several processes the first to finish wins."""
    remedy = f"prepare it where TFDS can: tfds build {name} --file_format=array_record"
    try:
        builder = tfds.builder(name, file_format="array_record", **_places())
    except registered.DatasetNotFoundError as error:
        raise ConfigError(
            f"data.source={spec!r} is neither prepared in {_data_dir()} (TFDS_DATA_DIR) nor known "
            f"to TFDS; check the name, or {remedy}"
        ) from error
    except Exception as error:
        raise _refused(spec, error, remedy) from error
    tfds.disable_progress_bar()
    # What fails is told below, in one line.
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except Exception as error:
        if _find(spec, name) is None:
            raise _refused(spec, error, remedy) from error
    return _find(spec, name)


def _data_dir() -> str:
    return os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")


def _refused(spec: str, error: Exception, remedy: str) -> ConfigError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:MESSAGE_CHARACTERS]
    return ConfigError(f"data.source={spec!r} cannot be used ({reason}); {remedy}")


def _check_fields(spec: str, builder: Any, fields: tuple[str, ...]) -> tuple[str, ...]:
    """Return the fields to read: those named, else the only text, else the one named `text`."""
    features = dict(builder.info.features)
    texts = sorted(name for name in features if isinstance(features[name], tfds.features.Text))
    if not fields:
        fields = (texts[0] if len(texts) == 1 else PREFERRED_FIELD,)
    unknown = [field for field in fields if field not in texts]
    if unknown:
        raise ConfigError(
            f"data.source={spec!r} has no text {unknown[0]!r}; "
            f"name one of its texts after #: {', '.join(texts) or 'there are none'}"
        )
    return fields
