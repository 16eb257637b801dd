"""Choice among the rationales of each record, as `sbs select` makes it. Standard library only.

Rules are applied one after the other, each to the rationales that the one before left, in its order:

    agreement   drops those whose own label is not the row's: the human one, or without one that of the vote
    short       fewest words first
    diverse     the first stays; next is always the one whose words differ most from the nearest of those before it
    likely      first the one to whose tokens a trained student gives the highest mean log probability

Ties keep their order. What a row keeps depends on this row alone, so not on its place in the file.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import checks
from sbs_jax.data import grading, parsing, records, release
from sbs_jax.data.dataset import Dataset
from sbs_jax.data.records import Rationale, Record
from sbs_jax.storage import places
from sbs_jax.storage.checksums import file_sha256

AGREEMENT, SHORT, DIVERSE, LIKELY = RULES = ("agreement", "short", "diverse", "likely")
KEEP = "keep"  # in the counts of dropped rationales: those beyond the number to keep
_SameLabel = Callable[[str, str], bool]
# Of pairs (input, rationale): the mean log probability of the rationale's tokens, rounded (prediction/likelihood.py).
Likelihoods = Callable[[Sequence[tuple[str, str]]], Sequence[float]]


def check(rules: Sequence[str], *, keep: int | None, scored: bool) -> None:
    """Requires known and distinct rules, something to keep, and a student exactly for "likely"."""
    for rule in rules:
        checks.choice("--by", rule, RULES)
    if len(set(rules)) < len(rules):
        raise ValueError(f"--by is {' '.join(rules)}; expected each rule once.")
    if keep is not None:
        checks.whole_number("--keep", keep, least=1)
    if LIKELY in rules and not scored:
        raise ValueError("--by likely needs a student that ranks the texts; give its run by --model.")
    if scored and LIKELY not in rules:
        raise ValueError(f"got --model with --by {' '.join(rules)}; only --by likely uses a student.")


def write(
    dataset: Dataset,
    *,
    records_dir: str | Path,
    output: str | Path,
    rules: Sequence[str],
    keep: int | None = None,
    likelihoods: Likelihoods | None = None,
    model: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> records.Manifest:
    """Writes `<output>/<dataset>/` with the chosen rationales of `<records_dir>/<dataset>/`; returns its manifest.

    The same records, rules and student give the same bytes. An existing directory is treated as by `sbs records`.

    Args:
      dataset: whose records and whose equality of labels.
      records_dir, output: different folders.
      rules: some of `RULES`, in the order to apply them.
      keep: most rationales of a row; None for all that the rules leave.
      likelihoods: scores for "likely".
      model: description of the student that gives them, for the manifest.
      overwrite: replace other records there.
    """
    check(rules, keep=keep, scored=likelihoods is not None)
    folder = places.of(records_dir) / dataset.name
    records.check_exist(records_dir, dataset.name)
    release.check_target(folder, places.of(output) / dataset.name)
    before = _manifest(folder)
    files = {split: file for split in records.SPLITS if (file := records.file_of(folder, split)).exists()}
    rows = {split: records.read_records(file) for split, file in files.items()}
    chosen, dropped = {}, Counter[str]()
    for split, found in rows.items():
        kept, less = choose(found, rules=rules, keep=keep, same_label=dataset.same_label, likelihoods=likelihoods)
        chosen[split] = [with_chosen(row, each, dataset.same_label) for row, each in zip(found, kept, strict=True)]
        dropped += less
    every, left = ([row for some in of.values() for row in some] for of in (rows, chosen))
    selection = {
        "by": [*rules],
        "keep": keep,
        "rows": len(every),
        "rationales": sum(len(row.rationales) for row in every),
        "kept": sum(len(row.rationales) for row in left),
        "dropped": {reason: dropped[reason] for reason in (AGREEMENT, KEEP)},
        "rows without a rationale left": sum(row.outcome == parsing.NONE_CHOSEN for row in left),
    }
    if model is not None:
        selection["model"] = dict(model)
    if "selection" in before:
        selection["earlier"] = before["selection"]
    return release.write_directory(
        dataset,
        chosen,
        sources={split: {file.name: file_sha256(file)} for split, file in files.items()},
        records_dir=output,
        parser=before.get("parser", "unknown"),
        inputs=before.get("inputs", "records"),
        skipped=before.get("skipped", {}),
        overwrite=overwrite,
        teacher=before.get("teacher"),
        selection=selection,
    )


def _manifest(folder: Path) -> Mapping[str, Any]:
    """Reads the manifest of records; {} if they have none, which training does not need either."""
    return records.read_manifest(folder) if (folder / records.MANIFEST).is_file() else {}


def choose(
    rows: Sequence[Record],
    *,
    rules: Sequence[str],
    keep: int | None,
    same_label: _SameLabel,
    likelihoods: Likelihoods | None = None,
) -> tuple[list[Sequence[Rationale]], Counter[str]]:
    """Returns the rationales that each row keeps, in order, and counts the others by "agreement" and "keep"."""
    found: list[Sequence[Rationale]] = [row.rationales for row in rows]
    dropped: Counter[str] = Counter()
    for rule in rules:
        if rule == AGREEMENT:
            before = sum(map(len, found))
            found = [_agreeing(row, each, same_label) for row, each in zip(rows, found, strict=True)]
            dropped[AGREEMENT] = before - sum(map(len, found))
        elif rule == SHORT:
            found = [sorted(each, key=lambda one: len(one.rationale.split())) for each in found]
        elif rule == DIVERSE:
            found = [_diverse(each) for each in found]
        else:
            assert likelihoods is not None
            found = _by_likelihood(rows, found, likelihoods)
    kept = [each[:keep] for each in found]
    dropped[KEEP] = sum(map(len, found)) - sum(map(len, kept))
    return kept, dropped


def _agreeing(row: Record, found: Sequence[Rationale], same_label: _SameLabel) -> list[Rationale]:
    label = row.teacher_label if row.label is None else row.label
    return [
        each
        for each in found
        if label is not None and each.teacher_label is not None and same_label(label, each.teacher_label)
    ]


def _diverse(found: Sequence[Rationale]) -> list[Rationale]:
    """Orders by the largest smallest Jaccard distance of the sets of words to those before."""
    words = [frozenset(grading.words(each.rationale)) for each in found]
    rest, order = [*range(len(found))], []
    nearest = dict.fromkeys(rest, 1.0)  # distance to the nearest of those before
    while rest:
        best = max(rest, key=nearest.__getitem__)  # the first of equals
        rest.remove(best)
        order.append(best)
        for other in rest:
            union = len(words[best] | words[other])
            shared = len(words[best] & words[other]) / union if union else 1.0
            nearest[other] = min(nearest[other], 1.0 - shared)
    return [found[number] for number in order]


def _by_likelihood(
    rows: Sequence[Record], found: Sequence[Sequence[Rationale]], likelihoods: Likelihoods
) -> list[Sequence[Rationale]]:
    """Orders by descending likelihood; only rows with a choice are scored."""
    open_ = [number for number, each in enumerate(found) if len(each) > 1]
    scores = iter(likelihoods([(rows[n].input, each.rationale) for n in open_ for each in found[n]]))
    ordered = [*found]
    for number in open_:
        scored = [(next(scores), each) for each in found[number]]
        ordered[number] = [each for _, each in sorted(scored, key=lambda pair: -pair[0])]
    return ordered


def with_chosen(row: Record, kept: Sequence[Rationale], same_label: _SameLabel) -> Record:
    """Returns the record with these of its rationales; the first becomes its own, with its label.

    Without any, the record keeps its labels, and its outcome is "none_chosen". `teacher_text` stays where rationale or
    label are still those of that reply, and `votes` where they counted this label.
    """
    if tuple(kept) == row.rationales:
        return row
    if not kept:
        return dataclasses.replace(row, rationale=None, other_rationales=(), outcome=parsing.NONE_CHOSEN)
    first, others = kept[0], tuple(kept[1:])
    if first.rationale == row.rationale:
        return dataclasses.replace(row, other_rationales=others)
    label = first.teacher_label
    voted = None not in (label, row.teacher_label) and same_label(str(row.teacher_label), str(label))
    return dataclasses.replace(
        row,
        teacher_text=None,
        rationale=first.rationale,
        teacher_label=label,
        outcome=parsing.NO_LABEL if label is None else records.OK,
        hinted=False,
        votes=row.votes if voted else None,
        other_rationales=others,
    )
