"""Batches: equal to SeqIO's feature converter, complete, aligned, and the same every time."""

import hashlib
import itertools
import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf
from builders.cats import configure, register, write
from builders.cats import row as a_cat

from sbs_jax.data import batches, records, registry, tokens
from sbs_jax.student import losses

LENGTHS = {"inputs": 60, "targets": 48}
UNPACKED = {
    "encoder_input_tokens",
    "decoder_input_tokens",
    "decoder_target_tokens",
    "decoder_loss_weights",
    "decoder_task_ids",
}
PACKED = UNPACKED | {
    "encoder_segment_ids",
    "encoder_positions",
    "decoder_segment_ids",
    "decoder_positions",
}


def row(number: int, **changes: Any) -> records.Record:
    return a_cat(number, **{"rationale": "so" + " many" * (number % 5), **changes})


@pytest.fixture
def cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with 20 training records (18 used, 2 held out) of the dataset `cats`."""
    write(tmp_path, [row(number) for number in range(20)])
    register(tmp_path, monkeypatch)
    return tmp_path


def take(name: str = "cats_step_by_step", *, count: int, **changes) -> list[dict[str, np.ndarray]]:
    arguments = {
        "lengths": LENGTHS,
        "split": "train",
        "batch_size": 4,
        "pack": False,
        "seed": 0,
        "skip_batches": 0,
        **changes,
    }
    return list(itertools.islice(batches.train_dataset(name, **arguments), count))


def joined(found: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([batch[key] for batch in found]) for key in found[0]}


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    for left, right in zip(first, second, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def segments(found: list[dict[str, np.ndarray]]) -> list[tuple[str, str, int]]:
    """Lists (inputs, targets, task id) of every example in packed batches, in order, as text."""
    vocabulary = registry.vocabulary("byte")
    pieces = []
    batch = joined(found)
    for index in range(len(batch["encoder_input_tokens"])):
        for segment in range(1, batch["encoder_segment_ids"][index].max() + 1):
            source = batch["encoder_segment_ids"][index] == segment
            target = batch["decoder_segment_ids"][index] == segment
            (task_id,) = set(batch["decoder_task_ids"][index][target].tolist())
            for side, mask in (("encoder_input_tokens", source), ("decoder_target_tokens", target)):
                ids = batch[side][index][mask]
                assert ids[-1] == 1
                assert 1 not in ids[:-1]
            pieces.append(
                (
                    vocabulary.decode(batch["encoder_input_tokens"][index][source].tolist()),
                    vocabulary.decode(batch["decoder_target_tokens"][index][target].tolist()),
                    task_id,
                )
            )
    return pieces


# ------------------------------------------------------------------------- the feature converter


def converted(examples: list[dict], *, lengths: dict[str, int], pack: bool) -> list[dict]:
    """Converts examples by SeqIO's feature converter."""
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(examples),
        output_signature={key: tf.TensorSpec([None], tf.int32) for key in ("inputs", "targets", "task_ids")},
    )
    converter = batches.StepByStepFeatureConverter(pack=pack)
    return list(converter(dataset, lengths).as_numpy_iterator())


def test_the_worked_example_of_the_docstring():
    examples = [
        {"inputs": [9689, 10, 204, 10003, 646, 1], "targets": [204, 1], "task_ids": [1, 1]},
        {
            "inputs": [3209, 10, 204, 10003, 646, 1],
            "targets": [314, 3, 18, 204, 3274, 204, 1],
            "task_ids": [2] * 7,
        },
    ]
    lengths = {"inputs": 14, "targets": 10, "task_ids": 10}
    (packed,) = converted(examples, lengths=lengths, pack=True)
    assert packed.keys() == PACKED
    # The docstring shows exactly these arrays.
    documented = batches.StepByStepFeatureConverter.__doc__ or ""
    shown = {}
    for line in documented.splitlines():
        key, _, values = line.strip().partition("[")
        if key.strip() in PACKED:
            shown[key.strip()] = json.loads(f"[{values}")
    assert shown == {key: array.tolist() for key, array in packed.items()}
    first, second = converted(examples, lengths=lengths, pack=False)
    assert first["decoder_task_ids"].tolist() == [1, 1] + [0] * 8
    assert second["decoder_input_tokens"].tolist() == [0, 314, 3, 18, 204, 3274, 204, 1, 0, 0]


def test_the_worked_example_has_the_real_ids(real_vocab: Path):
    vocabulary = registry.vocabulary(str(real_vocab))
    assert vocabulary.encode("predict: 2 cats left") == [9689, 10, 204, 10003, 646]
    assert vocabulary.encode("explain: 2 cats left") == [3209, 10, 204, 10003, 646]
    assert vocabulary.encode("4 - 2 = 2") == [314, 3, 18, 204, 3274, 204]


def test_task_ids_need_the_targets_length():
    examples = [{"inputs": [5, 1], "targets": [6, 1], "task_ids": [1, 1]}]
    with pytest.raises(ValueError, match="task_ids has length 5 and targets has length 4"):
        converted(examples, lengths={"inputs": 4, "targets": 4, "task_ids": 5}, pack=False)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [
        LENGTHS,
        {"inputs": 20, "targets": 9},  # cuts targets
        {"inputs": 32, "targets": 90},  # two inputs of 16 tokens fill a row exactly
        {"inputs": 200, "targets": 90},
    ],
)
def test_batches_equal_seqios(cats: Path, pack: bool, lengths: dict[str, int]):
    """SeqIO's trimming, packing and shifting of the same examples give equal batches."""
    plain = joined(take(count=9, lengths={"inputs": 200, "targets": 200}, pack=False))
    examples = []
    for source, target, task in zip(
        plain["encoder_input_tokens"], plain["decoder_target_tokens"], plain["decoder_task_ids"], strict=True
    ):
        ids = {"inputs": source, "targets": target, "task_ids": task}
        examples.append({key: array[array != 0] for key, array in ids.items()})
    task_lengths = {**lengths, "task_ids": lengths["targets"]}
    # The last packed row of a finite dataset may be one that an endless one fills further.
    expected = []
    for example in examples:
        for key in ("inputs", "targets"):
            if len(example[key]) > lengths[key]:
                example[key] = [*example[key][: lengths[key] - 1], 1]
        expected.append(example | {"task_ids": example["task_ids"][: lengths["targets"]]})
    rows = converted(expected, lengths=task_lengths, pack=pack)
    rows = rows[:-1] if pack else rows
    assert len(rows) >= 3
    ours = take(count=len(rows), batch_size=1, pack=pack, lengths=lengths)
    assert_same(ours, [{key: array[None] for key, array in row.items()} for row in rows])


# ------------------------------------------------------------------------------ training batches


@pytest.mark.parametrize("pack", [False, True])
def test_keys_shapes_and_types(cats: Path, pack: bool):
    (batch,) = take(count=1, pack=pack)
    assert batch.keys() == (PACKED if pack else UNPACKED)
    for key, array in batch.items():
        assert array.dtype == (np.float32 if key == "decoder_loss_weights" else np.int32)
        assert array.shape == (4, LENGTHS["inputs" if key.startswith("encoder") else "targets"])


def test_rows_hold_the_examples(cats: Path):
    found = joined(take(count=9))
    vocabulary = registry.vocabulary("byte")
    texts = [vocabulary.decode(ids.tolist()) for ids in found["encoder_input_tokens"]]
    targets = [vocabulary.decode(ids.tolist()) for ids in found["decoder_target_tokens"]]
    by_task = {}
    for task, name in ((losses.LABEL, "cats_label"), (losses.RATIONALE, "cats_rationale")):
        mine = [index for index in range(36) if found["decoder_task_ids"][index, 0] == task]
        by_task[task] = mine
        expected = Counter((e.inputs, e.targets) for e in registry.examples(name, "train"))
        assert Counter((texts[index], targets[index]) for index in mine) == expected
    assert by_task == {losses.LABEL: list(range(0, 36, 2)), losses.RATIONALE: list(range(1, 36, 2))}
    for index in range(0, 36, 2):  # label and rationale of one row are neighbors
        assert texts[index].removeprefix("predict: ") == texts[index + 1].removeprefix("explain: ")
    weights, task_ids = found["decoder_loss_weights"], found["decoder_task_ids"]
    np.testing.assert_array_equal(weights, found["decoder_target_tokens"] != 0)
    np.testing.assert_array_equal(task_ids != 0, weights != 0)
    np.testing.assert_array_equal(found["decoder_input_tokens"][:, 0], 0)


def test_packing_loses_nothing_and_keeps_the_order(cats: Path):
    vocabulary = registry.vocabulary("byte")
    plain = joined(take(count=30))
    expected = [
        (vocabulary.decode(source.tolist()), vocabulary.decode(target.tolist()), int(task[0]))
        for source, target, task in zip(
            plain["encoder_input_tokens"], plain["decoder_target_tokens"], plain["decoder_task_ids"], strict=True
        )
    ]
    found = take(count=6, pack=True)
    pieces = segments(found)
    assert len(pieces) > 30
    assert pieces == expected[: len(pieces)]
    # Shifted within each segment: the input is the target one place before, and 0 at its start.
    packed = joined(found)
    for inputs, targets, positions, weights in zip(
        packed["decoder_input_tokens"],
        packed["decoder_target_tokens"],
        packed["decoder_positions"],
        packed["decoder_loss_weights"],
        strict=True,
    ):
        for place in np.flatnonzero(weights):
            expected_input = 0 if positions[place] == 0 else targets[place - 1]
            assert inputs[place] == expected_input
        assert not inputs[weights == 0].any()


@pytest.mark.parametrize("pack", [False, True])
def test_skipping_resumes(cats: Path, pack: bool):
    assert_same(take(count=12, pack=pack)[7:], take(count=5, pack=pack, skip_batches=7))


@pytest.mark.parametrize("pack", [False, True])
def test_hosts_share_the_same_global_batch(cats: Path, pack: bool):
    whole = take(count=5, pack=pack)
    for rows in ([[0, 1], [2, 3]], [[1, 3], [0, 2]], [[2], [3, 0, 1]]):
        shares = [take(count=5, pack=pack, rows=mine) for mine in rows]
        order = np.argsort(np.concatenate(rows))
        together = [joined(list(parts)) for parts in zip(*shares, strict=True)]
        assert_same(whole, [{key: array[order] for key, array in batch.items()} for batch in together])


def test_the_label_task_alone_sees_the_same_labels(cats: Path):
    """Step-by-step with twice the batch size: the same label rows in each update."""
    for rationales in (None, "few"):
        if rationales is not None:  # the tasks differ in size
            write(cats, [row(n, rationale=rationales if n % 3 else None) for n in range(20)])
            configure(cats)
        alone = take("cats_label", count=20, batch_size=4, seed=3)
        both = take("cats_step_by_step", count=20, batch_size=8, seed=3)
        for first, second in zip(alone, both, strict=True):
            mine = second["decoder_task_ids"][:, 0] == losses.LABEL
            for key in first:
                np.testing.assert_array_equal(first[key], second[key][mine])


def test_tasks_of_different_size_repeat_on_their_own(cats: Path):
    write(cats, [row(n, rationale="few" if n < 6 else None) for n in range(20)])
    configure(cats, validation_fraction=0)
    found = joined(take(count=30))
    assert found["decoder_task_ids"][:, 0].tolist() == [losses.LABEL, losses.RATIONALE] * 60
    rationales = [tuple(ids) for ids in found["encoder_input_tokens"][1::2].tolist()]
    for start in range(0, 60, 6):
        assert len(set(rationales[start : start + 6])) == 6
    labels = [tuple(ids) for ids in found["encoder_input_tokens"][0::2].tolist()]
    for start in range(0, 60, 20):
        assert len(set(labels[start : start + 20])) == 20


def test_seeds_and_epochs_give_new_orders(cats: Path):
    first = joined(take("cats_label", count=18, seed=0))["encoder_input_tokens"]
    other = joined(take("cats_label", count=18, seed=1))["encoder_input_tokens"]
    assert not np.array_equal(first, other)
    epochs = first.reshape(4, 18, -1)
    assert not np.array_equal(epochs[0], epochs[1])


def test_another_process_gives_the_same_batches(starter, cats: Path, tmp_path: Path):
    program = f"""
        import hashlib, itertools, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from builders import cats
        from sbs_jax.data import batches, registry
        registry.add(cats.dataset())
        cats.configure({str(cats)!r})
        found = batches.train_dataset("cats_step_by_step", lengths={LENGTHS}, split="train",
            batch_size=4, pack=True, seed=0, skip_batches=0)
        content = b"".join(b[k].tobytes() for b in itertools.islice(found, 20) for k in sorted(b))
        print(hashlib.sha256(content).hexdigest())
    """
    done = starter.run(tmp_path, [], command=["-c", textwrap.dedent(program)])
    assert done.returncode == 0, done.stderr
    content = b"".join(b[k].tobytes() for b in take(count=20, pack=True) for k in sorted(b))
    assert done.stdout.split()[-1] == hashlib.sha256(content).hexdigest()


def test_bad_arguments_are_refused(cats: Path):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rows": []}, r"rows \[\] of a batch of 4"),
        ({"rows": [0, 4]}, r"rows \[0, 4\] of a batch of 4; expected numbers below 4"),
        ({"rows": [-1]}, r"rows \[-1\]"),
        ({"skip_batches": -1}, "skip_batches is -1"),
        ({"lengths": {"inputs": 8}}, "exactly 'inputs' and 'targets'"),
        ({"split": "tset"}, "Did you mean 'test'"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            take(count=1, **changes)
    with pytest.raises(ValueError, match="Did you mean 'cats_label'"):
        take("cats_labels", count=1)


# ------------------------------------------------------------------------------------ evaluation


def test_eval_examples(cats: Path):
    found = batches.eval_examples("cats_label", split="train", lengths=LENGTHS)
    assert [example.id for example in found] == [e.id for e in registry.examples("cats_label", "train")]
    example = found[0]
    number = example.id.removeprefix("row-")
    assert (example.label, example.targets) == (number, number)
    assert example.inputs == f"predict: {number} cats"
    assert example.features.keys() == UNPACKED
    task = seqio.TaskRegistry.get("cats_label")
    lengths = {**LENGTHS, "task_ids": LENGTHS["targets"]}
    rows = task.get_dataset(lengths, split="train", shuffle=False)
    converter = batches.StepByStepFeatureConverter(pack=False)
    assert_same([dict(e.features) for e in found], list(converter(rows, lengths).as_numpy_iterator()))
    with pytest.raises(ValueError, match="it is a mixture"):
        batches.eval_examples("cats_step_by_step", split="train", lengths=LENGTHS)


def test_texts_from_elsewhere_have_the_tasks_tokens(cats: Path):
    """`sbs predict` encodes and truncates inputs as the tasks do."""
    examples = batches.eval_examples("cats_label", split="train", lengths={"inputs": 16, "targets": 8})
    encoded = tokens.encode([example.inputs for example in examples], registry.vocabulary("byte"))
    assert any(len(ids) > 16 for ids in encoded)
    for example, ids in zip(examples, encoded, strict=True):
        cut = tokens.cut(np.asarray(ids, np.int32), 16)
        np.testing.assert_array_equal(np.pad(cut, (0, 16 - len(cut))), example.features["encoder_input_tokens"])


def test_counts_of_what_is_cut(cats: Path):
    counts = batches.count_truncated("cats_step_by_step", "train", {"inputs": 16, "targets": 12})
    label = registry.examples("cats_label", "train")
    rationale = registry.examples("cats_rationale", "train")
    assert counts == {
        "cats_label": {
            "rows": 18,
            "inputs cut": sum(len(e.inputs) + 1 > 16 for e in label),
            "inputs longest": max(len(e.inputs) + 1 for e in label),
            "targets cut": 0,
            "targets longest": 3,
        },
        "cats_rationale": {
            "rows": 18,
            "inputs cut": sum(len(e.inputs) + 1 > 16 for e in rationale),
            "inputs longest": max(len(e.inputs) + 1 for e in rationale),
            "targets cut": sum(len(e.targets) + 1 > 12 for e in rationale),
            "targets longest": 23,
        },
    }
    assert list(batches.count_truncated("cats_label", "train", LENGTHS)) == ["cats_label"]


def test_count_tokens(cats: Path):
    (batch,) = take(count=1)
    expected = (batch["encoder_input_tokens"] != 0).sum() + (batch["decoder_target_tokens"] != 0).sum()
    assert batches.count_tokens(batch) == expected


# ------------------------------------------------------------------------------------------ pairs


def pairs_of(texts: list[str]) -> list[tuple[str, str]]:
    rows = [text.partition(": ")[2] for text in texts]
    return list(zip(rows[::2], rows[1::2], strict=True))


@pytest.mark.parametrize("missing", [(), (3, 7)])
def test_pairs_are_the_label_and_the_rationale_of_one_row(cats: Path, missing: tuple[int, ...]):
    write(cats, [row(n, **({"rationale": None} if n in missing else {})) for n in range(20)])
    configure(cats, validation_fraction=0, pairs=True)
    counts = registry.selected("cats", "train").counts
    assert counts["label"] == counts["rationale"] == 20 - len(missing)
    assert counts.get("label: not used, no rationale (ok)", 0) == len(missing)
    vocabulary = registry.vocabulary("byte")
    plain = joined(take(count=25))
    found = pairs_of([vocabulary.decode(ids[ids > 0].tolist()) for ids in plain["encoder_input_tokens"]])
    assert all(label == rationale for label, rationale in found)
    epochs = 50 // (20 - len(missing))
    assert min(Counter(label for label, _ in found).values()) >= epochs
    # Packed rows hold whole pairs, in the same order, and no more than the loss has places for.
    packed = take(count=8, pack=True, lengths={"inputs": 400, "targets": 400})
    most = max(batch["encoder_segment_ids"].max() for batch in packed)
    assert most == 2 * batches.MOST_PAIRS
    of_rows = [sorted(set(ids[ids > 0])) for batch in packed for ids in batch["encoder_segment_ids"]]
    assert all(len(ids) % 2 == 0 for ids in of_rows)
    assert_same(packed[3:], take(count=5, pack=True, skip_batches=3, lengths={"inputs": 400, "targets": 400}))
    again = pairs_of([inputs for inputs, _, _ in segments(packed)])
    assert again[: len(found)] == found[: len(again)]


def test_pairs_that_no_row_holds_are_refused(cats: Path):
    configure(cats, pairs=True)
    with pytest.raises(ValueError, match=r"does not hold both label and rationale of 'row-\d+'"):
        take(count=1, pack=True, lengths={"inputs": 24, "targets": 48})
    with pytest.raises(ValueError, match="cats_label do not come in pairs"):
        take("cats_label", count=1)
