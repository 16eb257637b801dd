"""Runs of several datasets and sizes, each dataset and size summarized for itself, and what holds over all of them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sbs_jax.stats import paper, teacher
from sbs_jax.stats.results import Result, Run, load
from sbs_jax.stats.summary import Group, Summary, check_comparable, corrected, of_results
from sbs_jax.stats.variants import told_apart


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything a page says: summaries by dataset, in the order given, then by size of the student."""

    summaries: tuple[Summary, ...]
    left_out: tuple[str, ...]  # runs that a folder holds and the page does not, each with its reason

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(summary.dataset for summary in self.summaries))

    @property
    def methods(self) -> tuple[str, ...]:
        """Of all summaries, each in the order of its own."""
        return tuple(dict.fromkeys(method for summary in self.summaries for method in summary.methods))

    @property
    def results(self) -> tuple[Result, ...]:
        return tuple(r for summary in self.summaries for group in summary.groups for r in group.results)

    @property
    def comparisons(self) -> int:
        """How many there are: what p values are corrected for."""
        return sum(len(summary.comparisons) for summary in self.summaries)

    def of(self, dataset: str) -> tuple[Summary, ...]:
        """The sizes of one dataset, smallest first."""
        return tuple(summary for summary in self.summaries if summary.dataset == dataset)

    def groups(self) -> Iterator[tuple[Summary, Group]]:
        for summary in self.summaries:
            for group in summary.groups:
                yield summary, group


def study(runs: Sequence[Run], *, teacher_accuracy: float | None = None, left_out: Sequence[str] = ()) -> Study:
    """Summaries of some runs, one per dataset and size; p values are corrected for all comparisons together.

    Runs of one dataset have to answer the same test rows, whatever their size. Sizes are told apart by the
    configuration of the model, not by what adapters add to it; runs that differ in a setting alone by that setting, in
    the name of their method. `teacher_accuracy` as in `summarize`; with several
    datasets it must be left out.
    """
    results = [load(run) for run in runs]
    by_dataset: dict[str, list[Result]] = {}
    for result in results:
        by_dataset.setdefault(result.manifest["data"]["dataset"], []).append(result)
    if teacher_accuracy is not None and len(by_dataset) > 1:
        raise ValueError(f"Got one teacher_accuracy and {len(by_dataset)} datasets; leave it out.")
    summaries = []
    for of_dataset in by_dataset.values():
        check_comparable(of_dataset)
        of_dataset = told_apart(of_dataset, size=_size)
        sizes: dict[str, list[Result]] = {}
        for result in of_dataset:
            sizes.setdefault(_size(result), []).append(result)
        found = [of_results(of_size, teacher_accuracy=teacher_accuracy) for of_size in sizes.values()]
        summaries += sorted(found, key=lambda summary: summary.parameters or 0)
    if not summaries:
        raise ValueError("Got no runs to report on; name at least one run directory.")
    together = iter(corrected([c for summary in summaries for c in summary.comparisons]))
    return Study(
        summaries=tuple(
            dataclasses.replace(summary, comparisons=tuple(next(together) for _ in summary.comparisons))
            for summary in summaries
        ),
        left_out=tuple(left_out),
    )


def teacher_of(summary: Summary) -> teacher.Teacher | None:
    """The teacher of a summary's records, if those are still in place."""
    return teacher.read(summary.groups[0].results[0].manifest)


def paper_accuracy(summary: Summary, group: Group) -> float | None:
    """What the paper has for the same cell, in percent; None where it has none."""
    found = teacher_of(summary)
    return paper.accuracy(group.results, teacher=found.name if found else None)


def _size(result: Result) -> str:
    """The same for students of one shape. Dropout and arithmetic are no matter of size."""
    model = result.manifest.get("model")
    if not isinstance(model, dict):
        return ""
    names = ("emb_dim", "mlp_dim", "num_heads", "head_dim", "num_encoder_layers", "num_decoder_layers", "vocab_size")
    return json.dumps([model.get(name) for name in names])
