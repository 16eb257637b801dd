"""The browser of predictions: every answer of every run, embedded in the page, and what browser.js lists them by.

Texts of the data and of students are embedded as JSON that browser.js only ever puts into text nodes.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbs_jax.pages.elements import script_json, text
from sbs_jax.stats.costs import compact
from sbs_jax.stats.findings import percent
from sbs_jax.stats.results import Result
from sbs_jax.stats.study import Study

# Answers (test rows x runs) that one page holds, and characters of texts: beyond either, fewer test rows.
MOST_ANSWERS = 200_000
MOST_CHARACTERS = 40_000_000


def script() -> str:
    """The script of the browser; it does nothing on a page without answers."""
    return Path(__file__).with_name("browser.js").read_text("utf-8")


def style() -> str:
    """What the browser adds to the page's style."""
    return Path(__file__).with_name("browser.css").read_text("utf-8")


def data(study: Study, *, answers: int = MOST_ANSWERS, characters: int = MOST_CHARACTERS) -> dict[str, Any]:
    """The answers in columns, for `script_json`.

    A set is the test rows of one dataset: ids, inputs, gold labels. A run belongs to a set and has, in the same order,
    its predictions, a "1" or "0" for right or wrong, and what it said beside its prediction, if anything. Labels and
    predictions repeat, so they are numbers of `texts`:

        {"texts": ["yes", "no"], "sets": [{"dataset": "toy", "rows": 2, "ids": ["toy-0", "toy-1"], "inputs": [..],
         "gold": [0, 1], "teacher": []}], "runs": [{"set": 0, "method": "step-by-step", "size": "9.01M", "fraction":
         "25 %", "seed": "0", "predictions": [0, 0], "right": "10", "said": ["because ..", None], ..}]}

    Test rows that do not fit are left out by a hash of their ids, the same share of every dataset; `rows` counts all.
    """
    runs_of = {name: [r for r in study.results if r.manifest["data"]["dataset"] == name] for name in study.datasets}
    kept = {name: _sample(runs_of[name][0], 1.0) for name in study.datasets}
    total = sum(len(ids) * len(runs_of[name]) for name, ids in kept.items())
    size = sum(_characters(runs_of[name], ids) for name, ids in kept.items())
    share = min(1.0, answers / total, characters / max(1, size))
    if share < 1:
        kept = {name: _sample(runs_of[name][0], share) for name in study.datasets}
    texts: dict[str, int] = {}
    sets, runs = [], []
    for number, (name, ids) in enumerate(kept.items()):
        first = runs_of[name][0]
        rows = [first.test_rows[i] for i in ids]
        prefix = first.manifest["data"]["options"].get("label_prefix", "")
        said_by_teacher = _teacher_rationales(runs_of[name], ids)
        sets.append(
            {
                "dataset": name,
                "rows": len(first.test_rows),
                "ids": ids,
                "inputs": [row.get("input", "").removeprefix(prefix) for row in rows],
                "gold": [_number(texts, row.get("target", "")) for row in rows],
                "teacher": said_by_teacher if any(said_by_teacher) else [],
            }
        )
        runs += [_run(result, number, ids, texts) for result in runs_of[name]]
    return {"texts": list(texts), "sets": sets, "runs": runs}


def _run(result: Result, of_set: int, ids: Sequence[str], texts: dict[str, int]) -> dict[str, Any]:
    rows = [result.test_rows[i] for i in ids]
    examples = result.quality.examples if result.quality else {}
    said = [_said(result, i) for i in ids]
    told = [examples.get(i) for i in ids]
    some = any(told)
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
        "implied": [_number(texts, t.implied_label) if t and t.implied_label is not None else -1 for t in told]
        if some
        else [],
        "consistent": "".join("-" if t is None or t.consistent is None else str(int(t.consistent)) for t in told)
        if some
        else "",
    }


def _said(result: Result, row_id: str) -> str | None:
    """The rationale that was measured, or the whole text of a student that writes one before its label."""
    example = result.quality.examples.get(row_id) if result.quality else None
    if example:
        return example.rationale
    row = result.test_rows[row_id]
    for name in ("rationale", "text"):
        if isinstance(row.get(name), str):
            return row[name]
    return None


def _teacher_rationales(results: Sequence[Result], ids: Sequence[str]) -> list[str | None]:
    """What the teacher said on each row, by the first run that has it beside its own rationale."""
    found: list[str | None] = []
    for i in ids:
        examples = (result.quality.examples.get(i) for result in results if result.quality)
        found.append(next((e.teacher_rationale for e in examples if e and e.teacher_rationale), None))
    return found


def _sample(result: Result, share: float) -> list[str]:
    """This share of the test rows, at least one, chosen by a hash of their ids; in the order of the file."""
    ids = list(result.test_rows)
    if share >= 1:
        return ids
    count = max(1, int(share * len(ids)))
    chosen = set(sorted(ids, key=lambda i: hashlib.sha256(i.encode()).hexdigest())[:count])
    return [i for i in ids if i in chosen]


def _characters(results: Sequence[Result], ids: Sequence[str]) -> int:
    of_rows = sum(len(i) + len(results[0].test_rows[i].get("input", "")) for i in ids)
    return of_rows + sum(len(_said(result, i) or "") for result in results for i in ids)


def _number(texts: dict[str, int], value: str) -> int:
    return texts.setdefault(value, len(texts))


def section(found: dict[str, Any]) -> str:
    """The browser as HTML, filled by browser.js."""
    sets, runs = found["sets"], found["runs"]
    shown, total = sum(len(s["ids"]) for s in sets), sum(s["rows"] for s in sets)
    answers = sum(len(run["predictions"]) for run in runs)
    note = f"{answers:,} answers of {len(runs):,} run{'s' * (len(runs) != 1)} to {shown:,} test rows."
    if shown < total:
        note += f" The other {total - shown:,} test rows would make the page too large; these were chosen by a hash."
    selects = []
    for name, told, every, values in (
        ("dataset", "Dataset", "all", [s["dataset"] for s in sets]),
        ("method", "Method", "all", [run["method"] for run in runs]),
        ("size", "Parameters", "all", [run["size"] for run in runs]),
        ("fraction", "Data", "all", [run["fraction"] for run in runs]),
        ("seed", "Seed", "all", [run["seed"] for run in runs]),
    ):
        distinct = list(dict.fromkeys(values))
        if name == "seed":
            distinct.sort(key=int)
        elif name == "fraction":
            distinct.sort(key=lambda share: float(share.split()[0]))
        if len(distinct) > 1:
            options = "".join(f'<option value="{text(v)}">{text(v or "not known")}</option>' for v in distinct)
            selects.append(_select(name, told, every, options))
    several = len({run["method"] for run in runs}) > 1
    agreement = [("disagree", "methods disagree"), ("only-right", "only this method right")] if several else []
    agreement += [("only-wrong", "only this method wrong"), ("all-wrong", "all methods wrong")] if several else []
    verdict = '<option value="wrong">wrong only</option><option value="right">right only</option>'
    selects.append(_select("verdict", "Answers", "all", verdict))
    if agreement:
        options = "".join(f'<option value="{value}">{told}</option>' for value, told in agreement)
        selects.append(_select("agreement", "Agreement", "any", options))
    selected = "\n".join(selects)
    return f"""<section id="predictions" aria-labelledby="predictions-name">
<h2 id="predictions-name">Predictions</h2>
<p>{text(note)} Arrow keys move through the list, Enter goes to the answer, Escape back.</p>
<noscript><p class="caution">This list needs JavaScript; nothing is loaded from anywhere.</p></noscript>
<form id="filters" role="search" aria-label="Predictions">
<label class="search">Text in input, labels, rationale or id
<input type="search" id="text" autocomplete="off" spellcheck="false"></label>
{selected}
<button type="reset">Clear</button>
</form>
<p id="told" role="status"></p>
<div id="panes">
<div id="list" role="listbox" tabindex="0" aria-label="Answers"><div id="space" role="presentation"></div></div>
<div id="detail" role="region" tabindex="0" aria-label="Chosen answer"></div>
</div>
</section>"""


def embedded(found: dict[str, Any]) -> str:
    """The data as an element that browser.js reads."""
    return f'<script type="application/json" id="data">{script_json(found)}</script>'


def _select(name: str, told: str, every: str, options: str) -> str:
    return f'<label>{told}<select id="{name}"><option value="">{every}</option>{options}</select></label>'
