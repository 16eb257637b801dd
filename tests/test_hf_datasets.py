"""Datasets of Hugging Face's package `datasets`: saved folders as tables of `sbs init`, and as rows of `distill`."""

from typing import Any

import pytest
from builders.garden import ROWS, TOPICS

from sbs_jax import api
from sbs_jax.cli import main
from sbs_jax.data import records, table

datasets: Any = pytest.importorskip("datasets", reason="the package datasets is not installed: pip install datasets")

NAMES = sorted(TOPICS)


@pytest.fixture(scope="module")
def rows() -> Any:
    """The garden's rows, with labels as numbers that have names, and one row without a label."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    held = [{"text": row["text"], "label": NAMES.index(row["team"])} for row in ROWS]
    return datasets.Dataset.from_list([*held, {"text": "My lawn?", "label": -1}], features=features)


def test_a_saved_dataset_becomes_a_folder(rows, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    rows.save_to_disk("garden_saved")
    assert main.main(["init", "garden_saved"]) == 0
    assert "answers: one of 3 labels, ['pests', 'soil', 'water']" in capsys.readouterr().out
    labels = {row["text"]: row["team"] for row in ROWS}
    found = [
        row
        for split in records.SPLITS
        for row in records.read_records(f"garden_saved_dataset/inputs/garden_saved/{split}.jsonl")
    ]
    assert {row.input: row.label for row in found} == labels | {"My lawn?": None}


def test_saved_splits_are_kept(rows, tmp_path) -> None:
    halves = rows.train_test_split(test_size=0.3, seed=0)
    saved = datasets.DatasetDict({"train": halves["train"], "dev": halves["test"], "extra": halves["test"]})
    saved.save_to_disk(tmp_path / "saved")
    found = table.read(str(tmp_path / "saved"))
    assert {split: len(of.rows) for split, of in found.items()} == {"train": 32, "validation": 14}
    assert {row["label"] for row in found["train"].rows} <= {*NAMES, None}
    assert found["validation"].places[0] == f"{tmp_path / 'saved'}, dev: row 1"
    datasets.DatasetDict({"extra": halves["test"]}).save_to_disk(tmp_path / "others")
    with pytest.raises(ValueError, match=r"has the splits \['extra'\]; expected train, validation or test"):
        table.read(str(tmp_path / "others"))


def test_a_broken_folder_is_named(rows, tmp_path) -> None:
    rows.save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(ValueError, match="saved cannot be loaded by the package datasets"):
        table.read(str(tmp_path / "saved"))


def test_rows_of_distill_may_be_a_dataset(rows) -> None:
    found = api._table(rows, where="train")
    assert [row["label"] for row in found.rows] == [*(row["team"] for row in ROWS), None]
    assert found.places[-1] == f"train[{len(ROWS)}]"
    streamed = api._table(rows.to_iterable_dataset(), where="train")
    assert streamed == found
