"""Pieces of a BPE tokenizer, and its tokenizer.json with only some of them (vocabulary_cut.py).

BPE merges the two neighbours whose pair comes first in the list of merges, again and again. What happens within a final
piece does not depend on its neighbours, since no merge crossed its ends: it is the same as for the piece alone. So a
text is segmented as before if, with each of its pieces, the pieces that lead to it are kept, and every merge among kept
pieces: at each step the first merge of the whole list is still there, and no new one is.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sbs_jax.data import vocabularies
from sbs_jax.storage import json_files

_SPACE = "▁"
_UNUSED = re.compile(r"<unused\d+>")  # special tokens of Gemma without a meaning; 3 has 6,242


class BpePieces:
    """The pieces of a tokenizer.json; ids are those of the file."""

    def __init__(self, data: bytes) -> None:
        """Reads a file. ValueError for a tokenizer that is not plain BPE."""
        parsed = vocabularies.parse_bpe(data)
        self._parsed, model = parsed, parsed["model"]
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise ValueError(
                    f"The tokenizer has {name} {json_files.brief(model[name])}; only BPE without it can be cut."
                )
        self._tokenizer = vocabularies.library().Tokenizer.from_str(data.decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(model["merges"])))}
        self._ids = vocabularies.pieces(parsed)
        self._pieces = {id_: piece for piece, id_ in self._ids.items()}
        self.size = max(self._pieces) + 1
        added = {token["id"] for token in parsed["added_tokens"] if not _UNUSED.fullmatch(token["content"])}
        unknown = {self._ids[each] for each in (model.get("unk_token"),) if each in self._ids}
        letters = {id_ for id_, piece in self._pieces.items() if len(piece.removeprefix(_SPACE)) <= 1}
        if vocabularies.is_byte_level(parsed):  # its letters are the 256 bytes
            self.always, self.characters = added | unknown | letters, set[int]()
        else:
            fallback = {self._ids[piece] for piece in (f"<0x{byte:02X}>" for byte in range(256)) if piece in self._ids}
            self.always, self.characters = added | unknown | fallback, letters
        self.always |= {vocabularies.PAD_ID}
        self.unknown_id = None if vocabularies.falls_back_on_bytes(parsed) else next(iter(unknown), None)

    @property
    def known(self) -> Iterable[int]:
        """Ids that have a piece, ascending; the first ones are the most frequent."""
        return sorted(self._pieces)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes texts."""
        return [each.ids for each in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def spelled(self, ids: Sequence[int]) -> list[str]:
        """Returns the pieces of ids."""
        return [self._pieces[id_] for id_ in ids]

    def leading_to(self, id_: int) -> set[int]:
        """Returns a piece and those that merges make on the way to it."""
        symbols, made = list(self._pieces[id_]), {id_}
        while len(symbols) > 1:
            pairs = [
                (rank, place)
                for place, pair in enumerate(itertools.pairwise(symbols))
                if (rank := self._ranks.get(pair)) is not None
            ]
            if not pairs:
                return {id_}  # no merges lead to it: a special token, a byte, or a word that is looked up whole
            _, place = min(pairs)
            made |= {self._ids[each] for each in (*symbols[place : place + 2], symbols[place] + symbols[place + 1])}
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        return made

    def cut(self, kept: Sequence[int]) -> bytes:
        """Returns a tokenizer.json with these pieces, whose ids are their positions."""
        new = {old: position for position, old in enumerate(kept)}
        model = self._parsed["model"]
        vocab = {piece: new[id_] for piece, id_ in model["vocab"].items() if id_ in new}
        merges = [pair for pair in model["merges"] if all(p in vocab for p in (*pair, "".join(pair)))]
        added = [{**token, "id": new[token["id"]]} for token in self._parsed["added_tokens"] if token["id"] in new]
        found = {
            **self._parsed,
            "added_tokens": sorted(added, key=lambda token: token["id"]),
            "post_processor": _renumbered(self._parsed.get("post_processor"), new),
            "model": {**model, "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])), "merges": merges},
        }
        data = (json.dumps(found, ensure_ascii=False) + "\n").encode()
        made = vocabularies.library().Tokenizer.from_str(data.decode())
        lost = [token["content"] for token in added if made.token_to_id(token["content"]) != token["id"]]
        if lost:
            raise ValueError(f"The tokenizer's added token {lost[0]!r} lies between pieces; it cannot be cut.")
        return data


def _renumbered(step: Any, new: Mapping[int, int]) -> Any:
    """Renumbers the special tokens of a post-processor."""
    if not isinstance(step, dict):
        return step
    found = dict(step)
    if isinstance(step.get("processors"), list):
        found["processors"] = [_renumbered(each, new) for each in step["processors"]]
    if isinstance(step.get("special_tokens"), dict):
        found["special_tokens"] = {
            name: {**token, "ids": [new[id_] for id_ in token["ids"]]} for name, token in step["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if isinstance(step.get(name), list):
            found[name] = [step[name][0], new[step[name][1]]]
    return found
