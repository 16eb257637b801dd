"""Files with which a Hugging Face directory answers by itself: settings of `generate`, and the card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbs_jax.export import card as cards
from sbs_jax.student import decoder_only, families, t5
from sbs_jax.weights import hugging_face


def finish(folder: Path, *, card: Mapping[str, Any] | None, dtype: str) -> None:
    """Adds the card, and the settings that follow from it, to a directory that is being written."""
    if card is None:
        return
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": card["answer"]["max_new_tokens"]}
    _add(folder / "generation_config.json", greedy)
    _add(folder / "tokenizer_config.json", {"model_max_length": card["input"]["max_tokens"]})
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    weights = f"{dtype}, {cards.megabytes(size)}"
    cards.write(folder, card, usage=_usage(card), runtime="transformers", weights=weights)


def _rotary_usage(card: Mapping[str, Any], *, prefix: str, parsed: str) -> str:
    """Describes the use of a model that reads texts without BOS; a decoder-only one continues its prompt."""
    is_decoder = families.config_type(card["model"]) is decoder_only.DecoderConfig
    kind, start, skipped = ("CausalLM", ", START", "len(ids) :") if is_decoder else ("Seq2SeqLM", "", "1:")
    joint, rationale = card["input"].get("rationale_after"), card["rationale"]
    first = ""
    if joint is not None:  # two steps
        first = (
            f"    rationale = generate(text, {rationale['prefix']!r}, max_new_tokens={rationale['max_new_tokens']})\n"
            f"    text += {joint!r} + rationale.strip()\n"
        )
    starts = f"END, START = tokenizer.eos_token_id, {card['model']['decoder_start']}"
    ends = "A prompt is the text, the token that ends it, and one that begins the answer."
    return (
        "```python\nimport torch, transformers\n\n"
        'tokenizer = transformers.AutoTokenizer.from_pretrained("DIRECTORY")\n'
        f'model = transformers.AutoModelFor{kind}.from_pretrained("DIRECTORY")\n'
        f"{starts if is_decoder else 'END = tokenizer.eos_token_id'}\n"
        f"MOST = {card['input']['max_tokens']}\n\n"
        f"def encode(text, prefix={prefix!r}):\n"
        f"    parts = (prefix + text).split({card['input']['joint']!r})\n"
        "    ids = [i for part in parts for i in [*tokenizer.encode(part, add_special_tokens=False), END]]\n"
        f"    return [*(ids if len(ids) <= MOST else [*ids[: MOST - 1], END]){start}]\n\n"
        f"def generate(text, prefix={prefix!r}, **options):\n"
        "    ids = encode(text, prefix)\n"
        f"    found = model.generate(torch.tensor([ids]), **options)[0, {skipped}]\n"
        "    return tokenizer.decode(found, skip_special_tokens=True)\n\n"
        f"def answer(text):\n{first}"
        f"    return generate(text){parsed}\n```\n\n"
        "`generation_config.json` has greedy search and the length of an answer. "
        f"{ends if is_decoder else 'An input is the text, without BOS, and the token that ends it.'} "
        f"`{hugging_face.ORIGIN}` describes the run itself and names its folders; only sbs_jax reads it.\n"
    )


def _add(file: Path, settings: Mapping[str, Any]) -> None:
    if file.is_file():
        hugging_face.write_json(file, {**json.loads(file.read_text("utf-8")), **settings})


def _usage(card: Mapping[str, Any]) -> str:
    prefix, marker = card["input"]["prefix"], card["answer"]["parser"]["after_last"]
    parsed = ".strip()" if marker is None else f".rpartition({marker!r})[2].strip()"
    slots = card["input"].get("number_slots", False)
    hide = "numbers = [slots.Numbers.of(text) for text in texts]\n" if slots else ""
    hide += "texts = [n.hide(text) for n, text in zip(numbers, texts)]\n" if slots else ""
    ends = '{0} = [text.replace("<pad>", "").replace("</s>", "") for text in {0}]\n' if slots else ""
    fill = "answers = [n.fill(text) for n, text in zip(numbers, answers)]\n" if slots else ""
    if families.config_type(card["model"]) is not t5.T5Config:
        return _rotary_usage(card, prefix=prefix, parsed=parsed)
    asked = 'rows = tokenizer({}, return_tensors="pt", padding=True, truncation=True)\n'
    told = "{} = tokenizer.batch_decode(model.generate(**rows{}), skip_special_tokens=" + f"{not slots}{{}})\n"
    joint, rationale, first = card["input"].get("rationale_after"), card["rationale"], ""
    if joint is not None:  # two steps
        most = f", max_new_tokens={rationale['max_new_tokens']}"
        first = (
            f"questions = [{rationale['prefix']!r} + text for text in texts]\n{asked.format('questions')}"
            f"{told.format('rationales', most, ', clean_up_tokenization_spaces=False')}{ends.format('rationales')}"
            f"texts = [text + {joint!r} + read.strip() for text, read in zip(texts, rationales)]\n"
        )
    return (
        f"```python\n{'import slots  # slots.py of this folder' + chr(10) if slots else ''}import transformers\n\n"
        'tokenizer = transformers.AutoTokenizer.from_pretrained("DIRECTORY")\n'
        'model = transformers.AutoModelForSeq2SeqLM.from_pretrained("DIRECTORY")\n'
        f'texts = ["..."]\n{hide}{first}'
        f"texts = [{prefix!r} + text for text in texts]\n"
        f"{asked.format('texts')}{told.format('texts', '', '')}{ends.format('texts')}"
        f"answers = [text{parsed} for text in texts]\n{fill}```\n\n"
        "`generation_config.json` has greedy search and the length of an answer, `tokenizer_config.json` that of an "
        f"input. `{hugging_face.ORIGIN}` describes the run itself and names its folders; only sbs_jax reads it.\n"
    )
