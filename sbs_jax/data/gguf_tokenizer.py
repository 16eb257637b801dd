"""The tokenizer in a GGUF file's metadata, as a tokenizer.json.

GGUF names a way to split texts instead of storing it ("smollm"); `_SPLITS` has the step of the library `tokenizers` for
each name, as in the tokenizer.json of the models that use it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sbs_jax.storage import gguf
from sbs_jax.storage.json_files import brief

_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_TOKENS, _TYPES, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [step, _byte_level(use_regex=False)]


def _words(digits: str) -> str:
    """Builds the pattern of GPT-4's successors: contractions, words, so many digits, signs, line ends, spaces."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# By name: steps before the merges, whether texts are brought to Unicode's NFC, and whether a whole word that is a piece
# needs no merges.
_SPLITS: Mapping[str, tuple[Sequence[dict[str, Any]], bool, bool]] = {
    "gpt-2": ([_byte_level(use_regex=True)], False, False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)], False, False),
    "qwen2": (_split(_words(r"\p{N}")), True, False),
    "llama-bpe": (_split(_words(r"\p{N}{1,3}")), False, True),
}


def read(path: str) -> bytes:
    """Reads the tokenizer of a GGUF file as the contents of a tokenizer.json. ValueError for a kind without one."""
    metadata = gguf.read(path).metadata
    kind, pre = metadata.get(_MODEL), metadata.get(_PRE)
    if kind != "gpt2" or not isinstance(pre, str) or pre not in _SPLITS:
        raise ValueError(
            f"its tokenizer is {brief(kind)} with texts split as {brief(pre)}; expected 'gpt2' (BPE of bytes) with one "
            f"of {', '.join(_SPLITS)}. Give the model's own tokenizer.json"
        )
    tokens, types, merges = (_list(metadata, name, of) for name, of in ((_TOKENS, str), (_TYPES, int), (_MERGES, str)))
    if len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise ValueError(f"its {len(tokens)} tokens, {len(set(tokens))} of them distinct, have {len(types)} types")
    pairs = [merge.split(" ") for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"a merge is {brief(next(' '.join(pair) for pair in pairs if len(pair) != 2))}")
    steps, normalizes, ignores_merges = _SPLITS[pre]
    contents = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id_,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == _CONTROL,
            }
            for id_, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if normalizes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)},
        "post_processor": None,
        "decoder": {**_byte_level(use_regex=True), "add_prefix_space": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignores_merges,
            # Unused tokens pad the table of embeddings.
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED},
            "merges": pairs,
        },
    }
    return (json.dumps(contents, ensure_ascii=False) + "\n").encode()


def _list(metadata: Mapping[str, Any], name: str, of: type) -> list[Any]:
    found = metadata.get(name)
    if not isinstance(found, list) or not all(type(each) is of for each in found):
        raise ValueError(f"{name} is {brief(found)}; expected a list of {of.__name__}")
    return found
