"""Everything on gs://, against an emulator over loopback with the real client libraries."""

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import buckets
import gcsfs.retry
import numpy as np
import pytest
import toy
from builders.finished_runs import assert_same, contents
from processes import Starter, until

from sbs_jax import hosts
from sbs_jax.data import records, registry, soft_targets
from sbs_jax.export import convert
from sbs_jax.prediction import files
from sbs_jax.prediction import soft_targets as scoring
from sbs_jax.prediction.engine import Predictor, Settings
from sbs_jax.run import checkpoints, saving
from sbs_jax.run.checkpoints import Checkpoints, Retention
from sbs_jax.storage import bucket_lock, checksums, lock, places
from sbs_jax.training import students
from sbs_jax.weights import opening


@pytest.fixture(scope="session")
def emulator() -> Iterator[str]:
    """One emulator for all of a worker's tests."""
    with buckets.emulator() as address:
        yield address


@pytest.fixture(scope="module")
def url(emulator: str) -> Iterator[str]:
    """Address of the emulator, which this process uses too."""
    with pytest.MonkeyPatch.context() as patch, buckets.connected(emulator, patch):
        yield emulator


@pytest.fixture
def place(url: str, request: pytest.FixtureRequest) -> places.BucketPath:
    """An empty folder in the bucket."""
    found = places.of(f"gs://{buckets.BUCKET}/{random.randrange(2**64):x}")
    assert isinstance(found, places.BucketPath)
    return found


def test_a_path_reads_and_writes_as_one_on_disk_does(place, tmp_path):
    for folder in (place, tmp_path / "x"):
        assert places.of(str(folder)) == folder
        assert not folder.exists()
        folder.mkdir(parents=True)
        file = folder / "a" / "m.json"
        file.parent.mkdir()
        with pytest.raises(FileNotFoundError):
            file.read_bytes()
        with pytest.raises(FileNotFoundError):
            file.stat()
        assert file.write_text("é\n", "utf-8") == 2
        with file.open("rb") as opened:
            assert opened.seek(1) == 1
            assert opened.read() == b"\xa9\n"
        with contextlib.suppress(ZeroDivisionError), file.open("wb") as opened:
            opened.write(b"whole\n")
        (folder / "b").write_bytes(b"")
        assert file.read_text("utf-8") == "whole\n"
        assert (file.is_file(), file.is_dir(), folder.is_dir(), folder.exists(), file.stat().st_size) == (
            *(True, False, True, True),
            6,
        )
        assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
        assert [(path, names, files) for path, names, files in places.walk(folder)] == [
            (folder, ["a"], ["b"]),
            (folder / "a", [], ["m.json"]),
        ]
        assert list(folder.glob("*/m.json")) == [file]
        assert file.relative_to(folder).as_posix() == "a/m.json"
        assert (file.name, file.suffix, file.parent.parent) == ("m.json", ".json", folder)
        (folder / "b").unlink()
        with pytest.raises(FileNotFoundError):
            (folder / "b").unlink()
        (folder / "b").unlink(missing_ok=True)


def test_a_path_in_a_bucket_is_never_a_local_one(place):
    with pytest.raises(OSError, match=r"gs://bucket/.* is in a bucket; expected a local path"):
        os.fspath(place)
    with pytest.raises(OSError, match="expected a local path"):
        np.save(place, np.zeros(2))
    with pytest.raises(OSError, match="nothing can be renamed"):
        place.rename(place.with_name("y"))
    with pytest.raises(OSError, match="mode 'r\\+b'"):
        place.open("r+b")
    with pytest.raises(ValueError, match="names no bucket"):
        places.of("gs://").exists()


def test_an_interrupted_write_leaves_the_object_as_it_was(place):
    (place / "x").write_bytes(b"before")
    with contextlib.suppress(ZeroDivisionError), (place / "x").open("wb") as file:
        file.write(b"part")
        raise ZeroDivisionError
    assert (place / "x").read_bytes() == b"before"


def test_a_large_object_is_read_in_pieces(place):
    data = np.random.default_rng(0).bytes(20_000_000)
    (place / "x").write_bytes(data)
    with (place / "x").open("rb") as file:
        assert file.read(1000) == data[:1000]
        file.seek(15_000_000)
        assert file.read(6_000_000) == data[15_000_000:]
        (place / "x").write_bytes(b"another object")
        file.seek(0)
        with pytest.raises(OSError, match=str(place)):  # the emulator does not say that it is another one
            file.read()


def test_a_fetched_copy_follows_the_bucket(place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (place / "a.npz").write_bytes(b"1")
    first = places.fetched(place / "a.npz")
    assert (first.name, first.read_bytes(), places.fetched(place / "a.npz")) == ("a.npz", b"1", first)
    (place / "a.npz").write_bytes(b"2")
    assert places.fetched(place / "a.npz").read_bytes() == b"2"
    with pytest.raises(FileNotFoundError, match="nothing to read"):
        places.fetched(place, lambda names: [])


# ------------------------------------------------------------------------------------------ the lock


def lock_at(place: places.BucketPath) -> bucket_lock.BucketLock:
    made = bucket_lock.lock_of(place, instead="another MODEL_DIR")
    assert isinstance(made, bucket_lock.BucketLock)
    return made


def test_one_of_six_takes_the_lock(place, monkeypatch):
    monkeypatch.setattr(bucket_lock, "RENEWED", 0.2)
    locks = [lock_at(place) for _ in range(6)]
    start, got = threading.Barrier(6), []

    def take(mine: bucket_lock.BucketLock) -> None:
        start.wait()
        try:
            mine.take()
            got.append(mine)
        except lock.HeldError as error:
            got.append(str(error))

    threads = [threading.Thread(target=take, args=(mine,)) for mine in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (holder,) = (each for each in got if isinstance(each, bucket_lock.BucketLock))
    refused = [each for each in got if isinstance(each, str)]
    assert len(refused) == 5
    assert all(f"{place} is in use: process {os.getpid()} on" in text for text in refused)
    holder.check()
    holder.release()
    assert (place / "lock").read_bytes() == b""
    with lock_at(place) as next_one:
        next_one.check()


def test_a_silent_holder_is_taken_over_and_finds_out(place, monkeypatch):
    monkeypatch.setattr(bucket_lock, "RENEWED", 1000.0)
    monkeypatch.setattr(bucket_lock, "STALE", 1.0)
    first = lock_at(place)
    first.take()
    first.check()
    with lock_at(place) as second:
        second.check()
        first._written -= 1000.0  # as if it had been stopped for so long
        with pytest.raises(lock.TakenOverError, match=f"took over {place}, so this one, .*choose another MODEL_DIR"):
            first.check()
        first.release()  # must not release the other's
        second.check()
        second._written -= 1000.0
        second.check()


def test_a_lock_whose_process_has_ended_here_is_free_at_once(place):
    ended = lock.Holder.of_this_process()
    gone = {**vars(ended), "pid": 2**22 + 1}  # above the largest process id
    (place / "lock").write_text(json.dumps(gone))
    begin = time.monotonic()
    with lock_at(place):
        assert time.monotonic() - begin < 5


def test_a_lost_answer_to_the_renewal_loses_no_lock(place, url, monkeypatch):
    """The first request was carried out, and its repetition is refused."""
    with lock_at(place) as mine:
        real = places.BucketPath.write_versioned

        def repeated(self, data, *, replaces=None):
            real(self, data, replaces=replaces)
            return real(self, data, replaces=replaces)

        with monkeypatch.context() as patch:
            patch.setattr(places.BucketPath, "write_versioned", repeated)
            mine._written -= 1000.0
            mine.check()
        mine._written -= 1000.0
        mine.check()


def test_a_removed_lock_is_written_again(place):
    with lock_at(place) as mine:
        (place / "lock").unlink()
        mine._written -= 1000.0
        mine.check()
        assert (place / "lock").exists()


# ------------------------------------------------------------------------------------------ checkpoints


def opened(place: places.BucketPath, **scores: float) -> Checkpoints:
    return Checkpoints(place, retention=Retention(newest=2, best=0, period=None), scores={})


def arrays(step: int) -> dict[str, object]:
    import jax.numpy as jnp

    return {"parameters": {"a": jnp.full((3, 4), step, jnp.float32)}, "optimizer": {"m": jnp.full((5,), step)}}


def saved(place: places.BucketPath, *steps: int) -> None:
    with opened(place) as run:
        for step in steps:
            run.save(step, **arrays(step), metadata={"step": step})  # pyright: ignore[reportArgumentType]


def test_steps_in_a_bucket_are_kept_verified_and_restored(place, caplog):
    saved(place, 1, 2, 3)
    assert checkpoints.steps(place) == [2, 3]
    with opened(place) as run:
        assert run.newest_good() == 3
        found = run.restore(3, **arrays(0))
    np.testing.assert_array_equal(found.parameters["a"], np.full((3, 4), 3.0))
    assert found.metadata["step"] == 3
    # What is written again, even with the same bytes, is another generation.
    name = next(name for name in (place / "checkpoints" / "3").files() if name.startswith("parameters/d/"))
    file = place / "checkpoints" / "3" / name
    file.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=f"{name} has been written again: its generation"):
        checkpoints.restore(place, 3, **arrays(0))
    with opened(place) as run:
        assert run.newest_good() == 2
    assert "moved to" in caplog.text
    assert (place / "damaged" / "3" / "checksums.json").exists()
    assert checkpoints.steps(place) == [2]


@pytest.mark.parametrize("lost", ["parameters/manifest.ocdbt", "metadata/metadata"])
def test_a_lost_object_is_named(place, lost):
    saved(place, 1)
    (place / "checkpoints" / "1" / lost).unlink()
    assert checksums.problem(place / "checkpoints" / "1") == f"{lost} is missing"


def test_what_gcsfs_refuses_costs_a_checkpoint_and_not_the_run():
    found = saving._storage_error(gcsfs.retry.HttpError({"code": 401, "message": "expired"}))
    assert isinstance(found, OSError)
    assert "expired" in str(found)
    assert saving._storage_error(TypeError("a mistake")) is None


def test_a_step_without_its_list_never_was_one(place, tmp_path):
    """An interrupted save leaves objects, which the next start removes."""
    saved(place, 1, 2)
    (place / "checkpoints" / "2" / checksums.FILE).unlink()
    assert checkpoints.steps(place) == [1]
    with opened(place) as run:
        assert run.newest_good() == 1
        assert not (place / "checkpoints" / "2").exists()
        run.save(2, **arrays(2), metadata={"step": 2})  # pyright: ignore[reportArgumentType]
    assert checkpoints.steps(place) == [1, 2]
    assert not (place / "damaged").exists()


def test_a_copy_on_disk_is_good(place, tmp_path):
    saved(place, 1)
    buckets.download(place, tmp_path)
    assert checksums.problem(tmp_path / "checkpoints" / "1") is None
    found = checkpoints.restore(tmp_path, 1, **arrays(0))
    np.testing.assert_array_equal(found.parameters["a"], np.full((3, 4), 1.0))


# ------------------------------------------------------------------------------------------ whole runs

STEPS = 24
MACROS = {"TRAIN_STEPS": STEPS, "LOG_PERIOD": 4, "EVAL_PERIOD": 8, "CHECKPOINT_PERIOD": 3, "EVAL_BATCH_SIZE": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = registry.options()
    yield toy.write_command(tmp_path_factory.mktemp("buckets"), **MACROS)
    registry.configure(before)


@pytest.fixture(scope="module")
def reference(starter: Starter, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of one process on disk."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = starter.run(run.parent, toy.train_flags(folder, run), path=[folder])
    assert done.returncode == 0, done.stderr
    return run


def in_bucket(folder: Path, place: places.BucketPath) -> tuple[list[str], places.BucketPath]:
    """Copies the records into the bucket; returns the command that trains on them, and its run."""
    buckets.upload(folder / "records", place / "records")
    run = place / "run"
    flags = [flag for flag in toy.train_flags(folder, folder) if "RECORDS_DIR" not in flag and "MODEL_DIR" not in flag]
    return [*flags, f"--gin.RECORDS_DIR={place}/records", f"--gin.MODEL_DIR={run}"], run


def has_step(run: places.BucketPath, step: int) -> bool:
    time.sleep(0.2)  # each look is some requests
    return any(found >= step for found in checkpoints.steps(run))


def assert_same_as(run: places.BucketPath, reference: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    buckets.download(run, copy)
    assert_same(copy, reference)


# Process 0 holds the lock of the run, which its successor takes over.
@pytest.mark.parametrize("kills", [(0,), pytest.param((0, 1), marks=pytest.mark.faults)], ids=["one", "both in turn"])
def test_two_processes_killed_on_a_bucket_end_as_one_on_disk(starter, folder, place, url, tmp_path, kills):
    """Records, training, evaluation, prediction and report: nothing is written into the working directory."""
    flags, run = in_bucket(folder, place)
    cwd = tmp_path / "empty"
    cwd.mkdir()
    (cwd / "gin_configs").symlink_to(Path("gin_configs").absolute())
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = {"path": [folder], "cwd": cwd}
    on_bucket = {**buckets.environment(url), **cache}
    for killed in kills:
        with starter.together(tmp_path, flags, count=2, more=on_bucket, **options) as processes:
            until(lambda killed=killed: has_step(run, 3 + 6 * killed), processes)
            processes[killed].send(signal.SIGKILL)
            processes[1 - killed].wait()
    assert not has_step(run, STEPS)
    with starter.together(tmp_path, flags, count=2, more=on_bucket, **options) as processes:
        assert [process.wait() for process in processes] == [0, 0], processes[0].complained()
    one = tmp_path / "two_on_disk"
    with starter.together(tmp_path, toy.train_flags(folder, one), count=2, **options) as processes:
        assert [process.wait() for process in processes] == [0, 0], processes[0].complained()
    assert_same_as(run, one, tmp_path)

    (tmp_path / "in.jsonl").write_text('{"id": "1", "input": "a b c"}\n{"id": "2", "input": "d e f"}\n')
    places.upload(tmp_path / "in.jsonl", place / "in.jsonl")
    said = {}
    for where, source, output in ((run, place, place / "out"), (one, tmp_path, tmp_path / "out")):
        lines = [
            ["evaluate", str(where), "--split", "test", "--batch_size=4"],
            ["predict", str(where), "--input", f"{source}/in.jsonl", "--output", f"{output}/a.csv", "--batch_size=2"],
            ["report", str(where), "--output", f"{output}/report.html"],
        ]
        if where is one:  # its report is that of test_report.py
            lines.pop()
        (tmp_path / "out").mkdir(exist_ok=True)
        done = [starter.run(tmp_path, line, environment=on_bucket, command=toy.SBS, **options) for line in lines]
        assert {each.returncode for each in done} == {0}, "\n".join(each.stderr for each in done)
        said[where] = [json.loads(done[0].stdout), (output / "a.csv").read_bytes()]
    assert b"toy" in (place / "out" / "report.html").read_bytes()
    assert said[run][0]["accuracy"] == said[one][0]["accuracy"]
    assert said[run][1] == said[one][1]
    assert [path.name for path in cwd.iterdir()] == ["gin_configs"]


@pytest.mark.slow
def test_a_sweep_in_a_bucket_ends_as_one_on_disk(starter, folder, place, url, tmp_path):
    """Its configuration lies there too; the log of the cells is there at the end, and a second sweep skips them.

    A cell is compared with the run that `sbs train` makes on disk.
    """
    buckets.upload(folder / "records", place / "records")
    short = {"TRAIN_STEPS": 6, "EVAL_PERIOD": 3, "CHECKPOINT_PERIOD": 3}
    (tmp_path / "sweep.gin").write_text(
        'from __gin__ import dynamic_registration\nimport toy_task\ninclude "gin_configs/runs/sweep.gin"\n'
        f'EXPERIMENT = "{folder / "toy.gin"}"\nDATASETS = ("toy",)\nSIZES = ("tiny",)\n'
        f'METHODS = ("step_by_step",)\nBINDINGS = {short!r}\n'
    )
    places.upload(tmp_path / "sweep.gin", place / "sweep.gin")
    environment = {**buckets.environment(url), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def swept() -> str:
        flags = [f"--gin_file={place}/sweep.gin", f"--gin.RECORDS_DIR={place}/records"]
        flags.append(f"--gin.SWEEP_DIR={place}/sweep")
        done = starter.run(tmp_path, ["sweep", *flags], path=[folder], environment=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (run,) = ("runs/toy-tiny-step_by_step-1-0",)
    assert "1 cells: 1 new." in swept()
    one = toy.train_flags(folder, tmp_path / "one", *(f"{name}={value}" for name, value in short.items()))
    done = starter.run(tmp_path, one, path=[folder])
    assert done.returncode == 0, done.stderr
    assert_same_as(place / "sweep" / run, tmp_path / "one", tmp_path)
    assert b"toy" in (place / "sweep" / "index.html").read_bytes()
    assert b"Checkpoint of step 6" in (place / "sweep" / "logs" / f"{Path(run).name}.log").read_bytes()
    assert "1 cells: 1 finished." in swept()


def busy(proxy: buckets.Proxy) -> None:
    """Every fortieth answer is that of a busy store, and the others take their time."""

    def fault(method: str, path: str) -> int | float:
        return {7: 503, 47: 429}.get(proxy.asked % 80, 0.002)

    proxy.fault = fault


def expired(proxy: buckets.Proxy) -> None:
    """For some seconds the token is not accepted."""
    end = time.monotonic() + 3
    proxy.fault = lambda method, path: 401 if time.monotonic() < end else None


def gone(proxy: buckets.Proxy) -> None:
    proxy.fault = lambda method, path: 404


def start(
    starter: Starter, folder: Path, place: places.BucketPath, proxy: buckets.Proxy, tmp_path: Path, patience: int = 30
):
    flags, run = in_bucket(folder, place)
    options = {"path": [folder], "environment": buckets.environment(proxy.url)}
    return starter.alone(tmp_path, [*flags, f"--gin.train.TrainConfig.save_patience={patience}"], **options), run


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_busy_store_changes_nothing(starter, folder, reference, place, url, tmp_path):
    with buckets.proxied(url) as proxy:
        busy(proxy)
        process, run = start(starter, folder, place, proxy, tmp_path)
        with process as running:
            assert running.wait() == 0, running.complained()
    assert proxy.refused > 5
    assert_same_as(run, reference, tmp_path)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_token_that_expires_in_the_middle_costs_at_most_a_checkpoint(
    starter, folder, reference, place, url, tmp_path
):
    with buckets.proxied(url) as proxy:
        process, run = start(starter, folder, place, proxy, tmp_path)
        with process as running:
            until(lambda: has_step(run, 3), [running])
            expired(proxy)
            assert running.wait() == 0, running.complained()
        said = running.complained()
    assert proxy.refused
    assert "Cannot write" in said
    buckets.download(run, tmp_path / "copy")
    got, want = contents(tmp_path / "copy"), contents(reference)
    lines, wanted = ([line for line in each.lines if line["kind"] != "test"] for each in (got, want))
    assert lines == wanted  # another step may be tested, if the best one was not saved
    for name, array in want.arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array, err_msg=name)


@pytest.mark.faults
def test_a_bucket_that_vanishes_is_named_and_a_later_start_resumes(starter, folder, reference, place, url, tmp_path):
    with buckets.proxied(url) as proxy:
        process, run = start(starter, folder, place, proxy, tmp_path, patience=2)
        with process as running:
            until(lambda: has_step(run, 3), [running])
            gone(proxy)
            assert running.wait() == 1
        said = running.complained()
        assert f"{run}/checkpoints" in said.splitlines()[-1] or str(run) in said.splitlines()[-1]
        proxy.fault = lambda method, path: None
        process, run = start(starter, folder, place, proxy, tmp_path)
        with process as running:
            assert running.wait() == 0, running.complained()
    assert_same_as(run, reference, tmp_path)


def test_exports_are_written_into_a_bucket_and_read_from_it(place, toy_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = toy_run.model_dir
    want = {name: array.whole() for name, array in opening.open_any(run).arrays.items()}
    chain = (run, f"{place}/hf", f"{place}/run")
    for source, target, form in zip(chain, chain[1:], ("hf", "sbs"), strict=False):
        convert.convert(source, target, convert.Options(to_form=form))
        assert opening.form_of(opening.located(target)).name == form
        got = {name: array.whole() for name, array in opening.open_any(target).arrays.items()}
        assert got.keys() == want.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)
        with pytest.raises(FileExistsError, match=f"{target} exists already"):
            convert.convert(source, target, convert.Options(to_form=form))
    assert len(checkpoints.steps(places.of(chain[2]))) == 1


def test_shards_of_answers_are_written_into_a_bucket(place, toy_run, tmp_path, monkeypatch):
    """Journals of another number of processes are found in the user's cache, its shards in the bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    predictor = Predictor.load(toy_run.model_dir, settings=Settings(batch_size=1))
    source, out = place / "in.jsonl", place / "out.jsonl"
    source.write_text("".join(f'{{"id": "{number}", "input": "a b {number}"}}\n' for number in range(33)))
    files.predict(predictor, input_path=source, output_path=tmp_path / "out.jsonl")

    def answer(index: int, count: int) -> files.Summary:
        monkeypatch.setattr(hosts, "numbered", lambda: (index, count))
        return files.predict(predictor, input_path=source, output_path=out)

    with monkeypatch.context() as patch:
        patch.setattr(hosts, "barrier", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            answer(1, 2)
    with pytest.raises(FileExistsError, match=r"out\.jsonl-00001-of-00002\.partial holds .* run of 2 processes, and"):
        answer(0, 1)
    assert [answer(index, 2).resumed for index in range(2)] == [0, 17]
    assert [path.name for path in place.iterdir()] == ["in.jsonl", *(f"out.jsonl-0000{n}-of-00002" for n in range(2))]
    found = b"".join((place / f"out.jsonl-0000{index}-of-00002").read_bytes() for index in range(2))
    assert found == (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=f"{out}-00000-of-00002 is the output of 2 processes, and this run has 3"):
        answer(0, 3)


def test_soft_targets_are_stored_in_a_bucket_and_read_from_it(place, toy_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teacher = students.load_student(toy_run.model_dir, layout=toy_run.layout)
    options: dict[str, Any] = {"top_k": 8, "shard_rows": 20}
    scoring.write(teacher, output=tmp_path / "soft", **options)
    with monkeypatch.context() as patch:  # it ends after a shard, and goes on
        patch.setattr(soft_targets.Writer, "_save", lambda writer, save=soft_targets.Writer._save: ended(writer, save))
        with pytest.raises(KeyboardInterrupt):
            scoring.write(teacher, output=f"{place}/soft", **options)
    assert scoring.write(teacher, output=f"{place}/soft", **options).resumed == 20
    there = {path.name: path.read_bytes() for path in (place / "soft").iterdir() if path.name != "lock"}
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "soft").iterdir() if path.name != "lock"}
    found, want = soft_targets.Store(f"{place}/soft"), soft_targets.Store(tmp_path / "soft")
    for got, array in zip(found.read([3], [2]), want.read([3], [2]), strict=True):
        np.testing.assert_array_equal(got, array)


def ended(writer, save):
    save(writer)
    if len(writer._shards) == 1:
        raise KeyboardInterrupt


def test_two_processes_do_not_write_one_run(starter, folder, place, url, tmp_path):
    flags, run = in_bucket(folder, place)
    flags.append("--gin.TRAIN_STEPS=100000")
    options = {"path": [folder], "environment": buckets.environment(url)}
    with starter.alone(tmp_path, flags, **options) as first:
        until(lambda: has_step(run, 3), [first])
        refused = starter.run(tmp_path, flags, **options)
        assert refused.returncode == 1
        assert f"{run} is in use: process {first.pid} on" in refused.stderr.splitlines()[-1]
        assert first.running()


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_killed_at_twenty_moments_a_run_in_a_bucket_ends_as_one_on_disk(
    starter, folder, reference, place, url, tmp_path
):
    flags, run = in_bucket(folder, place)
    options = {"path": [folder], "environment": buckets.environment(url)}
    choose, whole = random.Random(0), []
    for number in range(20):
        newest = max(checkpoints.steps(run), default=0)
        with starter.alone(tmp_path, flags, **options) as process:
            if number % 4 == 3:  # at and after a save, else in the start
                until(lambda newest=newest: has_step(run, newest + 1), [process])
            time.sleep(choose.uniform(0.0, 0.2 if number % 4 == 3 else 2.0))
            process.send(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        whole.append(checkpoints.steps(run))
        assert all(checksums.problem(run / "checkpoints" / str(step)) is None for step in whole[-1])
    print(f"{len(whole)} kills; steps after each: {whole}")
    done = starter.run(tmp_path, flags, **options)
    assert done.returncode == 0, done.stderr
    assert_same_as(run, reference, tmp_path)


def test_records_are_written_into_a_bucket(place, real_data_dir, tmp_path, caplog):
    from sbs_jax.cli import main

    command = ["records", "--dataset", "svamp", "--release", str(real_data_dir), "--records_dir"]
    assert main.main([*command, str(place)]) == 0
    assert main.main([*command, str(tmp_path)]) == 0
    assert sorted((place / "svamp").files()) == sorted(path.name for path in (tmp_path / "svamp").iterdir())
    for name in (place / "svamp").files():
        assert (place / "svamp" / name).read_bytes() == (tmp_path / "svamp" / name).read_bytes()
    assert main.main([*command, str(place)]) == 0  # equal ones stay
    with pytest.raises(FileExistsError, match="holds other records"):
        records.put_in_place(changed(tmp_path / "svamp"), place / "svamp", overwrite=False)
    records.put_in_place(changed(tmp_path / "svamp"), place / "svamp", overwrite=True)
    assert len(records.read_records(place / "svamp" / "test.jsonl")) == 1


def test_rationales_are_chosen_in_a_bucket(place, tmp_path):
    from sbs_jax.cli import main

    others = tuple(records.Rationale(rationale=text, teacher_label="b") for text in ("it is b", "b"))
    row = records.Record(
        id="1", input="a b", label="b", rationale="why not b", teacher_label="b", other_rationales=others
    )
    for folder in (place, tmp_path):
        toy.registry.add(toy.DATASET)
        records.write_records(folder / "in" / "toy" / "train.jsonl", [row])
        words = ["select", "--dataset", "toy", "--records_dir", f"{folder}/in", "--output", f"{folder}/out"]
        for _ in range(2):  # equal ones stay
            assert main.main([*words, "--by", "short", "--keep", "1"]) == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "out" / "toy").iterdir()}
    assert {name: (place / "out" / "toy" / name).read_bytes() for name in (place / "out" / "toy").files()} == written
    assert b'"rationale": "b"' in written["train.jsonl"]


def changed(folder: Path) -> Path:
    """Cuts the test rows to one."""
    rows = records.read_records(folder / "test.jsonl")[:1]
    manifest = records.read_manifest(folder)
    manifest["splits"]["test"]["sha256"] = records.write_records(folder / "test.jsonl", rows)
    records.write_manifest(folder, manifest)
    return folder
