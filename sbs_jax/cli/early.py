"""Checks of a command's arguments that need neither TensorFlow nor JAX, for the `check` of commands.

Each raises what the command itself would raise seconds later, and returns what is cheap to have.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import socket
from collections.abc import Sequence

from sbs_jax.checks import nearest
from sbs_jax.data import catalogue, dataset_folder, grading, records
from sbs_jax.run import directory, manifest, trackers
from sbs_jax.storage import hub, places
from sbs_jax.training import gin_scan
from sbs_jax.training.gin_files import UsageError

# Packages in gin files that register no dataset of a user's; others may, when `configure` imports them.
_NO_DATASETS = {"__gin__", "flax", "jax", "optax", "sbs_jax", "tasks"}
_ROWS = 20  # of an input file: if all of these are wrong, the file is


def configuration(
    name: str, arguments: argparse.Namespace, bindings: Sequence[str], *, unread: Sequence[str] = ()
) -> gin_scan.Scan:
    """Checks gin files and bindings as far as names and literals go, and returns them."""
    if not arguments.gin_file:
        raise UsageError("no --gin_file given; the ready ones are under gin_configs/experiments/.")
    paths = [path for path in arguments.gin_search_paths.split(",") if path]
    found = gin_scan.scan(arguments.gin_file, bindings, paths)
    gin_scan.check(name, found, unread=unread)
    return found


def training(found: gin_scan.Scan) -> None:
    """Checks the trackers, dataset, records, vocabulary and first checkpoint that a training run names.

    A run that exists compares them itself, and says what has changed.
    """
    if isinstance(names := found.value("TRACKERS"), list | tuple):
        trackers.check(names)
        trackers.check_installed(names)
    given = found.value("DATASET")
    several = given if isinstance(given, list | tuple) else [given]
    names = [name for each in several if (name := dataset(found, each)) is not None]
    model_dir = found.value("MODEL_DIR")
    if isinstance(model_dir, str) and (places.of(model_dir) / directory.MANIFEST).is_file():
        return
    if isinstance(records_dir := found.value("RECORDS_DIR"), str):
        for name in names:
            records.check_exist(records_dir, name)
    if isinstance(path := found.value("VOCABULARY"), str) and path != "byte":
        weights(
            "VOCABULARY",
            path,
            "give the path of one (--gin.VOCABULARY), for example of T5's sentencepiece.model or of a tokenizer.json, "
            "or 'byte'",
        )
    if isinstance(path := found.value("INITIAL_CHECKPOINT_PATH"), str):
        weights("INITIAL_CHECKPOINT_PATH", path, "give the folder of a checkpoint (docs/checkpoints.md)")
    if isinstance(path := found.value("SOFT_TARGETS"), str):
        existing("SOFT_TARGETS", path, "write it with `sbs soft_targets`, or set it to None")
    if isinstance(path := found.value("TEACHER"), str):
        existing("TEACHER", path, "train it with `sbs train`, or set it to None")
    if isinstance(path := found.value("AUGMENTATION"), str):
        existing("AUGMENTATION", path, "write it with `sbs records --augmentation`, or set it to None")


def dataset(found: gin_scan.Scan, name: object) -> str | None:
    """Checks a dataset that gin files name, or its folder; returns its name, or None if it is no dataset of records.

    A name that a module of the gin files may register is left to the command.
    """
    if not isinstance(name, str) or name in ("", catalogue.CORPUS.name):
        return None
    if not found.imports - _NO_DATASETS or name in catalogue.names() or dataset_folder.is_folder(name):
        one = catalogue.get(name)
        grading.check_installed(one.metric_fns)
        return one.name
    return name


def sweeping(found: gin_scan.Scan) -> None:
    """Checks the datasets that a sweep names; only folders may leave their records to the experiment."""
    names = found.value("DATASETS")
    for name in names if isinstance(names, list | tuple) else ():
        checked = dataset(found, name)
        without = found.value("RECORDS_DIR") is None and found.value("EXPERIMENT") is None
        if checked is not None and without and not dataset_folder.is_folder(name):
            raise UsageError(f"RECORDS_DIR is missing, with the records of {name}; give it with --records_dir DIR.")


def existing(name: str, path: str, remedy: str) -> None:
    """Raises FileNotFoundError if a local path does not exist: the nearest name beside it, and a remedy.

    A path on a bucket is left to the command.
    """
    if "://" in path or places.of(path).exists():
        return
    folder = places.of(path).parent
    known = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    raise FileNotFoundError(f"{name} is {path!r}, where nothing is; {remedy}.{nearest(places.of(path).name, known)}")


def weights(name: str, path: str, remedy: str) -> None:
    """As `existing`, but a name of the Hugging Face Hub (owner/model) is left to a command that can ask the hub."""
    if hub.parse(path) is None:
        existing(name, path, remedy)
    hub.check_installed(path, owner=name)


def run(path: str, *, dataset: str | None = None, whole: bool = False) -> None:
    """Checks that a path is a run with a checkpoint, or one of its checkpoints, and that its datasets are known.

    Of a student of several, `dataset` must choose one, unless the `whole` student is meant.
    """
    directory.check_has_checkpoint(path)
    place = places.of(path).absolute()
    place = place if directory.step_of(place) is None else place.parent.parent
    if (place / directory.MANIFEST).is_file():
        found = directory.read_manifest(place)
        catalogue.restore_from(found["data"], where=f"{path}, its manifest")
        several = manifest.parts(found)
        if several and dataset is None and not whole:
            raise UsageError(f"{path} was trained on {', '.join(several)}; choose the one to answer for by --dataset.")
        manifest.one(found, dataset, where=path)


def rows(path: str) -> None:
    """Checks an input file of `sbs predict`: its form, its columns, and that not all of its first rows are wrong."""
    from sbs_jax.prediction import inputs

    existing("--input", path, "give a file of questions (docs/prediction.md)")
    first = list(itertools.islice(inputs.read(path), _ROWS))
    if first and all(entry.error is not None for entry in first):
        raise ValueError(
            f"{path}:{first[0].line}: {first[0].error} None of the first rows can be read; expected rows such as "
            '{"id": "1", "input": "How many .."}, or a table with the columns id and input.'
        )


def port(host: str, number: int) -> None:
    """Raises OSError if another process listens on the port; 0 is always free."""
    if not 0 <= number <= 65535:
        raise UsageError(f"--port is {number}; expected 0 to 65535.")
    if number == 0:
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"--host is {host!r}, which is no address of this machine ({error.strerror}).") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"port {number} of {host} is in use, perhaps by another `sbs serve`; end that, or give another "
                    "--port (0: any free one)."
                ) from None
            raise UsageError(f"cannot listen on port {number} of {host}: {error.strerror}.") from None
