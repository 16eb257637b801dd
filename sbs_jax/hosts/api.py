"""Functions for other modules; without `join`, each acts for a single process."""

import dataclasses
import difflib
import hashlib
import importlib.metadata
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax.hosts import slices
from sbs_jax.hosts.link import Link
from sbs_jax.hosts.roll import HostsError, Place, answer_roll, call_roll

# Packages whose version changes numbers or files, so it must be the same on all processes.
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow", "tensorflow-text", "numpy")
_DIFF_LINES = 40

_place: Place | None = None  # set by `join`
_link: Link | None = None  # open from `join` to `leave`
_preempted = threading.Event()  # used by a single process


# ------------------------------------------------------------------------------- joining, ending


def detect(*, timeout: float) -> Place:
    """Reads this process's place from Cloud TPU, GKE, Slurm or Open MPI. HostsError outside of them.

    The launch is Slurm's job and its number of requeues; the others have no id that changes with a restart.
    """
    from jax._src import clusters  # used by jax.distributed.initialize; JAX has no public API for it

    slices.check()
    try:
        coordinator, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout)
        )
    except RuntimeError as error:  # no address for the coordinator's name, or no metadata
        raise HostsError(
            f"--multihost cannot tell this process's place: {error}.{slices.hint(slices.claimed())}"
        ) from error
    if coordinator is None or count is None or index is None:
        raise HostsError(
            "--multihost found no Cloud TPU, GKE, Slurm or Open MPI environment. Give --coordinator_address HOST:PORT, "
            "--process_count N and --process_index I instead."
        )
    job, requeued = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")
    return Place(coordinator=coordinator, count=count, index=index, launch=job and f"{job}.{requeued}")


def join(place: Place, *, timeout: float, detected: bool) -> None:
    """Waits for all processes, starts `jax.distributed`, and compares code, versions and device counts.

    Call it before any device is used. `detected` also leaves the choice of local devices to JAX. Raises HostsError on
    every process that joined; it names the processes missing after `timeout` seconds, or the differences. Processes of
    another launch are turned away.
    """
    global _place, _link
    if _place is not None:
        raise HostsError("This process has joined already.")
    slices.check(place.count)
    if place.count == 1:
        return
    _place = place = dataclasses.replace(place, claims=slices.claimed())
    deadline = time.monotonic() + timeout
    wires = call_roll(place, timeout, deadline) if place.index == 0 else {0: answer_roll(place, timeout, deadline)}
    _link = Link(place, wires)
    agree({"code": source_digests(), "versions": _versions()})

    import jax

    _keep_stdout_clean()
    # JAX's SIGTERM handler would swallow the second signal, which has to end the process at once (preemption.py).
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=place.coordinator,
        num_processes=place.count,
        process_id=place.index,
        initialization_timeout=max(10, int(timeout)),
        cluster_detection_method=None if detected else "deactivate",
    )
    agree({"devices": f"{jax.local_device_count()} local {jax.local_devices()[0].device_kind}"})


def check_alone() -> None:
    """Raises ValueError if the environment claims several slices, for which libtpu would wait."""
    slices.check(1)


def leave() -> None:
    """Waits for every process, so a normal exit is not mistaken for a crash."""
    global _link
    if _link is not None:
        _link.leave()
        _link = None


def fail(text: str) -> None:
    """Ends every process with this error text; returns only if this process is alone.

    A process whose peers wait in a collective cannot exit in an orderly way. If another process failed first, its text
    is printed instead.
    """
    if _link is not None:
        _link.fail(text)


def is_first() -> bool:
    """Tells whether this process writes the run's files and talks to the user."""
    return _place is None or _place.index == 0


def has_peers() -> bool:
    """Tells whether other processes depend on this one."""
    return _link is not None


def numbered() -> tuple[int, int]:
    """Returns the index of this process and the number of processes: (0, 1) for a single one."""
    return (0, 1) if _place is None else (_place.index, _place.count)


def describe() -> str:
    """Returns "process 1 of 4" for messages, or "" for a single process."""
    return "" if _place is None else f"process {_place.index} of {_place.count}"


# ---------------------------------------------------------------------------- deciding together


def barrier() -> None:
    """Returns once every process has called it."""
    if _link is not None:
        _link.consult(None, lambda values: None)


def from_first(compute: Callable[[], Any]) -> Any:
    """Calls `compute` on process 0 alone and returns its result (JSON values) on every process."""
    if _link is None:
        return compute()
    return _link.from_first(compute)


def from_all(value: Any) -> list[Any]:
    """Returns every process's value (JSON), in process order, on every process."""
    return [value] if _link is None else _link.consult(value, list)


def agree(things: Mapping[str, str]) -> None:
    """Compares named texts across processes; if any differ, raises HostsError with the differences on all of them."""
    global _link
    if _link is not None:
        differences = _link.consult(dict(things), _differences, ends=bool)
        if differences:
            _link = None  # all processes raise this error, so none has to be notified
            raise HostsError(f"The processes do not run the same thing.\n{differences}")


def _differences(values: Sequence[Mapping[str, str]]) -> str:
    """Lists which processes differ from process 0, and in what; "" if none does."""
    found = []
    for name, reference in values[0].items():
        others: dict[str, list[int]] = {}
        for index, value in enumerate(values):
            if value.get(name) != reference:
                others.setdefault(value.get(name, ""), []).append(index)
        for text, indices in others.items():
            many = len(indices) > 1
            who = f"process{'es' if many else ''} {', '.join(map(str, indices))}"
            diff = difflib.unified_diff(reference.splitlines(), text.splitlines(), "process 0", who, lineterm="", n=0)
            lines = [line for line in diff if not line.startswith("@@")]
            more = [f"({len(lines) - _DIFF_LINES} more lines)"] if len(lines) > _DIFF_LINES else []
            found.append(
                "\n".join([f"{name}: {who} differ{'' if many else 's'} from process 0:", *lines[:_DIFF_LINES], *more])
            )
    return "\n".join(found)


def source_digests() -> str:
    """Hashes every file of the installed packages, one line each."""
    root = Path(__file__).parents[2]
    lines = []
    for package in ("sbs_jax", "tasks", "gin_configs"):
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                lines.append(f"{path.relative_to(root).as_posix()} {digest}")
    return "\n".join(lines)


def _versions() -> str:
    lines = [f"python {sys.version.split()[0]}"]
    return "\n".join([*lines, *(f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS)])


def _keep_stdout_clean() -> None:
    """Points file descriptor 1 at standard error, because Gloo prints there; `sys.stdout` keeps its target."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


# --------------------------------------------------------------------------- preemption, stalls


def request_preemption() -> None:
    """Makes `preemption_requested` return True, at the same call on every process."""
    if _link is None:
        _preempted.set()
    else:
        _link.request_preemption()


def preemption_requested() -> bool:
    """Tells whether any process was preempted.

    Every process must call this the same number of times (once per step), so that all stop together.
    """
    return _preempted.is_set() if _link is None else _link.preemption_requested()


def clear_preemption() -> None:
    """Clears an earlier request, for a new run in this process."""
    _preempted.clear()


def collect_activities(here: Callable[[], Mapping[str, Any]]) -> dict[int, Mapping[str, Any] | None]:
    """Asks each process for its current activity; None for one that does not answer within seconds.

    `here` reports this process's own. Only process 0 collects; elsewhere this asks process 0 to report, and returns
    this process's activity alone.
    """
    return {0: here()} if _link is None else _link.collect_activities(here)


def set_stall_handlers(here: Callable[[], Mapping[str, Any]] | None, report: Callable[[], None] | None) -> None:
    """Sets the function that describes this process's activity and, on process 0, the action when another stalls."""
    if _link is not None:
        _link.here, _link.report = here, report
