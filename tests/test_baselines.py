"""Baselines: models without a student find what is there to find, and students below them are told so."""

import dataclasses
import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import toy

from sbs_jax.data import records, registry, selection
from sbs_jax.data.dataset import JOINT
from sbs_jax.stats import baselines, linear, verdict

COLOURS = ("red", "green", "blue", "black")


def measured(folder: Path, name: str, rows: list[records.Record], **changes) -> dict[str, float]:
    registry.add(dataclasses.replace(toy.DATASET, name=name, **changes))
    random.Random(0).shuffle(rows)
    for number, split in enumerate(("train", "validation", "test")):
        records.write_records(folder / name / f"{split}.jsonl", rows[number::3])
    registry.configure(selection.DataOptions(records_dir=str(folder), vocabulary="byte"))
    found = linear.measure(name)
    assert found["train_rows"] == len(rows[0::3])
    assert found["test_rows"] == len(rows[2::3])
    return {model: value["accuracy"] for model, value in found["models"].items()}


def test_pairs_of_words_are_learned_where_single_words_say_nothing(tmp_path):
    rows = [
        records.Record(id=f"{n}-{a}-{b}", input=f"A {a} thing {n}.{JOINT}It is {b}.", label="yes" if a == b else "no")
        for n, a, b in itertools.product(range(30), COLOURS, COLOURS)
    ]
    found = measured(tmp_path, "pairs", rows, labels=("yes", "no"))
    assert found["linear"] > 98
    assert found["majority"] == pytest.approx(75.0, abs=8)
    assert found["partial"] == pytest.approx(75.0, abs=8)


def test_choices_are_scored_one_by_one(tmp_path):
    rows = []
    for n, right in itertools.product(range(30), COLOURS):
        choices = random.Random(f"{n}{right}").sample(COLOURS, 3)
        label = right if right in choices else choices[0]
        text = "\n".join((f"Which is {label}-ish {n}?", *choices))
        rows.append(records.Record(id=f"{n}-{right}", input=text, label=label, choices=(*choices,)))
    found = measured(tmp_path, "choosing", rows, labels=None)
    assert found["linear"] > 95
    assert found["majority"] < 70


def test_templates_take_the_numbers_of_their_row(tmp_path):
    words = {"more": "+", "less": "-"}
    rows = [
        records.Record(id=f"{a}-{b}-{word}", input=f"{a} and {b} {word}.", label=f"{max(a, b)} {sign} {min(a, b)}")
        for (a, b), (word, sign) in itertools.product(itertools.permutations(range(2, 99, 11), 2), words.items())
    ]
    found = measured(tmp_path, "templates", rows, labels=None)
    assert found["linear"] == 100.0
    assert found["majority"] == pytest.approx(50.0, abs=15)
    assert "partial" not in found


def test_a_run_finds_its_baselines_and_is_told_that_it_is_below(toy_run, tmp_path):
    name, folder, run = toy.DATASET.name, tmp_path / "records", tmp_path / "run"
    shutil.copytree(toy_run.data.records_dir, folder)
    shutil.copytree(toy_run.model_dir, run)
    text = (run / "manifest.json").read_text().replace(toy_run.data.records_dir, str(folder))
    (run / "manifest.json").write_text(text)
    manifest = json.loads(text)
    assert baselines.read(manifest) is None
    sha256 = {"test": manifest["data"]["splits"]["test"]["sha256"]}
    for accuracy, said in ((100.0, "below a baseline"), (0.0, None)):
        found = {"train": ["train"], "train_rows": 48, "test_rows": 16, "sha256": sha256}
        model = baselines.Baseline(accuracy=accuracy, low=accuracy, high=accuracy)
        path = baselines.write(folder, name, baselines.Baselines(**found, models={"linear": model}))
        assert baselines.read(manifest) is not None
        texts = verdict.verdicts(run)
        assert texts == [] if said is None else said in texts[0] and "100.0 %" in texts[0]
    (written,) = json.loads(path.read_text())["measured"]
    path.write_text(json.dumps({"format": 1, **written}))  # as earlier versions wrote it
    assert baselines.read(manifest) == written
    path.write_text(json.dumps({"format": 1, **written, "sha256": {"test": "0" * 64}}))
    assert baselines.read(manifest) is None  # of other rows
    path.unlink()


def test_baselines_of_folds_are_over_all_rows_and_stand_beside_the_plain_ones(tmp_path):
    registry.add(dataclasses.replace(toy.DATASET, name="folded", labels=("yes", "no")))
    rows = [
        records.Record(id=f"{n}", input=f"It is {colour}.", label="yes" if colour in ("red", "blue") else "no")
        for n, colour in enumerate(COLOURS * 10)
    ]
    for split, part in (("train", rows[:30]), ("test", rows[30:])):
        records.write_records(tmp_path / "folded" / f"{split}.jsonl", part)
    further = tmp_path / "further.jsonl"
    records.write_records(further, [records.Record(id="more", input="It is grey.", label="no")])
    entries = []
    for changes in ({}, {"folds": 4}, {"folds": 4, "augmentation": str(further)}):
        registry.configure(toy.options(tmp_path, **changes))
        entries.append(linear.measure("folded"))
        baselines.write(tmp_path, "folded", entries[-1])
        assert baselines.read({"data": registry.sources("folded")}) == entries[-1]
    assert [each["test_rows"] for each in entries] == [10, 40, 40]
    assert [each["train_rows"] for each in entries] == [27, 27, 28]  # 30 less 3 held out; 30 less 3; and 1 more
    assert entries[1]["models"]["linear"]["accuracy"] == 100.0
    registry.configure(toy.options(tmp_path))
    assert baselines.read({"data": registry.sources("folded")}) == entries[0]
