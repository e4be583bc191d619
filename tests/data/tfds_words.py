"""A dataset that the tests prepare: few and short texts, a question and an answer each."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

NUM_EXAMPLES = 60


class JaxscaleWords(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        tfds.core.BuilderConfig(name="short", description="few words"),
        tfds.core.BuilderConfig(name="long", description="many words"),
    ]

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "question": tfds.features.Text(),
                    "text": tfds.features.Text(),
                    "number": np.int64,
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number in range(NUM_EXAMPLES):
            words = f"{number} and " * (
                number % 7 + (30 if self.builder_config.name == "long" else 1)
            )
            yield number, {"question": f"{number}?", "text": words, "number": number}


def write(folder: str, config: str = "short") -> None:
    """Prepare a config below a folder, as a user of TFDS would."""
    builder = JaxscaleWords(data_dir=folder, config=config, file_format="array_record")
    builder.download_and_prepare()
