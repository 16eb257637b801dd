"""Answers of a report's runs: cards at its top, all of them embedded, and filters for their browser (answers.js)."""

from collections.abc import Mapping, Sequence
from typing import Any

from sbs_jax.pages import cards
from sbs_jax.stats.formats import compact, of_data, percent
from sbs_jax.stats.results import Result
from sbs_jax.stats.study import Study
from sbs_jax.stats.summary import Summary

# Answers (test rows x runs) that one page holds, and characters of texts: beyond either, fewer test rows.
MOST_ANSWERS = 200_000
MOST_CHARACTERS = 40_000_000

Filter = tuple[str, str, str, list[tuple[str, str]]]  # id, name, text for "no filter", (value, text) of each choice


def embed(study: Study, *, answers: int = MOST_ANSWERS, characters: int = MOST_CHARACTERS) -> dict[str, Any]:
    """Puts the answers into columns, for JSON.

    A set is the test rows of one dataset: ids, inputs, gold labels. A run belongs to a set and has, in the same order,
    its predictions, a "1" or "0" for right or wrong, and its rationales, if any. Labels and predictions repeat, so they
    are indices into `texts`:

        {"texts": ["yes", "no"], "sets": [{"dataset": "toy", "rows": 2, "ids": ["toy-0", "toy-1"], "inputs": [..],
         "gold": [0, 1], "teacher": []}], "runs": [{"set": 0, "method": "step-by-step", "size": "9.01M", "fraction":
         "25 %", "seed": "0", "predictions": [0, 0], "right": "10", "said": ["because ..", None], ..}]}

    Test rows that do not fit are left out by a hash of their ids, the same share of every dataset; `rows` counts all.
    """
    runs_of = {name: [r for r in study.results if r.manifest["data"]["dataset"] == name] for name in study.datasets}
    kept = {name: list(runs[0].test_rows) for name, runs in runs_of.items()}
    total = sum(len(ids) * len(runs_of[name]) for name, ids in kept.items())
    size = sum(_characters(runs_of[name], ids) for name, ids in kept.items())
    share = min(1.0, answers / total, characters / max(1, size))
    if share < 1:
        kept = {name: _sample(ids, share) for name, ids in kept.items()}
    texts: dict[str, int] = {}
    sets, runs = [], []
    for number, (name, ids) in enumerate(kept.items()):
        first = runs_of[name][0]
        rows = [first.test_rows[i] for i in ids]
        said_by_teacher = _teacher_rationales(runs_of[name], ids)
        sets.append(
            {
                "dataset": name,
                "rows": len(first.test_rows),
                "ids": ids,
                "inputs": [_input(first, row) for row in rows],
                "gold": [_number(texts, row.get("target", "")) for row in rows],
                "teacher": said_by_teacher if any(said_by_teacher) else [],
            }
        )
        runs += [_run(result, number, ids, texts) for result in runs_of[name]]
    return {"texts": list(texts), "sets": sets, "runs": runs}


def _run(result: Result, of_set: int, ids: Sequence[str], texts: dict[str, int]) -> dict[str, Any]:
    rows = [result.test_rows[i] for i in ids]
    said = [_said(result, i) for i in ids]
    measured = [result.quality.examples.get(i) if result.quality else None for i in ids]
    implied = [-1 if m is None or m.implied_label is None else _number(texts, m.implied_label) for m in measured]
    consistent = ["-" if m is None or m.consistent is None else str(int(m.consistent)) for m in measured]
    parameters = result.manifest.get("parameter_count")
    return {
        "set": of_set,
        "method": result.run.method,
        "size": compact(parameters) if parameters else "",
        "fraction": percent(result.run.fraction),
        "seed": str(result.run.seed),
        "predictions": [_number(texts, row.get("prediction", "")) for row in rows],
        "right": "".join("1" if row["correct"] else "0" for row in rows),
        "said": said if any(said) else [],
        "implied": implied if any(measured) else [],
        "consistent": "".join(consistent) if any(measured) else "",
    }


def _said(result: Result, row_id: str) -> str | None:
    """Returns the rationale that was measured, or the whole text of a student that writes one before its label."""
    example = result.quality.examples.get(row_id) if result.quality else None
    if example:
        return example.rationale
    row = result.test_rows[row_id]
    return next((row[name] for name in ("rationale", "text") if isinstance(row.get(name), str)), None)


def _teacher_rationales(results: Sequence[Result], ids: Sequence[str]) -> list[str | None]:
    """Returns the teacher's rationale for each row, from the first run that has one."""
    examples = [result.quality.examples for result in results if result.quality]
    return [
        next((e.teacher_rationale for of in examples if (e := of.get(i)) and e.teacher_rationale), None) for i in ids
    ]


def _sample(ids: Sequence[str], share: float) -> list[str]:
    """Chooses this share of the test rows, at least one, by a hash of their ids; in the order of the file."""
    count = max(1, int(share * len(ids)))
    chosen = set(cards.by_rank(ids, count))
    return [i for i in ids if i in chosen]


def _characters(results: Sequence[Result], ids: Sequence[str]) -> int:
    of_rows = sum(len(i) + len(results[0].test_rows[i].get("input", "")) for i in ids)
    return of_rows + sum(len(_said(result, i) or "") for result in results for i in ids)


def _number(texts: dict[str, int], value: str) -> int:
    return texts.setdefault(value, len(texts))


def opening(study: Study) -> tuple[str, list[cards.Card]]:
    """Chooses three test questions with the answers of one seed's students; returns a note and the cards.

    They are chosen by a hash of their ids, so not by how they were answered. With several datasets, each of the first
    three has one. The rationale is that of the student whose rationales were measured, or none.
    """
    several = len(study.datasets) > 1
    students: list[str] = []
    found: list[cards.Card] = []
    for dataset in study.datasets[: cards.CARDS]:
        summary, result = _shown(study.of(dataset))
        answering = [result, *_beside(summary, result)]
        ids = [i for i in result.test_rows if _said(result, i)] or list(result.test_rows)
        found += [
            _card(answering, i, about=dataset if several else "")
            for i in cards.by_rank(ids, 1 if several else cards.CARDS)
        ]
        students.append(f"{of_data(result.run.fraction)}, seed {result.run.seed}")
    where = f" Trained with {students[0]}." if len(set(students)) == 1 else ""
    return f"Chosen by a hash of their ids, not by their answers.{where}", found


def _shown(summaries: Sequence[Summary]) -> tuple[Summary, Result]:
    """Returns the run whose answers open the page: one with rationales, then the largest, the most data, the best."""
    found = [(summary, group, result) for summary in summaries for group in summary.groups for result in group.results]
    summary, _, result = max(
        found,
        key=lambda each: (
            bool(each[2].quality) or any(_said(each[2], i) for i in each[2].test_rows),
            each[0].parameters or 0,
            each[1].fraction,
            each[1].accuracy,
            -each[2].run.seed,
        ),
    )
    return summary, result


def _beside(summary: Summary, shown: Result) -> list[Result]:
    """Returns the other methods' runs with the same share of the data and seed."""
    same = [r for group in summary.groups if group.fraction == shown.run.fraction for r in group.results]
    return [r for r in same if r.run.seed == shown.run.seed and r.run.method != shown.run.method]


def _card(results: Sequence[Result], row_id: str, *, about: str) -> cards.Card:
    first = results[0]
    row = first.test_rows[row_id]
    said = _said(first, row_id)
    rows = [result.test_rows[row_id] for result in results]
    return cards.Card(
        question=cards.brief(_input(first, row) or row_id),
        rationale=cards.brief(said) if said else None,
        answers=tuple(
            cards.Answer(
                who=result.run.method,
                text=cards.brief(each.get("prediction", "")),
                verdict="right" if each["correct"] else "wrong",
            )
            for result, each in zip(results, rows, strict=True)
        ),
        label=None if all(each["correct"] for each in rows) else row.get("target"),
        about=about,
    )


def _input(result: Result, row: Mapping[str, Any]) -> str:
    """Returns a test row's input, without the prefix of the label task."""
    return row.get("input", "").removeprefix(result.manifest["data"]["options"].get("label_prefix", ""))


def note(embedded: dict[str, Any]) -> str:
    """Counts the answers and the test rows that were left out."""
    sets, runs = embedded["sets"], embedded["runs"]
    shown, total = sum(len(s["ids"]) for s in sets), sum(s["rows"] for s in sets)
    answers = sum(len(run["predictions"]) for run in runs)
    text = f"{answers:,} answers of {len(runs):,} run{'s' * (len(runs) != 1)} to {shown:,} test rows."
    if shown < total:
        text += f" The other {total - shown:,} test rows would make the page too large; these were chosen by a hash."
    return text


def filters(embedded: dict[str, Any]) -> list[Filter]:
    """Lists the filters that have more than one choice."""
    sets, runs = embedded["sets"], embedded["runs"]
    found: list[Filter] = []
    for name, label, values in (
        ("dataset", "Dataset", [s["dataset"] for s in sets]),
        ("method", "Method", [run["method"] for run in runs]),
        ("size", "Parameters", [run["size"] for run in runs]),
        ("fraction", "Data", sorted((run["fraction"] for run in runs), key=lambda share: float(share.split()[0]))),
        ("seed", "Seed", sorted((run["seed"] for run in runs), key=int)),
    ):
        distinct = list(dict.fromkeys(values))
        if len(distinct) > 1:
            found.append((name, label, "all", [(value, value or "not known") for value in distinct]))
    found.append(("verdict", "Answers", "all", [("wrong", "wrong only"), ("right", "right only")]))
    if len({run["method"] for run in runs}) > 1:
        agreements = [("disagree", "methods disagree"), ("only-right", "only this method right")]
        agreements += [("only-wrong", "only this method wrong"), ("all-wrong", "all methods wrong")]
        found.append(("agreement", "Agreement", "any", agreements))
    return found
