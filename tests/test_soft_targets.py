"""The store of soft targets: a teacher's numbers, resuming, damage, and what is refused."""

import dataclasses
import functools
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
import toy
from builders import finished_runs

from sbs_jax.data import batches, features, records, registry
from sbs_jax.data import soft_targets as store
from sbs_jax.prediction import soft_targets as scoring
from sbs_jax.storage import lock
from sbs_jax.student import families, partitioning, soft_targets
from sbs_jax.training import loop, students
from sbs_jax.training.config import TrainConfig

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
    np.testing.assert_array_equal(got.ids, [[[1, 3]], [[1, 3]]])
    exact = logits.astype(np.float64)
    log_p = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(got.log_p[:, 0], [log_p[0, 0, [1, 3]], log_p[1, 0, [1, 3]]], rtol=1e-6, atol=1e-6)
    others = np.log([np.exp(log_p[0, 0, [0, 2, 4, 5]]).sum(), np.exp(log_p[1, 0, [0, 2, 4, 5]]).sum()])
    assert others[1] < -50
    np.testing.assert_allclose(got.log_p_rest[:, 0], others, rtol=1e-6)
    whole = soft_targets.largest(jnp.asarray(logits), count=6)
    assert np.all(np.isneginf(whole.log_p_rest))
    np.testing.assert_allclose(np.exp(whole.log_p).sum(axis=-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(("size", "count"), [(384, 8), (390, 5), (384, 12), (70, 2)])
def test_the_largest_by_groups_are_those_of_a_sort(size, count):
    """Also of many equal logits: of those the smallest ids, and their sum is whole."""
    logits = jnp.asarray(np.random.default_rng(size).integers(0, 9, (2, 3, size)), jnp.float32)
    got = jax.jit(functools.partial(soft_targets.largest, count=count))(logits)
    log_p = log_softmax(logits)
    order = np.argsort(-log_p, axis=-1, kind="stable")
    np.testing.assert_array_equal(got.ids, order[..., :count])
    best = np.take_along_axis(log_p, order, axis=-1)
    np.testing.assert_allclose(got.log_p, best[..., :count], rtol=1e-5)
    np.testing.assert_allclose(got.log_p_rest, np.log(np.exp(best[..., count:]).sum(axis=-1)), rtol=1e-5)


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


@pytest.mark.slow
def test_two_processes_write_one_store(starter, folder, tmp_path):
    """A teacher in parts over the devices of both; the first one writes."""
    flags = ["soft_targets", str(folder / "run"), "--top_k", "8", "--batch_size", "16", "--shard_rows", "20"]
    with starter.alone(tmp_path, [*flags, "--output", str(tmp_path / "one")], command=toy.SBS) as process:
        assert process.wait() == 0, process.complained()
    both = [*flags, "--output", str(tmp_path / "two"), "--fsdp"]
    with starter.together(tmp_path, both, count=2, command=toy.SBS) as started:
        assert [process.wait() for process in started] == [0, 0], [process.complained() for process in started]
        assert [bool(process.said()) for process in started] == [True, False]
    one, two = (json.loads((tmp_path / name / store.MANIFEST).read_text()) for name in ("one", "two"))
    assert one["about"] == two["about"]
    students.load_student(folder / "run", layout=partitioning.DATA_PARALLEL)
    for task in ("toy_label", "toy_rationale"):
        for (_, mine), (_, other) in zip(found(tmp_path / "one", task), found(tmp_path / "two", task), strict=True):
            np.testing.assert_array_equal(mine[0], other[0])
            np.testing.assert_allclose(mine[1], other[1], rtol=2e-3, atol=1e-5)


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
    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "_save", die)
        with pytest.raises(KeyboardInterrupt):
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


# ---------------------------------------------------------------------------------- the divergence


def drawn(*, size: int = 24, scale: float = 3.0, seed: int = 0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(2, 3, size)), jnp.float32)


def divergence(student: jax.Array, teacher: soft_targets.SoftTargets) -> jax.Array:
    return soft_targets.divergence(student, jax.nn.logsumexp(student, axis=-1), teacher=teacher).kl


@jax.jit
def value_and_gradient(student: jax.Array, teacher: soft_targets.SoftTargets) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(lambda student: jnp.sum(divergence(student, teacher)))(student)


def log_softmax(logits: jax.Array) -> np.ndarray:
    exact = np.asarray(logits, np.float64)
    exact = exact - exact.max(axis=-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


def test_of_the_whole_vocabulary_it_is_the_whole_divergence():
    """Values and gradients, against softmaxes in float64."""
    teacher, student = drawn(seed=1), drawn(seed=2)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    whole = soft_targets.largest(teacher, count=24)
    np.testing.assert_allclose(divergence(student, whole), np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), rtol=1e-5)
    gradient = value_and_gradient(student, whole)[1]
    np.testing.assert_allclose(gradient, np.exp(log_q) - np.exp(log_p), atol=2e-6)


def test_it_grows_with_k_up_to_the_whole_divergence():
    """By the data-processing inequality; its gradient is that of the K + 1 outcomes."""
    teacher, student = drawn(seed=1), drawn(seed=2)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    before = np.zeros((2, 3))
    for count in (1, 5, 23, 24):
        found = soft_targets.largest(teacher, count=count)
        kl = np.asarray(divergence(student, found))
        assert np.all(kl >= before - 1e-6)
        before = kl
        ids = np.asarray(found.ids)
        rest = np.ones_like(log_p, bool)
        np.put_along_axis(rest, ids, False, axis=-1)
        p, q = np.exp(log_p), np.exp(log_q)
        share = (p * rest).sum(-1, keepdims=True) / np.maximum((q * rest).sum(-1, keepdims=True), 1e-300)
        gradient = value_and_gradient(student, found)[1]
        np.testing.assert_allclose(gradient, q - np.where(rest, q * share, p), atol=2e-6, err_msg=str(count))
    assert np.all(before > 0.1)


@pytest.mark.parametrize("count", [1, 5, 24])
def test_of_the_teacher_itself_it_is_zero_and_teaches_nothing(count):
    """Exactly so but for rounding; as stored, in 16 bits, but for theirs."""
    logits = drawn()
    found = soft_targets.largest(logits, count=count)
    stored = jax.tree.map(lambda x: x.astype(jnp.float16 if x.dtype == jnp.float32 else jnp.uint16), found)
    for teacher, error in ((found, 1e-6), (stored, 2e-3)):
        value, gradient = value_and_gradient(logits, teacher)
        assert abs(float(value)) <= error
        np.testing.assert_allclose(gradient, 0.0, atol=error)


def test_a_sure_student_and_a_sure_teacher_have_finite_values():
    """Where 1 minus the sum of the K is 0 in float32, the rest keeps its digits; an empty rest adds nothing."""
    sure = jnp.zeros((1, 1, 24)).at[..., 3].set(40.0)
    for teacher, student in ((drawn(), sure), (sure, drawn()), (sure, sure), (200 * sure, -200 * sure)):
        teacher, student = teacher[:1, :1], student[:1, :1]
        for count in (1, 4, 24):
            found = soft_targets.largest(teacher, count=count)
            value, gradient = value_and_gradient(student, found)
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))
    log_p, log_q = log_softmax(drawn()[:1, :1]), log_softmax(sure)
    found = soft_targets.largest(drawn()[:1, :1], count=1)
    (best,) = np.asarray(found.ids).reshape(-1)
    p, q = np.exp(log_p[0, 0]), np.exp(log_q[0, 0])
    want = p[best] * (log_p[0, 0, best] - log_q[0, 0, best])
    rest_p, rest_q = (np.delete(each, best).sum() for each in (p, q))
    assert float(divergence(sure, found)[0, 0]) == pytest.approx(want + rest_p * np.log(rest_p / rest_q), rel=1e-5)
    found = soft_targets.largest(sure, count=1)  # the rest of a student that is as sure has 1e-16
    assert abs(float(divergence(sure, found)[0, 0])) < 1e-6


# --------------------------------------------------------------------------------------- training


LENGTHS = {"inputs": 40, "targets": 32}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds records, a toy teacher that was trained, and its soft targets."""
    place = tmp_path_factory.mktemp("taught")
    toy.write_records(place / "records")
    config = student_config(place / "teacher", place, soft_targets=None, train_steps=6, learning_rate=RATE)
    loop.train(config, config_text="")
    student = students.load_student(place / "teacher", layout=partitioning.DATA_PARALLEL)
    write(student, place / "soft", top_k=16)
    return place


RATE = optax.constant_schedule(1e-2)


def student_config(run: Path, folder: Path, **changes) -> TrainConfig:
    model = dataclasses.replace(toy.MODEL, dropout_rate=0.0)
    defaults = {"soft_targets": str(folder / "soft"), "evaluate_test": False, "model": model, "pack": True}
    defaults |= {"task_feature_lengths": LENGTHS, "train_steps": 3, "log_period": 1, "eval_period": 6}
    return toy.config(run, folder / "records", **{**defaults, **changes})


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


@pytest.mark.parametrize("pack", [False, True])
def test_a_student_that_is_its_teacher_has_no_divergence(taught, tmp_path, pack):
    """So every distribution lies at its own token: rows, packing, truncation and the shift are those of the targets."""
    config = student_config(
        tmp_path / "run", taught, pack=pack, initial_checkpoint_path=str(taught / "teacher"),
        learning_rate=optax.constant_schedule(0.0),
    )  # fmt: skip
    loop.train(config, config_text="")
    for line in lines(tmp_path / "run"):
        assert abs(line["kl/label"]) < 1e-4
        assert abs(line["kl/rationale"]) < 1e-4
        assert line["loss/label"] > 0.1
        assert line["loss/rationale"] > 0.1
    other = dataclasses.replace(config, model_dir=str(tmp_path / "fresh"), initial_checkpoint_path=None)
    loop.train(other, config_text="")
    assert lines(tmp_path / "fresh")[0]["kl/label"] > 0.1


def test_a_student_learns_from_the_store_and_resumes_with_it_alone(taught, tmp_path, monkeypatch):
    """The divergence falls, a resumed run is bit-identical, and another store is refused; a copy elsewhere is not."""
    config = student_config(tmp_path / "whole", taught, train_steps=6, learning_rate=RATE, soft_share=1.0)
    programs = loop.Programs.of(config)
    loop.train(config, config_text="", programs=programs)
    found = lines(tmp_path / "whole")
    assert found[-1]["kl/rationale"] < 0.9 * found[0]["kl/rationale"]
    first = dataclasses.replace(config, model_dir=str(tmp_path / "run"))
    with finished_runs.ending_at_a_save(monkeypatch):
        loop.train(first, config_text="", programs=programs)
    shutil.copytree(taught / "soft", tmp_path / "copy")
    loop.train(dataclasses.replace(first, soft_targets=str(tmp_path / "copy")), config_text="")
    assert [line["loss"] for line in lines(tmp_path / "run")] == [line["loss"] for line in found]
    teacher = students.load_student(taught / "teacher", layout=partitioning.DATA_PARALLEL)
    write(teacher, tmp_path / "other", top_k=4)
    with pytest.raises(FileExistsError, match="soft_targets_sha256"):
        loop.train(dataclasses.replace(first, soft_targets=str(tmp_path / "other")), config_text="")
    with pytest.raises(FileExistsError, match="soft_targets_sha256"):
        loop.train(dataclasses.replace(first, soft_targets=None), config_text="")
    with pytest.raises(FileExistsError, match="soft_share"):
        loop.train(dataclasses.replace(first, soft_share=0.5), config_text="")


def test_what_no_student_can_learn_from_is_refused_before_training(taught, tmp_path):
    def fails(message: str, **changes) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            loop.train(student_config(tmp_path / "run", taught, **changes), config_text="")
        assert not (tmp_path / "run").exists()

    fails("no store of soft targets", soft_targets=str(tmp_path))
    fails("soft_targets is ''", soft_targets="")
    fails("soft_share is 0", soft_share=0.0)
    fails("soft_share is 1.5", soft_share=1.5)
    fails("Soft targets need all logits at a time; got vocabulary_chunks 4", vocabulary_chunks=4)
    toy.write_records(tmp_path / "more", train_rows=56)
    fails("no soft targets of the row 'toy-", data=toy.options(tmp_path / "more"))
    fails("of another text for the row 'toy-", task_feature_lengths={"inputs": 40, "targets": 9})
    several = tmp_path / "several"
    shutil.copytree(taught / "records", several)
    other = (records.Rationale(rationale="It is so.", teacher_label=None),)
    rows = records.read_records(several / "toy" / "train.jsonl")
    records.write_records(
        several / "toy" / "train.jsonl", [dataclasses.replace(row, other_rationales=other) for row in rows]
    )
    fails("toy_rationale has several rationales per row", data=toy.options(several, rationales_per_example="all"))
    file = tmp_path / "strange"
    shutil.copytree(taught / "soft", file)
    value = json.loads((file / store.MANIFEST).read_text())
    value["about"]["vocabulary"] = "00"
    (file / store.MANIFEST).write_text(json.dumps(value))
    fails("of a teacher with another vocabulary", soft_targets=str(file))
    value["about"] |= {"vocabulary": None, "vocabulary_size": 385}
    (file / store.MANIFEST).write_text(json.dumps(value))
    fails("has 385 ids, and the student's table 384 rows", soft_targets=str(file))


def test_each_host_builds_its_own_rows(taught):
    """Rows of a batch with soft targets are those of the whole batch; tokens without a teacher have none."""
    config = student_config(taught / "unused", taught)
    registry.configure(config.data)
    options = {"lengths": LENGTHS, "split": "train", "batch_size": 8, "seed": 0, "skip_batches": 1}
    options |= {"teacher": store.Store(taught / "soft"), "pack": True}
    name = "toy_step_by_step"
    whole = next(batches.train_dataset(name, **options))
    mine = next(batches.train_dataset(name, **options, rows=[1, 6]))
    for feature, x in whole.items():
        np.testing.assert_array_equal(mine[feature], x[[1, 6]])
    shapes = features.shapes(LENGTHS, batch_size=8, pack=True, teacher=store.form(taught / "soft"))
    assert {feature: (x.shape, x.dtype) for feature, x in whole.items()} == {
        feature: (each.shape, each.dtype) for feature, each in shapes.items()
    }
    there = np.isfinite(whole[soft_targets.LOG_P][..., 0])
    np.testing.assert_array_equal(there, whole["decoder_task_ids"] > 0)
