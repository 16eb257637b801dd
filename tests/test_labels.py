"""Precision, recall, F1 and confusions by label: of answers, in `sbs evaluate`, and on the page of a report."""

import csv
import json
from pathlib import Path

import pytest
from builders.report_runs import LABELS, answers, write_run

from sbs_jax.pages import report, tables
from sbs_jax.stats import graded, labels

PAIRS = [("a", "a")] * 6 + [("a", "b")] * 2 + [("b", "b")] * 3 + [("b", "x")] + [("c", "a")]


def test_scores_are_those_of_scikit_learn() -> None:
    """Reference: sklearn 1.9.1, precision_recall_fscore_support(labels=[a, b, c], zero_division=nan)."""
    found = labels.of_answers(PAIRS, ["a", "b", "c", "d"])
    assert found is not None
    a, b, c, d = found.labels
    assert (a.precision, a.recall, a.f1) == pytest.approx((85.714286, 75.0, 80.0))
    assert (b.precision, b.recall, b.f1) == pytest.approx((60.0, 75.0, 66.666667))
    assert (c.precision, c.recall, c.f1) == (None, 0.0, 0.0)
    assert (d.precision, d.recall, d.f1) == (None, None, None)
    assert found.macro_f1 == pytest.approx((80.0 + 66.666667 + 0.0) / 3)
    assert (found.rows, found.outside) == (13, 1)
    assert found.confusion["b"] == {"a": 0, "b": 3, "c": 0, "d": 0, None: 1}
    assert sum(each.rows for each in found.labels) == found.rows


def test_a_set_that_is_not_that_of_the_rows_counts_nothing() -> None:
    assert labels.of_answers(PAIRS, ["a", "b"]) is None
    assert labels.of_answers([], ["a", "b"]) is None


def test_a_terminal_shows_other_predictions_in_a_column_of_their_own() -> None:
    found = labels.of_answers(PAIRS, ["a", "b", "c"])
    assert found is not None
    lines = tables.of_labels(found).splitlines()
    assert lines[-5].split() == ["label", "\\", "predicted", "a", "b", "c", "outside", "of", "the", "set"]
    assert lines[-2].split() == ["b", "0", "3", "0", "1"]
    assert "macro-F1 48.9 over 13 rows" in lines


def test_every_accuracy_has_its_rows_and_an_interval() -> None:
    rows = [
        {"target": "a", "prediction": "a", "correct": True, "scores": {"rouge_l": 0.5 + 0.01 * i}} for i in range(20)
    ]
    found = graded.described({"accuracy": 100.0, "rouge_l": 59.5, "own": 12.0}, rows, None)
    assert (found["rows"], found["intervals"]["accuracy"]) == (20, [83.9, 100.0])
    low, high = found["intervals"]["rouge_l"]
    assert 55 < low < 59.5 < high < 64
    assert set(found["intervals"]) == {"accuracy", "rouge_l"}  # `own` is no mean over rows
    assert graded.described({"loss": 1.5}, [], None) == {"loss": 1.5}


def test_the_page_and_its_files_have_the_labels_of_every_method(tmp_path: Path) -> None:
    for kind, seed in (("label", 0), ("label", 1), ("step_by_step", 0)):
        right = answers(0.7, rows=90, seed=seed)
        write_run(tmp_path / f"{kind}{seed}", kind=kind, seed=seed, right=right, manifest_of={"labels": list(LABELS)})
    page = tmp_path / "report.html"
    study = report.write_page(
        page, report.find([tmp_path]).runs, title=None, notes=(), assets=tmp_path / "report_files"
    )
    (summary,) = study.summaries
    fine_tuning = summary.groups[0].by_label
    assert fine_tuning is not None
    assert fine_tuning.rows == 180  # of both seeds
    wrong = sum(not row["correct"] for result in summary.groups[0].results for row in result.test_rows.values())
    assert fine_tuning.outside == wrong > 0
    text = page.read_text()
    assert text.count("By label") == 2  # heading, name of the table
    assert "Confusions of step-by-step" in text
    rows = list(csv.DictReader((tmp_path / "report_files" / "labels.csv").read_text().splitlines()))
    assert {row["label"] for row in rows} == set(LABELS)
    assert float(rows[0]["recall"]) == pytest.approx(fine_tuning.labels[0].recall)
    counts = list(csv.DictReader((tmp_path / "report_files" / "confusions.csv").read_text().splitlines()))
    assert sum(int(row["rows"]) for row in counts) == 270


def test_free_answers_have_no_labels(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    page = tmp_path / "report.html"
    report.write_page(page, report.find([tmp_path]).runs, title=None, notes=())
    assert "By label" not in page.read_text()
    path = write_run(tmp_path / "folder" / "run")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["data"]["definition"] = {"labels": list(LABELS)}  # of a folder's dataset, in runs of an earlier version
    (path / "manifest.json").write_text(json.dumps(manifest))
    (summary,) = report.study(report.find([tmp_path / "folder"]).runs).summaries
    assert tables.largest(summary)


def test_metrics_besides_the_accuracy_have_a_table_of_their_own(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = write_run(tmp_path / f"run{seed}", seed=seed, right=[i % 2 == 0 for i in range(40)])
        (file,) = (run / "predictions").iterdir()
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [row | {"scores": {"rouge_l": 0.4 + 0.005 * i}} for i, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (summary,) = report.study(report.find([tmp_path]).runs).summaries
    value, low, high = summary.groups[0].further["rouge_l"]
    assert value == pytest.approx(100 * (0.4 + 0.005 * 19.5))
    assert low < value < high < low + 10
    assert "rouge_l  49.8" in report.table(summary)
    file.write_text(file.read_text().replace("0.4}", "1.4}"))
    with pytest.raises(ValueError, match=r"scores.rouge_l is 1.4; expected a number of at least 0 and at most 1"):
        report.study(report.find([tmp_path]).runs)


def test_correct_is_the_accuracy_that_it_equals(tmp_path: Path) -> None:
    """A dataset may have several accuracies, of which `correct` is the primary one."""
    run = write_run(tmp_path / "run", right=[i % 4 == 0 for i in range(40)])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[-1] = {"kind": "test", "step": 100, "normalized_accuracy": 10.0, "numeric_accuracy": 25.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.study(report.find([run]).runs).summaries[0].metric == "numeric_accuracy"
