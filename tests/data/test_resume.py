"""An interrupted prepare goes on, and its result is byte for byte the uninterrupted one."""

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import random
import subprocess
import sys
import time

import psutil
import pytest

from jaxscale.config import ConfigError, DataConfig, Stopped
from jaxscale.data import kept_shards
from jaxscale.data import prepare as prepare_module
from jaxscale.data.prepare import PrepareResult, prepare, shard_ranges
from jaxscale.data.shards import DoneShard, SkippedCounts, Work, write_shard
from jaxscale.data.sources import open_source
from jaxscale.data.token_cache import TokenCache
from jaxscale.data.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.data.conftest import SmallFiles


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 20_000)


@pytest.fixture
def whole(fresh: DataConfig, tmp_path: pathlib.Path) -> TokenCache:
    """Return the cache that nothing interrupted."""
    return TokenCache(prepare(dataclasses.replace(fresh, cache_dir=str(tmp_path / "w"))).path)


def partial_of(data: DataConfig) -> pathlib.Path:
    (partial,) = pathlib.Path(data.cache_dir).glob(".*.partial")
    return partial


def kept(data: DataConfig) -> list[pathlib.Path]:
    return sorted(partial_of(data).glob("whole/[0-9]*"))


def stop_after(data: DataConfig, shards: int, **options: object) -> None:
    """Prepare until some shards are done."""
    calls: list[int] = []
    with pytest.raises(Stopped, match=r"\d+ of \d+ shards of the token cache are done and kept"):
        prepare(
            data,
            progress=lambda done, total: calls.append(done),
            stop=lambda: len(calls) >= shards,
            **options,  # type: ignore[arg-type]
        )
    assert multiprocessing.active_children() == []


def assert_same_cache(result: PrepareResult, whole: TokenCache) -> None:
    assert TokenCache(result.path).fingerprint == whole.fingerprint
    files = {path.name for path in result.path.iterdir()}
    assert files == {"index.json", *whole.index["files"]}
    for name in whole.index["files"]:
        assert (result.path / name).read_bytes() == (whole.path / name).read_bytes()
    # Nothing else is left.
    beside = {path.name for path in result.path.parent.iterdir()}
    assert beside - {"sources"} == {result.path.name}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_prepare_goes_on(fresh: DataConfig, workers: int, whole: TokenCache) -> None:
    stop_after(fresh, 5, workers=workers)
    found = len(kept(fresh))
    assert found >= 5
    assert not list(partial_of(fresh).glob("whole/.*")), "shards that were begun are gone"
    result = prepare(fresh, workers=workers)
    assert (result.reused, result.found_shards) == (False, found)
    assert result.shards > found
    assert_same_cache(result, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_leaves_what_is_done(
    fresh: DataConfig, workers: int, whole: TokenCache
) -> None:
    def interrupt(done: int, total: int) -> None:
        assert 0 < done < total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(fresh, workers=workers, progress=interrupt)
    assert multiprocessing.active_children() == []
    found = len(kept(fresh))
    assert found
    result = prepare(fresh)
    assert result.found_shards == found
    assert_same_cache(result, whole)


def damage_size(shard: pathlib.Path) -> None:
    file = next(shard.glob("*.array_record"))
    file.write_bytes(file.read_bytes()[:-1])


def damage_content(shard: pathlib.Path) -> None:
    file = next(shard.glob("*.array_record"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_file(shard: pathlib.Path) -> None:
    next(shard.glob("*.array_record")).unlink()


def cut_record(shard: pathlib.Path) -> None:
    path = shard / "shard.json"
    path.write_text(path.read_text()[:-9])


@pytest.mark.parametrize("damage", [damage_size, damage_content, lose_file, cut_record])
def test_a_shard_that_is_not_whole_is_written_again(
    fresh: DataConfig, whole: TokenCache, damage: object
) -> None:
    stop_after(fresh, 6)
    found = kept(fresh)
    damage(found[2])  # type: ignore[operator]
    result = prepare(fresh)
    assert result.found_shards == len(found) - 1
    assert_same_cache(result, whole)


def test_what_a_shard_skipped_is_kept_with_it(tmp_path: pathlib.Path) -> None:
    skipped = {"empty": SkippedCounts(7, ("a", "b")), "not UTF-8": SkippedCounts(1, ("c",))}
    with kept_shards.begun(tmp_path, 3) as folder:
        kept_shards.keep(tmp_path, 3, DoneShard({}, skipped, folder))
    found = kept_shards.find(tmp_path, 3)
    assert found is not None
    assert found.skipped == skipped


def test_force_starts_anew(fresh: DataConfig, whole: TokenCache) -> None:
    stop_after(fresh, 5)
    before = kept(fresh)
    stop_after(fresh, 3, force=True)
    assert kept(fresh) == before, "that of a forced prepare is dropped, and no other"
    result = prepare(fresh, force=True)
    assert result.found_shards == 0
    assert_same_cache(result, whole)


def test_the_second_pass_goes_on_too(fresh: DataConfig, tmp_path: pathlib.Path) -> None:
    """Where whole documents cannot be held apart, the end of each is, in a second pass."""
    rare = dataclasses.replace(fresh, validation_fraction=1e-9)
    total = len(shard_ranges(open_source(fresh.source, cache_dir=tmp_path)))
    stop_after(rare, total + 4)
    assert len(kept(rare)) == total
    result = prepare(rare)
    assert result.found_shards == 4
    again = prepare(dataclasses.replace(rare, cache_dir=str(tmp_path / "again")))
    assert_same_cache(result, TokenCache(again.path))


def test_leftovers_go_after_a_while(fresh: DataConfig) -> None:
    """A killed prepare leaves its half shard; a corpus that changed leaves a whole folder."""
    stop_after(fresh, 2)
    partial = partial_of(fresh)
    begun = partial / "whole" / ".00007.dead"
    other = partial.with_name(".files-other.partial")
    for folder in (begun, other / "whole" / "00001"):
        folder.mkdir(parents=True)
        (folder / "file").touch()

    def age(folder: pathlib.Path, seconds: float) -> None:
        then = time.time() - seconds
        for path in (folder, *folder.rglob("*")):
            os.utime(path, (then, then))

    age(begun, 0.9 * kept_shards.BEGUN_SECONDS)
    age(other, 0.9 * kept_shards.KEPT_SECONDS)
    stop_after(fresh, 3)
    assert begun.exists()
    assert other.exists()
    age(begun, 1.1 * kept_shards.BEGUN_SECONDS)
    age(other, 1.1 * kept_shards.KEPT_SECONDS)
    stop_after(fresh, 4)
    assert not begun.exists()
    assert not other.exists()
    assert partial.exists()


def test_a_shard_stops_when_told(fresh: DataConfig, tmp_path: pathlib.Path) -> None:
    source = open_source(fresh.source, cache_dir=tmp_path)
    work = Work(source, load_tokenizer("bytes"), tmp_path, validation_below=0)
    written = write_shard(work, 0, range(5))
    assert written is not None
    assert len(written.splits["train"].document_starts) == 5
    asked = iter([False, False, True])
    assert write_shard(work, 1, range(5), stop=functools.partial(next, asked)) is None


# Real processes: `jaxscale prepare` with small shards and a source that takes its time.
SLOW_PREPARE = """
import sys, time
from jaxscale import cli
from jaxscale.data import files, prepare

read = files.FilesSource.__getitem__

def slow_read(self, index):
    time.sleep(0.01)
    return read(self, index)

files.FilesSource.__getitem__ = slow_read
prepare.SHARD_BYTES = 20_000

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def command(fresh: DataConfig, tmp_path: pathlib.Path) -> list[str]:
    script = tmp_path / "slow_prepare.py"
    script.write_text(SLOW_PREPARE)
    knobs = ("source", "cache_dir", "validation_fraction")
    return [
        *(sys.executable, str(script), "prepare"),
        f"--config={ROOT / 'configs' / 'lm.py'}:tiny",
        *(f"--config.data.{knob}={getattr(fresh, knob)}" for knob in knobs),
    ]


def start(command: list[str], *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def finished(data: DataConfig) -> list[pathlib.Path]:
    return list(pathlib.Path(data.cache_dir).glob(".*.partial/whole/[0-9]*"))


def wait_for_shards(run: subprocess.Popen[str], data: DataConfig, number: int) -> None:
    while len(finished(data)) < number:
        assert run.poll() is None, run.communicate()
        time.sleep(0.005)


def test_killed_at_any_moment_it_goes_on(
    fresh: DataConfig, whole: TokenCache, command: list[str]
) -> None:
    dice = random.Random(0)
    workers = []
    for more in (1, 4):
        run = start(command, "--workers=2")
        wait_for_shards(run, fresh, len(finished(fresh)) + more)
        workers += psutil.Process(run.pid).children(recursive=True)
        time.sleep(dice.random() * 0.05)
        run.kill()
        run.communicate()
    assert len(workers) >= 4
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    found = len(kept(fresh))
    assert found >= 5
    run = start(command, "--workers=2")
    output, error = run.communicate(timeout=60)
    assert run.returncode == 0, error
    assert f"found done: {found} of " in output
    # The half shards of the dead go with the folder when the cache is whole.
    assert_same_cache(prepare(fresh), whole)


@pytest.mark.slow
def test_killed_many_times_at_random_it_still_ends_right(
    fresh: DataConfig, whole: TokenCache, command: list[str]
) -> None:
    script = pathlib.Path(command[1])
    script.write_text(script.read_text().replace("0.01", "0.1"))
    dice = random.Random(1)
    total = len(shard_ranges(open_source(fresh.source, cache_dir=pathlib.Path(fresh.cache_dir))))
    kills = total // 3
    assert kills > 2
    for _ in range(kills):
        run = start(command, "--workers=2")
        time.sleep(dice.uniform(0.0, 0.5))
        wait_for_shards(run, fresh, len(finished(fresh)) + dice.randint(0, 1))
        time.sleep(dice.uniform(0.0, 0.1))
        run.kill()
        run.communicate()
    run = start(command, "--workers=2")
    error = run.communicate(timeout=120)[1]
    assert run.returncode == 0, error
    assert_same_cache(prepare(fresh), whole)


def test_sigterm_stops_it_cleanly(fresh: DataConfig, whole: TokenCache, command: list[str]) -> None:
    run = start(command, "--workers=2")
    wait_for_shards(run, fresh, 3)
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) >= 2
    assert_stopped(run)
    assert psutil.wait_procs(workers, timeout=5)[1] == []
    assert len(kept(fresh)) >= 3
    assert_same_cache(prepare(fresh), whole)


def assert_stopped(run: subprocess.Popen[str]) -> None:
    """Send SIGTERM, and expect one line."""
    run.terminate()
    output, error = run.communicate(timeout=30)
    assert run.returncode == 75, error
    assert "shards of the token cache are done and kept; the same command goes on" in error
    assert (error.count("\n"), output) == (1, "")


@pytest.mark.slow
def test_sigterm_before_the_first_step_stops_train_cleanly(
    fresh: DataConfig, command: list[str], tmp_path: pathlib.Path
) -> None:
    command[command.index("prepare")] = "train"
    knobs = ("model.num_layers=1", "data.length=32", "train.global_batch_size=2", "train.steps=1")
    options = [*(f"--config.{knob}" for knob in knobs), "--devices=cpu:1"]
    run = start(command, *options, f"--workdir={tmp_path / 'run'}")
    wait_for_shards(run, fresh, 3)
    assert_stopped(run)
    found = len(kept(fresh))
    run = start(command, *options, f"--workdir={tmp_path / 'run'}")
    output, error = run.communicate(timeout=120)
    assert run.returncode == 0, error
    assert prepare(fresh).reused
    assert found >= 3
    assert "done after step 1" in output


def test_two_at_once_share_the_work(
    fresh: DataConfig, whole: TokenCache, command: list[str], tmp_path: pathlib.Path
) -> None:
    script = pathlib.Path(command[1])
    script.write_text(script.read_text().replace("0.01", "0.05"))
    runs = [start(command, "--workers=1", f"--json={tmp_path / f'{n}.json'}") for n in range(2)]
    errors = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    rows = [json.loads((tmp_path / f"{n}.json").read_text())["rows"][0] for n in range(2)]
    # Unless one was so late that it found all done.
    assert any(row["found_shards"] or row["reused"] for row in rows)
    assert_same_cache(prepare(fresh), whole)


def test_a_corpus_that_cannot_be_read_keeps_what_is_done(
    fresh: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(fresh, 3)

    def refuse(self: object, index: int) -> None:
        raise ConfigError("data.source cannot be read")

    monkeypatch.setattr("jaxscale.data.files.FilesSource.__getitem__", refuse)
    with pytest.raises(ConfigError, match="cannot be read"):
        prepare(fresh)
    assert len(kept(fresh)) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_named_and_keeps_what_is_done(
    fresh: DataConfig, workers: int, whole: TokenCache, small_files: SmallFiles
) -> None:
    stop_after(fresh, 3, workers=workers)
    found = len(kept(fresh))
    with (
        small_files(4_000),
        pytest.raises(ConfigError, match=r"caches cannot be written \(.*File too large\); free"),
    ):
        prepare(fresh, workers=workers)
    assert len(kept(fresh)) >= found
    assert not list(partial_of(fresh).glob("whole/.*"))
    assert_same_cache(prepare(fresh), whole)


def test_a_disk_that_is_full_at_the_end_is_named(
    fresh: DataConfig, whole: TokenCache, small_files: SmallFiles
) -> None:
    def interrupt_at_the_end(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(fresh, progress=interrupt_at_the_end)
    with small_files(1_000), pytest.raises(ConfigError, match=r"caches cannot be written \(File"):
        prepare(fresh)
    assert_same_cache(prepare(fresh), whole)
