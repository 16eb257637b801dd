"""Readers of decoder-only models' files (tokenizer.json, GGUF, config.json), tested as in test_fuzz.py."""

import json
from collections.abc import Callable
from pathlib import Path

import fuzzing
import pytest
from builders import bpe, decoder_files, decoders
from fuzzing import Tape

from sbs_jax.data import registry, tokens, vocabularies
from sbs_jax.student import families
from sbs_jax.weights import hugging_face, opening
from sbs_jax.weights.arrays import Opened

Fuzz = Callable[[Callable[[Tape], None]], None]
TEXTS = ["Is it a</s>b\u4e2d?", "", "<|im_end|>\U0001f600"]


def test_tokenizers(fuzz: Fuzz, memory: Path) -> None:
    """A small tokenizer.json, damaged as JSON and as bytes."""
    path = memory / "tokenizer.json"
    whole = json.loads(bpe.byte_level(["Is it a b?"] * 3, size=265).to_str())

    def case(tape: Tape) -> None:
        node = fuzzing.damaged(tape, whole)
        fuzzing.put(tape, path, fuzzing.scratched(tape, fuzzing.encoded(fuzzing.written(node)), most=1))
        tokens.vocabulary.cache_clear()
        found = fuzzing.read(lambda: registry.vocabulary(str(path)), raises=ValueError, names=[path])
        if isinstance(found, vocabularies.Bpe):
            ids = fuzzing.read(lambda: tokens.encode(TEXTS, found), raises=(), names=())
            assert all(row[-1] == found.eos_id > 0 for row in ids)
            assert all(id_ < found.vocab_size for row in ids for id_ in row)
            fuzzing.read(lambda: [found.decode(row) for row in ids], raises=(), names=())

    fuzz(case)


def test_gguf_files(fuzz: Fuzz, memory: Path) -> None:
    """A small model as GGUF: bytes damaged, and numbers of the header replaced by others."""
    path = memory / "x.gguf"
    config = decoder_files.plain(decoder_files.LLAMA)
    whole = decoder_files.gguf_of(path, config, architecture="llama").read_bytes()
    header = len(whole) - 200_000

    def case(tape: Tape) -> None:
        data = whole
        for _ in range(tape.below(3)):
            width, at = tape.one_of((1, 4, 8)), tape.below(max(1, header))
            number = tape.one_of((0, 1, 2, 12, 255, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)) % 256**width
            data = data[:at] + number.to_bytes(width, "little") + data[at + width :]
        fuzzing.put(tape, path, fuzzing.scratched(tape, data), any_size=True)
        errors = (ValueError, FileNotFoundError)
        found = fuzzing.read(lambda: opening.open_any(path), raises=errors, names=[path])
        if isinstance(found, Opened):
            for array in found.arrays.values():
                assert array.whole().shape == array.shape
        tokens.vocabulary.cache_clear()
        fuzzing.read(lambda: registry.vocabulary(str(path)), raises=errors, names=[path])

    fuzz(case)


@pytest.mark.parametrize("config", [decoder_files.GEMMA3, *map(decoders.config, decoders.ENCODER_DECODERS)])
def test_settings_of_models_that_rotate(fuzz: Fuzz, memory: Path, config: families.ModelConfig) -> None:
    """config.json, generation_config.json and the tokenizer of a directory."""
    folder = memory / "model"
    path = bpe.write(memory, bpe.byte_level(["Is it a b?"] * 3, size=265))
    hugging_face.write(folder, decoder_files.opened(config, vocabulary=path), dtype="float32")
    names = ("config.json", "generation_config.json", "tokenizer.json")
    whole = {name: json.loads((folder / name).read_text("utf-8")) for name in names}

    def case(tape: Tape) -> None:
        for name, value in whole.items():
            node = fuzzing.damaged(tape, value) if tape.chance(2) else value
            text = fuzzing.written(node) if node is not value else json.dumps(value)
            fuzzing.put(tape, folder / name, fuzzing.encoded(text))
        errors = (ValueError, FileNotFoundError)
        found = fuzzing.read(lambda: opening.open_any(folder), raises=errors, names=[folder])
        if isinstance(found, Opened):
            assert 0 < found.config.eos_id < found.config.vocab_size

    fuzz(case)
