"""Cut vocabularies: a SentencePiece model with only the pieces that some texts need, and the rows of tables to keep.

A published T5 has 32,100 rows in its embedding table and in its logits, and a task uses a few thousand of them. A cut
model keeps

- every piece in the segmentation of the given texts, or under a limit those of the labels,
- the pieces of a corpus, if one is given; under a limit the most frequent ones of texts and corpus,
- every piece of one character, so that other words can still be spelled,
- a reserve: the first unused pieces in the order of the file, which are the most frequent ones of its training.

Texts whose pieces are all kept are segmented as before: a unigram model picks the segmentation with the highest total
score, and the old one is still among those left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as _pb2

from sbs_jax import checks
from sbs_jax.data import tokens
from sbs_jax.storage import atomic, json_files

_MODEL: Any = _pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]  # made when it is imported
MODEL, CUT = "sentencepiece.model", "cut.json"
_SPACE = "▁"
_MULTIPLE = 128  # of table rows, as TPUs tile them
_CHUNK = 10_000  # texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Contents of cut.json.

    Attributes:
      kept: ids in the original vocabulary of the kept pieces, ascending; the new id is the position.
      pieces: number of pieces of the original file.
      sha256: hash of the original file.
      needed, characters, reserve: kept pieces that the texts need, further single characters, further pieces of a
        corpus or of the reserve.
    """

    kept: tuple[int, ...]
    pieces: int
    sha256: str
    needed: int
    characters: int
    reserve: int

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        if self.kept[:2] != (tokens.PAD_ID, tokens.EOS_ID) or not ascending or self.kept[-1] >= self.pieces:
            raise ValueError(
                f"'kept' has {json_files.brief(list(self.kept))}; expected ascending ids from 0 and 1 to less than "
                f"{self.pieces}."
            )

    @property
    def vocab_size(self) -> int:
        """Rows of the cut tables: pieces and sentinels, padded to a multiple of 128."""
        return -(-(len(self.kept) + tokens.EXTRA_IDS) // _MULTIPLE) * _MULTIPLE

    def rows(self, table_rows: int) -> np.ndarray:
        """Returns for each row of a cut table, int64 [vocab_size], its row in the original one; -1 for a row of zeros.

        ValueError if the original table is too small for its vocabulary.
        """
        last = self.pieces + tokens.EXTRA_IDS
        if table_rows < last:
            raise ValueError(f"The table has {table_rows} rows; expected at least {last}, as in the cut vocabulary.")
        found = np.concatenate([self.kept, np.arange(self.pieces, table_rows)])[: self.vocab_size]
        return np.pad(found, (0, self.vocab_size - len(found)), constant_values=-1)


def read(folder: str | Path) -> Cut:
    """Reads cut.json of a folder that `write` made. ValueError names the file."""
    path = Path(folder) / CUT
    return json_files.typed(json_files.read_json(path), Cut, where=str(path))


def write(
    folder: str | Path,
    vocabulary: str,
    texts: Iterable[str],
    *,
    reserve: int,
    labels: Iterable[str] = (),
    corpus: Iterable[str] = (),
    pieces: int | None = None,
) -> Cut:
    """Cuts a SentencePiece model to the pieces of `texts` and a reserve, and writes it with cut.json to a new folder.

    The pieces of `corpus` are kept too. At most `pieces` are kept if that is given: those of the `labels`, and the most
    frequent ones of texts and corpus. Every text (under a limit, every label) is then segmented by both models;
    ValueError if one differs or the labels need more pieces, FileExistsError if the folder exists.
    """
    checks.whole_number("reserve", reserve, least=0)
    if pieces is not None:
        checks.whole_number("pieces", pieces, least=1)
    if vocabulary == tokens.BYTE_VOCABULARY:
        raise ValueError("The vocabulary 'byte' has no pieces to cut; give the path of a SentencePiece model.")
    tokens.check_vocabulary(vocabulary)
    texts = _parts(texts)
    whole = texts if pieces is None else _parts(labels)
    data = tokens.read_vocabulary(vocabulary)
    original = _MODEL.FromString(data)
    old = _processor(data)
    used = {k for ids in _ids(old, whole) for k in ids}
    plain = _MODEL.SentencePiece.NORMAL
    needed = {k for k, piece in enumerate(original.pieces) if k in used or piece.type != plain}
    characters = {k for k, p in enumerate(original.pieces) if len(p.piece.removeprefix(_SPACE)) <= 1} - needed
    kept = needed | characters
    room = len(original.pieces) if pieces is None else pieces - len(kept)
    if room < 0:
        raise ValueError(
            f"Labels and single characters need {len(kept)} pieces, more than --pieces {pieces}; expected at least as "
            "many, since a student cannot write a label without its pieces."
        )
    counted = corpus if pieces is None else itertools.chain(texts, corpus)
    frequent = [k for k, _ in _counts(old, counted).most_common() if k not in kept][:room]
    rest = [k for k in range(len(original.pieces)) if k not in {*kept, *frequent}][: min(reserve, room - len(frequent))]
    kept = sorted({*kept, *frequent, *rest})
    cut = Cut(
        kept=tuple(kept),
        pieces=len(original.pieces),
        sha256=hashlib.sha256(data).hexdigest(),
        needed=len(needed),
        characters=len(characters),
        reserve=len(frequent) + len(rest),
    )
    kept_pieces = [original.pieces[k] for k in kept]
    del original.pieces[:]
    original.pieces.extend(kept_pieces)
    original.trainer_spec.vocab_size = len(kept)
    written = original.SerializeToString(deterministic=True)
    for text, (before, after) in zip(whole, _segmented(old, _processor(written), whole, kept=kept), strict=True):
        if before != after:
            raise ValueError(
                f"{json_files.brief(text)} is segmented as {old.IdToPiece(after)} by the cut vocabulary and as "
                f"{old.IdToPiece(before)} by the whole one; only unigram models can be cut."
            )
    with atomic.new_folder(Path(folder)) as made:
        (made / MODEL).write_bytes(written)
        (made / CUT).write_text(json.dumps(dataclasses.asdict(cut)) + "\n", "utf-8")
    return cut


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Counts of some texts under a cut vocabulary."""

    texts: int
    tokens: int
    unknown: int  # tokens that became <unk>
    changed: int  # texts with another segmentation than before


def coverage(folder: str | Path, vocabulary: str, texts: Iterable[str]) -> Coverage:
    """Counts what a cut changes for texts that it was not made for."""
    parts = [part for text in texts for part in text.split(tokens.JOINT)]
    old, new = _processor(tokens.read_vocabulary(vocabulary)), _processor((Path(folder) / MODEL).read_bytes())
    counts: Counter[str] = Counter()
    for before, after in _segmented(old, new, parts, kept=read(folder).kept):
        counts["tokens"] += len(after)
        counts["unknown"] += after.count(old.unk_id())
        counts["changed"] += before != after
    return Coverage(len(parts), counts["tokens"], counts["unknown"], counts["changed"])


def _processor(data: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=data)


def _parts(texts: Iterable[str]) -> list[str]:
    """Lists the distinct parts of texts that are encoded on their own."""
    return list(dict.fromkeys(part for text in texts for part in text.split(tokens.JOINT)))


def _counts(model: sentencepiece.SentencePieceProcessor, texts: Iterable[str]) -> Counter[int]:
    """Counts each piece of the texts, ties in the order of the model's file."""
    counts = Counter(itertools.chain.from_iterable(_ids(model, texts)))
    return Counter(dict(sorted(counts.items())))


def _ids(model: sentencepiece.SentencePieceProcessor, texts: Iterable[str]) -> Iterable[list[int]]:
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, _CHUNK)):
        yield from model.EncodeAsIds(chunk)


def _segmented(
    old: sentencepiece.SentencePieceProcessor,
    new: sentencepiece.SentencePieceProcessor,
    texts: Sequence[str],
    *,
    kept: Sequence[int],
) -> Iterable[tuple[list[int], list[int]]]:
    """Yields for each text its segmentation by the whole and by the cut model, both as ids of the whole one."""
    for before, after in zip(_ids(old, texts), _ids(new, texts), strict=True):
        yield before, [kept[k] for k in after]
