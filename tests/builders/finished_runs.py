"""Compare finished runs: arrays, metrics without speeds, predictions and the best step."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbs_jax.run import checkpoints, directory
from sbs_jax.training import metrics_window
from sbs_jax.weights import tensor_store


@dataclasses.dataclass(frozen=True)
class Contents:
    """Result of a finished run."""

    arrays: dict[str, np.ndarray]  # of its last step: parameters and optimizer
    metadata: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics, without speeds
    predictions: dict[str, bytes]
    best: int | None


@contextlib.contextmanager
def ending_at_a_save(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the training in the block at its first checkpoint, as Ctrl-C would."""
    save = checkpoints.Checkpoints.save

    def die(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", die)
        with pytest.raises(KeyboardInterrupt):
            yield


def unmeasured(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line of metrics without what a clock or a device tells."""
    return {name: value for name, value in line.items() if not metrics_window.is_measured(name)}


def contents(run: str | Path) -> Contents:
    run = Path(run)
    step = checkpoints.steps(run)[-1]
    arrays = {}
    for item in (checkpoints.PARAMETERS, checkpoints.OPTIMIZER):
        for name, array in tensor_store.orbax_arrays(run / "checkpoints" / str(step) / item).items():
            arrays[f"{item}/{name}"] = array.whole()
    lines = [unmeasured(line) for line in directory.read_metrics(run)]
    predictions = {path.name: path.read_bytes() for path in (run / "predictions").iterdir()}
    metadata = checkpoints.read_metadata(run, step)
    for name in (
        "lines",
        "evaluation_due",
        "scores",
        "clock",
    ):  # a run preempted in its last evaluation, which the resumed run repeated
        del metadata[name]
    return Contents(arrays, metadata, lines, predictions, checkpoints.best_step(run))


def assert_same(run: str | Path, reference: str | Path) -> None:
    """Requires equal runs, bit for bit."""
    got, want = contents(run), contents(reference)
    assert got.lines == want.lines
    assert got.predictions == want.predictions
    assert (got.best, got.metadata) == (want.best, want.metadata)
    assert got.arrays.keys() == want.arrays.keys()
    for name, array in want.arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array, err_msg=name)


def assert_close(run: str | Path, reference: str | Path) -> None:
    """Requires equal runs up to rounding."""
    got, want = contents(run), contents(reference)
    assert [(line["kind"], line["step"]) for line in got.lines] == [(line["kind"], line["step"]) for line in want.lines]
    for line, wanted in zip(got.lines, want.lines, strict=True):
        for name in wanted.keys() - {"kind"}:
            assert line[name] == pytest.approx(wanted[name], rel=2e-3, abs=1e-5), (name, line["step"])
    assert got.arrays.keys() == want.arrays.keys()
    for name, array in want.arrays.items():
        np.testing.assert_allclose(got.arrays[name], array, rtol=2e-2, atol=2e-4, err_msg=name)
