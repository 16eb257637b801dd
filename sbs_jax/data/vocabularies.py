"""Vocabularies as SeqIO's, each opened by one table: bytes, SentencePiece models, BPE tokenizers.

A new kind is one class and one row of `KINDS`. Whatever the kind, a text ends in `eos_id`, which is not 0, and zeros
after it are padding. A BPE tokenizer may use 0 for a piece too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from sbs_jax.data import gguf_tokenizer
from sbs_jax.storage import hub, json_files, places

PAD_ID = 0
EOS_ID = 1  # of bytes and SentencePiece models; a BPE tokenizer has its own
# Sentinels of span corruption, above bytes and the pieces of a SentencePiece model, as in T5.
EXTRA_IDS = 100
BYTE = "byte"
LARGEST = 2**26  # bytes of a file; Gemma 3's tokenizer.json, of 262,144 pieces, has 33 MB
# A vocabulary beside weights: T5's SentencePiece model (its tokenizer.json is no BPE), a BPE, or our copy of either.
_IN_FOLDERS = ("spiece.model", "tokenizer.json", "sentencepiece.model")
# Special tokens that end a text, in order of preference: a chat model's end of turn comes before the end of a document.
_ENDS = ("<|im_end|>", "<eos>", "</s>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")
# Tokens that separate a source from its target: a line feed as a BPE of bytes spells it, or one of the others.
_LINE_FEED, _STARTS = "Ċ", ("<bos>", "<s>", "<|begin_of_text|>")


class Bytes(seqio.ByteVocabulary):
    """UTF-8 bytes, from id 3."""

    unknown_id = None
    contents = b""

    def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Encodes texts without EOS."""
        return [self.encode(text) for text in texts]

    def pieces(self, text: str) -> list[tuple[str, int]]:
        """Returns each piece of a text and its id."""
        return [(chr(byte), id_) for byte, id_ in zip(text.encode(), self.encode(text), strict=True)]

    def check(self) -> None:
        """Does nothing: every text is bytes."""


class SentencePiece(seqio.SentencePieceVocabulary):
    """A SentencePiece model with T5's 100 sentinels."""

    @property
    def unknown_id(self) -> int | None:
        """Id of pieces that the model lacks."""
        return self.unk_id

    @property
    def contents(self) -> bytes:
        """The model with its sentinels, for an export."""
        return self.sp_model or b""

    def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Encodes texts without EOS."""
        return self.tokenizer.EncodeAsIds(list(texts))

    def pieces(self, text: str) -> list[tuple[str, int]]:
        """Returns each piece of a text and its id."""
        return list(zip(self.tokenizer.EncodeAsPieces(text), self.tokenizer.EncodeAsIds(text), strict=True))

    def check(self) -> None:
        """Reads the file. `MismatchError` unless pad is 0 and EOS is 1."""
        ids = (self.tokenizer.pad_id(), self.eos_id)  # SeqIO's own pad_id is 0 whatever the file
        if ids != (PAD_ID, EOS_ID):
            raise MismatchError(f"has pad id {ids[0]} and EOS id {ids[1]}; expected {PAD_ID} and {EOS_ID}, as in T5's.")


def same(other: Any, own: Vocabulary) -> bool:
    """Tells whether a vocabulary of SeqIO gives every text the ids that `own` does, sentinels apart."""
    if isinstance(own, Bytes):
        return isinstance(other, seqio.ByteVocabulary) and other.extra_ids in (0, own.extra_ids)
    if isinstance(own, SentencePiece):
        if not isinstance(other, seqio.SentencePieceVocabulary) or other.extra_ids not in (0, own.extra_ids):
            return False
        alike = seqio.SentencePieceVocabulary(own.sentencepiece_model_file, extra_ids=other.extra_ids)
        return other.sp_model == alike.sp_model
    return other == own


class MismatchError(ValueError):
    """A readable vocabulary that cannot be used; the message follows its name."""


@dataclasses.dataclass(frozen=True)
class _Model:
    """A tokenizer, its file, and the ids that follow from that."""

    tokenizer: Any
    contents: bytes
    size: int
    eos_id: int
    unknown_id: int | None


class Bpe(seqio.Vocabulary):
    """A BPE tokenizer of the library `tokenizers`, as in `tokenizer.json` of SmolLM2, Qwen3 and Gemma 3.

    Encodes exactly as the library without its templates (no BOS). Special tokens in a text become their ids, so a
    prefix may hold a chat template or "<bos>". Decoding drops special tokens; a character of which bytes are missing
    becomes U+FFFD. There are no sentinels.
    """

    def __init__(self, name: str) -> None:
        """Reads nothing yet; `name` is the path of the file, which `read` reads."""
        super().__init__(extra_ids=0)
        self.name = name

    @functools.cached_property
    def _model(self) -> _Model:
        return _open_bpe(read(self.name))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_model"}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bpe) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def tokenizer(self) -> Any:
        """The library's object."""
        return self._model.tokenizer

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    def eos_id(self) -> int:
        return self._model.eos_id

    @property
    def unk_id(self) -> int | None:
        return self._model.unknown_id

    @property
    def unknown_id(self) -> int | None:
        """Id of pieces that the tokenizer lacks; None if it falls back on bytes."""
        return self._model.unknown_id

    @property
    def contents(self) -> bytes:
        """The file, for an export."""
        return self._model.contents

    @property
    def _base_vocab_size(self) -> int:
        return self._model.size

    def check(self) -> None:
        """Reads the file. `MismatchError` for one without a known end of text."""
        assert self._model

    def encode_all(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Encodes texts without EOS."""
        return [each.ids for each in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def pieces(self, text: str) -> list[tuple[str, int]]:
        """Returns each piece of a text and its id."""
        (ids,) = self.encode_all([text])
        return [(self.tokenizer.id_to_token(id_), id_) for id_ in ids]

    def _encode(self, s: str) -> Sequence[int]:
        return self.encode_all([s])[0]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        ids = tf.numpy_function(
            lambda text: np.array(self._encode(np.asarray(text).item().decode()), np.int32), [s], tf.int32
        )
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decoded(rows: Any) -> Any:
            texts = [self._decode(row).encode() for row in np.atleast_2d(rows).tolist()]
            return texts if rows.ndim > 1 else texts[0]

        return tf.numpy_function(decoded, [ids], tf.string)


Vocabulary = Bytes | SentencePiece | Bpe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of vocabulary.

    `name` is that in cards of exports, `described` that in errors; `file` names its copy in an export and `library` the
    package that reads that, both None if it has no file. `open` reads nothing yet; `read` returns the contents of that
    copy. `most` limits the bytes of the file. `extra_ids` counts the sentinels above its pieces.
    """

    name: str
    described: str
    file: str | None
    library: str | None
    extra_ids: int
    detects: Callable[[str], bool]
    open: Callable[[str], Vocabulary]
    read: Callable[[str], bytes]
    most: int | None = LARGEST


def _contents(name: str) -> bytes:
    return Path(located(name)).read_bytes()


def in_folder(names: Collection[str]) -> list[str]:
    """Picks the vocabulary among the names of a model's files; [] if there is none."""
    return [name for name in _IN_FOLDERS if name in names][:1]


def located(name: str) -> str:
    """Returns the local file of a vocabulary: in a folder, in a model of the Hugging Face Hub, or the name as it is.

    One in a bucket is fetched. ValueError for a folder without a vocabulary. The errors of hub.folder for a model of
    the hub.
    """
    if name == BYTE:
        return name
    if places.in_bucket(name):
        return _of_bucket(name)
    place = Path(hub.folder(name, in_folder, needed=f"vocabulary ({' or '.join(_IN_FOLDERS)})"))
    if not place.is_dir():
        return name
    return str(place / _file_in(place, name=name))


@functools.cache  # the vocabulary of a run is that of its start
def _of_bucket(name: str) -> str:
    place = places.of(name)
    return str(places.fetched(place if place.suffix else place / _file_in(place, name=name)))


def _file_in(folder: Path, *, name: str) -> str:
    file = next(iter(in_folder([path.name for path in folder.iterdir()])), None)
    if file is None:
        raise ValueError(
            f"{name} is a folder without a vocabulary; expected {', '.join(_IN_FOLDERS)} in it, or a file's path."
        )
    return file


# Kinds are tried in this order.
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name=BYTE,
            described=repr(BYTE),
            file=None,
            library=None,
            extra_ids=EXTRA_IDS,
            detects=lambda name: name == BYTE,
            open=lambda _: Bytes(extra_ids=EXTRA_IDS),
            read=lambda _: b"",
        ),
        Kind(
            name="bpe",
            described="BPE tokenizer (tokenizer.json)",
            file="tokenizer.json",
            library="tokenizers",
            extra_ids=0,
            detects=lambda name: name.endswith(".json"),
            open=Bpe,
            read=_contents,
        ),
        Kind(
            name="gguf",
            described="GGUF file with a BPE tokenizer",
            file="tokenizer.json",
            library="tokenizers",
            extra_ids=0,
            detects=lambda name: name.endswith(".gguf"),
            open=Bpe,
            read=lambda name: gguf_tokenizer.read(located(name)),
            most=None,
        ),
        Kind(
            name="sentencepiece",
            described="SentencePiece model",
            file="sentencepiece.model",
            library="sentencepiece",
            extra_ids=EXTRA_IDS,
            detects=lambda _: True,
            open=lambda name: SentencePiece(located(name), extra_ids=EXTRA_IDS),
            read=_contents,
        ),
    )
}


def kind_of(name: str) -> Kind:
    """Returns the kind of a vocabulary by the path of its file (`located`), without reading it."""
    file = name if places.in_bucket(name) and places.of(name).suffix else located(name)
    return next(kind for kind in KINDS.values() if kind.detects(file))


def read(name: str) -> bytes:
    """Reads a vocabulary's file as an export has it."""
    return kind_of(name).read(name)


# ------------------------------------------------------------------------------------ tokenizer.json


def parse_bpe(data: bytes) -> dict[str, Any]:
    """Reads tokenizer.json. `MismatchError` for another model than BPE, ValueError for damage.

    Found are "model" with "vocab" {piece: id} and "merges" [(left, right), ..], and "added_tokens" [{"content", "id",
    "special"}, ..].
    """
    found = json_files.parse_json(data.decode("utf-8", "strict"), "tokenizer.json")
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f"got {json_files.brief(found)}; expected an object with a 'model'")
    # Files of before 2021 lack the type.
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise MismatchError(
            f"has a model of type {json_files.brief(kind)}; expected 'BPE'. For a T5, give its SentencePiece model "
            "(spiece.model)."
        )
    model["type"] = kind
    if model.get("dropout"):
        raise MismatchError(f"drops merges at random ('dropout' {json_files.brief(model['dropout'])}); expected null.")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not all(type(id_) is int and 0 <= id_ < 2**31 for id_ in vocab.values()):
        raise ValueError(f"its 'vocab' is {json_files.brief(vocab)}; expected pieces and their ids")
    if not isinstance(merges, list):
        raise ValueError(f"its 'merges' are {json_files.brief(merges)}; expected a list")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(_list(merge)) for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or not all(isinstance(half, str) for half in pair):
            raise ValueError(f"one of its 'merges' is {json_files.brief(merge)}; expected two pieces")
    model["merges"] = pairs
    added = found["added_tokens"] = _list(found.get("added_tokens") or [])
    for token in added:
        fields = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(fields[0], str) or type(fields[1]) is not int or not 0 <= fields[1] < 2**31:
            raise ValueError(f"one of its 'added_tokens' is {json_files.brief(token)}; expected a text and its id")
    return found


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"it has {json_files.brief(value)}; expected a list")
    return value


def specials(parsed: Mapping[str, Any]) -> dict[str, int]:
    """Returns the special tokens of a parsed tokenizer.json and their ids."""
    return {token["content"]: token["id"] for token in parsed["added_tokens"] if token.get("special")}


def pieces(parsed: Mapping[str, Any]) -> dict[str, int]:
    """Returns all pieces of a parsed tokenizer.json and their ids."""
    return {**parsed["model"]["vocab"], **{token["content"]: token["id"] for token in parsed["added_tokens"]}}


def end_of(parsed: Mapping[str, Any]) -> str:
    """Returns the special token that ends a text. `MismatchError` if there is none of the known ones."""
    found = specials(parsed)
    end = next((token for token in _ENDS if found.get(token, PAD_ID) != PAD_ID), None)
    if end is None:
        raise MismatchError(
            f"has the special tokens {json_files.brief(found)}; expected one that ends a text, with another id than "
            f"{PAD_ID}: {', '.join(_ENDS)}."
        )
    return end


def marks(tokens: Mapping[str, int], *, eos_id: Any, bos_id: Any) -> dict[str, int]:
    """Returns the tokens of a decoder-only model that end its texts and begin a target: "eos_id", "decoder_start".

    `tokens` are all pieces, or none; the given ids serve where no known name is among them. After an end of turn, chat
    models have a line feed; others begin with BOS.
    """

    def whole(value: Any) -> int | None:
        value = value[0] if isinstance(value, list) and value else value  # several may end a text
        return value if type(value) is int and value >= 0 else None

    end = next((tokens[name] for name in _ENDS if tokens.get(name, PAD_ID) != PAD_ID), whole(eos_id))
    feed = tokens.get(_LINE_FEED) if end is not None and end == tokens.get(_ENDS[0]) else None
    start = next((id_ for id_ in (feed, *map(tokens.get, _STARTS), whole(bos_id)) if id_ is not None), None)
    if not end:
        raise ValueError(f"no known token ends a text; expected one of {', '.join(_ENDS)}, or an EOS id above 0.")
    return {"eos_id": end, "decoder_start": PAD_ID if start is None else start}


def _open_bpe(data: bytes) -> _Model:
    parsed = parse_bpe(data)
    eos_id = specials(parsed)[end_of(parsed)]
    try:
        tokenizer = library().Tokenizer.from_str(data.decode())
    except BaseException as error:  # a panic of the library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | ModuleNotFoundError):
            raise
        raise ValueError(str(error) or type(error).__name__) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    unknown = parsed["model"].get("unk_token")
    moved = [
        token["content"] for token in parsed["added_tokens"] if tokenizer.token_to_id(token["content"]) != token["id"]
    ]
    if moved:
        raise ValueError(f"its added token {json_files.brief(moved[0])} has the id of another, or leaves a gap")
    return _Model(
        tokenizer,
        contents=data,
        size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eos_id=eos_id,
        unknown_id=None if falls_back_on_bytes(parsed) or unknown is None else tokenizer.token_to_id(unknown),
    )


def falls_back_on_bytes(parsed: Mapping[str, Any]) -> bool:
    """True if every text can be encoded: pieces of bytes, either all or for characters without a piece."""
    return bool(parsed["model"].get("byte_fallback")) or is_byte_level(parsed)


def is_byte_level(parsed: Mapping[str, Any]) -> bool:
    """True if texts become bytes before they are merged (GPT-2's way); each byte is spelled as one character."""
    steps = [parsed.get("pre_tokenizer"), *_steps(parsed.get("pre_tokenizer"), "pretokenizers")]
    return any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in steps)


def _steps(step: Any, name: str) -> list[Any]:
    found = step.get(name) if isinstance(step, dict) else None
    return found if isinstance(found, list) else []


def library() -> Any:
    """Imports `tokenizers`. ModuleNotFoundError says how to install it."""
    try:
        return importlib.import_module("tokenizers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A tokenizer.json needs tokenizers, which is not installed: pip install 'sbs-jax[decoders]'."
        ) from error
