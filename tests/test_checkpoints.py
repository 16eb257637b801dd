"""Checkpoints: saved completely or not at all, damage detected, a full disk does not end a run."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fuzzing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from builders import disks
from saver import NEWEST_TWO, arrays, assert_restores, fill, like

from sbs_jax.run import checkpoints
from sbs_jax.run.checkpoints import Checkpoints, Retention
from sbs_jax.storage import checksums
from sbs_jax.student import families
from sbs_jax.weights import opening

ROOT = Path(__file__).resolve().parents[1]


def run_with(
    path: Path, *steps: int, retention: Retention = NEWEST_TWO, scores: dict[int, float] | None = None
) -> Path:
    with Checkpoints(path, retention=retention, scores=scores or {}) as saver:
        for step in steps:
            saver.save(step, **arrays(step))
    return path


def opened(path: Path, *, retention: Retention = NEWEST_TWO) -> Checkpoints:
    return Checkpoints(path, retention=retention, scores={})


def names(path: Path) -> set[str]:
    return {entry.name for entry in (path / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_with(tmp_path_factory.mktemp("run"), 1, 2)


@pytest.fixture
def run(two_steps: Path, tmp_path: Path) -> Path:
    """Copies a run with steps 1 and 2."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def test_what_is_saved_comes_back_bit_for_bit(run):
    with opened(run) as saver:
        assert saver.newest_good() == 2
        assert_restores(saver, 2)
        assert_restores(saver, 1)
    assert names(run) == {"1", "2"}
    directory = run / "checkpoints" / "2"
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert set(json.loads((directory / "checksums.json").read_text())["files"]) == files - {"checksums.json"}
    assert {"parameters/manifest.ocdbt", "optimizer/manifest.ocdbt", "metadata/metadata"} <= files


def test_a_save_has_the_values_of_its_moment(tmp_path):
    """The training step reuses the memory of the state while it is being written."""
    step = jax.jit(lambda x: {name: value + 1 for name, value in x.items()}, donate_argnums=0)
    state = {f"w{i}": jnp.zeros((512, 512)) for i in range(8)}
    with Checkpoints(tmp_path, retention=Retention(newest=9, best=0, period=None), scores={}) as saver:
        for number in range(1, 7):
            state = step(state)
            saver.save(number, parameters=state, optimizer={"count": jnp.asarray([number])}, metadata={})
            for _ in range(3):
                state = jax.tree.map(lambda x: x - 1, step(state))
    shapes = like(state)
    with opened(tmp_path) as saver:  # the last save has ended
        for number in range(1, 7):
            got = saver.restore(number, parameters=shapes, optimizer=like({"count": jnp.asarray([number])}))
            assert {float(bound) for x in got.parameters.values() for bound in (x.min(), x.max())} == {float(number)}


def test_a_checkpoint_of_other_shapes_is_not_cut_to_fit(run):
    want = arrays(2)
    with opened(run) as saver:
        saver.newest_good()
        wrong = dict(like(want["parameters"]), scale=like(jnp.zeros((4,))))
        with pytest.raises(ValueError, match="shape"):
            saver.restore(2, parameters=wrong, optimizer=like(want["optimizer"]))


# ------------------------------------------------------------------------------------ damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    at = random.Random(str(path.name) + str(len(contents))).randrange(len(contents) * 8)
    contents[at // 8] ^= 1 << at % 8
    path.write_bytes(contents)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "truncated": truncate,
    "emptied": empty,
    "flipped": flip,
    "removed": Path.unlink,
    "directory": make_directory,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_seen_and_the_step_before_is_used(run, damage, caplog):
    directory = run / "checkpoints" / "2"
    whole = run.parent / "whole"
    shutil.copytree(directory, whole)
    files = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    assert len(files) > 15
    for file in files:
        if not (size := (directory / file).stat().st_size) and damage in ("truncated", "emptied", "flipped"):
            pytest.fail(f"{file} is empty")
        assert size
        DAMAGES[damage](directory / file)
        caplog.clear()
        with opened(run) as saver:
            assert saver.newest_good() == 1, file
            if file == files[-1]:  # the step before is the same whichever file of this one is damaged
                assert_restores(saver, 1)
        assert file.name in caplog.text
        (moved,) = (run / "damaged").iterdir()
        assert str(moved) in caplog.text
        shutil.rmtree(moved)
        shutil.copytree(whole, directory)


@pytest.mark.parametrize("damage", DAMAGES)
def test_readers_of_parameters_refuse_what_is_damaged_and_nothing_else(run, damage):
    directory = run / "checkpoints" / "2"
    wanted = like(arrays(2)["parameters"])
    manifest = directory / "parameters" / "manifest.ocdbt"
    untouched = manifest.read_bytes()
    DAMAGES[damage](manifest)
    said = r"checkpoints/2 cannot be used: parameters/manifest.ocdbt .*Other steps there: 1\."
    with pytest.raises(ValueError, match=said):
        opening.load_parameters(run, like=wanted)
    with pytest.raises(ValueError, match=said):
        opening.open_any(run)
    assert checkpoints.read_metadata(run, 2)["step"] == 2
    if manifest.is_dir():
        manifest.rmdir()
    manifest.write_bytes(untouched)
    # They do not read the optimizer's files.
    DAMAGES[damage](directory / "optimizer" / "manifest.ocdbt")
    got = opening.load_parameters(run, like=wanted)
    np.testing.assert_array_equal(got["encoder/w"], arrays(2)["parameters"]["encoder/w"])
    DAMAGES[damage](directory / "metadata" / "metadata")
    for read in (checkpoints.read_metadata, lambda run, step: opening.load_parameters(run, like=wanted)):
        with pytest.raises(ValueError, match="metadata/metadata "):
            read(run, 2)


def test_damage_to_the_list_itself_is_seen_wherever_it_is(run):
    """Flips every hundredth bit of the list; a flip that leaves its meaning unchanged is not damage."""
    directory = run / "checkpoints" / "2"
    text = (directory / "checksums.json").read_bytes()
    for at in range(0, len(text) * 8, 101):
        changed = bytearray(text)
        changed[at // 8] ^= 1 << at % 8
        (directory / "checksums.json").write_bytes(changed)
        problem = checksums.problem(directory)
        try:
            same = json.loads(changed) == json.loads(text)
        except ValueError:
            same = False
        assert (problem is None) == same, (at, problem)
    for nonsense in (b"[]", b"{}", b'{"files": {}, "sha256": ""}', b"null", b"[" * 100_000, b"\xff\xfe"):
        (directory / "checksums.json").write_bytes(nonsense)
        assert checksums.problem(directory) == "checksums.json is damaged"


def listing(folder: Path, files: object) -> None:
    """Writes a list of checksums whose own hash is right."""
    (folder / checksums.FILE).write_text(json.dumps({"files": files, "sha256": checksums._of_list(files)}))


NOTHING = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}


def test_what_another_process_has_hashed_is_not_read_again(tmp_path):
    for name in ("mine", "theirs"):
        (tmp_path / name).write_bytes(b"")
    told = {"theirs": {"bytes": 0, "sha256": "0" * 64}, "gone": {"bytes": 0, "sha256": "0" * 64}}
    assert checksums.write(tmp_path, known=told) == 0
    listed = json.loads((tmp_path / checksums.FILE).read_text())["files"]
    assert listed == {"mine": NOTHING, "theirs": told["theirs"]}
    assert "theirs has been changed" in (checksums.problem(tmp_path) or "")


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/passwd", "/dev/zero", ".", "", "a//b", "a/"])
def test_a_list_of_checksums_leads_to_no_other_folder(tmp_path, name):
    (tmp_path / "1").mkdir()
    (tmp_path / "secret").write_bytes(b"")
    listing(tmp_path / "1", {name: NOTHING})
    assert checksums.problem(tmp_path / "1") == f"checksums.json lists {name!r}; expected files of its own folder"


@pytest.mark.parametrize("other", fuzzing.OTHERS[:-1])
@pytest.mark.parametrize("place", ["a", checksums.FILE])
def test_what_is_no_file_is_refused_where_a_checkpoint_names_it(tmp_path, other, place):
    """A pipe would wait, and a device never end."""
    listing(tmp_path, {"a": NOTHING})
    fuzzing.stand(tmp_path / place, other)
    problem = checksums.problem(tmp_path)
    assert problem is not None
    assert problem.startswith(place)


@pytest.mark.parametrize(
    "files",
    [
        *([], 1, None, {"a": 1}, {"a": None}, {"a": []}, {"a": {"bytes": 0}}, {"a": {**NOTHING, "bytes": "0"}}),
        *({"a": {**NOTHING, "bytes": 0.0}}, {"a": {**NOTHING, "bytes": False}}, {"a": {**NOTHING, "sha256": 1}}),
    ],
)
def test_a_list_of_checksums_of_other_types_is_damaged(tmp_path, files):
    (tmp_path / "a").write_bytes(b"")
    listing(tmp_path, files)
    assert checksums.problem(tmp_path) == "checksums.json is damaged"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": 1}, "'model' is 1; expected an object"),
        ({"model": {"vocab_size": "5"}}, "'vocab_size' is \"5\"; expected a whole number"),
        ({"base": {"path": 7, "seed": None, "fingerprint": ""}}, "'base.path' is 7; expected text or null"),
        ({"tuning": {"lora": 1}}, "'tuning' is {'lora': 1}; expected a run's"),
        ({"step": "2"}, "'step' is \"2\"; expected a whole number"),
    ],
)
def test_metadata_of_other_types_name_their_file(run, change, said):
    """Their checksums are right: somebody else wrote them."""
    folder = run / "checkpoints" / "2"
    (folder / "metadata" / "metadata").write_text(json.dumps({"step": 2} | change))
    checksums.write(folder)
    with pytest.raises(ValueError, match=r"checkpoints/2/metadata/metadata: .*" + re.escape(said)):
        checkpoints.read_metadata(run, 2)


def test_strangers_in_the_directory_change_nothing(run, caplog):
    directory = run / "checkpoints"
    (directory / "2" / "parameters" / ".nfs0001").write_text("left by a network file system")
    (directory / "2" / "notes.txt").write_text("good one")
    (directory / "best").mkdir()
    (directory / "readme").write_text("")
    leftovers = ["3.1.writing", "3.2.writing", "1.removing", "3.orbax-checkpoint-tmp", "3.orbax-checkpoint-tmp-17"]
    for name in leftovers:
        (directory / name / "parameters").mkdir(parents=True)
    with opened(run) as saver:
        assert saver.newest_good() == 2
        assert_restores(saver, 2)
    assert names(run) == {"1", "2", "best", "readme"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not (run / "damaged").exists()


def test_what_only_looks_like_a_step_is_named_and_put_aside(run, caplog):
    directory = run / "checkpoints"
    (directory / "7").mkdir()
    (directory / "9").write_text("not a directory")
    shutil.copytree(directory / "2", directory / "8", ignore=shutil.ignore_patterns("checksums.json"))
    assert checkpoints.steps(run) == [1, 2]
    for _ in range(2):
        with opened(run) as saver:
            assert saver.newest_good() == 2
    assert {path.name for path in (run / "damaged").iterdir()} == {"7", "8", "9"}
    assert "step 7 cannot be used: it is incomplete: checksums.json is missing" in caplog.text
    assert "step 8 cannot be used: it is incomplete" in caplog.text
    assert "step 9 cannot be used: checksums.json cannot be read: Not a directory" in caplog.text
    # Damaged once more: both are kept to look at. And the step can be saved again.
    empty(directory / "2" / "metadata" / "metadata")
    (run / "damaged" / "2").mkdir()
    with opened(run) as saver:
        assert saver.newest_good() == 1
        assert (run / "damaged" / "2.2" / "metadata").is_dir()
        saver.save(2, **arrays(2))
        saver.wait()
        assert_restores(saver, 2)


def test_an_older_one_is_used_where_both_newest_are_damaged(run, caplog):
    with opened(run, retention=Retention(newest=3, best=0, period=None)) as saver:
        saver.save(3, **arrays(3))
    flip(run / "checkpoints" / "3" / "optimizer" / "_METADATA")
    truncate(run / "checkpoints" / "2" / "parameters" / "_METADATA")
    with opened(run) as saver:
        assert saver.newest_good() == 1
        assert_restores(saver, 1)
    assert "step 3 cannot be used: optimizer/_METADATA has been changed" in caplog.text
    assert re.search(r"step 2 cannot be used: parameters/_METADATA has \d+ bytes; expected \d+", caplog.text)
    assert {path.name for path in (run / "damaged").iterdir()} == {"2", "3"}


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(run):
    for step in (1, 2):
        flip(run / "checkpoints" / str(step) / "metadata" / "metadata")
    for _ in range(2):  # nor the second time
        with (
            opened(run) as saver,
            pytest.raises(ValueError, match=r"(?s)No checkpoint of this run is good:.*/2: metada") as e,
        ):
            saver.newest_good()
        assert "checkpoints/1: metadata/metadata has been changed" in str(e.value)
        assert f"move {run} away to start over" in str(e.value)
    run.rename(run.parent / "away")
    with opened(run) as saver:
        assert saver.newest_good() is None


MANIFEST = {"data": {}, "run": {"primary_metric": "accuracy"}}
OLD = {**MANIFEST, "starts": [{"step": 0}]}  # of a version that did not note checkpoints
NEW = {**OLD, "checkpointed": False}


@pytest.mark.parametrize(
    ("manifest", "lines", "had"),
    [
        (NEW, [("train", 2), ("validation", 3), ("train", 4)], False),  # all saves failed, then it was killed
        ({**NEW, "checkpointed": True}, [], True),
        ({**NEW, "starts": [{"step": 0}, {"step": 3}]}, [], True),
        (NEW, [("train", 2), ("test", 3)], True),
        (OLD, [("train", 2), ("validation", 3)], False),  # killed in its first save
        (OLD, [("train", 2), ("validation", 3), ("train", 4)], True),
        (OLD, [("train", 2), ("train", 4)], False),
        (None, [], False),
    ],
)
def test_a_run_whose_checkpoints_are_gone_begins_anew_only_if_it_never_had_one(tmp_path, manifest, lines, had):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    text = "".join(json.dumps({"kind": kind, "step": step}) + "\n" for kind, step in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    with opened(tmp_path) as saver:
        if not had:
            assert saver.newest_good() is None
            return
        with pytest.raises(ValueError, match=f"This run had checkpoints, but {tmp_path}/checkpoints has none"):
            saver.newest_good()


def test_the_first_checkpoint_is_noted_in_the_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(NEW))
    run_with(tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    with opened(tmp_path) as saver, pytest.raises(ValueError, match="has none"):
        saver.newest_good()


def test_a_damaged_step_is_not_restored_without_asking(run):
    flip(run / "checkpoints" / "2" / "optimizer" / "manifest.ocdbt")
    want = arrays(2)
    with opened(run) as saver:
        with pytest.raises(ValueError, match=r"optimizer/manifest.ocdbt has been changed.*Other steps there: 1"):
            saver.restore(2, parameters=like(want["parameters"]), optimizer=like(want["optimizer"]))
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .*Other steps there: 1, 2"):
            saver.restore(5, parameters=like(want["parameters"]), optimizer=like(want["optimizer"]))


def test_converted_weights_have_checksums_too(tmp_path):
    parameters = families.init(toy.MODEL, seed=3)[1]
    checkpoints.save_parameters(tmp_path, parameters, config=toy.MODEL, step=5)
    assert names(tmp_path) == {"5"}
    assert checksums.problem(tmp_path / "checkpoints" / "5") is None
    assert checkpoints.locate(tmp_path) == (tmp_path, 5)
    assert families.config_of(checkpoints.read_metadata(tmp_path, 5)["model"]) == toy.MODEL
    got = opening.load_parameters(tmp_path, like=like(parameters))
    for name, value in parameters.items():
        np.testing.assert_array_equal(got[name], value)
    flip(next((tmp_path / "checkpoints" / "5" / "parameters" / "ocdbt.process_0" / "d").iterdir()))
    with pytest.raises(ValueError, match=r"parameters/ocdbt.process_0/d/\w+ has been changed.*There is no other step"):
        opening.load_parameters(tmp_path, like=like(parameters))


def test_a_run_is_read_while_it_writes(tmp_path):
    wanted = like(arrays(1)["parameters"])
    stop, seen, errors = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            try:
                got = opening.load_parameters(tmp_path, like=wanted)
                step = int(got["scale"][0])
                np.testing.assert_array_equal(got["encoder/w"], arrays(step)["parameters"]["encoder/w"])
                seen.append(step)
            except FileNotFoundError as error:  # none yet, or its time was over
                errors.append(str(error))
            except BaseException as error:
                errors.append(repr(error))
                raise

    reader = threading.Thread(target=read)
    with opened(tmp_path) as saver:
        saver.save(1, **arrays(1))
        saver.wait()
        reader.start()
        for step in range(2, 31):
            saver.save(step, **arrays(step))
        saver.wait()
    stop.set()
    reader.join()
    assert len(set(seen)) > 3
    assert all(re.match(r"There is no checkpoint of step \d+ in ", error) for error in errors), errors


# ------------------------------------------------------------------------------------ retention


@pytest.mark.parametrize(
    ("retention", "scores", "kept"),
    [
        (Retention(newest=1, best=0, period=None), {}, {6}),
        (Retention(newest=2, best=0, period=None), {1: 9.0}, {5, 6}),
        (Retention(newest=1, best=1, period=None), {2: 3.0, 4: 3.0, 6: 1.0}, {2, 6}),
        (Retention(newest=1, best=2, period=None), {1: 1.0, 2: 3.0, 4: 3.0, 6: 3.0}, {2, 4, 6}),
        (Retention(newest=1, best=1, period=None), {2: float("nan"), 3: float("inf"), 4: 0.0}, {4, 6}),
        (Retention(newest=1, best=1, period=None), {7: 9.0, 1: 1.0}, {1, 6}),
        (Retention(newest=2, best=1, period=3), {1: 1.0}, {1, 3, 5, 6}),
        (Retention(newest=9, best=9, period=1), {}, {1, 2, 3, 4, 5, 6}),
    ],
)
def test_newest_best_and_periodic_ones_are_kept(retention, scores, kept):
    assert retention.kept([1, 2, 3, 4, 5, 6], scores=scores) == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"newest": 0}, "newest is 0"), ({"best": -1}, "best is -1"), ({"period": 0}, "period is 0")],
)
def test_impossible_retention_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Retention(**{"newest": 1, "best": 1, "period": None} | changes)


def test_retention_follows_the_scores_as_they_come(tmp_path):
    scores: dict[int, float] = {}
    seen = []
    with Checkpoints(tmp_path, retention=Retention(newest=1, best=1, period=4), scores=scores) as saver:
        for step, score in enumerate([10.0, 30.0, 30.0, None, 20.0, 40.0, 25.0], start=1):
            if score is not None:
                scores[step] = score
            saver.save(step, **arrays(step))
            saver.wait()
            seen.append(checkpoints.steps(tmp_path))
    assert seen == [[1], [2], [2, 3], [2, 4], [2, 4, 5], [4, 6], [4, 6, 7]]
    assert names(tmp_path) == {"4", "6", "7"}
    # Checked through the readers of a run.
    (tmp_path / "manifest.json").write_text(json.dumps({"data": {}, "run": {"primary_metric": "accuracy"}}))
    lines = [{"kind": "validation", "step": step, "accuracy": score} for step, score in scores.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert checkpoints.locate(tmp_path) == (tmp_path, 6)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    assert checkpoints.best_step(tmp_path) == 7


def test_scores_of_the_newest_good_checkpoint_count_before_those_of_the_metrics(tmp_path):
    def saved(step: int, **more: object) -> dict:
        return {**arrays(step), "metadata": {"step": step, **more}}

    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    line = json.dumps({"kind": "validation", "step": 2, "accuracy": 9.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line)
    with opened(tmp_path, retention=Retention(newest=9, best=0, period=None)) as saver:
        saver.save(1, **saved(1, scores={"1": 5.0}, evaluation_due=False))
        saver.save(2, **saved(2, scores={"1": 5.0}, evaluation_due=True))
        saver.wait()
        assert checkpoints.best_step(tmp_path) == 2  # its evaluation came after its save
        saver.save(3, **saved(3, scores={"1": 5.0, "2": 4.0, "3": float("nan")}, evaluation_due=False))
    assert checkpoints.best_step(tmp_path) == 1
    (tmp_path / "metrics.jsonl").write_text("damaged\n")
    assert checkpoints.best_step(tmp_path) == 1
    (tmp_path / "metrics.jsonl").unlink()
    flip(tmp_path / "checkpoints" / "3" / "metadata" / "metadata")
    assert checkpoints.best_step(tmp_path) == 1


def test_the_best_is_the_earliest_of_equals_and_the_newest_where_nothing_was_evaluated(run):
    assert checkpoints.best_step(run) == 2
    (run / "manifest.json").write_text(json.dumps({"data": {}, "run": {"primary_metric": "accuracy"}}))
    assert checkpoints.best_step(run) == 2
    lines = [{"kind": "validation", "step": step, "accuracy": 0.5} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert checkpoints.best_step(run) == 1


# ------------------------------------------------------------------------------------ storage that refuses


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes real file systems of a size, unmounted at the end."""
    with contextlib.ExitStack() as stack:
        count = itertools.count()
        yield lambda options: stack.enter_context(disks.small_disk(tmp_path / f"disk{next(count)}", options))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


NEEDED = sum(x.nbytes for name in ("parameters", "optimizer") for x in jax.tree.leaves(arrays(0)[name]))


@pytest.mark.parametrize("leaving", [NEEDED // 2, NEEDED + 8192], ids=["before", "while"])
def test_training_goes_on_when_the_disk_is_full(small_disk, caplog, leaving):
    """Fills the disk before the save, and during TensorStore's writes."""
    disk = small_disk("size=4m")
    run = disk / "run"
    with opened(run) as saver:
        saver.save(1, **arrays(1))
        saver.wait()
        other = fill(disk, leaving=leaving)
        free = shutil.disk_usage(disk).free
        held = None
        for step in range(2, 22):
            saver.save(step, **arrays(step))
            if step == 6:
                saver.wait()
                held = descriptors(), threading.active_count()
        saver.wait()
        assert held is not None
        # 15 more failures; a few descriptors and threads come and go.
        assert all(now <= then + 4 for now, then in zip((descriptors(), threading.active_count()), held, strict=True))
        assert ("MB needed" in caplog.text) == (leaving < NEEDED)
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        said = (
            r"The checkpoint of step (\d+) could not be written: No space left on device.*The newest good one is step 1"
        )
        assert [re.findall(said, text) for text in warnings] == [[str(step)] for step in range(2, 22)]
        # A write that TensorStore had not ended may make a directory anew when it is gone: the next save removes it.
        late = names(run) - {"1"}
        assert late <= {"20.20.writing", "21.21.writing"}
        assert late or shutil.disk_usage(disk).free == free
        other.unlink()
        saver.save(30, **arrays(30))
        saver.wait()
        assert names(run) == {"1", "30"}
        assert_restores(saver, 30)


def test_failed_saves_hold_no_memory(small_disk):
    rows = 120_000
    size = sum(x.nbytes for name in ("parameters", "optimizer") for x in jax.tree.leaves(arrays(0, rows=rows)[name]))
    disk = small_disk(f"size={size + 300_000}")
    fill(disk, leaving=size + 16_384)
    resident = []
    with opened(disk / "run") as saver:
        for step in range(1, 7):
            saver.save(step, **arrays(step, rows=rows))
            saver.wait()
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert checkpoints.steps(disk / "run") == []
    assert max(resident[3:]) < max(resident[:3]) + size


def test_training_goes_on_when_no_file_can_be_made(small_disk, caplog):
    """A disk without inodes fails at a different place each time."""
    for count in range(12, 100, 4):
        run = small_disk(f"size=4m,nr_inodes={count}") / "run"
        with opened(run, retention=Retention(newest=1, best=0, period=None)) as saver:
            saver.save(1, **arrays(1))
            saver.wait()
            done = checkpoints.steps(run) == [1]
            assert done or names(run) == set()
            assert done or "step 1 could not be written: No space left on device" in caplog.text
            if done:
                assert_restores(saver, 1)
                saver.save(2, **arrays(2))
                saver.wait()
                assert saver.newest_good() in (1, 2)  # the last one stays until the next is there
            caplog.clear()
        if done and checkpoints.steps(run) == [2]:
            return
    pytest.fail("even 100 files were not enough")


def test_the_last_save_is_tried_until_its_time_is_over(small_disk, caplog):
    disk = small_disk("size=4m")
    run = disk / "run"
    with opened(run) as saver:
        saver.save(1, **arrays(1))
        saver.wait()
        other = fill(disk, leaving=5000)
        begin = time.monotonic()
        with pytest.raises(OSError, match="checkpoint of step 2 was not saved") as caught:
            saver.finish(2, **arrays(2), patience=2.5)
        assert 2 <= time.monotonic() - begin < 5
        assert len([record for record in caplog.records if "step 2 could not" in record.getMessage()]) == 2
        text = str(caught.value)
        assert f"{run}/checkpoints within 2.5 s: No space left on device" in text
        assert "(0.0 MB needed, 0.0 MB free)" in text
        assert text.endswith("repeat the command: the run resumes at step 1.")
        threading.Timer(1.0, other.unlink).start()
        saver.finish(3, **arrays(3), patience=20.0)
        assert checkpoints.steps(run) == [1, 3]
        written = (run / "checkpoints" / "3" / "checksums.json").stat().st_mtime_ns
        saver.finish(3, **arrays(3), patience=0.0)  # it is there
        saver.save(3, **arrays(3))
        saver.wait()
        assert (run / "checkpoints" / "3" / "checksums.json").stat().st_mtime_ns == written
        assert_restores(saver, 3)
    # In another process that did not write it: only if it is good.
    flip(run / "checkpoints" / "3" / "parameters" / "_METADATA")
    with opened(run) as saver:
        saver.finish(3, **arrays(3), patience=0.0)
        assert_restores(saver, 3)
    assert (run / "damaged" / "3").is_dir()


def test_the_last_save_waits_for_the_one_under_way(tmp_path):
    with opened(tmp_path) as saver:
        saver.save(1, **arrays(1, rows=80_000))
        saver.finish(1, **arrays(1, rows=80_000), patience=0.0)
        assert checkpoints.steps(tmp_path) == [1]


def test_training_goes_on_when_the_disk_becomes_read_only(small_disk, caplog):
    disk = small_disk("size=4m")
    run = disk / "run"
    with opened(run) as saver:
        saver.save(1, **arrays(1))
        saver.wait()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        saver.save(2, **arrays(2))
        saver.wait()
        assert "step 2 could not be written: Read-only file system (EROFS)" in caplog.text
        with pytest.raises(OSError, match=r"step 2 was not saved.*Read-only file system"):
            saver.finish(2, **arrays(2), patience=0.0)
        assert saver.newest_good() == 1
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        saver.save(3, **arrays(3))
    assert checkpoints.steps(run) == [1, 3]


def test_errors_that_are_not_the_storage_s_are_raised(tmp_path):
    with opened(tmp_path) as saver:
        saver.save(1, **{**arrays(1), "metadata": {"model": object()}})
        with pytest.raises(TypeError, match="JSON"):
            saver.wait()
        saver.save(3, **arrays(3))
    assert names(tmp_path) == {"3"}


@pytest.mark.slow
@pytest.mark.faults
def test_two_processes_fail_together_and_go_on(small_disk, tmp_path):
    """Includes the case that only one of them cannot write."""
    disk = small_disk("size=4m")
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, str(ROOT / "tests" / "saver.py"), str(disk / "run"), f"localhost:{port}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [subprocess.Popen([*command, str(index)], **pipes) for index in (0, 1)]
    late = threading.Timer(60, lambda: [process.send_signal(signal.SIGABRT) for process in processes])  # shows stacks
    late.start()
    said = [process.communicate() for process in processes]
    late.cancel()
    assert [process.returncode for process in processes] == [0, 0], "\n\n".join(text for _, text in said)
    assert [out for out, _ in said] == ["[5]\n"] * 2
    for _, complained in said:
        for step, reason in {2: "No space left", 3: "No space left", 4: "process 1: File too large"}.items():
            assert re.search(rf"^step {step}: The checkpoint of step {step} was not saved .*{reason}", complained, re.M)
    first, second = (complained for _, complained in said)
    assert first.count("could not be written") == 6
    assert second.count("could not be written") == 0
    for noise in ("Traceback", "Event loop", "Exception ignored"):
        assert noise not in first + second
    assert {path.name for path in (disk / "run" / "checkpoints").iterdir()} == {"5"}


# ------------------------------------------------------------------------------------ kills


@contextlib.contextmanager
def saving(run: Path) -> Iterator[Callable[[], int]]:
    """Returns a function that starts a process, which saves until it is killed, and returns its id."""
    command = [sys.executable, str(ROOT / "tests" / "saver.py"), str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def start() -> int:
            asked.write("go\n")
            asked.flush()
            return int(answers.readline())

        yield start
        asked.close()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.faults)])
def test_a_kill_leaves_whole_checkpoints_alone(tmp_path, kills):
    moments = random.Random(kills)
    last, left = 0, 0
    with saving(tmp_path) as start:
        for _ in range(kills):
            process = start()
            time.sleep(moments.uniform(0.0, 0.4))
            os.kill(process, signal.SIGKILL)
            while Path(f"/proc/{process}").exists():
                time.sleep(0.01)
            complete = [name for name in names(tmp_path) if name.isdigit()]
            left += len(names(tmp_path)) - len(complete)
            for name in complete:
                assert checksums.problem(tmp_path / "checkpoints" / name) is None
            assert last < max(map(int, complete))
            last = max(map(int, complete))
            assert len(complete) <= 3
    assert left  # some kill came while one was being written
    with opened(tmp_path) as saver:
        assert saver.newest_good() == last
        assert_restores(saver, last)
    assert all(name.isdigit() for name in names(tmp_path))
    assert not (tmp_path / "damaged").exists()
