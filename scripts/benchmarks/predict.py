"""Measures greedy answers of a T5 v1.1 small against Hugging Face's and CTranslate2's.

    python scripts/bench.py predict                        # part of `make bench`
    python scripts/bench.py predict --model runs/mine      # another student, of SVAMP's form
    python scripts/bench.py predict --train_steps 60 --rounds 1 --sides ours int8 hf   # shorter

All sides have the same weights and answer the same 64 inputs of SVAMP, up to 64 new tokens, on the same CPUs. The
student is first trained on those 64 examples (and kept in `--work`) until it answers them correctly: with random
weights most tokens are close calls and few answers end, so equal answers show little. Results: docs/speed.md.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness, svamp

EXAMPLES, NEW_TOKENS = 64, 64
OURS = {"ours": "float32", "bfloat16": "bfloat16", "int8": "int8"}
PEERS = {"hf": ("torch", "transformers"), "ct2": ("ctranslate2",), "ct2_int8": ("ctranslate2",)}
STUDENT = """
from __gin__ import dynamic_registration
include "gin_configs/runs/train.gin"
include "gin_configs/models/t5_1_1_small.gin"
include "gin_configs/methods/standard_finetuning.gin"
DATASET = "svamp"
TASK_FEATURE_LENGTHS = {"inputs": 224, "targets": 64}
PACK = True
EXAMPLES_PER_ROW = 4
EXAMPLES = 16
LEARNING_RATE = 5e-4
DROPOUT_RATE = 0.0
MAX_DECODE_LENGTH = 64
"""
Answer = Callable[[list[list[int]]], list[list[int]]]  # token ids of sources to those of answers


def add_options(parser: argparse.ArgumentParser) -> None:
    harness.add_turns(parser, rounds=5, steps=1)  # a step answers all inputs
    parser.add_argument("--work", default="runs/bench_predict", help="folder of the student and its other forms")
    parser.add_argument("--model", help="run to measure instead of a student trained here")
    parser.add_argument("--train_steps", type=int, default=200, help="training steps of the student trained here")
    parser.add_argument("--sides", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])


def measure(arguments: argparse.Namespace) -> Iterator[harness.Row]:
    from sbs_jax.data import tokens

    work = Path(arguments.work).absolute()
    inputs, source = questions(work)
    model = Path(arguments.model) if arguments.model else trained(work, steps=arguments.train_steps)
    if not (work / "hf").exists():
        subprocess.run([*harness.SBS, "convert", "--to", "hf", str(model), str(work / "hf")], check=True)
    vocabulary = tokens.vocabulary(svamp.vocabulary())
    job = {"inputs": inputs, "tokens": tokens.encode(inputs, vocabulary), "vocabulary": svamp.vocabulary()}
    (work / "work.json").write_text(json.dumps(job), "utf-8")
    print(f"inputs: {len(inputs)} of {source}")
    with harness.Sides() as sides:
        for name in arguments.sides:
            options = {"work": str(work), "threads": arguments.threads}
            if name in OURS:
                sides.start(name, ours, **options, weights=OURS[name], model=str(model))
            elif harness.installed(name, *PEERS[name]):
                sides.start(name, peer, **options, kind=name)
        answers = {side.name: texts(side.ready["answers"], vocabulary) for side in sides}
        found = sides.compare(rounds=arguments.rounds, steps=arguments.steps, unit="examples/s")
    reference = "ours" if "ours" in answers else next(iter(answers))
    for name, given in answers.items():
        print(f"{name}: {share(given, answers[reference]):.1%} of its answers equal those of {reference}")
    yield from rows({name: side.per_second for name, side in found.items()}, answers)


def rows(speeds: dict[str, float], answers: dict[str, list[str]]) -> Iterator[harness.Row]:
    versions = harness.versions("jax", "flax", "torch", "transformers", "ctranslate2")
    for name, side, peer, goal in (
        ("predict_vs_hf", "ours", "hf", ">= 2"),
        ("predict_int8_vs_hf", "int8", "hf", ">= 3"),
        ("predict_vs_ctranslate2", "ours", "ct2", ">= 1"),
        ("predict_int8_vs_ctranslate2_int8", "int8", "ct2_int8", ">= 1"),
    ):
        if side in speeds:
            yield harness.Row(name, "examples/s", speeds[side], speeds.get(peer), goal, versions)
    if "int8" in answers and "ours" in answers:
        equal = share(answers["int8"], answers["ours"])
        yield harness.Row("int8_agreement", "equal answers", equal, 1.0, ">= 0.99", versions)


def texts(answers: list[Any], vocabulary: Any) -> list[str]:
    """Converts answers to texts; a peer answers in tokens, among them 0 (padding) and 1 (EOS)."""
    return [x if isinstance(x, str) else vocabulary.decode([i for i in x if i > 1]).strip() for x in answers]


def share(answers: list[str], others: list[str]) -> float:
    """Returns the share of answers that are equal."""
    return statistics.mean(mine == other for mine, other in zip(answers, others, strict=True))


def questions(work: Path) -> tuple[list[str], str]:
    """Returns 64 inputs and a description of them; writes records of them to train on."""
    chosen, source = svamp.read()
    chosen = chosen[:EXAMPLES]
    if not (work / "records").is_dir():
        svamp.write(work / "records", train=chosen, validation=chosen, test=chosen)
    return [row.input for row in chosen], source


def trained(work: Path, *, steps: int) -> Path:
    """Returns the student of `work`, and trains it first if it does not exist (4 minutes on 2 cores)."""
    run, config = work / "student", work / "student.gin"
    config.write_text(STUDENT, "utf-8")
    bindings = {"RECORDS_DIR": work / "records", "MODEL_DIR": run, "VOCABULARY": svamp.vocabulary()}
    bindings |= dict.fromkeys(("TRAIN_STEPS", "EVAL_PERIOD", "CHECKPOINT_PERIOD"), steps)
    flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
    subprocess.run([*harness.SBS, "train", f"--gin_file={config}", *flags], check=True)
    return run


# ------------------------------------------------------------------------------------------------- sides


def ours(*, model: str, work: str, weights: str, threads: int) -> harness.Worker:
    """Answers with the `Predictor` of `sbs predict`, texts in and texts out, in the faster of two batch sizes."""
    harness.use_threads(threads)
    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax.prediction.engine import Predictor, Question, Settings

    inputs = json.loads((Path(work) / "work.json").read_text("utf-8"))["inputs"]
    asked = [Question(id=str(number), input=text) for number, text in enumerate(inputs)]

    def answer(batch: int) -> Callable[[], list]:
        predictor = Predictor.load(model, settings=Settings(weights=weights, batch_size=batch))
        return lambda: [found.prediction for found in predictor.answer(asked)]

    return fastest({batch: answer(batch) for batch in (64, 32)}, weights=weights)


def peer(*, work: str, kind: str, threads: int) -> harness.Worker:
    """Answers with Hugging Face's `generate` ("hf"), or CTranslate2 in float32 ("ct2") or int8 ("ct2_int8").

    It gets token ids (for ours, tokenizing is part of the measured time), the fastest of three batch sizes, and inputs
    sorted by length if there are several batches. Imports neither JAX nor TensorFlow.
    """
    harness.use_threads(threads)
    job = json.loads((Path(work) / "work.json").read_text("utf-8"))
    sources = job["tokens"]
    order = sorted(range(len(sources)), key=lambda n: -len(sources[n]))
    if kind == "hf":
        answer = hugging_face(Path(work) / "hf", threads=threads)
    else:
        precision = "int8" if kind == "ct2_int8" else "float32"
        answer = ctranslate2(Path(work), job["vocabulary"], precision=precision, threads=threads)

    def all_of(batch: int) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            found |= zip(part, answer([sources[n] for n in part]), strict=True)
        return [found[n] for n in range(len(sources))]

    return fastest({batch: lambda batch=batch: all_of(batch) for batch in (64, 32, 16)})


def fastest(answers: dict[int, Callable[[], list]], **ready: Any) -> harness.Worker:
    """Tries each batch size, once to warm up (which compiles) and once for time, and keeps the fastest."""
    first: dict[int, float] = {}
    tried: dict[int, float] = {}
    found: list = []
    for batch, answer in answers.items():
        for seconds in (first, tried):
            start = time.perf_counter()
            found = answer()
            seconds[batch] = round(time.perf_counter() - start, 2)
    best = min(tried, key=lambda batch: tried[batch])
    ready |= {"batch": best, "seconds by batch": tried, "first time, seconds": first, "answers": found}
    return harness.Worker(lambda index: len(answers[best]()), ready)


def hugging_face(folder: Path, *, threads: int) -> Answer:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(threads)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(sources: list[list[int]]) -> list[list[int]]:
        tokens = torch.tensor(harness.padded(sources, padding=0))
        limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
        with torch.inference_mode():
            found = model.generate(input_ids=tokens, attention_mask=(tokens != 0).long(), **limits)
        return found[:, 1:].tolist()

    return answer


def ctranslate2(work: Path, vocabulary: str, *, precision: str, threads: int) -> Answer:
    """Answers with CTranslate2. Its words are vocabulary pieces; the directory it converts must have the same file."""
    pieces: Any = importlib.import_module("sentencepiece").SentencePieceProcessor(model_file=vocabulary)
    library: Any = importlib.import_module("ctranslate2")
    place = work / "ct2"
    if not place.exists():
        library.converters.TransformersConverter(str(work / "hf")).convert(str(place))
    translator = library.Translator(
        str(place), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
    )

    def answer(sources: list[list[int]]) -> list[list[int]]:
        words = [[pieces.IdToPiece(i) for i in ids] for ids in sources]
        found = translator.translate_batch(words, beam_size=1, max_decoding_length=NEW_TOKENS, max_batch_size=0)
        return [[pieces.PieceToId(piece) for piece in each.hypotheses[0]] for each in found]

    return answer
