"""Datasets and SeqIO tasks of a user's own Python file, which `--module my_task.py` names.

The file defines DATASET, or DATASETS, as a file of `tasks/` does, or registers tasks and mixtures in SeqIO
(outside.py). It is code that the user asks to run; a manifest only names it, so that no run directory can have code
imported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from sbs_jax.checks import nearest
from sbs_jax.data import catalogue
from sbs_jax.data.dataset import KINDS, Dataset
from sbs_jax.storage.checksums import file_sha256


@dataclasses.dataclass(frozen=True)
class Module:
    """A file that has run: its hash, the datasets that it defines, and what it registered in SeqIO."""

    sha256: str
    datasets: tuple[Dataset, ...]
    tasks: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Names all of it with the hash of the file, for processes to compare."""
        return f"{','.join([*(dataset.name for dataset in self.datasets), *self.tasks])}={self.sha256}"


_loaded: dict[tuple[Path, str], Module] = {}


def load(path: str | Path) -> Module:
    """Runs a Python file and registers its datasets, once per contents; the file's folder can be imported from.

    FileNotFoundError if there is no such file; ValueError if it fails, or has neither a dataset nor a SeqIO task.
    """
    path = Path(path)
    if not path.is_file():
        known = [each.name for each in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"--module is {str(path)!r}, where no file is; expected a Python file that defines DATASET."
            f"{nearest(path.name, known)}"
        )
    key = path.resolve(), file_sha256(path)
    if key not in _loaded:
        catalogue.registered()  # shipped datasets have their names first
        before = _in_seqio()
        module = _run(path)
        tasks = tuple(sorted(_in_seqio() - before))
        facts = {"file": path.name, "sha256": key[1]}
        found = tuple(dataclasses.replace(each, module=facts) for each in _datasets(module, path, tasks))
        catalogue.note_outside(dict.fromkeys(tasks, facts))
        _loaded[key] = Module(key[1], found, tasks)
        for dataset in found:
            try:
                catalogue.add(dataset)
            except ValueError as error:
                del _loaded[key]
                raise ValueError(f"{path}: {error}") from None
    return _loaded[key]


def _in_seqio() -> set[str]:
    """Returns the names of others in SeqIO's registries; without importing SeqIO, which takes seconds."""
    if (seqio := sys.modules.get("seqio")) is None:
        return set()
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    return names - {f"{dataset}_{kind}" for dataset in catalogue.names() for kind in KINDS}


def _run(path: Path) -> ModuleType:
    name = f"sbs_module_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--module is {str(path)!r}; expected a Python file, my_task.py.")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{path}{_line(error, path)}: {type(error).__name__}: {error}") from error
    return module


def _line(error: Exception, path: Path) -> str:
    """Returns ":3" for the last line of the file that led to the error."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    lines = [
        each.lineno
        for each in traceback.extract_tb(error.__traceback__)
        if Path(each.filename).resolve() == path.resolve()
    ]
    return f":{lines[-1]}" if lines else ""


def _datasets(module: ModuleType, path: Path, tasks: Sequence[str]) -> Sequence[Dataset]:
    found = [*getattr(module, "DATASETS", ())]
    if hasattr(module, "DATASET"):
        found.append(module.DATASET)
    wrong = [each for each in found if not isinstance(each, Dataset)]
    if wrong or not (found or tasks):
        got = f"a {type(wrong[0]).__name__} as one" if wrong else "no DATASET"
        raise ValueError(
            f"{path} defines {got}; expected DATASET = sbs_jax.data.dataset.Dataset(..), as in docs/howto/dataset.md, "
            "or tasks in SeqIO's registry, as in docs/howto/seqio.md."
        )
    return found
