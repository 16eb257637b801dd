"""Token ids of texts: vocabularies, the separator of premise and hypothesis, token tables."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sbs_jax.data import vocabularies
from sbs_jax.data.dataset import JOINT
from sbs_jax.storage import json_files, user_files

PAD_ID, EOS_ID, EXTRA_IDS = vocabularies.PAD_ID, vocabularies.EOS_ID, vocabularies.EXTRA_IDS
BYTE_VOCABULARY = vocabularies.BYTE

# Texts encoded at a time; limits the Python lists in memory to about 20 MB.
_CHUNK = 10_000


@functools.cache
def vocabulary(name: str) -> vocabularies.Vocabulary:
    """Returns the vocabulary at a local or gs:// path, of a kind in `vocabularies.KINDS`, or that of "byte".

    It may also be a folder of a model, or a name on the Hugging Face Hub, with the vocabulary in it.

    SentencePiece models and "byte" get 100 sentinels, as in T5, whose 32,000 pieces become 32,100 ids; pad is 0 and EOS
    is 1. A tokenizer.json keeps its ids. The file is read at first use (`check_vocabulary`).
    """
    return vocabularies.kind_of(name).open(name)


def check_vocabulary(name: str) -> None:
    """Checks a vocabulary: FileNotFoundError if it cannot be read, ValueError if it cannot be used."""
    kind = vocabularies.kind_of(name)
    remedy = (
        "set DataOptions.vocabulary (--gin.VOCABULARY) to the path of one, for example of T5's sentencepiece.model or "
        f"of a tokenizer.json, or to {BYTE_VOCABULARY!r}."
    )
    try:
        found = kind.file is None or Path(vocabularies.located(name)).exists()
    except FileNotFoundError:
        found = False
    except OSError as error:  # no network, no permission
        raise FileNotFoundError(f"Cannot reach {name!r} ({error}); try again later, or {remedy}") from error
    if not found:
        raise FileNotFoundError(f"There is no {kind.described} at {name!r}; {remedy}")
    if kind.file is not None:
        user_files.check(vocabularies.located(name), most=kind.most)
    try:
        vocabulary(name).check()
    except vocabularies.MismatchError as error:
        raise ValueError(f"The vocabulary {name!r} {error}") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of protobuf, SentencePiece, tokenizers and TensorFlow
        reason = json_files.part(str(error)) or type(error).__name__
        raise ValueError(f"{name} is not a {kind.described} ({reason}). Get it again, or {remedy}") from None


def check_sentinels(name: str, *, owner: str) -> None:
    """Requires a vocabulary with sentinels (`<extra_id_0>`, ..). ValueError names who needs them."""
    if not vocabularies.kind_of(name).extra_ids:
        raise ValueError(
            f"{owner} needs a vocabulary with {EXTRA_IDS} sentinels; the {vocabularies.kind_of(name).described} "
            f"{name!r} has none. Leave {owner} out, or give a SentencePiece model."
        )


def vocabulary_sha256(name: str) -> str | None:
    """Hashes a vocabulary's file; None for "byte". Raises the errors of `check_vocabulary`."""
    if name == BYTE_VOCABULARY:
        return None
    check_vocabulary(name)
    return hashlib.sha256(read_vocabulary(name)).hexdigest()


def read_vocabulary(name: str) -> bytes:
    """Reads a vocabulary's file, local or gs://, as an export has it: a GGUF file's tokenizer as tokenizer.json."""
    return vocabularies.read(name)


def encode(texts: Sequence[str], text_vocabulary: vocabularies.Vocabulary) -> list[list[int]]:
    """Encodes texts as the model reads them: every "</s>" becomes EOS, and EOS ends each text.

    With T5's vocabulary,

        "A dog</s>It barks" -> [71, 1782, 1, 94, 21696, 7, 1]

    as the Hugging Face tokenizer of the official code does. SentencePiece alone would encode "</s>" as the pieces
    [2, 87, 7, 3155] for `<`, `/`, `s` and `>`.
    """
    table = TokenTable.of(texts, text_vocabulary)
    return [table.ids[start:end].tolist() for start, end in itertools.pairwise(table.starts.tolist())]


def _encoded(texts: Sequence[str], text_vocabulary: vocabularies.Vocabulary) -> TokenTable:
    """Encodes texts; a part that several have (a label, a premise) is encoded once."""
    rows = [text.split(JOINT) for text in texts]
    parts = list(itertools.chain.from_iterable(rows))
    distinct = list(dict.fromkeys(parts))
    encoded = text_vocabulary.encode_all(distinct)
    eos_id = text_vocabulary.eos_id
    assert eos_id is not None
    ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
    ids = np.insert(np.fromiter(itertools.chain.from_iterable(encoded), np.int32), ends, eos_id)
    table = TokenTable(ids=ids, starts=np.insert(ends + np.arange(1, len(ends) + 1), 0, 0))
    if len(distinct) < len(parts):
        number_of = dict(zip(distinct, range(len(distinct)), strict=True))
        table = table.chosen(np.fromiter(map(number_of.__getitem__, parts), np.int64))
    first = np.cumsum([0, *map(len, rows)])  # part of each row
    return TokenTable(ids=table.ids, starts=table.starts[first])


def unknown_piece(text: str, text_vocabulary: vocabularies.Vocabulary) -> str:
    """Returns the first piece of a text that the vocabulary lacks."""
    for part in text.split(JOINT):
        for piece, token in text_vocabulary.pieces(part):
            if token == text_vocabulary.unknown_id:
                return piece
    raise AssertionError(f"the vocabulary has all pieces of {text!r}")


def cut(ids: np.ndarray, length: int) -> np.ndarray:
    """Truncates a row to `length` tokens and keeps its last, EOS: [5, 6, 7, 1] at 3 is [5, 6, 1]."""
    if len(ids) <= length:
        return ids
    return np.append(ids[: length - 1], ids[-1:])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """Token ids of n texts, concatenated, EOS included.

    Row i is `ids[starts[i]:starts[i + 1]]`; `ids` is int32, `starts` int64 [n + 1]. (In the table WEIGHTS a row is one
    float32.)
    """

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str], text_vocabulary: vocabularies.Vocabulary) -> TokenTable:
        """Encodes texts, some at a time."""
        ids, sizes = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
        rest = iter(texts)
        while chunk := list(itertools.islice(rest, _CHUNK)):
            table = _encoded(chunk, text_vocabulary)
            ids.append(table.ids)
            sizes.append(table.sizes)
        return cls(ids=np.concatenate(ids), starts=np.cumsum(np.concatenate(sizes)))

    @classmethod
    def joined(cls, rows: Sequence[np.ndarray]) -> TokenTable:
        """Joins rows of token ids, EOS included."""
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(ids=np.concatenate([np.zeros(0, np.int32), *rows]), starts=starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def chosen(self, rows: np.ndarray) -> TokenTable:
        """Returns the table of these rows, in this order."""
        sizes = self.sizes[rows]
        starts = np.cumsum(np.insert(sizes, 0, 0))
        places = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], sizes)
        return TokenTable(ids=self.ids[places], starts=starts)

    @property
    def sizes(self) -> np.ndarray:
        """Number of tokens per row, int64 [n]."""
        return np.diff(self.starts)

    def rows_with(self, token: int | None) -> list[int]:
        """Returns the numbers of the rows that have a token; none have None."""
        places = np.flatnonzero(self.ids == token) if token is not None else np.zeros(0, np.int64)
        return np.unique(np.searchsorted(self.starts, places, side="right") - 1).tolist()

    def row(self, index: int, *, length: int) -> np.ndarray:
        """Returns one row's tokens, int32, truncated to `length`."""
        return cut(self.ids[self.starts[index] : self.starts[index + 1]], length)

    def padded(self, length: int) -> np.ndarray:
        """Returns all rows as int32 [n, length], truncated or padded with 0."""
        rows = np.zeros((len(self), length), np.int32)
        for index, row in enumerate(rows):
            ids = self.row(index, length=length)
            row[: len(ids)] = ids
        return rows


TARGETS_OF = "targets_of"  # beside the tables of inputs and targets: the numbers of each input's targets, if several
WEIGHTS = "weights"  # beside them too: the weight of each row, if a row has one
PARTS = tuple(field.name for field in dataclasses.fields(TokenTable))  # names of its arrays, as files hold them
