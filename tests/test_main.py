"""The command line as its user meets it: real processes, real files, the shipped gin files."""

import argparse
import json
import math
import re
import signal
import typing
from pathlib import Path

import numpy as np
import pytest

import tasks  # noqa: F401  (registers the datasets)
from sbs_jax import checks
from sbs_jax.cli import main
from sbs_jax.data import records, registry, release, selection
from sbs_jax.data.dataset import MIXTURES
from sbs_jax.prediction import compiled
from sbs_jax.run import directory, settings
from sbs_jax.stats import verdict
from sbs_jax.training import config, declared, gin_files, loop

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def sbs(starter, tmp_path):
    """Runs the command in a process of its own, on one CPU device."""

    def run(*arguments, check=True, **options):
        done = starter.run(tmp_path, [*map(str, arguments)], **options)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@pytest.mark.slow
def test_two_real_examples_are_learned_by_heart(sbs, tmp_path, real_data_dir, real_vocab):
    """2 real SVAMP rows to 100 % by generation, through the commands that users type."""
    records_dir = tmp_path / "records"
    release.import_release(registry.get("svamp"), release_dir=real_data_dir, records_dir=records_dir, parser="strict")
    lines = (records_dir / "svamp" / "train.jsonl").read_text().splitlines(keepends=True)
    for split in ("train", "validation", "test"):
        (records_dir / "svamp" / f"{split}.jsonl").write_text("".join(lines[:2]))
    run = tmp_path / "run"
    done = sbs(
        "train",
        "--gin_file=gin_configs/experiments/svamp/cpu.gin",
        f"--gin.MODEL_DIR={run}",
        f"--gin.RECORDS_DIR={records_dir}",
        f"--gin.VOCABULARY={real_vocab}",
        "--gin.EXAMPLES=2",
        "--gin.EVAL_BATCH_SIZE=2",
        "--gin.TRAIN_STEPS=50",
        "--gin.EVAL_PERIOD=50",
        "--gin.LOG_PERIOD=20",
        "--gin.DROPOUT_RATE=0.0",
        "--gin.LEARNING_RATE=3e-3",
    )
    result = json.loads(done.stdout)
    assert result["validation"]["equation_accuracy"] == 100.0
    assert result["test"]["equation_accuracy"] == 100.0
    assert "50/50" in done.stderr
    assert "tokens/s" in done.stderr

    # The saved configuration is the operative one, and says what was given.
    assert "EXAMPLES = 2" in (run / "config.gin").read_text()
    assert directory.read_manifest(run)["run"]["mixture_or_task_name"] == "svamp_step_by_step"

    rows = [json.loads(line) for line in lines[:2]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": r["id"], "input": r["input"]}) + "\n" for r in rows))
    sbs("predict", run, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "labels.jsonl", "--batch_size", 2)
    answers = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [a["prediction"] for a in answers] == [r["label"] for r in rows]
    assert all(set(a) == {"id", "prediction", "score"} and a["score"] < 0 for a in answers)

    done = sbs("evaluate", f"{run}/checkpoints/50", "--split", "train", "--batch_size", 2)
    graded = json.loads(done.stdout)
    assert (graded["equation_accuracy"], graded["rows"]) == (100.0, 2)


def configure(*files, bindings=()):
    paths = ["MODEL_DIR=/nowhere/run", "RECORDS_DIR=/nowhere/records", "INITIAL_CHECKPOINT_PATH=/nowhere/t5"]
    names = [f"gin_configs/{file}.gin" for file in files]
    return gin_files.configure("train.TrainConfig", gin_files=names, bindings=[*paths, *bindings])


EXPERIMENTS = sorted(
    path.relative_to(ROOT / "gin_configs").with_suffix("").as_posix()
    for path in (ROOT / "gin_configs" / "experiments").glob("[!b]*/*.gin")
    if "runs/train.gin" in path.read_text()  # the others are sweeps: test_sweep.py
)
METHODS = {
    "standard_finetuning": ("label", "human", 1.0, ""),
    "standard_distillation": ("label", "teacher", 1.0, ""),
    "step_by_step": ("step_by_step", "human", 0.5, "predict: "),
    "single_task_rationale": ("rationale_then_label", "human", 1.0, ""),
    "cascade": ("cascade", "human", 0.5, "predict: "),
}


def test_there_is_an_experiment_for_each_dataset_and_size():
    wanted = {f"experiments/{d}/{s}" for d in ("esnli", "anli1", "cqa", "svamp") for s in ("base", "large", "xxl")}
    assert wanted <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_experiment_runs_every_method(experiment, method):
    config, text = configure(experiment, f"methods/{method}", bindings=["VOCABULARY=/nowhere/tokenizer.json"])
    kind, source, alpha, prefix = METHODS[method]
    several = experiment.startswith("experiments/mixtures/")
    datasets = "svamp.cqa.esnli.anli1" if several else experiment.split("/")[1]
    assert config.mixture_or_task_name == f"{datasets}_{kind}"
    assert (config.data.label_source, config.alpha, config.data.label_prefix) == (source, alpha, prefix)
    # Every method sees the same number of label examples per update.
    per_row = given(text, "EXAMPLES_PER_ROW")
    count = (2 if kind in MIXTURES else 1) * (4 if several else 1)
    assert config.batch_size == math.ceil(given(text, "EXAMPLES") * count / per_row)
    header = (ROOT / "gin_configs" / f"{experiment}.gin").read_text()
    for word in ("sbs train", "Hardware", "Paper"):
        assert word in header


def test_methods_beyond_the_paper_build_on_step_by_step():
    config, _ = configure("experiments/svamp/base", "methods/mutual_information", bindings=["PACK=False"])
    assert (config.mutual_information, config.data.pairs) == ("as_written", True)
    assert config.mixture_or_task_name == "svamp_step_by_step"
    config, _ = configure("experiments/svamp/base", "methods/several_rationales")
    assert config.data.rationales_per_example == "all"
    config, _ = configure("experiments/svamp/base", "methods/rationale_first", bindings=["TRAIN_STEPS=100"])
    assert [float(config.alpha(step)) for step in (0, 50, 100)] == pytest.approx([0.1, 0.5, 0.9])
    lengths = "TASK_FEATURE_LENGTHS={'inputs': 40, 'targets': 24}"
    config, _ = configure("experiments/svamp/base", "methods/cascade", bindings=[lengths])
    assert config.task_feature_lengths == {"inputs": 40 + 24 + 16, "targets": 24}
    assert len(selection.RATIONALE_MARKER.encode()) <= 16
    with pytest.raises(gin_files.UsageError, match="expected exactly 'inputs' and 'targets'"):
        configure("experiments/svamp/base", "methods/cascade", bindings=["TASK_FEATURE_LENGTHS={}"])


def given(text, macro):
    return next(int(line.split("=")[1]) for line in text.splitlines() if line.startswith(f"{macro} ="))


def test_bindings_override_in_order_and_text_needs_no_quotes():
    config, text = configure(
        "experiments/svamp/base", bindings=["SEED=3", "FRACTION=0.125", "RATIONALES=agreeing", "SEED=4"]
    )
    assert (config.seed, config.data.seed, config.data.fraction) == (4, 4, 0.125)
    assert config.data.rationales == "agreeing"
    assert config.data.records_dir == "/nowhere/records"
    assert 'RATIONALES = "agreeing"' in text.replace("'", '"')


def test_the_other_optimiser_replaces_the_first():
    config, _ = configure("experiments/svamp/base", "optimizers/adafactor")
    assert config.optimizer.__name__ == "adafactor"
    assert float(np.asarray(config.learning_rate(9_999))) == pytest.approx(1e-3)
    config, _ = configure("experiments/svamp/base")
    assert config.optimizer.__name__ == "adamw"
    assert float(np.asarray(config.learning_rate(5_000))) == pytest.approx(2.5e-5)


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["APLHA=0.3"], r"APLHA.*Did you mean 'ALPHA'"),
        (["evaluate.EvaluateConfig.split='test'"], "evaluate.EvaluateConfig.split"),
        (["train.TrainConfig.train_step=5"], "doesn't have a parameter named 'train_step'"),
        (["train.TrainConfg.seed=5"], "TrainConfg"),
        (["SEED"], "expected NAME=value"),
        (["ALPHA=1.5"], "alpha is 1.5"),
        (["MIXTURE_OR_TASK_NAME=svamp_step_by_stp"], "svamp_step_by_step"),
        (["DATASET=swamp"], "svamp"),
    ],
)
def test_mistakes_in_bindings_are_explained(bindings, message):
    with pytest.raises(gin_files.UsageError, match=message):
        configure("experiments/svamp/base", bindings=bindings)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("train.TrainConfig.evaluate_test='false'", "TrainConfig.evaluate_test is 'false'; expected True or False."),
        ("PACK=no", "PACK is 'no'; expected True or False (as TrainConfig.pack)."),
        ("PACK=0", "PACK is 0; expected True or False"),
        ("optax.adamw.nesterov=yes", "adamw.nesterov is 'yes'; expected True or False."),
        ("LEARNING_RATE=1e-4x", "LEARNING_RATE is '1e-4x'; expected a number (as linear_schedule.init_value)."),
        ("LEARNING_RATE=nan", "LEARNING_RATE is 'nan'; expected a number"),
        ("optax.adamw.weight_decay=1%", "adamw.weight_decay is '1%'; expected a number or a reference, @..."),
        ("TRAIN_STEPS='1000'", "TRAIN_STEPS is '1000'; expected a whole number (as "),
        ("TRAIN_STEPS=1e3", "TRAIN_STEPS is 1000.0; expected a whole number (as "),
        ("SEED=true", "SEED is True; expected a whole number (as "),
        ("SEED=[[0]]", "SEED is [[0]]; expected a whole number (as "),
        ("KEEP_PERIOD=none", "KEEP_PERIOD is 'none'; expected a whole number or None (as TrainConfig.keep_period)."),
        ("CLIP_NORM=off", "CLIP_NORM is 'off'; expected a number or None (as TrainConfig.clip_norm)."),
        ("FRACTION=half", "FRACTION is 'half'; expected a number (as DataOptions.fraction)."),
        ("MODEL_DIR=2026", "MODEL_DIR is 2026; expected text in quotes (as TrainConfig.model_dir)."),
        (
            "MODEL=t5",
            "MODEL is 't5'; expected a reference to a T5Config, @..() or a reference to a DecoderConfig",
        ),
        ("MODEL=@t5.T5Config", "; expected a reference to a T5Config, @..() or a reference to a DecoderConfig, @..()"),
        ("OPTIMIZER=adamw", "OPTIMIZER is 'adamw'; expected a reference, @.. (as TrainConfig.optimizer)."),
        ("t5.T5Config.mlp_activations=gelu", "T5Config.mlp_activations is 'gelu'; expected a list of texts in quotes."),
        ("TASK_FEATURE_LENGTHS={inputs: 32}", "'TASK_FEATURE_LENGTHS={inputs: 32}'; expected brackets that close and"),
        (
            "TASK_FEATURE_LENGTHS={'inputs': '32'}",
            "TASK_FEATURE_LENGTHS is {'inputs': '32'}; expected names with whole",
        ),
        (
            "TASK_FEATURE_LENGTHS={'inputs': 32}",
            "task_feature_lengths is {'inputs': 32}; expected tokens of inputs and",
        ),
        ("TASK_FEATURE_LENGTHS=32", "TASK_FEATURE_LENGTHS is 32; expected names with whole numbers, such as {'name':"),
        ("TASK_FEATURE_LENGTHS={'inputs': 0, 'targets': 9}", "['inputs'] is 0; expected a whole number of at least 1."),
    ],
)
def test_a_value_of_another_type_than_declared_is_refused_by_name(binding, message, tmp_path):
    """On the command line and in a gin file, as a macro and as a parameter."""
    with pytest.raises(gin_files.UsageError) as caught:
        configure("experiments/svamp/base", bindings=[binding])
    assert message in str(caught.value)


def test_every_field_that_declares_a_number_or_a_truth_value_refuses_text(tmp_path):
    refused = 0
    for name, class_name in (("train.TrainConfig", "TrainConfig"), ("datasets.DataOptions", "DataOptions")):
        types = declared.parameters(getattr({"train": config, "datasets": registry}[name.split(".")[0]], class_name))
        for field, kind in types.items():
            if any(each in (int, float, bool) for each in (kind, *typing.get_args(kind))):
                with pytest.raises(gin_files.UsageError, match=rf"^{class_name}\.{field} is 'x'; expected "):
                    configure("experiments/svamp/base", bindings=[f"{name}.{field}=x"])
                refused += 1
    assert refused > 20


@pytest.mark.parametrize(("text", "value"), [("false", False), ("FALSE", False), ("true", True), ("True", True)])
def test_truth_values_are_read_as_other_command_lines_write_them(text, value):
    found, kept = configure("experiments/svamp/base", bindings=[f"PACK={text}", f"EVALUATE_TEST={text}"])
    assert (found.pack, found.evaluate_test) == (value, value)
    assert f"PACK = {value}" in kept


def test_gin_files_are_utf_8_with_or_without_a_byte_order_mark(tmp_path):
    mine = tmp_path / "mine.gin"
    text = "include 'gin_configs/experiments/svamp/base.gin'\nLABEL_PREFIX = 'é: '\n"
    bindings = ["MODEL_DIR=/m", "RECORDS_DIR=/r", "INITIAL_CHECKPOINT_PATH=/i"]

    def read(contents: bytes) -> typing.Any:
        mine.write_bytes(contents)
        return gin_files.configure("train.TrainConfig", gin_files=[str(mine)], bindings=bindings)[0]

    for contents in (text.encode("utf-8-sig"), text.encode(), text.replace("\n", "\r\n").encode("utf-8-sig")):
        assert read(contents).data.label_prefix == "é: "
    for contents, message in {
        text.encode("utf-16"): "is not UTF-8; convert the file to UTF-8",
        f"{text}PACK = 'false'\n".encode(): "PACK is 'false'; expected True or False",
        f"{text}PACK = false\n".encode(): "'false' (mine.gin, line 3) is no value; expected True, False, None",
        f"{text}train.TrainConfig.pack = 'false'\n".encode(): "TrainConfig.pack is 'false'; expected True or False.",
    }.items():
        with pytest.raises(gin_files.UsageError) as caught:
            read(contents)
        assert message in str(caught.value)
    for file in ("nowhere.gin", str(tmp_path)):
        with pytest.raises(gin_files.UsageError, match=f"Unable to open file: {file}.*The ready ones are in"):
            gin_files.configure("train.TrainConfig", gin_files=[file], bindings=bindings)


ADDRESSES = ("gs://bucket/x", "s3://bucket/x", "hdfs:///x", "file:///x", "GS://bucket/x", "gs:/bucket/x")


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_of_object_storage_are_refused_by_name(address, monkeypatch, tmp_path, capsys):
    """Flags of every command, fields of every configuration; some may be on Cloud Storage."""
    monkeypatch.chdir(tmp_path)
    seen = set()
    for parser in main._parser()[1].values():
        for action in parser._actions:
            if action.type is None and action.choices is None and action.metavar and action.dest != "base_url":
                seen.add(action.dest)
                given = argparse.Namespace(**{action.dest: address})
                if action.dest in checks.ON_BUCKETS and address.startswith("gs://"):
                    main._refuse_urls(parser, given)
                else:
                    with pytest.raises(ValueError, match=rf"^(--)?\w+ is '{address}'; expected a local path"):
                        main._refuse_urls(parser, given)
    assert {
        "old_run_flags",
        "input",
        "output",
        "records_dir",
        "store",
        "gin_file",
        "adapters",
        "assets",
        "run_dirs",
        "run_flags",
    } <= seen
    for name in ("train.TrainConfig.model_dir", "datasets.DataOptions.records_dir"):
        owner = name.partition(".")[2]
        if not address.startswith("gs://"):
            with pytest.raises(gin_files.UsageError, match=rf"^{owner} is '{address}'; expected a local path"):
                configure("experiments/svamp/base", bindings=[f"{name}={address}"])
    assert main.main(["teach", "--dataset=svamp", "--provider=openai", "--model=m", f"--store={address}"]) == 1
    assert f"sbs teach: --store is '{address}'" in capsys.readouterr().err
    monkeypatch.setenv("SBS_COMPILED", address)
    with pytest.raises(ValueError, match=r"^SBS_COMPILED is"):
        compiled.default()
    assert list(tmp_path.iterdir()) == []


def test_vocabulary_and_first_checkpoint_may_be_on_cloud_storage():
    where = "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model"
    found, _ = configure("experiments/svamp/base", bindings=["INITIAL_CHECKPOINT_PATH=gs://t5-data/x"])
    assert (found.data.vocabulary, found.initial_checkpoint_path) == (where, "gs://t5-data/x")


def test_what_is_required_is_named_with_its_flag():
    with pytest.raises(gin_files.UsageError, match=r"--gin\.MODEL_DIR=\.\."):
        gin_files.configure("train.TrainConfig", gin_files=["gin_configs/experiments/svamp/base.gin"], bindings=[])


def test_a_user_s_own_gin_file_includes_ours_from_anywhere(tmp_path):
    mine = tmp_path / "mine.gin"
    mine.write_text("include 'gin_configs/experiments/cqa/large.gin'\nALPHA = 0.7\nUNHEARD_OF = 1\n")
    with pytest.raises(gin_files.UsageError, match="UNHEARD_OF"):
        gin_files.configure(
            "train.TrainConfig",
            gin_files=[str(mine)],
            bindings=["MODEL_DIR=/m", "RECORDS_DIR=/r", "INITIAL_CHECKPOINT_PATH=/i"],
        )


def test_errors_of_the_command_are_one_message_without_a_traceback(sbs, tmp_path):
    done = sbs("train", "--gin_file=gin_configs/experiments/svamp/cpu.gin", "--gin.FRACTON=0.5", check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("sbs train:")
    done = sbs(
        "train",
        "--gin_file=gin_configs/experiments/svamp/cpu.gin",
        f"--gin.MODEL_DIR={tmp_path}/run",
        f"--gin.RECORDS_DIR={tmp_path}/none",
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert "sbs records --dataset svamp" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


CLOSED = """
import os, sys
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 1)
from sbs_jax.cli import main
sys.exit(main.main(sys.argv[1:]))
"""
LISTED = ["sweep", "--gin_file=gin_configs/experiments/paper/table1.gin", "--print"]
LISTED += [f"--gin.{binding}" for binding in ("SWEEP_DIR=runs", "RECORDS_DIR=records", "VOCABULARY=byte")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["records", "--help"],
        [*LISTED, "--index", "3"],  # written at the end
        LISTED,  # more than the pipe's buffer holds
    ],
    ids=["help", "help of a command", "a line", "many lines"],
)
def test_where_nobody_reads_on_it_ends_as_the_pipe_did(sbs, tmp_path, arguments):
    """Closes the pipe early, as `sbs .. | head` does."""
    done = sbs(*arguments, command=("-c", CLOSED), check=False)
    assert (done.stdout, done.stderr) == ("", "")
    # argparse hides the error where output is not buffered.
    assert done.returncode == 128 + signal.SIGPIPE or (done.returncode == 0 and "--help" in arguments)


@pytest.mark.parametrize("command", ["records", "train", "evaluate", "predict", "serve", "plan", "report", "demo"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main.main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: sbs {command}")
    if command in ("train", "evaluate", "plan"):
        assert "--gin_file" in shown
        assert "--gin.NAME=VALUE" in shown


def test_help_shows_every_default():
    for name, parser in main._parser()[1].items():
        shown = " ".join(parser.format_help().split())
        for action in parser._actions:
            default = action.default
            if (
                action.help == argparse.SUPPRESS
                or default is None
                or default is False
                or default in ("", [], "==SUPPRESS==")
            ):
                continue
            words = " ".join(default) if isinstance(default, list) else default
            assert f"(default: {words})" in shown, f"sbs {name} {action.option_strings}"


def test_train_lists_its_macros_with_a_line_each(capsys):
    with pytest.raises(SystemExit):
        main.main(["train", "--help"])
    lines = re.findall(r"^    ([A-Z_]+) = (\S+)(?:.*?  (\S.*))?$", capsys.readouterr().out, re.MULTILINE)
    found = {name: (value, words) for name, value, words in lines}
    assert found["TRAIN_STEPS"] == ("..", "updates")
    assert found["KEEP_BEST"] == ("1", "by validation score")
    assert found["TRAIN_SPLIT"][0] == "'train'"
    assert {name for name, (_, words) in found.items() if not words} == set()
    assert len(lines) == len(found)
    assert {name for name in gin_files.class_bindings("train.TrainConfig") if "." not in name} <= found.keys()


@pytest.mark.parametrize(
    ("words", "runs", "further"),
    [
        (["predict", "a", "--input=i", "--output=o"], ["a"], []),
        (["predict", "--input", "i", "--output=o", "a"], ["a"], []),
        (["predict", "--input=i", "--run", "a", "--output=o"], ["a"], []),
        (["predict", "--model", "a", "--input=i", "--output=o"], ["a"], []),
        (["serve", "--port", "1", "a"], ["a"], []),
        (["serve", "--model=a"], ["a"], []),
        (["evaluate", "a", "--split=test"], ["a"], []),
        (["evaluate", "--split", "test", "a"], ["a"], []),
        (["replay", "--step", "3", "a", "--gin.TENSOR=1"], ["a"], []),
        (["rationales", "--limit", "3", "a"], ["a"], []),
        (["report", "a", "--output", "o", "b", "--run=c"], ["c", "a", "b"], []),
        (["convert", "a", "--to", "hf", "b"], ["a"], ["b"]),
        (["convert", "--to", "hf", "a", "b"], ["a"], ["b"]),
        (["convert", "--run", "a", "--to", "hf", "b"], ["a"], ["b"]),
    ],
)
def test_a_run_is_a_positional_or_a_flag_of_one_name(words, runs, further, capsys):
    arguments, rest = main.parsed(*main._parser((words[0],)), words)
    assert (arguments.run_dirs, arguments.run_dir, arguments.further) == (runs, runs[0], further)
    assert [word for word in rest if not word.startswith("--gin.")] == []
    old = any(word.startswith("--model") for word in words)
    assert ("--model DIR is now RUN or --run DIR" in capsys.readouterr().err) == old


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "--input=i", "--output=o"], "expected RUN (or --run DIR)"),
        (["predict", "a", "b", "--input=i", "--output=o"], "got the runs a, b; expected one"),
        (["predict", "a", "--model=b", "--input=i", "--output=o"], "got the runs b, a; expected one"),
        (["convert", "--to=hf", "a"], "got a; expected RUN (or --run DIR) TARGET"),
        (["report"], "expected RUN (or --run DIR)"),
        (["serve", "a", "--prot", "80"], "unknown argument --prot Did you mean '--port'"),
    ],
)
def test_a_missing_run_or_one_too_many_ends_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["train", "--gin_fiel=x"], ["predict", "--modle", "x"], ["trian"]])
def test_unknown_flags_and_commands_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(flags)
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_the_teacher_s_messages_name_flags_that_exist():
    commands = main._parser()[1]
    for file in (Path(main.__file__).parents[1] / "teacher").glob("*.py"):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z_]*(?!\w|\.[A-Z{])", file.read_text("utf-8")):
            assert any(flag in command._option_string_actions for command in commands.values()), (file.name, flag)


SEEDS = [
    "train",
    "--gin_file=gin_configs/experiments/builtin/demo.gin",
    "--gin_file=gin_configs/methods/step_by_step.gin",
]
SEEDS += ["--gin.RECORDS_DIR=records", "--gin.FRACTION=0.5"]


def test_each_seed_trains_the_run_of_its_own_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    records.write_records("records/builtin/train.jsonl", [records.Record(id="1", input="a", label="b")])
    trained, made = [], []
    monkeypatch.setattr(loop.Programs, "of", lambda config: made.append(config) or "shared")
    monkeypatch.setattr(loop, "train", lambda config, **given: trained.append((config, given)) or {})
    monkeypatch.setattr(verdict, "verdicts", lambda run: [])
    assert main.main([*SEEDS, "--seeds=3,1", "--gin.MODEL_DIR=runs/x-{seed}"]) == 0
    assert main.main([*SEEDS, "--gin.SEED=3", "--gin.MODEL_DIR=runs/x-3"]) == 0
    (third, given), (first, _), (alone, alone_given) = trained
    assert (third.seed, third.data.seed, third.model_dir) == (3, 3, "runs/x-3")
    assert (first.seed, first.data.seed, first.model_dir) == (1, 1, "runs/x-1")
    assert (given["config_text"], given["programs"]) == (alone_given["config_text"], "shared")
    assert len(made) == 1
    assert alone_given["programs"] is None
    assert settings.describe(third) == settings.describe(alone)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds=0,1", "--gin.MODEL_DIR=runs/x"], "put {seed} into it"),
        (["--seeds=0,0", "--gin.MODEL_DIR=runs/{seed}"], "different whole numbers"),
        (["--seeds=0,x", "--gin.MODEL_DIR=runs/{seed}"], "--seeds is '0,x'"),
        (["--seeds=0,1", "--gin.SEED=2", "--gin.MODEL_DIR=runs/{seed}"], "both --seeds and SEED"),
    ],
)
def test_seeds_without_runs_of_their_own_are_refused(flags, message, capsys):
    assert main.main([*SEEDS, *flags]) == 1
    assert message in capsys.readouterr().err
