"""Small BPE tokenizers, trained here with the library `tokenizers`."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # as in SmolLM2: ids 0, 1, 2


def byte_level(texts: Iterable[str], *, size: int = 400, specials: Sequence[str] = SPECIALS) -> Any:
    """Trains a tokenizer as SmolLM2's: single digits, then bytes."""
    made = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def with_byte_pieces(texts: Iterable[str], *, size: int = 600) -> Any:
    """Trains a tokenizer as Gemma 3's: characters, and bytes for those without a piece."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials + pieces, show_progress=False)
    made.train_from_iterator(texts, trainer)
    found = json.loads(made.to_str())
    del found["added_tokens"][len(specials) :]  # pieces of bytes are ordinary pieces
    return tokenizers.Tokenizer.from_str(json.dumps(found))


def write(folder: Path, tokenizer: Any) -> str:
    """Writes tokenizer.json to a folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")
