"""Planning of a run: candidates are compiled for absent TPUs and costed, and one is suggested."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sbs_jax import chips
from sbs_jax.data import registry, selection, task_names
from sbs_jax.plan import compiler, measured, worker
from sbs_jax.student import adapters, families, flops
from sbs_jax.training.config import TrainConfig

MESHES = (
    {"data": 1, "fsdp": -1, "tensor": 1},
    {"data": -1, "fsdp": 1, "tensor": 1},
    {"data": 1, "fsdp": -1, "tensor": 2},
    {"data": 1, "fsdp": -1, "tensor": 4},
)
MICRO_BATCHES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of `sbs plan`; see its --help."""

    topologies: tuple[chips.Topology, ...]
    steps: tuple[str, ...]
    search: bool
    max_compiles: int
    batch_size: int | None
    price: str  # "on_demand", "three_years", or USD per chip and hour
    examples: int | None  # per task and epoch
    examples_per_row: float | None
    run: str | None = None  # whose measured steps are shown beside the estimates

    def __post_init__(self) -> None:
        if self.price not in ("on_demand", "three_years"):
            try:
                valid = float(self.price) >= 0
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"Got the price {self.price!r}; expected on_demand, three_years, or USD, e.g. 1.2.")
        unknown = [step for step in self.steps if step not in worker.STEPS]
        if unknown or not self.steps:
            raise ValueError(f"Got the steps {list(self.steps)}; expected some of {', '.join(worker.STEPS)}.")


def plan(
    config: TrainConfig, options: Options, *, machine: compiler.Compiler, report: Callable[[str], None]
) -> dict[str, Any]:
    """Compiles and costs every candidate, as `sbs plan --json` prints it; `report` gets a line before each compile."""
    if options.batch_size is not None:
        config = dataclasses.replace(config, batch_size=options.batch_size)
    epoch = _epoch(config, options)
    beside = None if options.run is None else measured.read(options.run, config)  # refuses before a compile
    tried: list[dict[str, Any]] = []

    def attempt(topology: chips.Topology, mesh: dict[str, int], micro_batches: int) -> dict[str, Any]:
        candidate = worker.Candidate(
            topology=topology.name,
            slices=topology.slices,
            mesh=mesh,
            batch_size=config.batch_size,
            micro_batches=micro_batches,
            steps=options.steps,
        )
        report(f"compiling for {topology.title}, mesh {mesh_title(mesh)}, {micro_title(micro_batches)} ..")
        outcome = machine.measure(candidate)
        found = _costed(config, topology, candidate, outcome, epoch=epoch, price=options.price)
        tried.append(found)
        return found

    if options.search:
        _search(config, options, attempt=attempt, compiles=lambda: _compiles(tried))
    else:
        for topology in options.topologies:
            attempt(topology, _with_slices(config.layout.shape, topology), config.micro_batches)
    return {
        "libtpu": importlib.metadata.version("libtpu"),
        "jax": importlib.metadata.version("jax"),
        "estimates": "All times, utilisations and costs are estimates: the compiler's cycles, and bytes over link "
        "speeds. Nothing ran.",
        "configuration": _configuration(config),
        "epoch": epoch,
        "chips": {"date": chips.table()["date"], "sources": chips.table()["sources"], "price": options.price},
        "candidates": tried,
        "compiles": _compiles(tried),
        "suggestion": suggestion(tried),
        "measured": beside,
    }


def _configuration(config: TrainConfig) -> dict[str, Any]:
    parameters, trained = _parameters(config)
    return {
        "task": config.mixture_or_task_name,
        "parameters": parameters,
        "trained": trained,
        "tuning": None if config.tuning is None else adapters.title(config.tuning),
        "dtype": config.model.dtype,
        "batch_size": config.batch_size,
        "micro_batches": config.micro_batches,
        "inputs": config.task_feature_lengths["inputs"],
        "targets": config.task_feature_lengths["targets"],
        "eval_batch_size": config.eval_batch_size,
        "max_decode_length": config.max_decode_length,
        "train_steps": config.train_steps,
        "model_flops": _flops(config),
    }


def _parameters(config: TrainConfig) -> tuple[int, int]:
    """Counts the student's parameters without adapters, and those that are trained."""
    adapted = adapters.abstract(config.model, config.tuning)
    counts = [
        sum(math.prod(leaf.shape) for leaf in shapes.values())
        for shapes in (families.abstract(config.model)[1], adapted.split(adapted.shapes)[0])
    ]
    return counts[0], counts[1]


def _flops(config: TrainConfig) -> int:
    lengths, (parameters, trained) = config.task_feature_lengths, _parameters(config)
    return flops.training_flops(
        config.model,
        rows=config.batch_size,
        inputs=lengths["inputs"],
        targets=lengths["targets"],
        trained=trained / parameters,
    )


# ------------------------------------------------------------------------------------ search


def _with_slices(mesh: dict[str, int], topology: chips.Topology) -> dict[str, int]:
    """Returns the mesh, spread over all slices if there are several."""
    return mesh if topology.slices == 1 or mesh["slice"] != 1 else mesh | {"slice": topology.slices}


def _search(
    config: TrainConfig,
    options: Options,
    *,
    attempt: Callable[[chips.Topology, dict[str, int], int], dict[str, Any]],
    compiles: Callable[[], int],
) -> None:
    """Tries every mesh, with more micro-batches until it fits; then more micro-batches on each topology's fastest mesh.

    The topologies share the allowed compilations evenly; the second round uses what is left.
    """
    fastest: dict[int, dict[str, Any]] = {}
    for number, topology in enumerate(options.topologies):
        share = options.max_compiles * (number + 1) // len(options.topologies)
        for mesh in _meshes(config, topology):
            for micro_batches in MICRO_BATCHES:
                if compiles() >= share:
                    break
                one = attempt(topology, mesh, micro_batches)
                if "step_seconds" in one and one["fits"]:
                    fastest[number] = min(fastest.get(number, one), one, key=lambda found: found["step_seconds"])
                if one["fits"] or one["refused"] is not None:
                    break
    for number, best in fastest.items():
        more = [micro_batches for micro_batches in MICRO_BATCHES if micro_batches > best["micro_batches"]]
        for micro_batches in more:
            if compiles() >= options.max_compiles:
                return
            one = attempt(options.topologies[number], best["mesh"], micro_batches)
            if not one["fits"] or one.get("step_seconds", math.inf) > best["step_seconds"]:
                break
            best = one


def _meshes(config: TrainConfig, topology: chips.Topology) -> Iterator[dict[str, int]]:
    """Yields the configured mesh, then the usual ones, without repeating a division."""
    devices = topology.chips * topology.chip.devices
    seen = []
    for mesh in (_with_slices(config.layout.shape, topology), *({"slice": topology.slices} | m for m in MESHES)):
        try:
            sizes = dataclasses.replace(config.layout, **mesh).sizes(devices)
        except ValueError:
            continue
        if sizes not in seen:
            seen.append(sizes)
            yield sizes


def _compiles(tried: Sequence[dict[str, Any]]) -> int:
    return sum(bool(one["steps"]) or bool(one["broke"]) for one in tried)


# ------------------------------------------------------------------------------------- costs


def _epoch(config: TrainConfig, options: Options) -> dict[str, Any]:
    """Counts the updates of one epoch (every example of every task once) and names the source of the count."""
    tasks = task_names.subtasks(config.mixture_or_task_name)
    folders = [Path(config.data.records_dir) / name for name in task_names.datasets(config.mixture_or_task_name)]
    if options.examples is not None:
        examples, source = options.examples * len(tasks), f"--examples {options.examples} of each task"
    elif all(folder.is_dir() for folder in folders):
        registry.configure(config.data)
        examples = sum(len(registry.examples(task, selection.TRAIN)) for task in tasks)
        source = f"counted in {', '.join(map(str, folders))}"
    elif config.data.corpus:
        return {"updates": None, "source": "unknown: give the rows of the corpus as --examples N"}
    else:
        return {"updates": None, "source": "unknown: give --records_dir (sbs records) or --examples N"}
    per_row = 1.0 if not config.pack else options.examples_per_row
    if per_row is None:
        return {"updates": None, "source": "unknown: rows are packed; give --examples_per_row N"}
    if config.pack:
        source += f", {per_row:g} to a packed row (assumed)"
    updates = math.ceil(examples / per_row / config.batch_size)
    return {"updates": updates, "examples": examples, "source": source}


def _costed(
    config: TrainConfig,
    topology: chips.Topology,
    candidate: worker.Candidate,
    outcome: dict[str, Any],
    *,
    epoch: dict[str, Any],
    price: str,
) -> dict[str, Any]:
    """Adds times, utilisation and cost, derived from the compiler's figures."""
    chip = topology.chip
    rate = float(price) if price not in ("on_demand", "three_years") else getattr(chip, price)
    lengths = {worker.EVALUATION: config.max_decode_length, worker.GENERATION: config.task_feature_lengths["targets"]}
    steps = {name: step | _times(step, chip, trips=lengths.get(name, 1)) for name, step in outcome["steps"].items()}
    found = {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "mesh": outcome.get("mesh", candidate.mesh),
        "hosts": outcome.get("hosts"),
        "checkpoint_bytes": outcome.get("checkpoint_bytes"),
        "batch_size": candidate.batch_size,
        "micro_batches": candidate.micro_batches,
        "refused": outcome.get("refused") or next((s["refused"] for s in steps.values() if s.get("refused")), None),
        "broke": outcome.get("broke", False),
        "fits": bool(steps) and all(step["fits"] for step in steps.values()),
        "usd_per_chip_hour": rate,
        "steps": steps,
    }
    training = steps.get(worker.TRAIN, {})
    if training.get("seconds") is None:
        return found
    seconds, peak = training["seconds"], chip.peak_flops * topology.chips
    tokens = config.batch_size * sum(config.task_feature_lengths.values())
    found |= {
        "step_seconds": seconds,
        "utilisation": _flops(config) / (seconds * peak),
        "utilisation_computing": _flops(config) / (training["compute_seconds"] * peak),
        "tokens_per_second_per_chip": tokens / seconds / topology.chips,
    }
    for name, updates in (("epoch", epoch["updates"]), ("run", config.train_steps)):
        if updates is not None:
            hours = updates * seconds / 3600
            cost = {"hours": hours, "chip_hours": hours * topology.chips, "usd": hours * topology.chips * rate}
            found[name] = {"updates": updates} | cost
    return found


def _times(step: dict[str, Any], chip: chips.Chip, *, trips: int) -> dict[str, float | None]:
    """Computes a step's seconds: cycles plus exposed communication, or all communication if that takes longer.

    A generation counts `trips` tokens.
    """
    if "cycles" not in step:
        return {"seconds": None}

    def seconds(part: dict[str, Any]) -> float:
        return max(part["cycles"] / chip.clock + part["exposed_seconds"], part["communication_seconds"])

    token = seconds(step["token"]) if step["token"] else None
    return {
        "compute_seconds": step["cycles"] / chip.clock,
        "seconds": seconds(step) + (trips - 1) * (token or 0.0),
        "seconds_per_token": token,
    }


# -------------------------------------------------------------------------------- suggestion


def suggestion(tried: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """Picks the smallest machine that fits (its fastest mesh), the cheapest and the fastest, as indices of `tried`."""
    fitting = [(index, one) for index, one in enumerate(tried) if one["fits"] and one.get("step_seconds")]
    if not fitting:
        return {"smallest": None, "cheapest": None, "fastest": None}

    def best(key: Callable[[dict[str, Any]], Any]) -> int:
        return min(fitting, key=lambda pair: key(pair[1]))[0]

    return {
        "smallest": best(lambda one: (one["chips"], one["run"]["usd"])),
        "cheapest": best(lambda one: (one["run"]["usd"], one["chips"])),
        "fastest": best(lambda one: (one["step_seconds"], one["chips"])),
    }


def mesh_title(mesh: dict[str, int]) -> str:
    """Names a mesh without its axes of size 1: `fsdp=8 tensor=2`."""
    return " ".join(f"{axis}={'all' if n == -1 else n}" for axis, n in mesh.items() if n != 1) or "one device"


def micro_title(micro_batches: int) -> str:
    """Returns `1 micro-batch` or `2 micro-batches`."""
    return f"{micro_batches} micro-batch{'es' * (micro_batches > 1)}"
