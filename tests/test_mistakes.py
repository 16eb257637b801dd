"""Mistakes of a new user are answered without TensorFlow and JAX: what was got, what was expected, what to do.

One process makes all mistakes, so that it can tell at the end that it never imported them.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sbs_jax.cli import main
from sbs_jax.training import gin_scan

CPU = ["train", "--gin_file=gin_configs/experiments/svamp/cpu.gin"]
PLACES = ["--gin.RECORDS_DIR=records", "--gin.MODEL_DIR=runs/new", "--gin.VOCABULARY=byte"]
TEACH = ["teach", "--inputs_dir=records", "--inputs=records", "--store=s", "--records_dir=r", "--model=gpt-4o-mini"]
OPENAI = [*TEACH, "--provider=openai"]
EVALUATE = ["evaluate", "--gin_file=gin_configs/runs/evaluate.gin"]
PREDICT = ["predict", "--output=answers.jsonl"]
OWN_SWEEP = ["sweep", "--gin_file=gin_configs/experiments/own/methods.gin", "--gin.SWEEP_DIR=s"]
SELECT = ["select", "--dataset=svamp", "--records_dir=records", "--output=out"]
QUESTIONS = "--input=questions.jsonl"

DEFINITION = """{"version": 1, "name": "own", "labels": null, "marker": "So", "metric": "METRIC",
"lengths": {"inputs": 64, "targets": 64}}"""

# What is typed, and parts of the answer. PORT is one that is in use.
MISTAKES = {
    "a command": (["trian"], ["unknown command 'trian'", "Did you mean 'train'"]),
    "a flag": ([*CPU, "--gin_fiel=x"], ["unknown argument --gin_fiel", "--gin_file"]),
    "a dataset": ([*OPENAI, "--dataset=svmap", "--dry_run"], ["Unknown dataset 'svmap'", "Did you mean 'svamp'"]),
    "a dataset of records": (
        ["records", "--dataset=esnil", "--release=dss", "--records_dir=r"],
        ["Unknown dataset 'esnil'", "Did you mean 'esnli'"],
    ),
    "a dataset in gin": ([*CPU, *PLACES, "--gin.DATASET=svmap"], ["Unknown dataset 'svmap'", "Did you mean 'svamp'"]),
    "columns of one's own": (
        [*OPENAI, "--dataset=svamp", "--dry_run", "--inputs_dir=own"],
        ["train.jsonl:1", "['question', 'answer']", "id, input and label", "sbs init FILE --input COLUMN"],
    ),
    "a column": (["init", "tickets.csv", "--input=txet"], ["no column 'txet'", "'team'", "Did you mean 'text'"]),
    "a table": (["init", "tikets.csv"], ["tikets.csv"]),
    "a metric": (["init", "tickets.csv", "--metric=rouge"], ["--metric is 'rouge'", "Did you mean 'rouge_l'"]),
    "a metric of a dataset": (
        [*CPU, *PLACES, "--gin.DATASET=metric"],
        ["metric/dataset.json", "'metric' is 'rouge'", "expected one of", "Did you mean 'rouge_l'"],
    ),
    "a tolerance": (
        [*CPU, *PLACES, "--gin.DATASET=tolerance"],
        ["tolerance/dataset.json", "'tolerance' is \"half\"", "expected a number"],
    ),
    "a provider": (
        [*TEACH, "--dataset=svamp", "--provider=anthropic", "--dry_run"],
        ["no provider 'anthropic'", "openai, gemini, vertex", "--base_url"],
    ),
    "no key": ([*OPENAI, "--dataset=svamp"], ["OPENAI_API_KEY"]),
    "no key of Gemini": ([*TEACH, "--dataset=svamp", "--provider=gemini"], ["GEMINI_API_KEY"]),
    "a prompt": ([*OPENAI, "--dataset=svamp", "--prompt=mine.json", "--dry_run"], ["no prompt file mine.json"]),
    "no inputs": ([*OPENAI, "--dataset=cqa", "--dry_run"], ["no inputs of cqa", "train.jsonl"]),
    "no gin file": (["train", *PLACES], ["no --gin_file given", "gin_configs/experiments/"]),
    "a gin file": (
        ["train", "--gin_file=gin_configs/experiments/svamp/cpuu.gin", *PLACES],
        ["no gin file gin_configs/experiments/svamp/cpuu.gin", "Did you mean 'gin_configs/experiments/svamp/cpu.gin'"],
    ),
    "a macro": ([*CPU, *PLACES, "--gin.TRAIN_STEP=5"], ["TRAIN_STEP", "Did you mean 'TRAIN_STEPS'"]),
    "a macro that is needed": ([*CPU, "--gin.MODEL_DRI=runs/new"], ["MODEL_DRI", "Did you mean 'MODEL_DIR'"]),
    "no value of a macro": ([*CPU, *PLACES[:1]], ["needs values", "--gin.MODEL_DIR=.."]),
    "a value": ([*CPU, *PLACES, "--gin.TRAIN_STEPS=many"], ["TRAIN_STEPS is 'many'", "expected a whole number"]),
    "a tracker": ([*CPU, *PLACES, "--gin.TRACKERS=['mlfow']"], ["trackers is 'mlfow'", "Did you mean 'mlflow'"]),
    "no folder of records": (
        [*CPU, *PLACES, "--gin.RECORDS_DIR=recrods"],
        ["There are no records of svamp", "no folder recrods", "sbs records --dataset svamp"],
    ),
    "no vocabulary": (
        [*CPU, *PLACES, "--gin.VOCABULARY=spiece.modl"],
        ["VOCABULARY is 'spiece.modl'", "sentencepiece.model", "Did you mean 'spiece.model'"],
    ),
    "no first checkpoint": (
        [*CPU, *PLACES, "--gin.INITIAL_CHECKPOINT_PATH=t5/base/1.bin"],
        ["INITIAL_CHECKPOINT_PATH is 't5/base/1.bin'", "docs/checkpoints.md"],
    ),
    "a name of the hub": (
        ["convert", "--to=hf", "--base=google/t5-v1_1-base", "runs/empty", "out"],
        ["--base is 'google/t5-v1_1-base'", "hf download google/t5-v1_1-base --include"],
    ),
    "seeds": ([*CPU, *PLACES, "--seeds=1,2"], ["--seeds needs a directory per run"]),
    "no run": ([*PREDICT, "--run=runs/emtpy", QUESTIONS], ["no run at", "empty", "Did you mean 'empty'"]),
    "a run without checkpoints": (
        [*PREDICT, "runs/empty", QUESTIONS],
        ["holds no checkpoint yet", "sbs train"],
    ),
    "a folder that is no run": ([*PREDICT, "records", QUESTIONS], ["expected a run directory"]),
    "adapters without a name": (
        [*PREDICT, "runs/empty", "--adapters=runs/x", QUESTIONS],
        ["--adapters 'runs/x'", "NAME=DIR"],
    ),
    "no questions": ([*PREDICT, "runs/empty", "--input=question.jsonl"], ["Did you mean 'questions.jsonl'"]),
    "broken questions": (
        [*PREDICT, "runs/empty", "--input=broken.jsonl"],
        ["broken.jsonl:1", "not valid JSON", '{"id": "1", "input"'],
    ),
    "questions in other columns": (
        [*PREDICT, "runs/empty", "--input=tickets.csv"],
        ["tickets.csv", "'id'", "'input'"],
    ),
    "no checkpoint to evaluate": ([*EVALUATE, "--gin.CHECKPOINT_PATH=runs/old"], ["no run at", "empty"]),
    "a port in use": (["serve", "runs/empty", "--port=PORT"], ["port", "in use", "--port"]),
    "a port": (["serve", "runs/empty", "--port=80000"], ["--port is 80000"]),
    "a form": (["convert", "--to=onx", "runs/empty", "out"], ["invalid choice: 'onx'", "onnx"]),
    "shapes": (["convert", "--to=stablehlo", "--shapes=88", "runs/empty", "out"], ["--shapes is '88'", "32x88"]),
    "nothing to convert": (
        ["convert", "--to=hf", "runs/emtpy", "out"],
        ["RUN is 'runs/emtpy'", "Did you mean 'empty'"],
    ),
    "no records to measure": (["baseline", "--dataset=cqa", "--records_dir=records"], ["no records of cqa"]),
    "a rule": ([*SELECT, "--by=likly"], ["--by is 'likly'", "Did you mean 'likely'"]),
    "likely without a student": ([*SELECT, "--by=likely"], ["--by likely needs a student", "--model"]),
    "a student that is not there": (
        [*SELECT, "--by=likely", "--model=runs/emtpy"],
        ["no run at", "Did you mean 'empty'"],
    ),
    "nothing to keep": ([*SELECT, "--by=short", "--keep=0"], ["--keep is 0", "at least 1"]),
    "chosen over the records": (
        ["select", "--dataset=svamp", "--records_dir=records", "--output=./records", "--by=short"],
        ["is the folder of the inputs", "choose another one"],
    ),
    "no records to choose from": (
        ["select", "--dataset=cqa", "--records_dir=records", "--output=out", "--by=short"],
        ["no records of cqa"],
    ),
    "no records of a vocabulary": (
        ["vocabulary", "--vocabulary=spiece.model", "--dataset", "cqa", "--records_dir=records", "--output=out"],
        ["no records of cqa"],
    ),
    "no teacher": (["soft_targets", "runs/emtpy", "--output=soft"], ["no run at", "Did you mean 'empty'"]),
    "no tokens to keep": (["soft_targets", "runs/empty", "--output=soft", "--top_k=0"], ["--top_k is 0", "at least 1"]),
    "no soft targets": (
        [*CPU, *PLACES, "--gin.SOFT_TARGETS=soft/xl"],
        ["SOFT_TARGETS is 'soft/xl'", "sbs soft_targets"],
    ),
    "no teacher to keep": ([*CPU, *PLACES, "--gin.TEACHER=runs/emtpy"], ["TEACHER is 'runs/emtpy'", "'empty'"]),
    "no run to replay": (["replay", "runs/old"], ["runs/old"]),
    "no run to measure": (["rationales", "runs/old"], ["no run at", "empty"]),
    "neither run nor teacher": (["rationales"], ["got neither", "--dataset NAME"]),
    "no run to report": (["report", "runs"], ["no finished run in runs", "runs/empty"]),
    "jobs of a sweep": (
        ["sweep", "--gin_file=gin_configs/experiments/paper/table1.gin", "--jobs=0"],
        ["--jobs is 0", "at least 1"],
    ),
    "a dataset of a sweep": ([*OWN_SWEEP, "--dataset=tikets"], ["Unknown dataset 'tikets'", "sbs init"]),
    "no records of a sweep": ([*OWN_SWEEP, "--dataset=svamp"], ["RECORDS_DIR is missing", "--records_dir DIR"]),
    "no records of a teacher": (["rationales", "--dataset=svamp"], ["--records_dir is missing", "dataset.json"]),
    "a macro of a sweep": (
        ["sweep", "--gin_file=gin_configs/experiments/paper/table1.gin", "--gin.RECORDS_DIR=r", "--gin.SWEEP_DRI=s"],
        ["SWEEP_DRI", "Did you mean 'SWEEP_DIR'"],
    ),
}

PROGRAM = """
import contextlib, io, json, socket, sys
from sbs_jax.cli import main

sys.modules["huggingface_hub"] = None  # as where it is not installed
with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = str(taken.getsockname()[1])
    answers = {}
    for name, words in json.load(sys.stdin).items():
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                status = main.main([word.replace("PORT", port) for word in words])
            except SystemExit as end:
                status = end.code
        answers[name] = [status, said.getvalue(), [name for name in ("jax", "tensorflow") if name in sys.modules]]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Makes all mistakes in a folder with records, runs and tables: (status, text, heavy modules) by mistake."""
    folder = tmp_path_factory.mktemp("mistakes")
    row = '{"id": "1", "input": "Ann has 3 pens and buys 4.", "label": "(3 + 4)"}\n'
    files = {
        **{f"records/svamp/{split}.jsonl": row for split in ("train", "validation", "test")},
        "own/svamp/train.jsonl": '{"question": "Ann has 3 pens and buys 4.", "answer": "(3 + 4)"}\n',
        "tickets.csv": "text,team\nThe page is blank,web\n",
        "metric/dataset.json": DEFINITION.replace("METRIC", "rouge"),
        "tolerance/dataset.json": DEFINITION.replace("METRIC", 'numeric_accuracy", "tolerance": "half'),
        "runs/empty/manifest.json": '{"format": 1}',
        "runs/empty/metrics.jsonl": "",
        "questions.jsonl": '{"id": "1", "input": "Ann has 3 pens."}\n',
        "broken.jsonl": '{"id": "1", "input": \n',
        "spiece.model": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    keys = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "GEMINI_API_KEY", "GOOGLE_API_KEY")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps({name: words for name, (words, _) in MISTAKES.items()}),
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in keys}
        | {"PYTHONPATH": str(Path(main.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_before_anything_heavy_is_imported(mistake, answers):
    status, said, heavy = answers[mistake]
    assert status in (1, 2), said
    assert "Traceback" not in said
    assert [part for part in MISTAKES[mistake][1] if part not in said] == [], said
    assert heavy == []


def test_no_ready_configuration_is_refused_early():
    """Every experiment, model, adapter, mesh, method and optimizer, scanned as the command line does before imports."""
    folder = Path(main.__file__).parents[2] / "gin_configs"
    given = [f"{name}=x" for name in ("RECORDS_DIR", "MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "SOFT_TARGETS")]
    given += ["VOCABULARY=x", "TEACHER=x"]
    experiments = sorted(path for name in ("svamp", "esnli") for path in folder.glob(f"experiments/{name}/*.gin"))
    runs = [path for path in experiments if "runs/sweep.gin" not in path.read_text("utf-8")]
    sweeps = [path for path in folder.glob("experiments/paper/*.gin") if path.stem != "settings"]
    others = [path for name in ("adapters", "meshes", "methods", "optimizers") for path in folder.glob(f"{name}/*.gin")]
    for files in [*([str(path)] for path in runs), *([str(runs[0]), str(path)] for path in others)]:
        gin_scan.check("train.TrainConfig", gin_scan.scan(files, given))
    for path in sweeps:
        gin_scan.check("sweep.Sweep", gin_scan.scan([str(path)], ["SWEEP_DIR=s", "RECORDS_DIR=r", "VOCABULARY=byte"]))
    assert len(runs) > 8
    assert len(sweeps) > 8
    assert len(others) > 16


def test_help_is_quick():
    """0.2 s on two free cores (docs/experiments.md); the limit allows for a busy machine."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "sbs_jax", "--help"], capture_output=True, text=True
    )
    assert time.monotonic() - begin < 5
    assert all(f"\n  {name} " in done.stdout for name in main.SUMMARIES)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sbs_jax.cli.main" in imported
    assert {name for name in imported if name.startswith("sbs_jax.")} == {
        "sbs_jax.checks",
        "sbs_jax.cli",
        "sbs_jax.cli.main",
        "sbs_jax.cli.runs",
    }
    assert not imported & {"absl", "difflib", "gin", "jax", "logging", "numpy", "tensorflow"}
