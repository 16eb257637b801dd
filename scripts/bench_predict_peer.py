"""The peers of scripts/bench_predict.py: Hugging Face's `generate`, and CTranslate2 in float32 or int8.

They get token ids (ours are made from text within the time that is measured), whichever of some batch sizes is fastest
for them, and inputs sorted by length where they are cut into several batches. Imports neither JAX nor TensorFlow.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sbs_jax import bench

NEW_TOKENS = 64
BATCHES = (64, 32, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", required=True, choices=("hf", "ct2", "ct2_int8"))
    parser.add_argument("--work", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    stream = bench.protocol()
    bench.use_threads(arguments.threads)
    work = Path(arguments.work)
    job = json.loads((work / "work.json").read_text("utf-8"))
    sources = job["tokens"]
    order = sorted(range(len(sources)), key=lambda n: -len(sources[n]))
    if arguments.side == "hf":
        answer = hugging_face(work / "hf", threads=arguments.threads)
    else:
        precision = "int8" if arguments.side == "ct2_int8" else "float32"
        answer = ctranslate2(work, job["vocabulary"], precision=precision, threads=arguments.threads)

    def all_of(batch: int) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            found |= zip(part, answer([sources[n] for n in part]), strict=True)
        return [found[n] for n in range(len(sources))]

    tried = {}
    for batch in BATCHES:
        all_of(batch)
        start = time.perf_counter()
        ids = all_of(batch)
        tried[batch] = time.perf_counter() - start
    best = min(tried, key=lambda batch: tried[batch])

    def step(index: int) -> int:
        del index
        return len(all_of(best))

    ready = {
        "batch": best,
        "seconds by batch": {batch: round(seconds, 2) for batch, seconds in tried.items()},
        "answers": ids,
    }
    bench.serve(step, ready=ready, stream=stream)


def hugging_face(folder: Path, *, threads: int) -> Callable[[list[list[int]]], list[list[int]]]:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(threads)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(sources: list[list[int]]) -> list[list[int]]:
        tokens = torch.tensor(bench.padded(sources, padding=0))
        with torch.inference_mode():
            found = model.generate(
                input_ids=tokens,
                attention_mask=(tokens != 0).long(),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                num_beams=1,
            )
        return found[:, 1:].tolist()

    return answer


def ctranslate2(
    work: Path, vocabulary: str, *, precision: str, threads: int
) -> Callable[[list[list[int]]], list[list[int]]]:
    """Its words are pieces of the vocabulary's file, which the directory it reads must have too."""
    pieces: Any = importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=vocabulary)
    library: Any = importlib.import_module("ctranslate2")
    place = work / "ct2"
    if not place.exists():
        library.converters.TransformersConverter(str(work / "hf")).convert(str(place))
    translator = library.Translator(
        str(place), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
    )

    def answer(sources: list[list[int]]) -> list[list[int]]:
        found = translator.translate_batch(
            [[pieces.IdToPiece(i) for i in ids] for ids in sources],
            beam_size=1,
            max_decoding_length=NEW_TOKENS,
            max_batch_size=0,
        )
        return [[pieces.PieceToId(piece) for piece in each.hypotheses[0]] for each in found]

    return answer


if __name__ == "__main__":
    main()
