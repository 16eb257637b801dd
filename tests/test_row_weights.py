"""Weights of rows: from the field of a record to the batches; test_losses.py has what they do to the loss."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import seqio
from builders import cats as made

from sbs_jax.data import batches, choice, records
from sbs_jax.teacher import command, prompts, sampler
from sbs_jax.teacher.clients import Parameters
from tasks import builtin

LENGTHS = {"inputs": 60, "targets": 48}
WEIGHTS = (None, 2, 0.5, 3)  # of rows in turn


@pytest.fixture
def cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with 12 training rows of `cats`, three of each weight."""
    rows = [made.row(number, rationale="so" * (1 + number), weight=WEIGHTS[number % 4]) for number in range(12)]
    made.write(tmp_path, rows)
    made.register(tmp_path, monkeypatch)
    made.configure(tmp_path, validation_fraction=0)
    return tmp_path


@pytest.mark.parametrize("pack", [False, True])
def test_each_token_has_the_weight_of_its_row(cats, pack):
    options = {"lengths": LENGTHS, "split": "train", "batch_size": 6, "pack": pack, "seed": 0}
    seen = set()
    for number in range(4):
        batch = {name: array for name, array in _batch(number, **options).items() if name.startswith("decoder_")}
        places, alone = batches.batch_examples("cats_step_by_step", batch=number, **options)
        for place, weights, task_ids in zip(
            places, alone["decoder_loss_weights"], alone["decoder_task_ids"], strict=True
        ):
            weight = WEIGHTS[int(place.id.removeprefix("row-")) % 4] or 1
            np.testing.assert_array_equal(weights, np.where(task_ids > 0, weight, 0))
            segments = batch["decoder_segment_ids"] if pack else np.minimum(batch["decoder_task_ids"], 1)
            mine = segments[place.row] == place.segment
            assert mine.sum() == (task_ids > 0).sum()
            assert set(batch["decoder_loss_weights"][place.row][mine].tolist()) == {weight}
            seen.add((place.task, weight))
    assert len(seen) == 8


def _batch(number: int, **options):
    return next(itertools.islice(batches.train_dataset("cats_step_by_step", skip_batches=number, **options), 1))


def test_several_rationales_of_a_row_have_its_weight(cats):
    others = (records.Rationale(rationale="and so", teacher_label=None),)
    made.write(cats, [made.row(n, weight=WEIGHTS[n % 4], other_rationales=others * (n % 2)) for n in range(12)])
    made.configure(cats, validation_fraction=0, rationales_per_example="all")
    options = {"lengths": LENGTHS, "split": "train", "batch_size": 24, "pack": False, "seed": 1}
    for epoch in range(2):
        weights = _batch(epoch, **options)["decoder_loss_weights"].max(axis=1).tolist()
        assert sorted(weights) == sorted(6 * [weight or 1 for weight in WEIGHTS])


def test_a_record_keeps_its_weight_and_one_without_has_no_such_field(tmp_path):
    rows = [made.row(1, weight=0.5), made.row(2)]
    made.write(tmp_path, rows)
    file = tmp_path / "cats" / "train.jsonl"
    assert records.read_records(file) == rows
    assert ["weight" in line for line in file.read_text().splitlines()] == [True, False]


@pytest.mark.parametrize("weight", ["0", "-1", "1e-7", "1e7", "true", '"2"', "NaN"])
def test_a_weight_that_cannot_be_is_refused(tmp_path, weight):
    file = tmp_path / "cats" / "train.jsonl"
    made.write(tmp_path, [made.row(1, weight=7)])
    file.write_text(file.read_text().replace('"weight": 7', f'"weight": {weight}'))
    with pytest.raises(ValueError, match=r"train\.jsonl:1: .*weight"):
        records.read_records(file)


def test_seqio_s_converters_have_no_room_for_weights(cats):
    with pytest.raises(ValueError, match=r"cats_label have a weight, .* Train with `sbs train`"):
        seqio.get_mixture_or_task("cats_label").get_dataset(LENGTHS, split="train", shuffle=False)


def test_teacher_and_choice_keep_weights(tmp_path):
    builtin.write_release(tmp_path / "release", rows={"train": 2}, seed=0)
    (rows,) = builtin.read_release(tmp_path / "release").values()
    inputs = [
        records.Record(id=f"{n}", input=row.input, label=row.label, weight=(None, 2)[n]) for n, row in enumerate(rows)
    ]
    records.write_records(tmp_path / "inputs" / "builtin" / "train.jsonl", inputs)
    settings = {
        "model": "scripted",
        "form": "chat",
        "parameters": Parameters(temperature=0.0, max_tokens=200),
        "unusable": 1.0,
    }
    command.teach(
        command.Options(
            dataset="builtin",
            inputs="records",
            inputs_dir=str(tmp_path / "inputs"),
            provider="scripted",
            template=prompts.read("builtin"),
            store=str(tmp_path / "store.sqlite"),
            records_dir=str(tmp_path / "asked"),
            settings=sampler.Settings(**settings),
        )
    )
    found = records.read_records(tmp_path / "asked" / "builtin" / "train.jsonl")
    assert [row.weight for row in found] == [None, 2]
    fewer = [choice.with_chosen(row, row.rationales[:1], str.__eq__) for row in found]
    assert [row.weight for row in fewer] == [None, 2]
