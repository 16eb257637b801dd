"""Answer questions with the student beside this file, as `sbs_student.json` describes it. Needs no sbs_jax.

    python run.py < questions.jsonl > answers.jsonl         # {"id", "input"} to {"id", "prediction", "score"}

`--rationale` asks for the rationale. An input is the text alone; its prefix is added here. A student that answers in
two steps writes a rationale first and reads it after the text.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import model  # noqa: E402  (model.py of this folder)

CARD = json.loads((HERE / "sbs_student.json").read_text("utf-8"))
GIVEN, TOKENIZER, MARKER = CARD["input"], CARD["tokenizer"], CARD["answer"]["parser"]["after_last"]
RATIONALE_AFTER = GIVEN.get("rationale_after")
PAD, EOS = TOKENIZER["pad_id"], TOKENIZER["eos_id"]
SLOTS = GIVEN.get("number_slots", False)
if SLOTS:
    import slots  # slots.py of this folder
if TOKENIZER["kind"] == "sentencepiece":
    import sentencepiece

    PIECES = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "sentencepiece.model"))
elif TOKENIZER["kind"] == "bpe":
    import tokenizers

    PIECES = tokenizers.Tokenizer.from_file(str(HERE / "tokenizer.json"))
    PIECES.no_padding()
    PIECES.no_truncation()


def pieces(text: str) -> list[int]:
    """Encodes a part of a text."""
    if TOKENIZER["kind"] == "byte":
        return [byte + 3 for byte in text.encode()]
    if TOKENIZER["kind"] == "sentencepiece":
        return PIECES.EncodeAsIds(text)
    return PIECES.encode(text, add_special_tokens=False).ids


def encode(text: str) -> list[int]:
    """Encodes a text: "</s>" becomes the end token, one more is appended; truncated to the length of training."""
    ids = []
    for part in text.split(GIVEN["joint"]):
        ids += [*pieces(part), EOS]
    return ids if len(ids) <= GIVEN["max_tokens"] else [*ids[: GIVEN["max_tokens"] - 1], EOS]


def decode(ids: list[int]) -> str:
    """Decodes token ids; sentinels, numbered after the pieces, stand for numbers or count as unknown."""
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    if TOKENIZER["kind"] == "byte":
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode("utf-8", errors="ignore")
    if TOKENIZER["kind"] == "bpe":
        return PIECES.decode(ids, skip_special_tokens=True)
    known = PIECES.GetPieceSize() - (0 if SLOTS else TOKENIZER["extra_ids"])
    return PIECES.DecodeIds([i if i < known else PIECES.unk_id() for i in ids])


def generate(texts: list[str], task: str) -> list[tuple[str, float]]:
    """Generates from each text, with slots for numbers: (text, natural log probability)."""
    asked = GIVEN if task == "answer" else CARD["rationale"]
    if asked is None or task not in model.TASKS:
        raise SystemExit("This student was not exported with rationales.")
    rows = [encode(asked["prefix"] + text) for text in texts]
    padded = np.full((len(rows), max(map(len, rows), default=1)), PAD, np.int32)
    for row, ids in zip(padded, rows):  # noqa: B905  (equally many, by construction)
        row[: len(ids)] = ids
    tokens, scores = model.generate(padded, task)
    return [(decode(ids.tolist()), float(score)) for ids, score in zip(tokens, scores)]  # noqa: B905


def answer(texts: list[str], rationale: bool = False) -> list[tuple[str, float]]:
    """Answers each text: (answer, natural log probability)."""
    if SLOTS:
        numbers = [slots.Numbers.of(text) for text in texts]
        texts = [found.hide(text) for found, text in zip(numbers, texts)]  # noqa: B905
    if RATIONALE_AFTER is not None and not rationale:
        read = generate(texts, "rationale")
        texts = [text + RATIONALE_AFTER + first.strip() for text, (first, _) in zip(texts, read)]  # noqa: B905
    found, scores = zip(*generate(texts, "rationale" if rationale else "answer"))  # noqa: B905
    if SLOTS:
        found = [each.fill(text) for each, text in zip(numbers, found)]  # noqa: B905
    if MARKER is not None and not rationale:
        found = [text.rpartition(MARKER)[2] if MARKER in text else "" for text in found]
    return [(text.strip(), score) for text, score in zip(found, scores)]  # noqa: B905


if __name__ == "__main__":
    questions = [json.loads(line) for line in sys.stdin.buffer if line.strip()]
    for start in range(0, len(questions), 256):
        asked = questions[start : start + 256]
        answers = answer([question["input"] for question in asked], rationale="--rationale" in sys.argv[1:])
        for question, (text, score) in zip(asked, answers):  # noqa: B905
            print(json.dumps({"id": question["id"], "prediction": text, "score": score}), flush=True)
