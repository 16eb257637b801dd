"""Plain text for pre-training: files read as one run of tokens, cut into full rows, with spans masked by sentinels.

Span corruption is T5's (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4; `t5.data.preprocessors`): 15 % of a row's
tokens are noise, in spans of 3 on average. A sentinel replaces each span in the inputs, and precedes it in the targets:

    tokens     Thank you for inviting me to your party last week
    inputs     Thank you <extra_id_0> me to your party <extra_id_1> week </s>
    targets    <extra_id_0> for inviting <extra_id_1> last </s>

All rows have equally many tokens, noise tokens and spans, so inputs and targets have one length each and no padding.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from sbs_jax.data import catalogue, tokens, vocabularies
from sbs_jax.data.selection import TRAIN, VALIDATION, DataOptions
from sbs_jax.storage import json_files, places, user_files

SPAN_CORRUPTION = "span_corruption"
DATASET = catalogue.CORPUS
TASK = f"{DATASET.name}_{SPAN_CORRUPTION}"

_CHUNK = 10_000  # texts encoded at a time
_BLOCK = 100  # neighbouring texts that are held out together, because they often share a subject
_FIXED = 2**32  # epoch that corrupts the held-out rows; training never gets there
# Options of records.
_ROWS_ONLY = ("label_source", "rationales", "fraction", "train_split", "number_slots", "folds", "augmentation")


# ------------------------------------------------------------------------------------- files


def texts(path: str | Path) -> Iterator[str]:
    """Yields the texts of a file: its lines, or with the ending .jsonl a JSON text, {"text": ..} or a record per line.

    Of a record only the input is taken. The file may be packed with gzip. Blank texts are left out. ValueError names
    file and line.
    """
    as_json = places.of(path).name.removesuffix(".gz").endswith(".jsonl")
    for number, line in user_files.TextFile(path, as_json=False).lines():
        where = f"{path}:{number}"
        if line is None:
            raise ValueError(f"{where}: the line is longer than {user_files.LONGEST_LINE} bytes; break it.")
        text = json_files.decoded(line, where)
        if "\0" in text:
            raise ValueError(f"{where}: the line has a zero byte, so this is no text; give files of UTF-8 text.")
        if as_json and text.strip():
            value = json_files.parse_json(text, where)
            text = value.get("text", value.get("input")) if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise ValueError(
                    f"{where}: got {json.dumps(value)[:60]}; expected a JSON text, or one as 'text' or 'input'."
                )
        if text.strip():
            yield text.strip()


def read(options: DataOptions, vocabulary: vocabularies.Vocabulary) -> dict[str, tokens.TokenTable]:
    """Reads and encodes the texts of all files, per split; rows of a table are texts without EOS.

    Every `1 / validation_fraction`-th block of neighbouring texts is held out for validation.
    """
    if not options.corpus:
        raise ValueError("Pre-training has no text; give files as --gin.CORPUS=books.txt, or ['a.txt', 'b.jsonl.gz'].")
    for name in _ROWS_ONLY:
        value, default = getattr(options, name), DataOptions.__dataclass_fields__[name].default
        if value != default:
            raise ValueError(f"{name.upper()} is {value!r}, but applies to records only; a corpus is used whole.")
    found: list[tokens.TokenTable] = []
    for path in options.corpus:
        lines = texts(path)
        before = len(found)
        while chunk := list(itertools.islice(lines, _CHUNK)):
            found.append(_without_eos(tokens.TokenTable.of(chunk, vocabulary)))
        if len(found) == before:
            raise ValueError(f"{path} has no text; expected lines of text. Remove it from CORPUS.")
    ids = np.concatenate([table.ids for table in found])
    sizes = np.concatenate([table.sizes for table in found])
    held_out = _held_out(len(sizes), options.validation_fraction)
    of_token = np.repeat(held_out, sizes)
    return {
        split: tokens.TokenTable(ids=ids[of_token == mine], starts=np.cumsum([0, *sizes[held_out == mine]]))
        for split, mine in ((TRAIN, False), (VALIDATION, True))
    }


def splits(options: DataOptions) -> tuple[str, ...]:
    return (TRAIN, VALIDATION) if options.validation_fraction else (TRAIN,)


def counts(table: tokens.TokenTable, vocabulary: vocabularies.Vocabulary) -> dict[str, int]:
    """Counts texts, tokens and tokens that are unknown to the vocabulary."""
    unknown = int(np.sum(table.ids == vocabulary.unknown_id)) if vocabulary.unknown_id is not None else 0
    return {"texts": len(table), "tokens": len(table.ids), "unknown": unknown}


def _without_eos(table: tokens.TokenTable) -> tokens.TokenTable:
    """Drops the EOS that ends each row; T5 concatenates the texts of a corpus without it."""
    starts = table.starts - np.arange(len(table.starts))
    return tokens.TokenTable(ids=np.delete(table.ids, table.starts[1:] - 1), starts=starts)


def _held_out(count: int, fraction: int | float) -> np.ndarray:
    """Tells for each of `count` texts, bool [count], whether it is held out; at least one if `fraction` is above 0."""
    block = max(1, min(_BLOCK, count // _BLOCK))
    blocks = -(-count // block)
    every = np.arange(1, blocks + 1) * fraction
    chosen = np.floor(every + 1e-9) > np.floor(every - fraction + 1e-9)
    if fraction and not chosen.any():
        chosen[-1] = True
    return np.repeat(chosen, block)[:count]


# ---------------------------------------------------------------------------------- corruption


@dataclasses.dataclass(frozen=True)
class Spans:
    """Numbers of a corrupted row: its tokens, noise tokens among them, and spans of noise."""

    tokens: int
    noise: int
    count: int

    @classmethod
    def of(cls, size: int, *, density: int | float, mean: int | float) -> Spans:
        """Returns the numbers for rows of `size` tokens, rounded as T5 does."""
        noise = min(max(round(size * density), 1), size - 1)
        return cls(size, noise, min(max(round(noise / mean), 1), noise, size - noise))

    @classmethod
    def fitting(cls, lengths: Mapping[str, int], *, density: int | float, mean: int | float) -> Spans:
        """Returns those of the longest rows whose inputs and targets fit. ValueError if none or too many spans do."""
        sizes = range(2, sum(lengths.values()))
        found = [each for size in sizes if (each := cls.of(size, density=density, mean=mean)).fits(lengths)]
        if not found:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS is {dict(lengths)}, too short for a token, a span of noise, its sentinel and "
                "EOS; expected at least {'inputs': 3, 'targets': 3}."
            )
        if found[-1].count > tokens.EXTRA_IDS:
            raise ValueError(
                f"Rows of {found[-1].tokens} tokens have {found[-1].count} spans of noise, and the vocabulary has "
                f"{tokens.EXTRA_IDS} sentinels. Set shorter TASK_FEATURE_LENGTHS, a lower NOISE_DENSITY or a longer "
                "MEAN_SPAN."
            )
        return found[-1]

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of inputs and targets, EOS included."""
        return {"inputs": self.tokens - self.noise + self.count + 1, "targets": self.noise + self.count + 1}

    def fits(self, lengths: Mapping[str, int]) -> bool:
        return all(self.lengths[feature] <= length for feature, length in lengths.items())

    def corrupt(self, ids: np.ndarray, keys: np.ndarray, *, sentinel: int) -> dict[str, np.ndarray]:
        """Returns inputs and targets, int32 [B, length], of tokens [B, tokens].

        Random `keys` in [0, 1), [B, tokens - 2], place the spans; row i depends on row i of them only. Sentinels count
        down from the id `sentinel`.
        """
        noise = _segments(keys[:, : self.noise - 1], self.count)
        text = _segments(keys[:, self.noise - 1 :], self.count)
        sizes = np.stack([text, noise], axis=2)  # in turns, as T5: text first, noise last
        number = np.tile(np.arange(2 * self.count), len(ids))
        segment = np.repeat(number, sizes.ravel()).reshape(ids.shape)
        first = np.diff(segment, axis=1, prepend=-1) != 0
        is_noise, marks = segment % 2 == 1, sentinel - segment // 2
        found = {}
        for feature, masked in (("inputs", is_noise), ("targets", ~is_noise)):
            kept = np.where(masked, marks, ids)[~masked | first].reshape(len(ids), -1)
            found[feature] = np.pad(kept, ((0, 0), (0, 1)), constant_values=tokens.EOS_ID).astype(np.int32)
        return found


def _segments(keys: np.ndarray, count: int) -> np.ndarray:
    """Returns the sizes [B, count] of a random division of n items into non-empty segments, by keys [B, n - 1]."""
    size = keys.shape[1] + 1
    cuts = np.sort(np.argsort(keys, axis=1)[:, : count - 1], axis=1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=size)


class Rows:
    """Rows of a split under some feature lengths, corrupted anew in each epoch; held-out rows always in one way.

    The corruption of a row depends on (seed, epoch, number of the row) only.
    """

    def __init__(
        self, table: tokens.TokenTable, *, split: str, lengths: Mapping[str, int], seed: int, options: DataOptions
    ) -> None:
        self._spans = Spans.fitting(lengths, density=options.noise_density, mean=options.mean_span)
        self._sentinel = tokens.vocabulary(options.vocabulary).vocab_size - 1  # <extra_id_0>
        self._seed, self._split, size = seed, split, self._spans.tokens
        if len(table.ids) < size:
            raise ValueError(
                f"The {split} split of the corpus has {len(table.ids)} tokens, less than a row of {size}. Give more "
                "text, set shorter TASK_FEATURE_LENGTHS, or another VALIDATION_FRACTION."
            )
        count = len(table.ids) // size
        self._ids = table.ids[: count * size].reshape(count, size)
        self._table = table

    def encoded(self) -> dict[str, tokens.TokenTable]:
        """Returns the tokens that rows are made of."""
        return {"text": self._table}

    def __len__(self) -> int:
        return len(self._ids)

    def id(self, index: int) -> str:
        return f"{self._split}-{index}"

    def sizes(self, feature: str) -> np.ndarray:
        """Returns the tokens of each row, int64 [n]."""
        return np.full(len(self), self._spans.lengths[feature])

    def sizes_of(self, feature: str, *, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Returns the tokens of rows [m] in epochs [m], which are the same in all."""
        del epochs
        return self.sizes(feature)[indices]

    def tables(self, epochs: np.ndarray, indices: np.ndarray) -> tuple[dict[str, tokens.TokenTable], np.ndarray]:
        """Corrupts rows [m] in epochs [m]; returns tables and the place of each row in them."""
        if self._split == VALIDATION:
            epochs, seed = np.full_like(indices, _FIXED), 0
        else:
            seed = self._seed
        width = self._spans.tokens - 2
        keys = [
            np.random.default_rng((seed, epoch, index)).random(width)
            for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True)
        ]
        corrupted = self._spans.corrupt(self._ids[indices], np.array(keys).reshape(-1, width), sentinel=self._sentinel)
        tables = {
            feature: tokens.TokenTable(ids=ids.ravel(), starts=np.arange(len(ids) + 1) * ids.shape[1])
            for feature, ids in corrupted.items()
        }
        return tables, np.arange(len(indices))
