"""The `sbs` command: read flags, then call one top-level function (`sbs_jax/commands/`).

Heavy imports wait until they are needed, so `--help` answers at once.
"""

import argparse
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

from sbs_jax import hosts
from sbs_jax.checks import nearest
from sbs_jax.hosts import preemption
from sbs_jax.training.gin_files import UsageError

_BINDING = re.compile(r"--gin\.([^=]+)=(.*)", re.DOTALL)
# The commands, in the order of --help: a module of `sbs_jax/commands/` each.
NAMES = (
    *("records", "teach", "train", "sweep", "replay"),
    *("evaluate", "predict", "serve", "rationales", "convert"),
    *("report", "plan", "demo"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of the console script; returns the exit status: that of SIGPIPE where nobody reads what it prints."""
    try:
        try:
            return _main(argv)
        except SystemExit:  # --help and errors of flags
            sys.stdout.flush()
            raise
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is not tried again
        return 128 + signal.SIGPIPE


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    try:
        descriptor = sys.stdout.fileno()
    except ValueError:  # a stand-in of another program's
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
        if hasattr(arguments, "multihost"):
            _join(arguments)
        import_tensorflow()
        # SeqIO and Orbax log through absl, at length.
        absl.logging.set_verbosity(absl.logging.ERROR)
        status = arguments.run(arguments, bindings) if takes_gin else arguments.run(arguments)
        sys.stdout.flush()  # here, where what goes wrong is said
        hosts.leave()
        return status
    except preemption.PreemptedError as told:
        if hosts.is_first():
            print(f"sbs {arguments.command}: {told}", file=sys.stderr)
        return preemption.EXIT_STATUS
    except (UsageError, hosts.HostsError, ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            _tell_others("Nobody reads what it prints.", show=False)
            raise
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

    for name in NAMES:
        importlib.import_module(f"sbs_jax.cli.commands.{name}").add(command)
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


if __name__ == "__main__":
    sys.exit(main())
