"""The `sbs` command: parses flags, then calls the `run` of a module in `cli/commands/`.

Heavy imports are late, so `--help` answers at once.
"""

import argparse
import faulthandler
import importlib
import logging
import os
import re
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import absl.logging

from sbs_jax import checks, hosts
from sbs_jax.checks import nearest
from sbs_jax.hosts import preemption
from sbs_jax.training.gin_files import UsageError

_BINDING = re.compile(r"--gin\.([^=]+)=(.*)", re.DOTALL)
# The commands in the order of --help; each is a module of `cli/commands/`.
NAMES = (
    *("init", "records", "teach", "baseline", "vocabulary", "train", "sweep", "replay"),
    *("evaluate", "predict", "serve", "rationales", "convert"),
    *("report", "plan", "demo"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the console script and returns its exit status; 128 + SIGPIPE if the reader of its output is gone."""
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
        return 128 + signal.SIGPIPE


def _reader_is_gone() -> bool:
    """Tells whether standard output is a pipe whose other end is closed."""
    try:
        descriptor = sys.stdout.fileno()
    except ValueError:  # replaced by an object without a descriptor
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _main(argv: Sequence[str] | None) -> int:
    parser, commands = _parser()
    arguments, rest = parser.parse_known_args(argv)
    takes_gin = hasattr(arguments, "gin_file")
    bindings = []
    for flag in rest:
        match = _BINDING.fullmatch(flag)
        if not takes_gin or match is None:
            known = list(commands[arguments.command]._option_string_actions)
            commands[arguments.command].error(f"unknown argument {flag}{nearest(flag, known)}")
        bindings.append(f"{match[1]}={match[2]}")
    _log_to_stderr()
    try:
        _refuse_urls(commands[arguments.command], arguments)
        if hasattr(arguments, "multihost"):
            _join(arguments)
        import_tensorflow()
        # SeqIO and Orbax log a lot through absl.
        absl.logging.set_verbosity(absl.logging.ERROR)
        status = arguments.run(arguments, bindings) if takes_gin else arguments.run(arguments)
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


def _refuse_urls(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuses flags that name a file of object storage; `gin_files` does so for configurations."""
    for action in parser._actions:
        value = getattr(arguments, action.dest, None)
        name = (action.option_strings or [action.metavar])[0]
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and action.dest != "base_url":
                for part in re.split("[=,]", each):  # NAME=DIR, DIR,DIR
                    checks.local_path(str(name), part, or_bucket=action.dest in checks.ON_BUCKETS)


def _fail_others(text: str, *, show: bool) -> None:
    """Ends all processes of a multi-process run; returns if this one is alone."""
    if hosts.describe():
        if show:
            traceback.print_exc()
        hosts.fail(text)


def _join(arguments: argparse.Namespace) -> None:
    """Joins the other processes if the flags name any."""
    given = {
        name: getattr(arguments, name)
        for name in ("coordinator_address", "process_count", "process_index")
        if getattr(arguments, name) is not None
    }
    if arguments.multihost and given:
        raise UsageError(f"--multihost detects --{', --'.join(given)}; give either it or those flags.")
    if not given and not arguments.multihost:
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
    hosts.join(place, timeout=arguments.join_timeout, detected=arguments.multihost)
    if not hosts.is_first():
        logging.getLogger("sbs_jax").setLevel(logging.ERROR)


def _log_to_stderr() -> None:
    """Shows only this project's messages; gin logs to the root logger, which stays silent."""
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


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="sbs",
        description="Distilling step-by-step: train a small T5 on the labels and rationales of a large model.",
        epilog="sbs COMMAND --help lists a command's flags. Ready configurations: gin_configs/experiments/.",
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
        if multihost:
            _add_multihost(sub)
        sub.set_defaults(run=run)
        commands[name] = sub
        return sub

    for name in NAMES:
        importlib.import_module(f"sbs_jax.cli.commands.{name}").add(command)
    return parser, commands


def _add_multihost(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group(
        "several processes",
        "One process per host, all with the same command; process 0 writes the files. All must share the folders.",
    )
    group.add_argument(
        "--multihost", action="store_true", help="join the processes that Cloud TPU, GKE, Slurm or Open MPI started"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="without --multihost: address of process 0")
    group.add_argument("--process_count", type=int, metavar="N", help="without --multihost: number of processes")
    group.add_argument("--process_index", type=int, metavar="I", help="without --multihost: index of this one, from 0")
    group.add_argument(
        "--join_timeout", type=float, default=300.0, metavar="SECONDS", help="how long to wait for the other processes"
    )


if __name__ == "__main__":
    sys.exit(main())
