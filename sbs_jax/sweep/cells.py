"""Cells of a sweep, each a run of `sbs train`, and the checks before the first one starts."""

import dataclasses
import hashlib
import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import checks
from sbs_jax.checks import nearest
from sbs_jax.data import dataset_folder
from sbs_jax.storage import places
from sbs_jax.training import gin_files
from sbs_jax.training.gin_files import UsageError

_ROOT = Path(__file__).parents[2]  # holds gin_configs/
_EXPERIMENT = "gin_configs/experiments/{dataset}/{size}.gin"
_OWN = ("MODEL_DIR", "RECORDS_DIR", "FRACTION", "SEED", "FOLDS", "FOLD")  # macros set by the sweep itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    dataset: str
    size: str
    method: str
    axes: Mapping[str, Any]
    fraction: float
    seed: int
    gin_files: tuple[str, ...]
    bindings: tuple[str, ...]  # without MODEL_DIR, FRACTION, SEED, FOLDS and FOLD
    sweep_dir: Path
    folds: int = 0
    fold: int = 0
    search_paths: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Returns "svamp-base-step_by_step-0.25-0"; free axes ("ALPHA=0.3") come before the fraction, "fold2" last."""
        return self.named(self.seed)

    def named(self, seed: int | str) -> str:
        """Returns the name with another text in the place of the seed."""
        axes = [f"{macro}={str(value).replace('/', '_')}" for macro, value in self.axes.items()]
        parts = [self.dataset, self.size, Path(self.method).stem, *axes, f"{self.fraction:g}", str(seed)]
        parts += [f"fold{self.fold}"] if self.folds else []
        return "-".join(parts)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Identifies all that a cell is but fraction, seed and fold."""
        return self.dataset, self.size, self.method, repr(self.axes)

    @property
    def model_dir(self) -> Path:
        return self.sweep_dir / "runs" / self.name

    @property
    def log(self) -> Path:
        """The file its process writes to; of a sweep in a bucket in the user's cache, because objects cannot grow."""
        if not places.in_bucket(self.sweep_dir):
            return self.sweep_dir / "logs" / f"{self.name}.log"
        folder = hashlib.sha256(str(self.sweep_dir).encode()).hexdigest()[:16]
        return places.user_cache() / "logs" / folder / f"{self.name}.log"

    def all_bindings(self) -> list[str]:
        axes = [binding(macro, value) for macro, value in self.axes.items()]
        own = {"MODEL_DIR": str(self.model_dir), "FRACTION": self.fraction, "SEED": self.seed}
        own |= {"FOLDS": self.folds, "FOLD": self.fold} if self.folds else {}
        return [*self.bindings, *axes, *(binding(macro, value) for macro, value in own.items())]

    def arguments(self) -> list[str]:
        """Returns the arguments of `sbs`."""
        paths = [f"--gin_search_paths={','.join(self.search_paths)}"] if self.search_paths else []
        files = [f"--gin_file={file}" for file in self.gin_files]
        files += [f"--module={file}" for file in self.modules]
        return ["train", *paths, *files, *(f"--gin.{each}" for each in self.all_bindings())]

    def command(self) -> str:
        """Returns the command as a line for a shell."""
        return shlex.join(["sbs", *self.arguments()])

    def configured(self) -> tuple[Any, str]:
        """Returns its train.TrainConfig and the text its run keeps. UsageError if it cannot be configured."""
        try:
            return gin_files.configure(
                "train.TrainConfig",
                gin_files=self.gin_files,
                bindings=self.all_bindings(),
                search_paths=self.search_paths,
            )
        except UsageError as error:
            raise UsageError(f"The cell {self.name} cannot be configured: {error}") from error


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells that differ only in seed, trained one after the other by one process that compiles once."""

    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """Returns "svamp-base-step_by_step-0.25-0,1,2"."""
        return self.cells[0].named(self._seeds)

    @property
    def log(self) -> Path:
        return self.cells[0].log.with_name(f"{self.name}.log")

    def arguments(self) -> list[str]:
        """Returns the arguments of `sbs`."""
        first = self.cells[0]
        if len(self.cells) == 1:
            return first.arguments()
        own = ("--gin.SEED=", "--gin.MODEL_DIR=")
        folder = binding("MODEL_DIR", str(first.model_dir.with_name(first.named("{seed}"))))
        found = [argument for argument in first.arguments() if not argument.startswith(own)]
        return [*found, f"--gin.{folder}", f"--seeds={self._seeds}"]

    @property
    def _seeds(self) -> str:
        return ",".join(str(cell.seed) for cell in self.cells)


def groups(cells: Sequence[Cell], *, jobs: int, together: int | None) -> list[Group]:
    """Groups cells that differ only in seed, at most `together` in one; None shares those of a kind among the jobs.

    Seeds in one process share compiled programs, but only one of them trains at a time.
    """
    kinds: dict[Any, list[Cell]] = {}
    for cell in cells:
        kinds.setdefault((*cell.kind, cell.fraction, cell.fold), []).append(cell)
    found = []
    for same in kinds.values():
        most = together or -(-len(same) // jobs)
        found += [Group(tuple(same[start : start + most])) for start in range(0, len(same), most)]
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """All combinations of its lists; bound by `gin_configs/runs/sweep.gin`.

    Attributes:
      sweep_dir: folder for runs/<cell>, logs/<cell>.log and the report, index.html.
      records_dir: folder with the records of all datasets; None keeps the experiment's, as a folder's has its own.
      datasets: dataset names, or folders with a dataset.json (data/dataset_folder.py).
      sizes: experiment names of each dataset: "base", "large".
      methods: names in gin_configs/methods/, or paths ending in .gin.
      fractions: shares of the training rows, in (0, 1]; or a list per dataset.
      seeds: seeds of the row subset, the parameters, the order and the dropout.
      folds: parts of a cross-validation, each a run of its own; 0 for the files' own splits.
      axes: other macros with their values; they become part of a cell's name.
      experiment: gin file of a cell, with {dataset} and {size}; None is gin_configs/experiments/{dataset}/{size}.gin,
        or {size}.gin of a dataset's folder.
      initial_checkpoint_path, vocabulary: for every cell, with {dataset} (the name) and {size}; None keeps the
        experiment's.
      gin_files: included after the experiment and the method.
      bindings: macros of every cell. Texts may hold {dataset} and {size}; a leading @ or % makes a gin reference.
    """

    sweep_dir: str
    records_dir: str | None = None
    datasets: Sequence[str]
    sizes: Sequence[str]
    methods: Sequence[str]
    fractions: Sequence[float] | Mapping[str, Sequence[float]]
    seeds: Sequence[int]
    folds: int = 0
    experiment: str | None = None
    axes: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    initial_checkpoint_path: str | None = None
    vocabulary: str | None = None
    gin_files: Sequence[str] = ()
    bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    search_paths: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lists = {"datasets": self.datasets, "sizes": self.sizes, "methods": self.methods, "seeds": self.seeds}
        lists |= {f"axes[{macro!r}]": values for macro, values in self.axes.items()}
        by_dataset = (
            self.fractions if isinstance(self.fractions, Mapping) else dict.fromkeys(self.datasets, self.fractions)
        )
        lists |= {f"fractions[{dataset!r}]": values for dataset, values in by_dataset.items()}
        for name, values in lists.items():
            _check_list(f"Sweep.{name}", values)
        for dataset in self.datasets:
            if dataset not in by_dataset:
                raise ValueError(
                    f"Sweep.fractions has none for {dataset!r}; it names {', '.join(map(repr, by_dataset))}."
                )
        for dataset, fractions in by_dataset.items():
            if dataset not in self.datasets:
                near = nearest(dataset, self.datasets)
                raise ValueError(f"Sweep.fractions names {dataset!r}, which is not among datasets.{near}")
            for fraction in fractions:
                checks.number("A fraction of Sweep.fractions", fraction, above=0, most=1)
        for seed in self.seeds:
            checks.whole_number("A seed of Sweep.seeds", seed)
        checks.whole_number("Sweep.folds", self.folds)
        if self.folds == 1:
            raise ValueError("Sweep.folds is 1, which leaves no rows to train on; expected 0 or at least 2.")
        for macro in (*self.axes, *self.bindings):
            if macro in _OWN:
                raise ValueError(f"A sweep sets {macro} itself, by its own lists; leave it out of axes and bindings.")
            if macro in self.axes and macro in self.bindings:
                raise ValueError(f"{macro} is among axes and among bindings; keep one.")

    def cells(self) -> list[Cell]:
        """Lists all cells by dataset, size, fraction (large first), seed, method and fold; comparable are adjacent.

        ValueError with near matches if the gin file of an experiment or a method is missing.
        """
        found = []
        names = [dataset_folder.name_of(dataset) for dataset in self.datasets]
        _check_list("The names of Sweep.datasets", names)
        for (given, dataset), size in itertools.product(zip(self.datasets, names, strict=True), self.sizes):
            fractions = self.fractions[given] if isinstance(self.fractions, Mapping) else self.fractions
            usual = "{dataset}/{size}.gin" if dataset_folder.is_folder(given) else _EXPERIMENT
            experiment = self._file((self.experiment or usual).format(dataset=given, size=size), f"{dataset}, {size}")
            for fraction, seed, method, values, fold in itertools.product(
                *(sorted(fractions, reverse=True), self.seeds, self.methods, itertools.product(*self.axes.values())),
                range(max(1, self.folds)),
            ):
                found.append(
                    Cell(
                        dataset=dataset,
                        size=size,
                        method=method,
                        axes=dict(zip(self.axes, values, strict=True)),
                        fraction=float(fraction),
                        seed=seed,
                        folds=self.folds,
                        fold=fold,
                        gin_files=(experiment, self._method_file(method), *self.gin_files),
                        bindings=self._bindings(dataset, size),
                        sweep_dir=places.of(self.sweep_dir),
                        search_paths=self.search_paths,
                        modules=self.modules,
                    )
                )
        return found

    def _bindings(self, dataset: str, size: str) -> tuple[str, ...]:
        given = {"INITIAL_CHECKPOINT_PATH": self.initial_checkpoint_path, "VOCABULARY": self.vocabulary}
        values = {name: value for name, value in given.items() if value is not None} | dict(self.bindings)
        found = [] if self.records_dir is None else [binding("RECORDS_DIR", self.records_dir)]
        for macro, value in values.items():
            if isinstance(value, str):
                value = value.replace("{dataset}", dataset).replace("{size}", size)
            found.append(binding(macro, value))
        return tuple(found)

    def _method_file(self, method: str) -> str:
        return self._file(
            method if method.endswith(".gin") else f"gin_configs/methods/{method}.gin", f"method {method}"
        )

    def _file(self, file: str, what: str) -> str:
        tried = [Path(file), *(Path(path) / file for path in self.search_paths), _ROOT / file]
        if any(place.is_file() for place in tried):
            return file
        around = {
            str(found.relative_to(_ROOT))
            for folder in (_ROOT / file).parents[:2]
            if folder.is_relative_to(_ROOT / "gin_configs")
            for found in folder.glob("*/*.gin" if folder != (_ROOT / file).parent else "*.gin")
        }
        raise ValueError(f"There is no gin file {file} ({what}).{nearest(file, around)}")


def searching(sweep: Sweep, paths: str, *, modules: Sequence[str] = ()) -> Sweep:
    """Returns the sweep with --gin_search_paths and --module, which its cells need too."""
    return dataclasses.replace(
        sweep, search_paths=tuple(path for path in paths.split(",") if path), modules=tuple(modules)
    )


def binding(macro: str, value: Any) -> str:
    """Returns `NAME=value` for `sbs train`; texts are quoted unless they are gin references."""
    return f"{macro}={value if isinstance(value, str) and value.startswith(('@', '%')) else repr(value)}"


def _check_list(name: str, values: Any) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{name} is {values!r}; expected a tuple of one or more values, such as (0, 1).")
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise ValueError(f"{name} has {twice[0]!r} twice; a cell is trained once.")


# ------------------------------------------------------------------------------- before the first


def check_configurations(cells: Sequence[Cell]) -> list[tuple[Cell, Any]]:
    """Configures one cell per kind (all but fraction, seed and fold) and returns these with their train.TrainConfig.

    ValueError if a cell cannot be configured, trains on another dataset, grades nothing on test, or equals another
    cell under a second name.
    """
    from sbs_jax.data import task_names

    kinds: dict[Any, Cell] = {}
    for cell in cells:
        kinds.setdefault(cell.kind, cell)
    found, seen = [], {}
    for cell in kinds.values():
        config, text = cell.configured()
        names = task_names.datasets(config.mixture_or_task_name)
        if len(names) == 1 and names[0] != cell.dataset:
            raise ValueError(
                f"The cell {cell.name} trains on {names[0]}: {cell.gin_files[0]} is not about {cell.dataset}."
            )
        if not config.evaluate_test:
            raise ValueError(f"The cell {cell.name} has evaluate_test = False; a table needs test metrics.")
        lines = (line for line in text.splitlines() if line and not line.startswith(("#", "MODEL_DIR")))
        meaning = "\n".join(lines)
        if meaning in seen:
            raise ValueError(f"The cells {seen[meaning]} and {cell.name} are the same run; leave one of them out.")
        seen[meaning] = cell.name
        found.append((cell, config))
    return found


def check_inputs(kinds: Sequence[tuple[Cell, Any]]) -> None:
    """Checks that records, vocabulary and checkpoint of every kind of cell exist. Reads no row, computes nothing."""
    from sbs_jax.data import registry, selection, task_names, tokens
    from sbs_jax.weights import opening

    for cell, config in kinds:
        registry.configure(config.data)
        for dataset in task_names.datasets(config.mixture_or_task_name):
            splits = registry.available_splits(dataset)
            missing = [name for name in (selection.TRAIN, selection.VALIDATION, selection.TEST) if name not in splits]
            if missing:
                raise ValueError(
                    f"The cell {cell.name} needs {' and '.join(missing)} rows of {dataset}, which "
                    f"{config.data.records_dir} does not give (train_split is {config.data.train_split!r}). Write them "
                    "with `sbs records`, or leave the dataset out."
                )
        tokens.check_vocabulary(config.data.vocabulary)
        start = config.initial_checkpoint_path
        if start is not None and "://" not in start and not Path(opening.located(start)).exists():
            raise FileNotFoundError(f"The cell {cell.name} starts from the checkpoint {start}, which does not exist.")
