"""Cut vocabularies: a vocabulary with only the pieces that some texts need, and the rows of tables to keep.

A published T5 has 32,100 rows in its embedding table and in its logits, SmolLM2 49,152 and Gemma 3 262,144, and a task
uses a few thousand of them. A cut vocabulary keeps

- every piece in the segmentation of the given texts, or under a limit those of the labels,
- the pieces of a corpus, if one is given; under a limit the most frequent ones of texts and corpus,
- every piece of one character or byte, so that other words can still be spelled,
- a reserve: the first unused pieces in the order of the file, which are the most frequent ones of its training,
- in a BPE tokenizer, the pieces from which these are merged (bpe_cut.py).

Texts whose pieces are all kept are segmented as before: a unigram model picks the segmentation with the highest total
score, and the old one is still among those left; BPE finds the same merges in the same order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as _pb2

from sbs_jax import checks
from sbs_jax.data import bpe_cut, tokens, vocabularies
from sbs_jax.data.dataset import JOINT
from sbs_jax.storage import atomic, json_files

_MODEL: Any = _pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]  # made when it is imported
CUT = "cut.json"
_SPACE = "▁"
_MULTIPLE = 128  # of table rows, as TPUs tile them
_CHUNK = 10_000  # texts
_SENTENCEPIECE, _BPE = "sentencepiece", "bpe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Contents of cut.json.

    Attributes:
      kept: ids in the original vocabulary of the kept pieces, ascending; the new id is the position.
      pieces: number of pieces of the original file.
      sha256: hash of the original file.
      needed, characters, reserve: kept pieces that the texts need, further single characters, further pieces of a
        corpus or of the reserve.
      kind: kind of the vocabulary, a key of `vocabularies.KINDS`.
    """

    kept: tuple[int, ...]
    pieces: int
    sha256: str
    needed: int
    characters: int
    reserve: int
    kind: str = _SENTENCEPIECE

    def __post_init__(self) -> None:
        checks.choice("'kind'", self.kind, _PIECES)
        ascending = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        first = (tokens.PAD_ID, tokens.EOS_ID) if self.extra_ids else (tokens.PAD_ID,)
        if self.kept[: len(first)] != first or not ascending or self.kept[-1] >= self.pieces:
            raise ValueError(
                f"'kept' has {json_files.brief(list(self.kept))}; expected ascending ids from {first} to less than "
                f"{self.pieces}."
            )

    @property
    def file(self) -> str:
        """Name of the cut vocabulary beside cut.json."""
        return str(vocabularies.KINDS[self.kind].file)

    @property
    def extra_ids(self) -> int:
        """Number of sentinels above the pieces."""
        return vocabularies.KINDS[self.kind].extra_ids

    @property
    def vocab_size(self) -> int:
        """Rows of the cut tables: pieces and sentinels, padded to a multiple of 128."""
        return -(-(len(self.kept) + self.extra_ids) // _MULTIPLE) * _MULTIPLE

    def renumbered(self, **ids: int) -> dict[str, int]:
        """Returns the new ids of pieces, by name. ValueError for one that was not kept."""
        for name, id_ in ids.items():
            if id_ not in self.kept:
                raise ValueError(f"The piece {id_}, the model's {name}, was not kept; cut the vocabulary anew.")
        return {name: self.kept.index(id_) for name, id_ in ids.items()}

    def rows(self, table_rows: int) -> np.ndarray:
        """Returns for each row of a cut table, int64 [vocab_size], its row in the original one; -1 for a row of zeros.

        ValueError if the original table is too small for its vocabulary.
        """
        last = self.pieces + self.extra_ids
        if table_rows < last:
            raise ValueError(f"The table has {table_rows} rows; expected at least {last}, as in the cut vocabulary.")
        found = np.concatenate([self.kept, np.arange(self.pieces, table_rows)])[: self.vocab_size]
        return np.pad(found, (0, self.vocab_size - len(found)), constant_values=-1)


def read(folder: str | Path) -> Cut:
    """Reads cut.json of a folder that `write` made. FileNotFoundError or ValueError names it."""
    path = Path(folder) / CUT
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CUT}; expected a folder that `sbs vocabulary --output` made.")
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
    """Cuts a vocabulary to the pieces of `texts` and a reserve, and writes it with cut.json to a new folder.

    The pieces of `corpus` are kept too. At most `pieces` are kept if that is given: those of the `labels`, and the most
    frequent ones of texts and corpus. Every text (under a limit, every label) is then segmented by both vocabularies;
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
    data, kind = tokens.read_vocabulary(vocabulary), _kind(vocabulary)
    old = _PIECES[kind](data)
    needed = _with_sources(old, old.always | {k for ids in _ids(old, whole) for k in ids})
    characters = set(old.characters) - needed
    kept = needed | characters
    most = len(list(old.known)) if pieces is None else pieces
    if most < len(kept):
        raise ValueError(
            f"Labels and single characters need {len(kept)} pieces, more than --pieces {pieces}; expected at least as "
            "many, since a student cannot write a label without its pieces."
        )
    counted = corpus if pieces is None else itertools.chain(texts, corpus)
    frequent = (k for k, _ in _counts(old, counted).most_common())
    kept = _filled(old, kept, frequent, most=most)
    kept = _filled(old, kept, old.known, most=min(most, len(kept) + reserve))
    cut = Cut(
        kept=tuple(sorted(kept)),
        pieces=old.size,
        sha256=hashlib.sha256(data).hexdigest(),
        needed=len(needed),
        characters=len(characters),
        reserve=len(kept) - len(needed) - len(characters),
        kind=kind,
    )
    written = old.cut(cut.kept)
    for text, (before, after) in zip(whole, _segmented(old, _PIECES[kind](written), whole, kept=cut.kept), strict=True):
        if before != after:
            raise ValueError(
                f"{json_files.brief(text)} is segmented as {old.spelled(after)} by the cut vocabulary and as "
                f"{old.spelled(before)} by the whole one; only unigram models and BPE can be cut."
            )
    with atomic.new_folder(Path(folder)) as made:
        (made / cut.file).write_bytes(written)
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
    parts = [part for text in texts for part in text.split(JOINT)]
    cut = read(folder)
    old = _PIECES[cut.kind](tokens.read_vocabulary(vocabulary))
    new = _PIECES[cut.kind]((Path(folder) / cut.file).read_bytes())
    counts: Counter[str] = Counter()
    for before, after in _segmented(old, new, parts, kept=cut.kept):
        counts["tokens"] += len(after)
        counts["unknown"] += 0 if old.unknown_id is None else after.count(old.unknown_id)
        counts["changed"] += before != after
    return Coverage(len(parts), counts["tokens"], counts["unknown"], counts["changed"])


class SentencePieces:
    """The pieces of a SentencePiece model; ids are those of the file."""

    def __init__(self, data: bytes) -> None:
        """Reads a file."""
        self._model, self._processor = _MODEL.FromString(data), sentencepiece.SentencePieceProcessor(model_proto=data)
        self.size = len(self._model.pieces)
        self.known: Iterable[int] = range(self.size)
        plain = _MODEL.SentencePiece.NORMAL
        self.always = {k for k, piece in enumerate(self._model.pieces) if piece.type != plain}
        self.characters = {k for k, p in enumerate(self._model.pieces) if len(p.piece.removeprefix(_SPACE)) <= 1}
        self.unknown_id: int | None = self._processor.unk_id()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes texts."""
        return self._processor.EncodeAsIds(list(texts))

    def spelled(self, ids: Sequence[int]) -> list[str]:
        """Returns the pieces of ids."""
        return self._processor.IdToPiece(list(ids))

    def leading_to(self, id_: int) -> set[int]:
        """Returns the piece alone: a unigram model needs no other pieces for it."""
        return {id_}

    def cut(self, kept: Sequence[int]) -> bytes:
        """Returns a model with these pieces, whose ids are their positions."""
        made = _MODEL()
        made.CopyFrom(self._model)
        del made.pieces[:]
        made.pieces.extend(self._model.pieces[k] for k in kept)
        made.trainer_spec.vocab_size = len(kept)
        return made.SerializeToString(deterministic=True)


_Pieces = SentencePieces | bpe_cut.BpePieces
_PIECES: Mapping[str, type[_Pieces]] = {_SENTENCEPIECE: SentencePieces, _BPE: bpe_cut.BpePieces}


def _kind(vocabulary: str) -> str:
    """Returns the kind of a vocabulary's file in an export: a GGUF file's tokenizer is one of BPE."""
    return vocabularies.kind_of(str(vocabularies.kind_of(vocabulary).file)).name


def _parts(texts: Iterable[str]) -> list[str]:
    """Lists the distinct parts of texts that are encoded on their own."""
    return list(dict.fromkeys(part for text in texts for part in text.split(JOINT)))


def _with_sources(model: _Pieces, ids: Iterable[int]) -> set[int]:
    return {source for k in ids for source in model.leading_to(k)}


def _filled(model: _Pieces, kept: set[int], more: Iterable[int], *, most: int) -> set[int]:
    """Adds pieces in the given order, each with those that lead to it, while at most `most` are kept."""
    kept = set(kept)
    for k in more:
        if len(kept) >= most:
            break
        if k not in kept:
            added = model.leading_to(k) - kept
            if len(kept) + len(added) <= most:
                kept |= added
    return kept


def _counts(model: _Pieces, texts: Iterable[str]) -> Counter[int]:
    """Counts each piece of the texts, ties in the order of the model's file."""
    counts = Counter(itertools.chain.from_iterable(_ids(model, texts)))
    return Counter(dict(sorted(counts.items())))


def _ids(model: _Pieces, texts: Iterable[str]) -> Iterable[list[int]]:
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, _CHUNK)):
        yield from model.ids(chunk)


def _segmented(
    old: _Pieces, new: _Pieces, texts: Sequence[str], *, kept: Sequence[int]
) -> Iterable[tuple[list[int], list[int]]]:
    """Yields for each text its segmentation by the whole and by the cut vocabulary, both as ids of the whole one."""
    for before, after in zip(_ids(old, texts), _ids(new, texts), strict=True):
        yield before, [kept[k] for k in after]
