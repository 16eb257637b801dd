"""Measures greedy answers of a T5 v1.1 small against Hugging Face's and CTranslate2's, side by side.

    make bench                                                # appends to bench.json
    python scripts/bench_predict.py --model runs/mine         # another student, of SVAMP's form
    python scripts/bench_predict.py --train_steps 60 --rounds 1 --sides ours int8 hf   # shorter

All sides have the same weights and answer the same 64 inputs of SVAMP, up to 64 new tokens, on the same CPUs. The
student is trained from scratch on those 64 examples first (and kept in `--work`) until it has them right, so that its
answers are answers: of random weights most tokens are close calls, few answers end, and equality says little.
docs/speed.md.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from sbs_jax import bench, tokens

FOLDER = Path(__file__).resolve().parent
SHARED = FOLDER.parents[1] / "shared"
RELEASE, VOCABULARY = SHARED / "data" / "dss", SHARED / "vocab" / "t5" / "sentencepiece.model"
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=1, help="times that a turn answers all inputs")
    parser.add_argument("--threads", type=int, default=2, help="CPUs that each side may use")
    parser.add_argument("--work", default="runs/bench_predict", help="where the student and its other forms are kept")
    parser.add_argument("--model", help="a run to measure instead of the one that is trained for this")
    parser.add_argument("--train_steps", type=int, default=200, help="of the student that is trained for this")
    parser.add_argument("--output", default="bench.json", help="file to append the results to")
    parser.add_argument("--sides", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    arguments = parser.parse_args()
    work = Path(arguments.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    inputs, source = questions(work)
    model = Path(arguments.model) if arguments.model else trained(work, steps=arguments.train_steps)
    if not (work / "hf").exists():
        command = ["convert", "--to", "hf", str(model), str(work / "hf")]
        subprocess.run([sys.executable, "-m", "sbs_jax.main", *command], check=True)
    vocabulary = tokens.vocabulary(vocabulary_name())
    job = {"inputs": inputs, "tokens": tokens.encode(inputs, vocabulary), "vocabulary": vocabulary_name()}
    (work / "work.json").write_text(json.dumps(job), "utf-8")
    print(f"inputs: {len(inputs)} of {source}")
    sides: list[bench.Side] = []
    with bench.started(sides):
        for name in arguments.sides:
            missing = [each for each in PEERS.get(name, ()) if importlib.util.find_spec(each) is None]
            if missing:
                print(f"{name} is not measured: {' and '.join(missing)} not installed.")
                continue
            common = ["--work", str(work), "--threads", str(arguments.threads)]
            script, more = "bench_predict_peer.py", ["--side", name]
            if name in OURS:
                script, more = "bench_predict_ours.py", ["--weights", OURS[name], "--model", str(model)]
            sides.append(bench.Side(name, [sys.executable, str(FOLDER / script), *common, *more]))
            print(f"{name}: { {key: value for key, value in sides[-1].ready.items() if key != 'answers'} }", flush=True)
        answers = {side.name: texts(side.ready["answers"], vocabulary) for side in sides}
        results = bench.in_turns(sides, rounds=arguments.rounds, steps=arguments.steps)
        peaks = {side.name: side.finish() / 2**30 for side in sides}
    speeds = {name: [turn.tokens / turn.seconds for turn in turns] for name, turns in results.items()}
    for name, values in speeds.items():
        listed = " ".join(f"{value:.1f}" for value in values)
        print(
            f"{name}: {statistics.median(values):.1f} examples/s (median); turns: {listed}; peak {peaks[name]:.2f} GiB"
        )
    reference = "ours" if "ours" in answers else next(iter(answers))
    for name, found in answers.items():
        print(f"{name}: {share(found, answers[reference]):.1%} of its answers are those of {reference}")
    print(f"load: {' '.join(f'{load:.1f}' for load in os.getloadavg())}")
    rows = found_rows({name: statistics.median(values) for name, values in speeds.items()}, answers)
    bench.append(arguments.output, rows)
    print(bench.table(rows))
    return 0


def texts(answers: list[Any], vocabulary: Any) -> list[str]:
    """Answers as texts; a peer's are tokens, 0 and 1 among them padding and EOS."""
    return [x if isinstance(x, str) else vocabulary.decode([i for i in x if i > 1]).strip() for x in answers]


def vocabulary_name() -> str:
    return str(VOCABULARY) if VOCABULARY.is_file() else tokens.BYTE_VOCABULARY


def share(answers: list[str], others: list[str]) -> float:
    """How many of the answers are equal."""
    return statistics.mean(mine == other for mine, other in zip(answers, others, strict=True))


def found_rows(medians: dict[str, float], answers: dict[str, Any]) -> list[bench.Row]:
    versions = bench.versions("jax", "flax", "torch", "transformers", "ctranslate2")

    def row(name: str, unit: str, ours: float, peer: float | None, goal: str) -> bench.Row:
        return bench.Row(name=name, unit=unit, ours=ours, peer=peer, goal=goal, versions=versions)

    rows = []
    for name, side, peer, goal in (
        ("predict_vs_hf", "ours", "hf", ">= 2"),
        ("predict_int8_vs_hf", "int8", "hf", ">= 3"),
        ("predict_vs_ctranslate2", "ours", "ct2", ">= 1"),
        ("predict_int8_vs_ctranslate2_int8", "int8", "ct2_int8", ">= 1"),
    ):
        if side in medians:
            rows.append(row(name, "examples/s", medians[side], medians.get(peer), goal))
    if "int8" in answers and "ours" in answers:
        rows.append(row("int8_agreement", "equal answers", share(answers["int8"], answers["ours"]), 1.0, ">= 0.99"))
    return rows


def questions(work: Path) -> tuple[list[str], str]:
    """The first 64 inputs of SVAMP's training split, with records of them to train on; or texts of the same lengths."""
    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax import datasets, records, release

    folder = work / "records" / "svamp"
    if RELEASE.is_dir() and VOCABULARY.is_file():
        source = "SVAMP, T5's vocabulary"
        if not folder.is_dir():
            everything = work / "all"
            dataset = datasets.get("svamp")
            release.import_release(dataset, release_dir=RELEASE, records_dir=everything, parser="strict")
            chosen = records.read_records(everything / "svamp" / "train.jsonl")[:EXAMPLES]
    else:
        source = "random text of the lengths of SVAMP, bytes as tokens"
        if not folder.is_dir():
            import numpy as np

            random = np.random.default_rng(0)

            def text(mean: float, spread: float, least: int, most: int) -> str:
                size = int(np.clip(random.normal(mean, spread), least, most))
                return "".join(random.choice(list("abcdefghij"), size))

            chosen = [
                records.Record(
                    id=f"svamp-{number}",
                    input=text(45, 10, 24, 73),
                    label=text(11, 3, 5, 18),
                    teacher_text="",
                    rationale="",
                    teacher_label="",
                    outcome=records.OK,
                )
                for number in range(EXAMPLES)
            ]
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            records.write_records(folder / f"{split}.jsonl", chosen)
    return [row.input for row in records.read_records(folder / "train.jsonl")], source


def trained(work: Path, *, steps: int) -> Path:
    """The student of `work`, trained if it is not there (4 minutes on 2 cores)."""
    run = work / "student"
    config = work / "student.gin"
    config.write_text(STUDENT, "utf-8")
    bindings = {
        "RECORDS_DIR": work / "records",
        "MODEL_DIR": run,
        "VOCABULARY": vocabulary_name(),
        "TRAIN_STEPS": steps,
        "EVAL_PERIOD": steps,
        "CHECKPOINT_PERIOD": steps,
    }
    flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
    subprocess.run([sys.executable, "-m", "sbs_jax.main", "train", f"--gin_file={config}", *flags], check=True)
    return run


if __name__ == "__main__":
    sys.exit(main())
