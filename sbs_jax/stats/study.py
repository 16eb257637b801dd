"""Summaries of runs of several datasets and sizes, with p values corrected for all comparisons together."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sbs_jax.stats import paper, teacher
from sbs_jax.stats.results import Result, Run, join_folds, load
from sbs_jax.stats.summary import Group, Summary, check_comparable, corrected, of_results
from sbs_jax.stats.variants import name_variants


@dataclass(frozen=True, kw_only=True)
class Study:
    """Numbers of a page: summaries by dataset, in the order given, then by size of the student."""

    summaries: tuple[Summary, ...]
    left_out: tuple[str, ...]  # runs in the folders that the page leaves out, each with its reason

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(summary.dataset for summary in self.summaries))

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods of all summaries, in their order."""
        return tuple(dict.fromkeys(method for summary in self.summaries for method in summary.methods))

    @property
    def results(self) -> tuple[Result, ...]:
        """Results of all seeds; those of folds are joined."""
        return tuple(r for summary in self.summaries for group in summary.groups for r in group.results)

    @property
    def runs(self) -> tuple[Result, ...]:
        """Results of single runs."""
        return tuple(run for result in self.results for run in result.runs)

    @property
    def comparisons(self) -> int:
        """Number of comparisons, for which p values are corrected."""
        return sum(len(summary.comparisons) for summary in self.summaries)

    def of(self, dataset: str) -> tuple[Summary, ...]:
        """Returns the sizes of one dataset, smallest first."""
        return tuple(summary for summary in self.summaries if summary.dataset == dataset)

    def groups(self) -> Iterator[tuple[Summary, Group]]:
        for summary in self.summaries:
            for group in summary.groups:
                yield summary, group


def study(runs: Sequence[Run], *, teacher_accuracy: float | None = None, left_out: Sequence[str] = ()) -> Study:
    """Summarizes runs by dataset and size; p values are corrected for all comparisons together.

    The folds of a seed are joined; a seed without all its folds is left out, and said to be. Runs of one dataset must
    answer the same test rows, whatever their size. Sizes differ by the configuration of the model, without adapters;
    runs that differ only in a setting have it in the name of their method. `teacher_accuracy` as in `summarize`; leave
    it out with several datasets.
    """
    results = [load(run) for run in runs]
    by_dataset: dict[str, list[Result]] = {}
    for result in results:
        by_dataset.setdefault(result.manifest["data"]["dataset"], []).append(result)
    if teacher_accuracy is not None and len(by_dataset) > 1:
        raise ValueError(f"Got one teacher_accuracy and {len(by_dataset)} datasets; leave it out.")
    summaries = []
    incomplete: list[str] = []
    for of_dataset in by_dataset.values():
        joined, reasons = join_folds(name_variants(of_dataset, size=_size), size=_size)
        incomplete += reasons
        if joined:
            check_comparable(joined)
        sizes: dict[str, list[Result]] = {}
        for result in joined:
            sizes.setdefault(_size(result), []).append(result)
        found = [of_results(of_size, teacher_accuracy=teacher_accuracy) for of_size in sizes.values()]
        summaries += sorted(found, key=lambda summary: summary.parameters or 0)
    if not summaries:
        raise ValueError(" ".join(("Got no runs to report on; name at least one run directory.", *incomplete)))
    together = iter(corrected([c for summary in summaries for c in summary.comparisons]))
    return Study(
        summaries=tuple(
            dataclasses.replace(summary, comparisons=tuple(next(together) for _ in summary.comparisons))
            for summary in summaries
        ),
        left_out=(*left_out, *incomplete),
    )


def teacher_of(summary: Summary) -> teacher.Teacher | None:
    """Reads the teacher of a summary from its records, if those are still in place."""
    return teacher.read(summary.groups[0].results[0].manifest)


def paper_accuracy(summary: Summary, group: Group) -> float | None:
    """Returns the paper's accuracy for the same cell, in percent; None if it has no such cell."""
    found = teacher_of(summary)
    return paper.accuracy(group.results, teacher=found.name if found else None)


def _size(result: Result) -> str:
    """Returns a key of the model's shape, without dropout and arithmetic."""
    model = result.manifest.get("model")
    if not isinstance(model, dict):
        return ""
    names = ("emb_dim", "mlp_dim", "num_heads", "head_dim", "num_encoder_layers", "num_decoder_layers", "vocab_size")
    of_decoder_only = ("num_layers", "num_kv_heads")
    return json.dumps([model.get(name) for name in (*names, *of_decoder_only)])
