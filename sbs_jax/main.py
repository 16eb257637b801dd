"""The `sbs` command: read flags and gin files, then call one top-level function.

The only module that knows gin. Configurations use gin's dynamic registration: a gin file imports the modules it
configures, so no library function is decorated, and third-party callables (`@optax.adamw`) are bound directly.
Heavy imports wait until they are needed, so `--help` answers at once.
"""

import argparse
import ast
import difflib
import importlib
import json
import logging
import os
import re
import sys
import tempfile
import tokenize
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import absl.logging

from sbs_jax import hosts, preemption

_BINDING = re.compile(r"--gin\.([^=]+)=(.*)", re.DOTALL)
_LONGEST = 3_000  # characters of a message; some of gin's quote the configuration
_NAME = re.compile(r"[\w.]+(/[\w.]+)*", re.ASCII)
_REFERENCE = re.compile(r"[@%](?:[\w.]+/)*([\w.]+)")
_REQUIRED = re.compile(r"^([\w.]+) = %gin.REQUIRED$", re.MULTILINE)
_LEFT_SIDE = re.compile(r"^([\w./]+) =", re.MULTILINE)


class UsageError(Exception):
    """Something the caller of the command can mend; printed without a traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..")


def configure(
    name: str,
    *,
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str] = (),
    unread: Sequence[str] = (),
) -> tuple[Any, str]:
    """An instance of a configuration class (`"train.TrainConfig"`), and the operative configuration as text.

    `bindings` are `NAME=value`. Files and bindings that come later override earlier ones. Values that are no gin
    expression are taken as text, so `MODEL_DIR=/tmp/run` needs no quotes. A binding that nothing refers to, an
    unknown name, and a macro left at REQUIRED are errors, except for `unread` macros, which the command does not read.
    """
    import gin

    gin.clear_config()
    # Names that start with gin_configs/ are found from any folder: gin looks packages up, and gin_configs is one.
    for path in search_paths:
        gin.add_config_file_search_path(path)
    # What bindings of the command line may name without an import of their own.
    modules = ("adapters", "datasets", "evaluate", "partitioning", "t5", "train")
    prelude = "from __gin__ import dynamic_registration\nimport optax\nimport tasks\n"
    prelude += "".join(f"from sbs_jax import {module}\n" for module in modules)
    prelude += "".join(f"include {file!r}\n" for file in gin_files)
    text = prelude + "\n".join(_quoted(binding) for binding in bindings) + "\n"
    try:
        # Imports of the prelude do not reach into included files, and theirs not out of them.
        includes, _ = gin.parse_config(text)
        _refuse_foreign(importlib.import_module("gin.config"))
        missing = _REQUIRED.findall(gin.config_str())
        gin.parse_config("".join(f"{macro} = 'none'\n" for macro in missing if macro in unread))
        missing = [macro for macro in missing if macro not in unread]
        if missing:
            flags = " ".join(f"--gin.{macro}=.." for macro in missing)
            raise UsageError(f"{name} needs values that no gin file gives: {flags}")
        instance = gin.get_configurable(name)()
    except UsageError:
        raise
    except tokenize.TokenError as error:
        raise UsageError(f"The configuration ends within a bracket or a text: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise UsageError(f"The configuration is nested too deeply to read ({type(error).__name__}).") from error
    except (ArithmeticError, LookupError, ImportError) as error:
        raise UsageError(f"The configuration cannot be read: {type(error).__name__}: {error}") from error
    except (ValueError, SyntaxError, OSError, NameError, AttributeError, TypeError, RuntimeError) as error:
        raise UsageError(str(error) or f"The configuration cannot be read: {type(error).__name__}.") from error
    texts = [text, *(_read(file) for file in _file_names(includes))]
    unused = _unused(gin.config_str(), gin.operative_config_str(), texts)
    if unused:
        known = sorted({m[1] for m in _LEFT_SIDE.finditer(gin.config_str())} - set(unused))
        lines = [f"{binding}{_near(binding, known)}" for binding in unused]
        raise UsageError("Nothing uses these bindings; correct or remove them:\n  " + "\n  ".join(lines))
    return instance, gin.operative_config_str()


def _quoted(binding: str) -> str:
    """A `NAME=value` binding as a line of gin, its value quoted if it is bare text."""
    name, equals, value = binding.partition("=")
    if not equals:
        raise UsageError(f"Got the binding {binding[:200]!r}; expected NAME=value.")
    if not _NAME.fullmatch(name.strip()):
        raise UsageError(f"Got the binding {binding[:200]!r}; {name[:200]!r} is no name of a macro or parameter.")
    value = value.strip()
    if not value.startswith(("@", "%", "[", "(", "{")):
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = repr(value)
    elif "\n" in value or "\r" in value:  # it could go on with other statements
        raise UsageError(f"Got the binding {binding[:200]!r}; expected a value of one line.")
    return f"{name.strip()} = {value}"


def _refuse_foreign(config: Any) -> None:
    """UsageError where a configuration refers to a function of the standard library, which could do anything.

    Dynamic registration lets a gin file name whatever can be imported, and what it names with `()` is called; and a
    module that is imported leads to those that it imports (`@train.os.system()`). What a configuration is made of is
    this project's, or another package's. `config` is gin's module, which has parsed and called nothing yet.
    """
    waiting, seen = list(config._CONFIG.values()), set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif isinstance(value, config.ConfigurableReference) and id(value) not in seen:
            seen.add(id(value))
            function = value.configurable.wrapped
            home = getattr(function, "__module__", None) or type(function).__module__
            if home.partition(".")[0] in sys.stdlib_module_names:
                name = getattr(function, "__qualname__", type(function).__qualname__)
                raise UsageError(
                    f"The configuration refers to {value.scoped_selector}, which is {home}.{name} of "
                    "Python itself; it may refer to what sbs_jax, tasks, optax and other packages define. It was not "
                    "run."
                )


def _read(file: str) -> str:
    path = Path(file)
    if not path.exists():  # gin found it through the package gin_configs
        path = Path(__file__).parents[1] / file
    return path.read_text("utf-8")


def _file_names(includes: Iterable[Any]) -> list[str]:
    found = []
    for include in includes:
        found += [include.filename, *_file_names(include.includes)]
    return found


def _unused(config: str, operative: str, texts: Sequence[str]) -> list[str]:
    """Bindings that took no effect and that no text refers to.

    A binding whose configurable or macro is referred to somewhere (`@optax.adamw`, `%WARMUP`) may be idle because
    another file chose differently; that is how alternatives are offered, and no mistake.
    """
    referred = {match[1] for text in texts for match in _REFERENCE.finditer(text)}
    ends = {name.rpartition(".")[2] for name in referred}
    idle = {m[1] for m in _LEFT_SIDE.finditer(config)} - {m[1] for m in _LEFT_SIDE.finditer(operative)}
    unused = []
    for binding in sorted(idle):
        path = binding.rpartition("/")[2]
        owner = path.rpartition(".")[0] or path
        if owner not in referred and owner.rpartition(".")[2] not in ends:
            unused.append(binding)
    return unused


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the console script; returns the exit status."""
    parser, commands = _parser()
    arguments, rest = parser.parse_known_args(argv)
    takes_gin = hasattr(arguments, "gin_file")
    bindings = []
    for flag in rest:
        match = _BINDING.fullmatch(flag)
        if not takes_gin or match is None:
            known = list(commands[arguments.command]._option_string_actions)
            commands[arguments.command].error(f"unknown argument {flag}{_near(flag, known)}")
        bindings.append(f"{match[1]}={match[2]}")
    _log_to_stderr()
    try:
        if hasattr(arguments, "multihost"):
            _join(arguments)
        import_tensorflow()
        # SeqIO and Orbax log through absl, at length.
        absl.logging.set_verbosity(absl.logging.ERROR)
        status = arguments.run(arguments, bindings) if takes_gin else arguments.run(arguments)
        hosts.leave()
        return status
    except preemption.PreemptedError as told:
        if hosts.is_first():
            print(f"sbs {arguments.command}: {told}", file=sys.stderr)
        return preemption.EXIT_STATUS
    except (UsageError, hosts.HostsError, ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        _tell_others(str(error), show=arguments.traceback)
        if arguments.traceback:
            raise
        print(f"sbs {arguments.command}: {error}", file=sys.stderr)
        return 1
    except BaseException as error:
        _tell_others(f"{type(error).__name__}: {error}", show=True)
        raise


def _tell_others(text: str, *, show: bool) -> None:
    """Ends all processes of a run of several; returns where there is only this one."""
    if hosts.describe():
        if show:
            traceback.print_exc()
        hosts.fail(text)


def _join(arguments: argparse.Namespace) -> None:
    """Joins the other processes where the flags say that there are some."""
    given = {
        name: getattr(arguments, name)
        for name in ("coordinator_address", "process_count", "process_index")
        if getattr(arguments, name) is not None
    }
    if arguments.multihost and given:
        raise UsageError(f"--multihost finds out what --{', --'.join(given)} would say; give it alone, or those.")
    if not given and not arguments.multihost:
        return
    if not arguments.multihost and len(given) < 3:
        raise UsageError(
            f"got --{', --'.join(given)} alone; --coordinator_address, --process_count and --process_index go together."
        )
    if arguments.join_timeout <= 0:
        raise UsageError(f"--join_timeout is {arguments.join_timeout:g}; expected seconds above 0.")
    if arguments.multihost:
        place = hosts.detect(timeout=arguments.join_timeout)
    else:
        place = hosts.Place(
            coordinator=arguments.coordinator_address, count=arguments.process_count, index=arguments.process_index
        )
    hosts.join(place, timeout=arguments.join_timeout, detected=arguments.multihost)
    if not hosts.is_first():
        logging.getLogger("sbs_jax").setLevel(logging.ERROR)


def _log_to_stderr() -> None:
    """Our own messages alone; gin writes to the root logger, which stays silent."""
    logging.getLogger().addHandler(logging.NullHandler())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("sbs_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


def import_tensorflow() -> None:
    """Imports TensorFlow without what it prints about devices that it must not use (they are JAX's) and cannot mute."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            import tensorflow as tf
            import tensorflow_text  # noqa: F401  (registers its operations)

            tf.config.set_visible_devices([], "GPU")
        except BaseException:
            said.seek(0)
            os.write(stderr, said.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="sbs",
        description="Distilling step-by-step: train a small T5 on labels and rationales of a large model.",
        epilog="sbs COMMAND --help tells the flags of a command. Ready configurations: gin_configs/experiments/.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {}

    def command(
        name: str, run: Any, summary: str, *, gin: bool = False, multihost: bool = False, epilog: str = ""
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        if gin:
            sub.add_argument(
                "--gin_file", action="append", default=[], metavar="FILE", help="gin file; repeat, later ones override"
            )
            sub.add_argument(
                "--gin_search_paths", default="", metavar="DIRS", help="comma-separated folders to look for gin files"
            )
            sub.add_argument("--gin.NAME=VALUE", dest="_", metavar="", help="override a macro or parameter; repeat")
        if multihost:
            _add_multihost(sub)
        sub.set_defaults(run=run)
        commands[name] = sub
        return sub

    records = command("records", _records, "Import teacher outputs (official release layout or TFDS) as records.")
    records.add_argument("--dataset", required=True, help="name of a dataset: esnli, anli1, cqa, svamp")
    records.add_argument("--release", required=True, metavar="DIR", help="folder that holds <name>/ of the release")
    records.add_argument("--records_dir", required=True, metavar="DIR", help="where to write <dataset>/*.jsonl")
    records.add_argument("--parser", choices=("strict", "official"), default="strict", help="how replies are read")
    records.add_argument("--inputs", choices=("release", "tfds"), default="release", help="where inputs come from")
    records.add_argument("--overwrite", action="store_true", help="replace records of another parser or source")
    _add_teach(command)
    train = command(
        "train",
        _train,
        "Train a student, evaluate it on validation meanwhile and on test once at the end.",
        gin=True,
        multihost=True,
        epilog="example:\n  sbs train --gin_file=gin_configs/experiments/svamp/base.gin \\\n"
        "      --gin.RECORDS_DIR=records --gin.MODEL_DIR=runs/svamp\n\n"
        "Repeat the command to resume. SIGTERM or Ctrl-C saves and ends the run (a second one ends it at once).\n"
        f"Exit status: 0 finished, {preemption.EXIT_STATUS} told to end and saved, to be repeated, 1 after an error.",
    )
    train.add_argument(
        "--accept_changes",
        action="store_true",
        help="resume although data, vocabulary, defaults or configuration differ from what the run began with",
    )
    replay = command(
        "replay",
        _replay,
        "Do one training step of a run again: which examples and parameters made it what it was.",
        gin=True,
        epilog="example:\n  sbs replay runs/svamp --step 120 --gin.TENSOR=1",
    )
    replay.add_argument("run_dir", metavar="RUN_DIR", help="run directory of sbs train")
    replay.add_argument("--step", type=int, metavar="N", help="(default: the newest that was not finite)")
    replay.add_argument("--json", action="store_true", help="print everything as JSON")
    command(
        "evaluate",
        _evaluate,
        "Grade a checkpoint on a split by generation.",
        gin=True,
        multihost=True,
        epilog="example:\n  sbs evaluate --gin_file=gin_configs/runs/evaluate.gin --gin.CHECKPOINT_PATH=runs/svamp \\\n"
        "      --gin.SPLIT=test",
    )
    predict = command(
        "predict",
        _predict,
        'Answer {"id", "input"} rows with {"id", "prediction", "score"} rows.',
        multihost=True,
        epilog="examples:\n  sbs predict --model runs/svamp --input questions.jsonl --output answers.jsonl\n"
        "  sbs predict --model runs/svamp-lora --adapters esnli=runs/esnli-lora --input rows.jsonl \\\n"
        "      --output answers.jsonl\n\n"
        'With --adapters, rows that have "adapter": "esnli" are answered by that run, the others by --model; all of\n'
        "them over one base, which is held once. Their vocabularies, prefixes and lengths are their own.",
    )
    predict.add_argument(
        "--model", required=True, metavar="DIR", help="run directory, or one of its checkpoints/<step>"
    )
    predict.add_argument("--input", required=True, metavar="FILE", help="JSON lines to read")
    predict.add_argument("--output", required=True, metavar="FILE", help="JSON lines to write")
    predict.add_argument("--task", choices=("label", "rationale"), default="label", help="what to predict")
    predict.add_argument("--batch_size", type=int, default=32, help="rows at a time")
    predict.add_argument(
        "--base", metavar="PATH", help="where the base of a run that trained adapters lies, if it has moved"
    )
    predict.add_argument(
        "--adapters",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a run over the same base, for rows that name it; repeat",
    )
    convert = command(
        "convert",
        _convert,
        "Convert a checkpoint: Hugging Face, T5X, or a run of ours, to any of them; adapters to PEFT's form and back.",
        epilog="examples:\n  sbs convert --to hf runs/svamp svamp-student\n"
        "  sbs convert --to peft runs/svamp-lora svamp-lora\n"
        "  sbs convert --to sbs svamp-lora runs/svamp-again --base t5-v1_1-base\n\n"
        "A run that trained adapters becomes one whole student in hf, t5x and sbs: they are merged into their base.\n"
        "PEFT has LoRA and IA3 alone; what else was trained is named. See docs/checkpoints.md.",
    )
    forms = ("hf", "t5x", "sbs", "peft")
    convert.add_argument("--from", dest="from_form", choices=forms, help="form of the source (default: as it looks)")
    convert.add_argument("--to", dest="to_form", choices=forms, required=True, help="form to write")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of hf weights")
    convert.add_argument("--shard_gb", type=float, default=5.0, metavar="GB", help="largest file of hf weights")
    convert.add_argument(
        "--base",
        metavar="PATH",
        help="of adapters of PEFT, their base; of a run's, where its base lies, if it has moved",
    )
    convert.add_argument("source", metavar="SRC", help="directory, .npz, or gs:// path of T5X")
    convert.add_argument("target", metavar="DST", help="directory to make")
    report = command("report", _report, "Compare finished runs: a table, and a page with their curves.")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run directories of sbs train")
    report.add_argument("--output", default="report.html", metavar="FILE", help="page to write")
    _add_plan(command)
    demo = command("demo", _demo, "Train and compare both methods on the built-in dataset; writes a page.")
    demo.add_argument("--output", default="runs/demo", metavar="DIR", help="where runs, table and page go")
    return parser, commands


def _add_multihost(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group(
        "several processes",
        "One process per host, each with the same command; process 0 writes the files. Folders must be shared by all.",
    )
    group.add_argument(
        "--multihost", action="store_true", help="join the processes that Cloud TPU, GKE, Slurm or Open MPI started"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="elsewhere: where process 0 can be reached")
    group.add_argument("--process_count", type=int, metavar="N", help="elsewhere: how many processes there are")
    group.add_argument("--process_index", type=int, metavar="I", help="elsewhere: which one this is, from 0")
    group.add_argument(
        "--join_timeout", type=float, default=300.0, metavar="SECONDS", help="how long to wait for the others"
    )


def _add_teach(command: Any) -> None:
    teach = command(
        "teach",
        _teach,
        "Ask a hosted model for rationales and labels, and write its replies as records.",
        epilog="example:\n  sbs teach --dataset svamp --inputs_dir dss --provider openai --model gpt-4o-mini \\\n"
        "      --store svamp.sqlite --records_dir records --dry_run\n\n"
        "Credentials come from the environment (OPENAI_API_KEY, GEMINI_API_KEY, or Google's default credentials).\n"
        "Replies are kept in the store and never asked for twice; repeat the command to go on. See docs/teacher.md.",
    )
    rows = teach.add_argument_group("rows")
    rows.add_argument("--dataset", required=True, help="name of a dataset")
    rows.add_argument("--inputs_dir", metavar="DIR", help="folder of the inputs")
    rows.add_argument(
        "--inputs",
        choices=("release", "records", "tfds"),
        default="release",
        help="what they are: the official release's layout, <dataset>/<split>.jsonl of id, input and label, or TFDS",
    )
    rows.add_argument(
        "--split", action="append", metavar="NAME", help="train, validation or test; repeat (default: all)"
    )
    rows.add_argument("--limit", type=int, metavar="N", help="the first N rows of each split")
    ask = teach.add_argument_group("the teacher")
    ask.add_argument("--provider", required=True, metavar="NAME", help="openai (any compatible server), gemini, vertex")
    ask.add_argument("--model", required=True, help="the provider's name of the model")
    ask.add_argument("--base_url", metavar="URL", help="address of an OpenAI-compatible server, for example vLLM's")
    ask.add_argument("--prompt", metavar="FILE", help="prompt file (default: tasks/prompts/<dataset>.json)")
    ask.add_argument("--form", choices=("chat", "completion"), default="chat", help="messages, or one text to continue")
    ask.add_argument("--temperature", type=float, default=0.0)
    ask.add_argument(
        "--max_tokens", type=int, default=256, help="room for a reply; cut short ones get 2 and 4 times it"
    )
    ask.add_argument("--samples", type=int, default=1, help="replies per row; the most frequent label is taken")
    ask.add_argument("--hint", action="store_true", help="ask again with the label as a hint where the label differs")
    pace = teach.add_argument_group("pace and money")
    pace.add_argument("--concurrency", type=int, default=64, help="requests in flight at most")
    pace.add_argument("--requests_per_minute", type=float, metavar="N")
    pace.add_argument("--tokens_per_minute", type=float, metavar="N")
    pace.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for one reply")
    pace.add_argument("--retries", type=int, default=6, help="repetitions of a request after errors that may pass")
    pace.add_argument("--max_requests", type=int, metavar="N", help="ask at most so often in this run")
    pace.add_argument("--max_cost", type=float, metavar="USD", help="spend at most so much in this run")
    pace.add_argument("--price", metavar="IN,OUT", help="USD per million tokens, where the model's is not known or old")
    pace.add_argument("--unusable", type=float, default=0.3, help="share of unreadable replies that ends the run")
    pace.add_argument("--batch", action="store_true", help="batch jobs: half the price, within a day")
    pace.add_argument("--batch_size", type=int, default=20_000, metavar="N", help="requests in one job")
    pace.add_argument("--batch_folder", metavar="GS", help="gs:// folder for the files of Vertex AI's batch jobs")
    pace.add_argument("--cancel_batches", action="store_true", help="cancel the jobs under way, keep their answers")
    out = teach.add_argument_group("results")
    out.add_argument("--store", required=True, metavar="FILE", help="where replies are kept (SQLite)")
    out.add_argument("--records_dir", required=True, metavar="DIR", help="where to write <dataset>/*.jsonl")
    out.add_argument("--parser", choices=("strict", "official"), default="strict", help="how replies are read")
    out.add_argument("--page", metavar="FILE", help="HTML page to look at the replies (default: beside the store)")
    out.add_argument("--overwrite", action="store_true", help="replace other records there")
    out.add_argument("--retry_failed", action="store_true", help="ask again what failed for good before")
    out.add_argument("--dry_run", action="store_true", help="show prompt, tokens, price and time; ask nothing")
    out.add_argument("--export_only", action="store_true", help="write records of what is stored; ask nothing")


def _add_plan(command: Any) -> None:
    plan = command(
        "plan",
        _plan,
        "Compile a configuration for TPUs that are not here: does it fit, how fast, at what cost.",
        gin=True,
        epilog="examples:\n  sbs plan --gin_file=gin_configs/experiments/esnli/base.gin --topology v5e:2x4\n"
        "  sbs plan --gin_file=gin_configs/experiments/esnli/xxl.gin --topology v5e:16x16,v5p:4x4x4 --search\n\n"
        "Needs no data, weights or TPU, only its compiler: pip install libtpu. All it says are estimates.\n"
        "Exit status: 0 if something fits, 3 if nothing does, 1 after a mistake.",
    )
    plan.add_argument("--topology", required=True, metavar="LIST", help="such as v5e:4x4 or v5p:2x2x2; several: A,B")
    plan.add_argument(
        "--slices", type=int, default=1, metavar="N", help="so many of each, over the data-centre network"
    )
    plan.add_argument(
        "--steps", default="train,evaluation,generation", metavar="LIST", help="what to compile (default: %(default)s)"
    )
    plan.add_argument("--batch_size", type=int, metavar="N", help="rows per update, over all chips")
    plan.add_argument("--search", action="store_true", help="try meshes (fsdp, data, tensor) and micro-batches")
    plan.add_argument("--max_compiles", type=int, default=16, metavar="N", help="of a search (default: %(default)s)")
    plan.add_argument(
        "--time_limit", type=float, default=1800.0, metavar="SECONDS", help="for one candidate (default: %(default)s)"
    )
    plan.add_argument("--price", default="on_demand", help="on_demand, three_years, or USD per chip and hour")
    plan.add_argument("--examples", type=int, metavar="N", help="of each task in an epoch, without RECORDS_DIR")
    plan.add_argument("--examples_per_row", type=float, metavar="N", help="where rows are packed")
    plan.add_argument("--json", action="store_true", help="print everything as JSON")
    plan.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # the process that compiles


def _plan(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from sbs_jax.plan import chips, compiler

    unread = ("MODEL_DIR", "RECORDS_DIR", "INITIAL_CHECKPOINT_PATH")
    if arguments.serve:
        from sbs_jax.plan import worker

        config, _ = _configured("train.TrainConfig", arguments, bindings, unread=unread)
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what others print is no answer
        worker.serve(config, requests=sys.stdin, answers=answers)
        return 0
    chips.check_compiler()
    topologies = tuple(chips.topology(name, slices=arguments.slices) for name in arguments.topology.split(","))
    child = [sys.executable, "-m", "sbs_jax.main", "plan", "--serve", "--topology=-"]
    child += [f"--gin_file={file}" for file in arguments.gin_file]
    child += [f"--gin_search_paths={arguments.gin_search_paths}", *(f"--gin.{binding}" for binding in bindings)]
    with compiler.Compiler(child, time_limit=arguments.time_limit) as machine:
        machine.start()
        config, text = _configured("train.TrainConfig", arguments, bindings, unread=unread)
        from sbs_jax.plan import command, table

        per_row = re.search(r"^EXAMPLES_PER_ROW = ([\d.]+)$", text, re.MULTILINE)
        options = command.Options(
            topologies=topologies,
            steps=("train",) if arguments.search else tuple(arguments.steps.split(",")),
            search=arguments.search,
            max_compiles=arguments.max_compiles,
            batch_size=arguments.batch_size,
            price=arguments.price,
            examples=arguments.examples,
            examples_per_row=arguments.examples_per_row or (float(per_row[1]) if per_row else None),
        )
        found = command.plan(config, options, machine=machine, report=logging.getLogger("sbs_jax").info)
    print(json.dumps(found, indent=1) if arguments.json else table.text(found))
    return 0 if found["suggestion"]["smallest"] is not None else 3


def _teach(arguments: argparse.Namespace) -> int:
    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax.teacher import clients, command, prompts, sampler

    template = prompts.read(arguments.prompt or arguments.dataset)
    settings = sampler.Settings(
        model=arguments.model,
        form=arguments.form,
        parameters=clients.Parameters(temperature=arguments.temperature, max_tokens=arguments.max_tokens),
        samples=arguments.samples,
        hint=arguments.hint,
        concurrency=arguments.concurrency,
        requests_per_minute=arguments.requests_per_minute,
        tokens_per_minute=arguments.tokens_per_minute,
        retries=arguments.retries,
        max_requests=arguments.max_requests,
        max_cost=arguments.max_cost,
        unusable=arguments.unusable,
    )
    same = (
        *("dataset", "inputs_dir", "inputs", "limit", "provider", "base_url", "price", "timeout"),
        *("batch", "batch_size", "batch_folder", "cancel_batches", "parser", "retry_failed", "store", "records_dir"),
        *("overwrite", "dry_run", "export_only"),
    )
    options = command.Options(
        settings=settings,
        template=template,
        splits=tuple(arguments.split) if arguments.split else None,
        page=arguments.page or str(Path(arguments.store).with_suffix(".html")),
        **{name: getattr(arguments, name) for name in same},
    )
    manifest = command.teach(options)
    if manifest is None:
        return 0 if arguments.dry_run else 3
    print(json.dumps(manifest, indent=1))
    return 0


def _train(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    from sbs_jax import train

    config, text = _configured("train.TrainConfig", arguments, bindings)
    result = train.train(config, config_text=text, accept_changes=arguments.accept_changes)
    if hosts.is_first():
        print(json.dumps(result, indent=1))
    return 0


def _replay(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    from sbs_jax import failures, replay, run_dir

    run_dir.read_manifest(arguments.run_dir)  # whether it is a run directory
    arguments.gin_file = [str(Path(arguments.run_dir).absolute() / "config.gin"), *arguments.gin_file]
    config, _ = _configured("train.TrainConfig", arguments, bindings)
    found = replay.replay(config, arguments.run_dir, step=arguments.step)
    kept = failures.read(arguments.run_dir, found["step"])
    print(json.dumps(found, indent=1) if arguments.json else replay.text(found, kept))
    return 0


def _evaluate(arguments: argparse.Namespace, bindings: Sequence[str]) -> int:
    from sbs_jax import evaluate

    config, _ = _configured("evaluate.EvaluateConfig", arguments, bindings)
    metrics = evaluate.evaluate(config)
    if hosts.is_first():
        print(json.dumps(metrics))
    return 0


def _configured(
    name: str, arguments: argparse.Namespace, bindings: Sequence[str], *, unread: Sequence[str] = ()
) -> tuple[Any, str]:
    if not arguments.gin_file:
        raise UsageError("no --gin_file given; the ready ones are under gin_configs/experiments/.")
    configured, text = configure(
        name,
        gin_files=arguments.gin_file,
        bindings=bindings,
        search_paths=[path for path in arguments.gin_search_paths.split(",") if path],
        unread=unread,
    )
    # Records may lie elsewhere on another host; what they hold is compared when they are read.
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "RECORDS_DIR"))]
    hosts.agree({"configuration": "\n".join(lines)})
    return configured, text


def _predict(arguments: argparse.Namespace) -> int:
    from sbs_jax import evaluate

    count = evaluate.predict(
        arguments.model,
        input_path=arguments.input,
        output_path=arguments.output,
        objective=arguments.task,
        batch_size=arguments.batch_size,
        base=arguments.base,
        adapters=_named(arguments.adapters),
    )
    if hosts.is_first():
        print(f"{count} predictions in {arguments.output}")
    return 0


def _named(flags: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` flags by name."""
    named: dict[str, str] = {}
    for flag in flags:
        name, equals, place = flag.partition("=")
        if not (name and equals and place):
            raise UsageError(f"got --adapters {flag!r}; expected NAME=DIR, such as esnli=runs/esnli-lora.")
        if name in named:
            raise UsageError(f"--adapters names {name!r} twice: {named[name]} and {place}.")
        named[name] = place
    return named


def _records(arguments: argparse.Namespace) -> int:
    import tasks  # noqa: F401  (registers the datasets)
    from sbs_jax import datasets, release

    manifest = release.import_release(
        datasets.get(arguments.dataset),
        release_dir=arguments.release,
        records_dir=arguments.records_dir,
        parser=arguments.parser,
        inputs=arguments.inputs,
        overwrite=arguments.overwrite,
    )
    print(json.dumps(manifest, indent=1, default=str))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from sbs_jax.convert import command

    summary = command.convert(
        arguments.source,
        arguments.target,
        from_form=arguments.from_form,
        to_form=arguments.to_form,
        dtype=arguments.dtype,
        shard_bytes=int(arguments.shard_gb * 1e9),
        base=arguments.base,
    )
    print(json.dumps(summary))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from sbs_jax import report

    report.main(arguments.run_dirs, arguments.output)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from sbs_jax import demo

    return demo.main(arguments.output)


if __name__ == "__main__":
    sys.exit(main())
