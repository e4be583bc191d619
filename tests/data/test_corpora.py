"""Every kind of corpus gives the same batches, by hash, on any mesh and number of processes."""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys

import jax
import pytest

from jaxscale.config import DataConfig
from jaxscale.data.corpus import open_corpus
from jaxscale.data.loader import Loader
from jaxscale.train.step import batch_hash
from tests.emulators import free_port
from tests.programs import assemble_tiny

ROOT = pathlib.Path(__file__).parents[2]
KINDS = ("tfds", "prompts", "mixture", "s3")
MESHES = (
    {"data": 8},
    {"fsdp": 4, "sequence": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"sequence": 8},
)
STEPS = 3


@pytest.fixture(scope="module")
def corpora(
    tfds_folder: pathlib.Path, s3_bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, DataConfig]:
    """Return the config of a corpus of each kind, prepared."""
    import fsspec

    folder = tmp_path_factory.mktemp("corpora")
    dice = random.Random(0)
    rows = [
        {"q": "?" * dice.randrange(20), "a": f"answer {number} " * dice.randrange(1, 9)}
        for number in range(60)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fsspec.filesystem("s3").pipe(
        {f"{s3_bucket}/equal/{n}.txt": f"object {n} ".encode() * (n + 1) for n in range(40)}
    )
    tfds, pairs = "tfds:jaxscale_words/short", f"files:{folder}/pairs.jsonl#q,a"
    sources = dict(
        zip(
            KINDS,
            (tfds, pairs, f"0.7 {pairs}; 0.3 {tfds}", f"files:{s3_bucket}/equal/**"),
            strict=True,
        )
    )
    configs = {
        kind: DataConfig(source=source, length=16, cache_dir=str(folder / "caches"))
        for kind, source in sources.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tfds_folder))
        for data in configs.values():
            open_corpus(data)
        yield configs


def hashes(data: DataConfig, mesh: dict[str, int] | None = None) -> list[int]:
    """Return the hashes of the first training batches on a mesh, one device by default."""
    assembly = assemble_tiny(mesh=mesh)
    loader = Loader(
        open_corpus(data), data, global_batch_size=8, seed=3, sharding=assembly.batch_sharding
    )
    compute = jax.jit(functools.partial(batch_hash, rules=assembly.rules))
    with jax.set_mesh(assembly.mesh), contextlib.closing(loader.batches()) as batches:
        return [int(compute(batch)) for batch in itertools.islice(batches, STEPS)]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_equal_on_every_mesh(kind: str, corpora: dict[str, DataConfig]) -> None:
    expected = hashes(corpora[kind])
    assert len(set(expected)) == STEPS
    for mesh in MESHES:
        assert hashes(corpora[kind], mesh) == expected, mesh


def test_corpora_differ(corpora: dict[str, DataConfig]) -> None:
    firsts = {hashes(data)[0] for data in corpora.values()}
    assert len(firsts) == len(KINDS)


ONE_PROCESS = """
import json, sys
from jaxscale import runtime

port, count, number, corpora = sys.argv[1:]
runtime.set_jax_flags()
runtime.fake_devices(f"cpu:{8 // int(count)}")
group = runtime.ProcessGroup(f"127.0.0.1:{port}", int(count), int(number), "test")
runtime.join(group, timeout_seconds=60)
from jaxscale.config import DataConfig
from tests.data.test_corpora import hashes

found = {}
for kind, values in json.loads(corpora).items():
    found[kind] = hashes(DataConfig(**values), {"data": 4, "sequence": 2})
print(json.dumps(found))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_batches_are_equal_on_every_number_of_processes(
    count: int, corpora: dict[str, DataConfig]
) -> None:
    """Each process reads its rows alone, and the hash is of what all of them hold."""
    expected = {kind: hashes(data) for kind, data in corpora.items()}
    values = json.dumps({kind: vars(data) for kind, data in corpora.items()})
    port = str(free_port())
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_PROCESS, port, str(count), str(number), values],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    outputs = [run.communicate(timeout=180) for run in runs]
    assert [run.returncode for run in runs] == [0] * count, outputs
    for output, _ in outputs:
        assert json.loads(output.splitlines()[-1]) == expected
