"""The `sbs` command: parses flags, checks them, then calls the `run` of a module in `cli/commands/`.

A mistake costs no import of TensorFlow and JAX, which takes seconds: imports here and in the commands are late, only
the chosen command's module is loaded, and its `check` comes before anything heavy. `sbs --help` loads no command.
"""

import argparse
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from sbs_jax import checks
from sbs_jax.cli import runs

_BINDING = re.compile(r"--gin\.([^=]+)=(.*)", re.DOTALL)
# The commands by workflow, in the order of --help, with their summaries; each is a module of `cli/commands/`.
WORKFLOW = {
    "make data": {
        "init": "Make a dataset of a table of your own: splits, labels, a prompt, and configurations.",
        "records": "Import existing teacher outputs (official release layout or TFDS) as records.",
        "teach": "Ask a hosted model for rationales and labels, and write its replies as records.",
        "select": "Choose among the rationales of each row: those that agree, the short, the diverse, the likely ones.",
        "baseline": "Measure what simple models answer: the most frequent label, and linear models of words.",
        "vocabulary": "Cut a vocabulary to the pieces that the records need, so that a student's tables get small.",
    },
    "train": {
        "plan": "Compile a configuration for absent TPUs: does it fit, how fast is it, what does it cost?",
        "soft_targets": "Store a trained student's distributions over its training targets, to teach a smaller one.",
        "train": "Train a student; evaluate on validation during training, and once on test at the end.",
        "sweep": "Train every cell of a table: methods x datasets x fractions x sizes x seeds. Finished cells are "
        "skipped.",
        "replay": "Repeat one training step of a run, to see which examples and parameters made it non-finite.",
    },
    "compare": {
        "evaluate": "Grade a checkpoint on a split by generation.",
        "rationales": "Measure a student's rationales: fit to its answers, overlap with the teacher's, length.",
        "report": "Compare finished runs: tables, and one page with plots, tests and every answer.",
    },
    "use": {
        "predict": 'Answer {"id", "input"} rows with {"id", "prediction", "score"} rows.',
        "serve": "Answer questions over HTTP: POST /predict, GET /health, /metrics, /openapi.json.",
        "convert": "Convert a run, or a Hugging Face or T5X checkpoint, to any of these forms, to StableHLO or to "
        "ONNX; adapters to PEFT's form and back.",
    },
    "try": {
        "demo": "Train and compare both methods on the built-in dataset, and write a page of results.",
    },
}
SUMMARIES = {name: summary for commands in WORKFLOW.values() for name, summary in commands.items()}


def command() -> int:
    """Runs `sbs` as a process of its own, which a signal ends at once when its work is done."""
    try:
        return main()
    finally:
        import signal

        # Python's handler would raise KeyboardInterrupt inside libraries that are being torn down; some abort of it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `sbs` with these words and returns its exit status; 128 + SIGPIPE if the reader of its output is gone."""
    try:
        try:
            return _main(argv)
        except SystemExit:  # --help and errors of flags
            sys.stdout.flush()
            raise
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not fail again
        import signal

        return 128 + signal.SIGPIPE


def _reader_is_gone() -> bool:
    """Tells whether standard output is a pipe whose other end is closed."""
    try:
        descriptor = sys.stdout.fileno()
    except ValueError:  # replaced by an object without a descriptor
        return False
    import select

    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parser(_named(words))
    arguments, rest = parsed(parser, commands, words)
    takes_gin = hasattr(arguments, "gin_file")
    bindings = []
    for flag in rest:
        match = _BINDING.fullmatch(flag)
        if not takes_gin or match is None:
            known = [name for name in commands[arguments.command]._option_string_actions if name.startswith("--")]
            commands[arguments.command].error(f"unknown argument {flag}{checks.nearest(flag, known)}")
        bindings.append(f"{match[1]}={match[2]}")
    _log_to_stderr()
    given = (arguments, bindings) if takes_gin else (arguments,)
    # Late, as everything that takes a while and --help does not need.
    from sbs_jax import hosts
    from sbs_jax.hosts import preemption
    from sbs_jax.training.gin_files import UsageError

    try:
        _refuse_urls(commands[arguments.command], arguments)
        if takes_gin:
            arguments.gin_file = [_local_gin_file(file) for file in arguments.gin_file]
        if hasattr(arguments, "multihost"):
            _join(arguments)
        if files := getattr(arguments, "module", ()):
            from sbs_jax.data import dataset_module

            loaded = [dataset_module.load(file) for file in files]
            hosts.agree({"modules": " ".join(module.digest for module in loaded)})
        if arguments.check is not None:
            arguments.check(*given)
        if arguments.tensorflow:
            import_tensorflow()
        status = arguments.run(*given)
        sys.stdout.flush()  # here, where errors are still reported
        hosts.leave()
        return status
    except preemption.PreemptedError as error:
        if hosts.is_first():
            print(f"sbs {arguments.command}: {error}", file=sys.stderr)
        return preemption.EXIT_STATUS
    except (UsageError, hosts.HostsError, ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            _fail_others("The reader of its output is gone.", show=False)
            raise
        _fail_others(str(error), show=arguments.traceback)
        if arguments.traceback:
            raise
        print(f"sbs {arguments.command}: {error}", file=sys.stderr)
        return 1
    except BaseException as error:
        _fail_others(f"{type(error).__name__}: {error}", show=True)
        raise


def parsed(
    parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser], words: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line; returns the arguments and the words that no flag or positional takes."""
    arguments, rest = parser.parse_known_args(words)
    if hasattr(arguments, "runs"):
        rest = runs.take(commands[arguments.command], arguments, rest)
    return arguments, rest


def _named(words: Sequence[str]) -> tuple[str, ...]:
    """Returns the command that a command line names; ends with status 2 for one that does not exist."""
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:
        return ()
    if name not in SUMMARIES:
        _parser(())[0].error(f"unknown command {name!r}.{checks.nearest(name, SUMMARIES) or ' See sbs --help.'}")
    return (name,)


def _refuse_urls(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuses flags that name a file of object storage; `gin_files` does so for configurations."""
    for action in parser._actions:
        value = getattr(arguments, action.dest, None)
        name = (action.option_strings or str(action.metavar).split())[0]
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and action.dest != "base_url":
                for part in re.split("[=,]", each):  # NAME=DIR, DIR,DIR
                    checks.local_path(str(name), part, or_bucket=action.dest in checks.ON_BUCKETS)


def _local_gin_file(file: str) -> str:
    """Returns the path of a gin file, or of a copy of one in a bucket."""
    from sbs_jax.storage import places

    return str(places.fetched(places.of(file))) if places.in_bucket(file) else file


def _fail_others(text: str, *, show: bool) -> None:
    """Ends all processes of a multi-process run; returns if this one is alone."""
    from sbs_jax import hosts

    if hosts.describe():
        if show:
            import traceback

            traceback.print_exc()
        hosts.fail(text)


def _join(arguments: argparse.Namespace) -> None:
    """Joins the other processes if the flags name any."""
    from sbs_jax import hosts
    from sbs_jax.training.gin_files import UsageError

    given = {
        name: getattr(arguments, name)
        for name in ("coordinator_address", "process_count", "process_index")
        if getattr(arguments, name) is not None
    }
    if arguments.multihost and given:
        raise UsageError(f"--multihost detects --{', --'.join(given)}; give either it or those flags.")
    if not given and not arguments.multihost:
        if arguments.launch_id:
            raise UsageError(
                f"--launch_id is {arguments.launch_id} without other processes; give --multihost, or "
                "--coordinator_address, --process_count and --process_index, too."
            )
        hosts.check_alone()
        return
    if not arguments.multihost and len(given) < 3:
        raise UsageError(
            f"got --{', --'.join(given)} alone; give --coordinator_address, --process_count and --process_index "
            "together."
        )
    if arguments.join_timeout <= 0:
        raise UsageError(f"--join_timeout is {arguments.join_timeout:g}; expected seconds above 0.")
    if arguments.multihost:
        place = hosts.detect(timeout=arguments.join_timeout)
    else:
        place = hosts.Place(
            coordinator=arguments.coordinator_address, count=arguments.process_count, index=arguments.process_index
        )
    if arguments.launch_id:
        place = dataclasses.replace(place, launch=arguments.launch_id)
    hosts.join(place, timeout=arguments.join_timeout, detected=arguments.multihost)
    if not hosts.is_first():
        import logging

        logging.getLogger("sbs_jax").setLevel(logging.ERROR)


def _log_to_stderr() -> None:
    """Shows only this project's messages; gin logs to the root logger, which stays silent."""
    import logging

    logging.getLogger().addHandler(logging.NullHandler())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("sbs_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


def import_tensorflow() -> None:
    """Imports TensorFlow, hides the GPUs from it (JAX uses them) and drops its messages, which no setting mutes.

    If the import crashes the process, the Python stack is printed.
    """
    import faulthandler
    import tempfile

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr, told = os.dup(2), faulthandler.is_enabled()
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            faulthandler.enable(stderr)
            import tensorflow as tf
            import tensorflow_text  # noqa: F401  (registers its operations)

            tf.config.set_visible_devices([], "GPU")
        except BaseException:
            output.seek(0)
            os.write(stderr, output.read())
            raise
        finally:
            os.dup2(stderr, 2)
            faulthandler.enable(2) if told else faulthandler.disable()
            os.close(stderr)
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)  # SeqIO and Orbax log a lot through it


class _Parser(argparse.ArgumentParser):
    """A command's parser; `more` is called for the end of its help."""

    more: Callable[[], str] | None = None

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.more()}" if self.more is not None else "")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one, and runs (runs.py) as positionals."""

    def _format_args(self, action: argparse.Action, default_metavar: str | None) -> str:
        if action.nargs == "*" and not action.option_strings:
            metavar = str(action.metavar)
            return metavar if metavar != "RUNS" else "RUNS .."
        return super()._format_args(action, default_metavar)  # pyright: ignore[reportArgumentType]  # None in add_argument

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.help or ""
        if "(default" in shown or action.default is None or action.default is False or not str(action.default):
            return shown
        if isinstance(action.default, list):
            words = " ".join(map(str, action.default))
            return f"{shown} (default: {words})" if words else shown
        return shown if action.default == argparse.SUPPRESS else f"{shown} (default: %(default)s)"


def _parser(
    names: Sequence[str] = tuple(SUMMARIES),
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Makes the parser of `sbs`, and those of the commands `names` by name; the others are only listed."""
    parser = argparse.ArgumentParser(
        prog="sbs",
        usage="sbs COMMAND [FLAGS]",
        description="Distilling step-by-step: train a small T5 on the labels and rationales of a large model.",
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(
        parser_class=_Parser, dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(
        name: str,
        run: Callable[..., int],
        *,
        check: Callable[..., None] | None = None,
        gin: bool = False,
        multihost: bool = False,
        module: bool = True,
        tensorflow: bool = True,
        epilog: str = "",
        more: Callable[[], str] | None = None,
    ) -> argparse.ArgumentParser:
        """Makes a command's parser.

        `run` and `check` get the arguments, with `gin` also the bindings. `check` raises what is wrong with them, as
        far as that can be told within a second. `module` adds --module, which is imported before it; `tensorflow`
        imports TensorFlow after it. `more` makes text below the epilog, only when help is asked for.
        """
        sub = subparsers.add_parser(
            name,
            prog=f"sbs {name}",
            description=SUMMARIES[name],
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        sub.more = more
        sub.add_argument("--traceback", action="store_true", help="print the traceback of an error")
        if gin:
            sub.add_argument(
                "--gin_file",
                action="append",
                default=[],
                metavar="FILE",
                help="gin file; repeatable, later files override earlier ones",
            )
            sub.add_argument(
                "--gin_search_paths", default="", metavar="DIRS", help="comma-separated folders to search for gin files"
            )
            sub.add_argument("--gin.NAME=VALUE", dest="_", metavar="", help="override a macro or parameter; repeatable")
        if module:
            sub.add_argument(
                "--module",
                action="append",
                default=[],
                metavar="FILE",
                help="Python file that defines the DATASET, as tasks/*.py do; repeatable",
            )
        if multihost:
            _add_multihost(sub)
        sub.set_defaults(run=run, check=check, tensorflow=tensorflow)
        commands[name] = sub
        return sub

    for name in names:
        importlib.import_module(f"sbs_jax.cli.commands.{name}").add(command)
    return parser, commands


def _overview() -> str:
    """Lists the commands by workflow, for --help."""
    import textwrap

    lines = []
    for group, commands in WORKFLOW.items():
        lines.append(f"{group}:")
        for name, summary in commands.items():
            first, *rest = textwrap.wrap(summary, 92)
            lines += [f"  {name:14}{first}", *(f"{'':16}{line}" for line in rest)]
        lines.append("")
    return "\n".join(lines) + (
        "\nsbs COMMAND --help lists a command's flags. Ready configurations: gin_configs/experiments/."
    )


def _add_multihost(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group(
        "several processes",
        "One process per host, all with the same command; process 0 writes the files (predict: each its shard). All "
        "must share the folders.",
    )
    group.add_argument(
        "--multihost", action="store_true", help="join the processes that Cloud TPU, GKE, Slurm or Open MPI started"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="without --multihost: address of process 0")
    group.add_argument("--process_count", type=int, metavar="N", help="without --multihost: number of processes")
    group.add_argument("--process_index", type=int, metavar="I", help="without --multihost: index of this one, from 0")
    group.add_argument(
        "--launch_id",
        default="",
        metavar="ID",
        help="the same on all processes, another for each launch: processes of other launches are turned away "
        "(default: with --multihost, Slurm's job and its number of requeues)",
    )
    group.add_argument(
        "--join_timeout", type=float, default=300.0, metavar="SECONDS", help="how long to wait for the other processes"
    )


if __name__ == "__main__":
    sys.exit(main())
