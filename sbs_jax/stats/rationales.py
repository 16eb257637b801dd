"""Measures of rationales: their fit to the answers, their overlap with the teacher's, their length.

Three figures, each over the rows to which it applies:

by parser        The rationale's text names a label (a choice, a label, a calculation: `Dataset.implied_label`), and
                 it is the predicted one. Most texts of e-SNLI name none.
by label task    The student reads its own rationale after the input, and gives the same answer as without. The same
                 with another row's rationale is the baseline: near 1, the student hardly reads rationales at all. It
                 was not trained on such inputs. A cascade's student was, and always reads its own: only the baseline
                 is measured.
ROUGE-L          F1 of the longest common subsequence of words with the teacher's rationale (Lin, 2004): lower case,
                 letters and digits, no stemming.

`measure` writes them to `<run>/rationales.json`, and the texts to `<run>/rationales.jsonl` (quality.py).
"""

import functools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import hosts
from sbs_jax.data import grading, parsing, records, registry, selection, task_names, tokens
from sbs_jax.data.dataset import Dataset, answers_in_two_steps
from sbs_jax.stats.quality import LINES, NAME, VERSION
from sbs_jax.storage import atomic, places
from sbs_jax.student import partitioning
from sbs_jax.training import evaluate, students


def measure(
    run: str | Path,
    *,
    records_dir: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    base: str | None = None,
) -> dict[str, Any]:
    """Generates rationales and answers on test with the best checkpoint of a run, greedily, and measures them.

    Returns the contents of `rationales.json`. The answers are those of the label task, or of the single task, whose
    text is rationale and answer in one. ValueError if the run was trained on labels alone.
    """
    student = students.load_student(run, layout=partitioning.DATA_PARALLEL, records_dir=records_dir, base=base)
    name, kind = task_names.answering(student.manifest["run"]["mixture_or_task_name"])
    if kind == selection.LABEL:
        raise ValueError(
            f"{run} was trained on labels alone ({name.name}_{kind}); expected a student that writes rationales."
        )
    rows = [row for row in registry.read_split(name.name, selection.TEST) if row.label or row.teacher_label][:limit]
    generate = _Generator(student, batch_size=batch_size)
    texts = [row.input for row in rows]
    by_label_task: dict[str, float | None] = {"by_label_task": None}
    if kind == selection.RATIONALE_THEN_LABEL:
        whole = generate(texts, prefix=student.options.label_prefix, answer="targets")
        written = [text.rpartition(selection.ANSWER_MARKER)[0].strip() for text in whole]
        predictions = [registry.graded_text(text, kind=kind) for text in whole]
    elif answers_in_two_steps(kind):
        in_slots = generate.unfilled(texts, prefix=student.options.rationale_prefix, answer="targets")
        written = generate.filled(texts, in_slots)
        label = functools.partial(generate, texts, prefix=student.options.label_prefix, answer="label")
        predictions, others = (label(rationales=read) for read in (in_slots, in_slots[1:] + in_slots[:1]))
        by_label_task["by_label_task_other_rationale"] = _share(map(_alike(name.same_label), predictions, others))
    else:
        written = generate(texts, prefix=student.options.rationale_prefix, answer="targets")
        label = functools.partial(generate, prefix=student.options.label_prefix, answer="label")
        predictions = label(texts)
        own, others = (
            label([f"{text} {each}" for text, each in zip(texts, read, strict=True)], wide=True)
            for read in (written, written[1:] + written[:1])
        )
        same = name.same_label
        by_label_task = {
            "by_label_task": _share(map(_alike(same), predictions, own)),
            "by_label_task_other_rationale": _share(map(_alike(same), predictions, others)),
        }
    found, lines = quality(name, rows, rationales=written, predictions=predictions)
    found["consistency"] |= by_label_task
    found |= {"step": student.step, "split": selection.TEST}
    if hosts.is_first():
        folder = places.of(run)
        folder = folder if (folder / "manifest.json").exists() else folder.parents[1]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic.replace(folder / LINES, text.encode("utf-8", "backslashreplace"))
        atomic.replace(folder / NAME, (json.dumps(found, indent=1) + "\n").encode())
    return found


def of_teacher(dataset: str, *, records_dir: str, limit: int | None = None) -> dict[str, Any]:
    """Measures the teacher's own rationales and labels on test, without generating anything.

    `dataset` is a name, or the folder of one (data/dataset_folder.py). Rows without a rationale or a label of the
    teacher are left out.
    """
    registry.configure(selection.DataOptions(records_dir=records_dir, vocabulary="byte"))
    one = registry.get(dataset)
    rows = [row for row in registry.read_split(one.name, selection.TEST) if row.rationale and row.teacher_label][:limit]
    written, labels = [row.rationale or "" for row in rows], [row.teacher_label or "" for row in rows]
    found, _ = quality(one, rows, rationales=written, predictions=labels)
    graded = [one.same_label(row.label, row.teacher_label or "") for row in rows if row.label]
    implied = [(_implied(one, row, text), row.label) for row, text in zip(rows, written, strict=True)]
    found["consistency"]["by_parser_with_human_label"] = _share(
        one.same_label(label, text) for text, label in implied if text is not None and label
    )
    found["teacher_right"] = _share(graded)
    del found["examples_file"], found["overlap_with_teacher"]
    return found


def quality(
    dataset: Dataset,
    rows: Sequence[records.Record],
    *,
    rationales: Sequence[str],
    predictions: Sequence[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Computes the contents of rationales.json, except those of a student's run, and the lines of rationales.jsonl."""
    lines = []
    for row, written, prediction in zip(rows, rationales, predictions, strict=True):
        implied = _implied(dataset, row, written)
        lines.append(
            {
                "id": row.id,
                "rationale": written,
                "implied_label": implied,
                "prediction": prediction,
                "consistent": None if implied is None else _alike(dataset.same_label)(implied, prediction),
                "teacher_rationale": row.rationale,
                "rouge_l": grading.rouge_l_of(row.rationale, written) if row.rationale else None,
            }
        )
    decided = [line["consistent"] for line in lines if line["consistent"] is not None]
    teachers = [line for line in lines if line["teacher_rationale"]]
    found = {
        "version": VERSION,
        "dataset": dataset.name,
        "rows": len(lines),
        "consistency": {"by_parser": _share(decided), "by_parser_rows": len(decided), "by_label_task": None},
        "overlap_with_teacher": {"rouge_l": _mean(line["rouge_l"] for line in teachers), "chrf": None},
        "length": {
            "student_words": _mean(len(line["rationale"].split()) for line in lines),
            "teacher_words": _mean(len(line["teacher_rationale"].split()) for line in teachers),
        },
        "examples_file": LINES,
    }
    return found, lines


def _implied(dataset: Dataset, row: records.Record, text: str) -> str | None:
    """Returns the label that a rationale names."""
    if dataset.implied_label is not None:
        return dataset.implied_label(text, row.choices)
    return parsing.only_label_named(text, parsing.label_patterns(row.choices or dataset.labels or ()))


def _alike(same: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    """Compares by the dataset's grading, or by characters, since texts that are not labels can be equal too."""
    return lambda a, b: a == b or same(a, b)


def _share(values: Iterable[bool]) -> float | None:
    return _mean(map(float, values))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


class _Generator:
    """Greedy generator with one program per width of the inputs and length of the answers."""

    def __init__(self, student: students.Student, *, batch_size: int) -> None:
        self._student, self._batch_size = student, batch_size
        run = student.manifest["run"]
        self._lengths = dict(run["task_feature_lengths"])
        self._answers = {"label": run["max_decode_length"], "targets": self._lengths["targets"]}
        self._generators: dict[str, evaluate.Generator] = {}

    def __call__(self, texts: Sequence[str], **options: Any) -> list[str]:
        """Generates answers, with the options of `unfilled`."""
        return self.filled(texts, self.unfilled(texts, **options))

    def filled(self, texts: Sequence[str], answers: Sequence[str]) -> list[str]:
        """Puts the numbers of each text into its answer, in place of slots."""
        numbers = [selection.numbers_of(text, self._student.options) for text in texts]
        return [each.fill(answer).strip() for each, answer in zip(numbers, answers, strict=True)]

    def unfilled(
        self,
        texts: Sequence[str],
        *,
        prefix: str,
        answer: str,
        wide: bool = False,
        rationales: Sequence[str] | None = None,
    ) -> list[str]:
        """Generates answers up to the length of `answer`, "label" or "targets", with numbers in slots.

        `wide` inputs hold a rationale that the student was not trained to read; `rationales` (in slots) are those that
        it was.
        """
        student = self._student
        vocabulary = registry.vocabulary(student.options.vocabulary)
        length = self._lengths["inputs"] + (self._lengths["targets"] if wide else 0)
        numbers = [selection.numbers_of(text, student.options) for text in texts]
        hidden = [found.hide(text) for found, text in zip(numbers, texts, strict=True)]
        if rationales is not None:
            hidden = map(selection.with_rationale, hidden, rationales)
        rows = tokens.TokenTable.of([prefix + text for text in hidden], vocabulary).padded(length)
        if answer not in self._generators:
            self._generators[answer] = evaluate.Generator(
                student.structure,
                eos_id=student.config.eos_id,
                partitioner=student.partitioner,
                batch_size=self._batch_size,
                length=self._answers[answer],
            )
        found = self._generators[answer].run(student.parameters, rows)
        return [vocabulary.decode(ids) for ids, _ in found]
