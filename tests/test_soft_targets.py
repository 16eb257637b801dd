"""The store of soft targets: a teacher's numbers, resuming, damage, and what is refused."""

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import toy

from sbs_jax.data import registry
from sbs_jax.data import soft_targets as store
from sbs_jax.prediction import soft_targets as scoring
from sbs_jax.storage import lock
from sbs_jax.student import families, partitioning, soft_targets
from sbs_jax.training import students

LENGTH = 9  # tokens of a target, in toy.write_untrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds records and a run with random parameters."""
    place = tmp_path_factory.mktemp("teacher")
    toy.write_records(place / "records")
    toy.write_untrained(place)
    return place


@pytest.fixture
def teacher(folder: Path) -> students.Student:
    return students.load_student(folder / "run", layout=partitioning.DATA_PARALLEL)


def write(teacher: students.Student, output: Path, **options) -> scoring.Summary:
    return scoring.write(teacher, output=output, **{"top_k": 8, "shard_rows": 20, "batch_size": 16, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def found(place: Path, task: str) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Yields the target tokens of each training row of a task, and what a store has of them."""
    targets, examples = registry.token_tables(task, "train")["targets"], registry.examples(task, "train")
    opened = store.Store(place)
    starts = opened.find(task, [example.id for example in examples], targets, length=LENGTH)
    for row, start in enumerate(starts.tolist()):
        ids = targets.row(row, length=LENGTH)
        yield ids, opened.read([start], [len(ids)])


# ----------------------------------------------------------------------------------------- numbers


def test_the_largest_of_a_distribution_and_its_tail():
    """Also of equal logits, and of a tail that 1 minus the sum of the largest would lose."""
    logits = np.array([[[3.0, 5.0, 1.0, 5.0, 5.0, 0.0]], [[0.0, 60.0, -1.0, 20.0, 3.0, 2.0]]], np.float32)
    got = soft_targets.largest(jnp.asarray(logits), count=2)
    np.testing.assert_array_equal(got.ids_BTK, [[[1, 3]], [[1, 3]]])
    exact = logits.astype(np.float64)
    log_p = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(got.log_p_BTK[:, 0], [log_p[0, 0, [1, 3]], log_p[1, 0, [1, 3]]], rtol=1e-6, atol=1e-6)
    others = np.log([np.exp(log_p[0, 0, [0, 2, 4, 5]]).sum(), np.exp(log_p[1, 0, [0, 2, 4, 5]]).sum()])
    assert others[1] < -50
    np.testing.assert_allclose(got.log_p_tail_BT[:, 0], others, rtol=1e-6)
    whole = soft_targets.largest(jnp.asarray(logits), count=6)
    assert np.all(np.isneginf(whole.log_p_tail_BT))
    np.testing.assert_allclose(np.exp(whole.log_p_BTK).sum(axis=-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("task", ["toy_label", "toy_rationale"])
def test_the_store_has_the_teacher_s_distributions(teacher, tmp_path, task):
    """Against one row at a time without padding, summed in float64; rationales here are longer than the lengths."""
    write(teacher, tmp_path / "soft")
    forced = jax.jit(
        lambda inputs, shifted: (model := families.join(teacher.structure, teacher.parameters)).logits(
            model.states(inputs, shifted)
        )
    )
    inputs = registry.token_tables(task, "train")["inputs"]
    for row, (ids, (top, log_p, tail)) in enumerate(found(tmp_path / "soft", task)):
        if row % 23:
            continue
        shifted = np.concatenate([[0], ids[:-1]]).astype(np.int32)
        source = inputs.row(row, length=toy.UNTRAINED_LIMIT)
        logits = np.asarray(forced(source[None], shifted[None]), np.float64)[0]
        want = logits - logits.max(axis=-1, keepdims=True)
        want -= np.log(np.exp(want).sum(axis=-1, keepdims=True))
        order = np.argsort(-want, axis=-1, kind="stable")
        best = np.take_along_axis(want, order, axis=-1)
        np.testing.assert_array_equal(top, order[:, :8])
        np.testing.assert_allclose(log_p, best[:, :8], rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(tail, np.log(np.exp(best[:, 8:]).sum(axis=-1)), rtol=2e-3, atol=1e-4)
    assert (top.dtype, log_p.dtype, tail.dtype) == (np.uint16, np.float16, np.float16)


def test_rows_of_any_length_batch_and_shard_have_the_same_numbers(teacher, tmp_path):
    write(teacher, tmp_path / "a")
    write(teacher, tmp_path / "b", batch_size=8, shard_rows=7, tasks=["toy_rationale", "toy_label"])
    for task in ("toy_label", "toy_rationale"):
        for (_, one), (_, other) in zip(found(tmp_path / "a", task), found(tmp_path / "b", task), strict=True):
            np.testing.assert_array_equal(one[0], other[0])
            np.testing.assert_allclose(one[1], other[1], rtol=2e-3, atol=1e-5)


def test_ids_take_four_bytes_where_the_vocabulary_needs_them():
    assert [store.ids_dtype(size).name for size in (2**16, 2**16 + 1)] == ["uint16", "uint32"]


# ---------------------------------------------------------------------------------------- resuming


def test_resumes_after_the_last_whole_shard(teacher, tmp_path, monkeypatch):
    """Finished shards are not computed again, and the store is byte for byte that of one go."""
    assert write(teacher, tmp_path / "want") == scoring.Summary(
        rows=96,
        tokens=2 * 48 + 9 * 48,
        resumed=0,
        bytes=sum(map(len, contents(tmp_path / "want").values())) - len(contents(tmp_path / "want")[store.MANIFEST]),
    )
    computed: list[str] = []
    scored, save = scoring._scored, store.Writer._save

    def score(part, **options):
        computed.append(part.file)
        return scored(part, **options)

    def die(writer):
        if len(writer._shards) == 3:  # the third shard is there, its hash is not
            raise KeyboardInterrupt
        save(writer)

    monkeypatch.setattr(scoring, "_scored", score)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.Writer, "_save", die)
        write(teacher, tmp_path / "soft")
    assert len(computed) == 3
    with pytest.raises(ValueError, match=r"unfinished: 4 of its 6 files are not written. Repeat"):
        store.Store(tmp_path / "soft")
    assert write(teacher, tmp_path / "soft").resumed == 40
    assert computed[3:] == computed[2:3] + [
        f"toy_{name}.safetensors" for name in ("rationale-00000", "rationale-00001", "rationale-00002")
    ]
    assert contents(tmp_path / "soft") == contents(tmp_path / "want")
    assert write(teacher, tmp_path / "soft").resumed == 96


@pytest.mark.slow
def test_killed_while_it_writes_it_ends_with_the_same_bytes(starter, tmp_path):
    """`sbs soft_targets`, killed by SIGKILL twice."""
    toy.write_records(tmp_path / "records", train_rows=480)
    run = toy.write_untrained(tmp_path)
    flags = ["soft_targets", str(run), "--top_k", "8", "--batch_size", "8", "--shard_rows", "4"]

    def start(output: Path):
        return starter.alone(tmp_path, [*flags, "--output", str(output)], command=toy.SBS)

    with start(tmp_path / "want") as process:
        assert process.wait() == 0, process.complained()
        assert f"5,280 target tokens of 960 rows in {tmp_path / 'want'}, " in process.said()
    output = tmp_path / "soft"
    for count in (3, 40):
        with start(output) as process:
            processes.until(lambda count=count: len([*output.glob("*.safetensors")]) >= count, [process])
            process.send(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    with start(output) as process:
        assert process.wait() == 0, process.complained()
        assert "of these rows were resumed" in process.said()
    assert contents(output) == contents(tmp_path / "want")


def test_damaged_shards_are_found_and_made_again(teacher, tmp_path, caplog):
    write(teacher, tmp_path / "soft")
    want = contents(tmp_path / "soft")
    file = tmp_path / "soft" / "toy_rationale-00001.safetensors"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1] + b"x"), file.unlink):
        damage()
        with pytest.raises(ValueError, match=r"toy_rationale-00001.safetensors is (damaged|missing)"):
            store.Store(tmp_path / "soft")
        assert write(teacher, tmp_path / "soft").resumed == 76
        assert "toy_rationale-00001.safetensors is" in caplog.text
        assert contents(tmp_path / "soft") == want


# ----------------------------------------------------------------------------------------- refused


def test_another_teacher_and_other_data_are_refused_by_name(teacher, folder, tmp_path):
    write(teacher, tmp_path / "soft")
    before = contents(tmp_path / "soft")
    other = dataclasses.replace(teacher, parameters={name: x + 1 for name, x in teacher.parameters.items()})
    with pytest.raises(ValueError, match=r"soft targets with another teacher checksum \('\w{8}', now '\w{8}'\)"):
        write(other, tmp_path / "soft")
    with pytest.raises(ValueError, match=r"another top_k \(8, now 4\)"):
        write(teacher, tmp_path / "soft", top_k=4)
    with pytest.raises(ValueError, match=r"another tasks"):
        write(teacher, tmp_path / "soft", tasks=["toy_label"])
    toy.write_records(tmp_path / "records", train_rows=40)
    other = students.load_student(
        folder / "run", layout=partitioning.DATA_PARALLEL, records_dir=str(tmp_path / "records")
    )
    with pytest.raises(ValueError, match=r"another records toy sha256"):
        write(other, tmp_path / "soft")
    assert contents(tmp_path / "soft") == before


def test_a_folder_of_something_else_and_one_in_use_are_left_alone(teacher, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no store of soft targets; choose another --output"):
        write(teacher, tmp_path / "mine")
    (tmp_path / "soft").mkdir()
    with lock.Lock(tmp_path / "soft" / "lock", of=tmp_path / "soft"), pytest.raises(lock.HeldError, match="is in use"):
        write(teacher, tmp_path / "soft")


def test_more_tokens_than_the_vocabulary_and_tasks_without_ids_are_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"--top_k is 385, and the vocabulary of this student has 384 ids"):
        write(teacher, tmp_path / "soft", top_k=385)
    with pytest.raises(ValueError, match=r"corpus_span_corruption is not made of records"):
        write(teacher, tmp_path / "soft", tasks=["corpus_span_corruption"])
    assert not (tmp_path / "soft").exists()


def test_rows_that_the_store_lacks_are_named(teacher, tmp_path):
    write(teacher, tmp_path / "soft")
    opened = store.Store(tmp_path / "soft")
    table = registry.token_tables("toy_label", "train")["targets"]
    ids = [example.id for example in registry.examples("toy_label", "train")]
    with pytest.raises(ValueError, match=r"no soft targets of the row 'toy-new' of toy_label. Write them"):
        opened.find("toy_label", [*ids[:-1], "toy-new"], table, length=LENGTH)
    moved = np.roll(np.arange(len(table)), 1)
    with pytest.raises(ValueError, match=rf"of another text for the row '{ids[0]}' of toy_label"):
        opened.find("toy_label", ids, table.chosen(moved), length=LENGTH)
    rows = registry.token_tables("toy_rationale", "train")["targets"]
    with pytest.raises(ValueError, match=r"of another text for the row 'toy-\d+' of toy_rationale than 11 tokens"):
        opened.find("toy_rationale", ids, rows, length=16)  # those of the teacher are cut


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda value: value.pop("files"), r"'files'"),
        (
            lambda value: value["shards"].update({"../x": {"rows": 1, "tokens": 1, "bytes": 1, "sha256": ""}}),
            r"own folder",
        ),
        (lambda value: value["about"].pop("top_k"), r"'top_k'"),
    ],
)
def test_a_strange_manifest_is_refused(teacher, tmp_path, damage, message):
    write(teacher, tmp_path / "soft")
    file = tmp_path / "soft" / store.MANIFEST
    value = json.loads(file.read_text())
    damage(value)
    file.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
        store.Store(tmp_path / "soft")
    with pytest.raises(FileNotFoundError, match="is no store of soft targets"):
        store.Store(tmp_path)
