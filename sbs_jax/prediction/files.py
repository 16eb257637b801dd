"""Answers to a file of questions of any size, in constant memory, resumable: `sbs predict`.

Rows are read and answered one window at a time. Rows of a window are grouped by length; answers are written in input
order. Windows depend on the input only, so an interrupted run resumes at the start of a window and writes the same
answers. Each of several processes answers a block of the windows, on its own devices (shards.py).
"""

import dataclasses
import itertools
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sbs_jax import hosts
from sbs_jax.prediction import id_index, inputs, outputs, shards
from sbs_jax.prediction.engine import CHOICES, Answer, Predictor
from sbs_jax.storage import checksums, json_files, places

log = logging.getLogger(__name__)

# A window ends after this many batches or characters.
_BATCHES, _CHARACTERS = 16, 2**23
_SHOWN = 5  # rows with errors to log


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts of the output's rows, of rows with an error, and of rows answered by an earlier process."""

    rows: int
    errors: int
    resumed: int


def predict(predictor: Predictor, *, input_path: str | Path, output_path: str | Path) -> Summary:
    """Answers every row of a file, in order; file endings choose the formats (inputs.py, outputs.py).

    An output row is {"id", "prediction", "score"}, with "rationale" and "scores" if the settings ask for them; or
    {"id", "line", "error"} for a row that cannot be answered. Each of several processes writes its shard, and the
    summary counts the rows of all.
    """
    input_path, output_path, shard = places.of(input_path), places.of(output_path), shards.Shard(*hosts.numbered())
    outputs.check(output_path, input_path=input_path, shard=shard)
    reader = inputs.read(input_path)
    settings = predictor.settings
    source = _Source(input_path)
    about = {"input": source.identity, **predictor.describe()}
    hosts.agree({"inputs and model": json.dumps(about, sort_keys=True)})
    journal = outputs.Journal(output_path, about=about, shard=shard)
    errors = resumed = rows = 0
    window_rows = _BATCHES * settings.batch_size
    unit = {"unit": reader.unit, "unit_scale": True, "disable": not (hosts.is_first() and sys.stderr.isatty())}
    try:
        mine = _block(input_path, shard, rows=window_rows)
        with (
            id_index.IdIndex(journal.ids) as known,
            # The first process shows it, whose block is the first.
            tqdm(total=reader.total // shard.count, desc=output_path.name, **unit) as bar,
        ):
            for number, window in enumerate(itertools.islice(_windows(reader, rows=window_rows), mine.stop)):
                entries = _distinct(window, known)
                if number < mine.start:
                    continue
                if rows == resumed and rows + len(entries) <= journal.rows:
                    resumed += len(entries)
                    errors += _same_rows(journal, entries)
                else:
                    if rows == resumed:
                        journal.cut()
                    answered = _answered(predictor, entries)
                    source.check_unchanged()
                    errors += _log_errors(answered, before=errors)
                    journal.add(answered)
                rows += len(entries)
                bar.update(reader.done - bar.n)
                bar.set_postfix_str(f"{rows} rows" + (f", {errors} with errors" if errors else ""), refresh=False)
        if rows == resumed:
            journal.cut()
        source.check_unchanged()
        journal.finish(columns=_columns(settings))
    except BaseException:
        journal.close()
        raise
    counts = hosts.from_all([rows, errors, resumed])
    rows, errors, resumed = (sum(each) for each in zip(*counts, strict=True))
    return Summary(rows=rows, errors=errors, resumed=resumed)


def _block(path: Path, shard: shards.Shard, *, rows: int) -> slice:
    """Returns the windows that this process answers; with several processes, the input is read to count them all."""
    if shard.count == 1:
        return slice(0, None)
    mine = shard.windows(sum(1 for _ in _windows(inputs.read(path), rows=rows)))
    return slice(mine.start, mine.stop)


def _windows(reader: Iterable[inputs.Entry], *, rows: int) -> Iterator[list[inputs.Entry]]:
    window: list[inputs.Entry] = []
    characters = 0
    for entry in reader:
        window.append(entry)
        characters += len(entry.question.input) if entry.question else 0
        if len(window) == rows or characters >= _CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _distinct(window: list[inputs.Entry], known: id_index.IdIndex) -> list[inputs.Entry]:
    """Turns entries whose id occurred earlier into errors."""
    asked = [entry for entry in window if entry.question is not None]
    first = dict(
        zip(
            (e.line for e in asked),
            known.first_lines([(e.question.id, e.line) for e in asked if e.question]),
            strict=True,
        )
    )
    return [
        inputs.Entry(
            line=entry.line,
            id=entry.id,
            error=f"id {json_files.brief(entry.id)} is already that of line {first[entry.line]}; ids must be distinct.",
        )
        if first.get(entry.line, entry.line) != entry.line
        else entry
        for entry in window
    ]


def _answered(predictor: Predictor, entries: list[inputs.Entry]) -> list[outputs.Row]:
    answers = iter(predictor.answer([entry.question for entry in entries if entry.question is not None]))
    return [_row(entry, next(answers) if entry.question is not None else None, predictor) for entry in entries]


def _row(entry: inputs.Entry, answer: Answer | None, predictor: Predictor) -> outputs.Row:
    error = entry.error if answer is None else answer.error
    if answer is None or error is not None:
        return {"id": entry.id, "line": entry.line, "error": error}
    row: outputs.Row = {"id": answer.id, "prediction": answer.prediction, "score": answer.score}
    if predictor.settings.rationale:
        row["rationale"] = answer.rationale
    if answer.scores is not None:
        row["scores"] = dict(answer.scores)
    return row


def _columns(settings: Any) -> list[str]:
    asked = [("rationale", settings.rationale), ("scores", settings.decoding == CHOICES)]
    return ["id", "prediction", "score", *(name for name, wanted in asked if wanted), "line", "error"]


def _same_rows(journal: outputs.Journal, entries: list[inputs.Entry]) -> int:
    """Counts the errors among rows answered earlier. ValueError if those rows are not the input's."""
    errors = 0
    for entry in entries:
        try:
            row = journal.read()
            same = row["id"] == entry.id
        except (ValueError, KeyError, TypeError):
            row, same = {}, False
        if not same:
            raise ValueError(
                f"{journal.path} lacks the answer to line {entry.line} (id {json_files.brief(entry.id)}) in its "
                f"place: it or the input was changed. Remove {journal.path} to start again."
            )
        errors += "error" in row
    return errors


def _log_errors(rows: list[outputs.Row], *, before: int) -> int:
    """Logs the first errors; returns the number of rows with one."""
    wrong = [row for row in rows if "error" in row]
    for row in itertools.islice(wrong, max(0, _SHOWN - before)):
        log.warning("line %d: %s", row["line"], row["error"])
    return len(wrong)


class _Source:
    """The input as it is at the start: `identity` has its size and a hash of all of it."""

    def __init__(self, path: Path) -> None:
        self._path, self._status = path, _status(path)
        self.identity = {"bytes": self._status[0], "sha256": checksums.file_sha256(path)}

    def check_unchanged(self) -> None:
        """Raises ValueError if the file was written since: answers would join questions that nobody asked."""
        if _status(self._path) != self._status:
            raise ValueError(
                f"{self._path} was changed while it was being answered; the answers of rows that were read since are "
                "not kept. Leave it as it is and repeat the command."
            )


def _status(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev
