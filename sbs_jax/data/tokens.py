"""Token ids of texts: vocabularies, the separator of premise and hypothesis, token tables."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf

from sbs_jax.storage import json_files, user_files

PAD_ID, EOS_ID = 0, 1
# Joins premise and hypothesis in the text of records; becomes the vocabulary's EOS id.
JOINT = "</s>"
# Sentinels of span corruption, above the pieces of the vocabulary's file, as in T5.
EXTRA_IDS = 100
BYTE_VOCABULARY = "byte"

_LARGEST = 2**26  # bytes of a SentencePiece model; mT5's, of 250,000 pieces, has 4 MB
# Texts encoded at a time; limits the Python lists in memory to about 20 MB.
_CHUNK = 10_000


@functools.cache
def vocabulary(name: str) -> seqio.Vocabulary:
    """Returns the vocabulary of a SentencePiece model (local or gs:// path), or of "byte".

    Adds 100 sentinels, as T5 does: T5's 32,000 pieces become 32,100 ids, the 259 of "byte" become 359. Pad is 0 and
    EOS is 1. The file is read at first use (`check_vocabulary`).
    """
    if name == BYTE_VOCABULARY:
        return seqio.ByteVocabulary(extra_ids=EXTRA_IDS)
    return seqio.SentencePieceVocabulary(name, extra_ids=EXTRA_IDS)


def check_vocabulary(name: str) -> None:
    """Checks a vocabulary: FileNotFoundError if it cannot be read, ValueError unless pad is 0 and EOS is 1."""
    remedy = (
        "set DataOptions.vocabulary (--gin.VOCABULARY) to the path of one, for example of T5's sentencepiece.model, "
        f"or to {BYTE_VOCABULARY!r}."
    )
    try:
        found = name == BYTE_VOCABULARY or tf.io.gfile.exists(name)
    except tf.errors.OpError as error:  # no network, no permission
        raise FileNotFoundError(f"Cannot reach {name!r} ({error.message}); try again later, or {remedy}") from error
    if not found:
        raise FileNotFoundError(f"There is no SentencePiece model at {name!r}; {remedy}")
    if name != BYTE_VOCABULARY and "://" not in name:
        user_files.check(name, most=_LARGEST)
    text_vocabulary = vocabulary(name)
    try:
        pad_id, eos_id = text_vocabulary.pad_id, text_vocabulary.eos_id
        if isinstance(text_vocabulary, seqio.SentencePieceVocabulary):
            pad_id = text_vocabulary.tokenizer.pad_id()  # SeqIO's own pad_id is 0 whatever the file
    except Exception as error:  # of protobuf, SentencePiece and TensorFlow
        reason = json_files.part(str(error)) or type(error).__name__
        raise ValueError(f"{name} is not a SentencePiece model ({reason}). Get it again, or {remedy}") from None
    if (pad_id, eos_id) != (PAD_ID, EOS_ID):
        raise ValueError(
            f"The vocabulary {name!r} has pad id {pad_id} and EOS id {eos_id}; expected {PAD_ID} and {EOS_ID}, as in "
            "T5's."
        )


def vocabulary_sha256(name: str) -> str | None:
    """Hashes a vocabulary's file; None for "byte". Raises the errors of `check_vocabulary`."""
    if name == BYTE_VOCABULARY:
        return None
    check_vocabulary(name)
    return hashlib.sha256(read_vocabulary(name)).hexdigest()


def read_vocabulary(name: str) -> bytes:
    """Reads the file of a SentencePiece model, local or gs://."""
    with tf.io.gfile.GFile(name, "rb") as file:
        return file.read()


def encode(texts: Sequence[str], text_vocabulary: seqio.Vocabulary) -> list[list[int]]:
    """Encodes texts as the model reads them: every "</s>" becomes EOS, and EOS ends each text.

    With T5's vocabulary,

        "A dog</s>It barks" -> [71, 1782, 1, 94, 21696, 7, 1]

    as the Hugging Face tokenizer of the official code does. SentencePiece alone would encode "</s>" as the pieces
    [2, 87, 7, 3155] for `<`, `/`, `s` and `>`.
    """
    parts = [text.split(JOINT) for text in texts]
    flat = [part for row in parts for part in row]
    if isinstance(text_vocabulary, seqio.SentencePieceVocabulary):
        ids = iter(text_vocabulary.tokenizer.EncodeAsIds(flat))
    else:
        ids = iter([text_vocabulary.encode(part) for part in flat])
    return [[token for _ in row for token in (*next(ids), EOS_ID)] for row in parts]


def unknown(texts: Sequence[str], table: TokenTable, text_vocabulary: seqio.Vocabulary) -> tuple[int, str]:
    """Returns how many of the texts of a table have a piece that the vocabulary lacks, and the first such piece."""
    if not isinstance(text_vocabulary, seqio.SentencePieceVocabulary):  # bytes are never unknown
        return 0, ""
    places = np.flatnonzero(table.ids == text_vocabulary.unk_id)
    if not places.size:
        return 0, ""
    rows = np.unique(np.searchsorted(table.starts, places, side="right") - 1)
    tokenizer = text_vocabulary.tokenizer
    text: str = texts[int(rows[0])]
    for part in text.split(JOINT):
        for piece, token in zip(tokenizer.EncodeAsPieces(part), tokenizer.EncodeAsIds(part), strict=True):
            if token == text_vocabulary.unk_id:
                return len(rows), piece
    raise AssertionError("the table belongs to other texts")


def cut(ids: np.ndarray, length: int) -> np.ndarray:
    """Truncates a row to `length` tokens, EOS last: [5, 6, 7, 1] at 3 is [5, 6, 1]."""
    if len(ids) <= length:
        return ids
    return np.append(ids[: length - 1], np.int32(EOS_ID))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """Token ids of n texts, concatenated, EOS included.

    Row i is `ids[starts[i]:starts[i + 1]]`; `ids` is int32, `starts` int64 [n + 1].
    """

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str], text_vocabulary: seqio.Vocabulary) -> TokenTable:
        """Encodes texts; duplicates within a chunk (labels) are encoded once."""
        ids, sizes = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            distinct = list(dict.fromkeys(chunk))
            rows = dict(zip(distinct, encode(distinct, text_vocabulary), strict=True))
            chunk_rows = [rows[text] for text in chunk]
            ids.append(np.fromiter(itertools.chain.from_iterable(chunk_rows), np.int32))
            sizes.append(np.array([len(row) for row in chunk_rows], np.int64))
        return cls(ids=np.concatenate(ids), starts=np.cumsum(np.concatenate(sizes)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Number of tokens per row, int64 [n]."""
        return np.diff(self.starts)

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
