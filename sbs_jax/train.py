"""Training: the state, one step as a pure function, and the loop that reads from top to bottom."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jaxtyping import Array, Float

from sbs_jax import (
    adapters,
    checkpoints,
    datasets,
    evaluate,
    failures,
    features,
    frozen,
    hosts,
    identity,
    losses,
    partitioning,
    preemption,
    run_dir,
    settings,
    stacking,
    t5,
    watchdog,
)

log = logging.getLogger(__name__)


MEMORIES = ("device", "pinned_host")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on. Bound by `gin_configs/runs/train.gin`; the macros there carry T5X's names."""

    model_dir: str
    model: t5.T5Config
    data: datasets.DataOptions
    mixture_or_task_name: str
    # Tokens per row, `{"inputs": .., "targets": ..}`; with `pack` several examples share a row.
    task_feature_lengths: Mapping[str, int]
    pack: bool
    batch_size: int  # rows per update, over all devices and micro-batches (see `rows_per_update`)
    micro_batches: int
    train_steps: int
    seed: int
    # Share of the label objective, 1 - alpha is the rationale's; and T5X's auxiliary loss.
    alpha: float
    z_loss: float
    vocabulary_chunks: int  # pieces of the vocabulary whose logits exist at a time
    optimizer: Callable[..., optax.GradientTransformation]  # called with learning_rate=
    learning_rate: optax.Schedule
    clip_norm: float | None
    execution: t5.Execution
    layout: partitioning.Layout
    initial_checkpoint_path: str | None
    tuning: adapters.Tuning | None  # what is trained; None: everything
    optimizer_memory: str  # where the optimiser's state lives between updates, of MEMORIES
    # Periods in steps.
    log_period: int
    eval_period: int
    checkpoint_period: int
    # Checkpoints that stay: the newest, the best by validation, and each whose step is a multiple of keep_period.
    keep_checkpoints: int
    keep_best: int
    keep_period: int | None
    skip_non_finite: int  # updates left out for a loss or gradient that is not finite, before the run stops
    stall_seconds: float  # after which a loop that does not move is reported
    save_patience: float  # seconds in which the last checkpoint is tried again where the disk is full
    eval_batch_size: int
    max_decode_length: int  # tokens generated for an answer
    evaluate_test: bool

    def __post_init__(self) -> None:
        positive = (
            *("batch_size", "micro_batches", "train_steps", "log_period", "eval_period", "checkpoint_period"),
            *("keep_checkpoints", "eval_batch_size", "max_decode_length", "vocabulary_chunks"),
            *(() if self.keep_period is None else ("keep_period",)),
        )
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"TrainConfig.{name} is {value!r}; expected a whole number of at least 1.")
        for name in ("keep_best", "skip_non_finite"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"TrainConfig.{name} is {value!r}; expected a whole number of at least 0.")
        if not self.stall_seconds > 0 or not self.save_patience >= 0:
            raise ValueError(
                f"TrainConfig.stall_seconds is {self.stall_seconds!r} and save_patience {self.save_patience!r}; "
                "expected seconds, above 0 and at least 0."
            )
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"TrainConfig.alpha is {self.alpha!r}; expected 0 (rationale only) to 1 (label only).")
        if self.z_loss < 0 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise ValueError(
                f"TrainConfig.z_loss is {self.z_loss!r} and clip_norm {self.clip_norm!r}; expected z_loss >= 0 and "
                "clip_norm > 0 or None."
            )
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.micro_batches} micro_batches; choose a "
                "multiple."
            )
        if not callable(self.optimizer) or not callable(self.learning_rate):
            raise ValueError(
                "TrainConfig.optimizer must be an optimiser's constructor (gin: @optax.adamw) and learning_rate a "
                f"schedule (gin: @optax.constant_schedule()); got {self.optimizer!r} and {self.learning_rate!r}."
            )
        if self.optimizer_memory not in MEMORIES:
            raise ValueError(
                f"TrainConfig.optimizer_memory is {self.optimizer_memory!r}; expected one of {', '.join(MEMORIES)}."
            )
        if self.pack and self.tuning is not None and self.tuning.prompt is not None:
            raise ValueError(
                "A prompt stands before each example, and packed rows hold several: set PACK = False, or take prefix "
                "tuning, whose keys all examples of a row see."
            )
        self.gradient_transformation()  # a wrong optimiser argument fails here, before any compile

    def gradient_transformation(self) -> optax.GradientTransformation:
        """The optimiser with its schedule; it sees one layer at a time, however layers are held."""
        optimizer = self.optimizer(learning_rate=self.learning_rate)
        return stacking.layerwise(optimizer) if self.execution.layers == "scanned" else optimizer


def rows_per_update(*, mixture_or_task_name: str, examples: int, examples_per_row: int) -> int:
    """Rows that hold this many examples of every task: 64 of `svamp_label`, 128 of `svamp_step_by_step`.

    So methods are compared at the same label examples per update (the official code's batch size counts these).
    `examples_per_row` is 1, or how many fit on average where rows are packed.
    """
    return math.ceil(examples * len(datasets.subtasks(mixture_or_task_name)) / examples_per_row)


def rsqrt_schedule(*, peak: float, warmup_steps: int) -> optax.Schedule:
    """peak * sqrt(warmup / max(step, warmup)): T5's pre-training schedule, at its peak until `warmup_steps`."""

    def schedule(step: Any) -> Any:
        return peak * jnp.sqrt(warmup_steps / jnp.maximum(step, warmup_steps))

    return schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes, and what it leaves alone."""

    step: Any  # int32 scalar, the number of updates made, or left out because they were not finite
    parameters: Any  # t5.Parameters that are trained, or the same tree of shapes or shardings
    optimizer: Any
    skipped: Any  # int32 scalar, how many of them were left out
    frozen: Any = dataclasses.field(default_factory=dict)  # the other t5.Parameters


Batch = dict[str, Any]  # arrays, or their shapes


def loss_and_gradients(
    parameters: t5.Parameters,
    batch: Batch,
    *,
    structure: t5.Structure,
    alpha: float,
    z_loss: float,
    micro_batches: int,
    vocabulary_chunks: int,
    dropout_key: jax.Array,
    frozen: t5.Parameters | None = None,
) -> tuple[Float[Array, ""], dict[int, losses.TaskSums], t5.Parameters]:
    """Loss of a global batch, sums per task, and gradients; the same however the batch is cut into micro-batches.

    `parameters` and `frozen` together are all that the model has; gradients are of `parameters` alone.
    """
    # Over the whole batch, before it is cut: see losses.py.
    weights = losses.token_weights(batch["decoder_task_ids"], alpha=alpha)

    def loss_of(parameters: t5.Parameters, rows: Batch, index: jax.Array):
        model = t5.join(structure, {**(frozen or {}), **parameters})
        states = model.states(
            rows["encoder_input_tokens"],
            rows["decoder_input_tokens"],
            encoder_segment_ids=rows.get("encoder_segment_ids"),
            decoder_segment_ids=rows.get("decoder_segment_ids"),
            dropout_key=jax.random.fold_in(dropout_key, index),
        )
        targets = rows["decoder_target_tokens"]
        if vocabulary_chunks == 1:
            statistics = losses.token_statistics(model.logits(states), targets)
        else:
            statistics = losses.projected_token_statistics(*model.projection(states), targets, chunks=vocabulary_chunks)
        return losses.weighted_cross_entropy(
            statistics,
            task_ids_BT=rows["decoder_task_ids"],
            weights_BT=rows["weights"],
            z_loss=z_loss,
        )

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    pieces = (_cut({**batch, "weights": weights}, micro_batches), jnp.arange(micro_batches))
    first = jax.tree.map(lambda x: x[0], pieces)
    if micro_batches == 1:
        (loss, sums), gradients = gradient_of(parameters, *first)
        return loss, sums, gradients

    def add(total, piece):
        return jax.tree.map(jnp.add, total, gradient_of(parameters, *piece)), None

    shapes = jax.eval_shape(gradient_of, parameters, *first)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((loss, sums), gradients), _ = jax.lax.scan(add, zero, pieces)
    return loss, sums, gradients


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    structure: t5.Structure,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update from one global batch, and its metrics. Pure; the dropout key follows from (seed, step).

    An update whose loss or gradient is not finite changes neither parameters nor optimiser. After more than
    `config.skip_non_finite` of them no further step changes anything: `step` stays the number of the last good one,
    so that the loop, which looks at the metrics later, finds the state from which the fault can be replayed.
    """
    loss, sums, gradients = loss_and_gradients(
        state.parameters,
        batch,
        structure=structure,
        alpha=config.alpha,
        z_loss=config.z_loss,
        micro_batches=config.micro_batches,
        vocabulary_chunks=config.vocabulary_chunks,
        dropout_key=jax.random.fold_in(jax.random.key(config.seed), state.step),
        frozen=state.frozen,
    )
    norm = optax.tree.norm(gradients)
    if config.clip_norm is not None:
        scale = jnp.where(norm > config.clip_norm, config.clip_norm / norm, 1.0)
        gradients = jax.tree.map(lambda x: x * scale, gradients)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    going = state.skipped <= config.skip_non_finite
    skipped = state.skipped + (going & ~finite)
    parameters, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(going & finite, new, old),
        (parameters, optimizer_state),
        (state.parameters, state.optimizer),
    )
    metrics = {"loss": loss, "gradient_norm": norm, "skipped": skipped}
    for task, name in losses.TASK_NAMES.items():
        metrics |= sums[task].means(name)
    step = state.step + (skipped <= config.skip_non_finite)
    return TrainState(step, parameters, optimizer_state, skipped, state.frozen), metrics


def _cut(batch: Batch, pieces: int) -> Batch:
    """`[B, ..]` to `[pieces, B / pieces, ..]`; row i goes to piece i mod pieces, so no device's rows have to move."""
    return {name: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled step and where its state lives; what `train`, `sbs plan` and the benchmarks share."""

    partitioner: partitioning.Partitioner
    abstract: TrainState  # shapes with shardings, as held in memory
    saved: TrainState  # the same where every layer has arrays of its own: as on disk, but for what is frozen
    batch: Batch  # the same, of one global batch
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    unstacked: Callable[[TrainState], TrainState]  # from memory to disk, without what is frozen
    stacked: Callable[[TrainState], TrainState]  # and back, with it
    parameters: Callable[[TrainState], t5.Parameters]  # all of them, every layer's by itself
    structure: t5.Structure  # of a model that has them


def prepare(config: TrainConfig, *, devices: Sequence[Any] | None = None) -> Trainer:
    """Mesh, shardings and the jitted step. Computes no parameter and reads no data.

    `devices` are those of a machine that may not be there (`sbs plan`); all of this one by default.
    """
    partitioner = config.layout.partitioner(devices)
    _check_divisible(config, partitioner)
    optimizer = config.gradient_transformation()

    def placed(execution: t5.Execution, optimizer: optax.GradientTransformation) -> tuple[t5.Structure, TrainState]:
        adapted = adapters.abstract(config.model, config.tuning, execution=execution)
        trained, rest = adapted.parts(adapted.shapes)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(number, trained, jax.eval_shape(optimizer.init, trained), number, rest)
        state = partitioner.placed(state, parameters=adapted.shapes, axes=adapted.axes)
        return adapted.structure, dataclasses.replace(state, optimizer=_in_memory(state.optimizer, config))

    structure, abstract = placed(config.execution, optimizer)
    if config.execution.layers == "scanned":
        saved_structure, saved = placed(t5.UNROLLED, config.optimizer(learning_rate=config.learning_rate))
        unstack = jax.jit(stacking.unstack, out_shardings=_shardings(dataclasses.replace(saved, frozen={})))
        unstack_all = jax.jit(stacking.unstack, out_shardings=_shardings({**saved.frozen, **saved.parameters}))
        stacked = jax.jit(stacking.stack, out_shardings=_shardings(abstract))
    else:
        saved_structure, saved = structure, abstract
        unstack = unstack_all = stacked = _as_it_is

    def unstacked(state: TrainState) -> TrainState:
        return unstack(dataclasses.replace(state, frozen={}))

    def parameters(state: TrainState) -> t5.Parameters:
        return unstack_all({**state.frozen, **state.parameters})

    on_device = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), abstract.optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if config.optimizer_memory != "device":
            state = dataclasses.replace(state, optimizer=jax.device_put(state.optimizer, on_device))
        with partitioner.constraining():
            return train_step(state, batch, structure=structure, config=config, optimizer=optimizer)

    compiled = jax.jit(
        step,
        in_shardings=(_shardings(abstract), partitioner.batch),
        out_shardings=(_shardings(abstract), partitioner.replicated),
        donate_argnums=0,
        compiler_options=partitioner.compiler_options,
    )
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=partitioner.batch)
        for name, shape in features.batch_shapes(
            config.task_feature_lengths, batch_size=config.batch_size, pack=config.pack
        ).items()
    }
    return Trainer(partitioner, abstract, saved, batch, compiled, unstacked, stacked, parameters, saved_structure)


def _in_memory(optimizer: Any, config: TrainConfig) -> Any:
    """The optimiser's abstract state in the memory that is asked for; step counts and the like stay on the device."""
    if config.optimizer_memory == "device":
        return optimizer

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding: Any = leaf.sharding
        if leaf.ndim == 0:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.with_memory_kind(config.optimizer_memory))

    return jax.tree.map(one, optimizer)


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _as_it_is(tree: Any) -> Any:
    return tree


def _check_divisible(config: TrainConfig, partitioner: partitioning.Partitioner) -> None:
    """Before any compile: rows over devices and micro-batches, heads over splits."""
    rows, pieces = config.batch_size, partitioner.data_parallel_size * config.micro_batches
    if rows % pieces:
        down, up = rows // pieces * pieces, -(-rows // pieces) * pieces
        raise ValueError(
            f"batch_size {rows} does not divide over {pieces} = {partitioner.data_parallel_size} pieces of the mesh "
            f"{partitioner.sizes} x micro_batches {config.micro_batches}; the nearest that does is "
            f"{f'{down} or {up}' if down else up}. Choose it, or another mesh (gin_configs/meshes/)."
        )
    heads, splits = config.model.num_heads, partitioner.sizes["tensor"]
    if heads % splits:
        raise ValueError(
            f"The model has {heads} attention heads, which do not divide over tensor={splits} of the mesh "
            f"{partitioner.sizes}; the nearest that divides them is "
            f"{partitioning.nearest_divisor(heads, splits)}. Choose another mesh "
            "(gin_configs/meshes/)."
        )


def initial_state(config: TrainConfig, trainer: Trainer, *, base: frozen.Base | None = None) -> TrainState:
    """Fresh parameters from the seed, or those of `initial_checkpoint_path`; optimiser at zero; step 0."""
    saved = _shardings(trainer.saved)
    if config.tuning is not None:
        base = base or base_of(config, trainer)
        model = {**base.frozen, **base.trained}
        new = {name: sharding for name, sharding in saved.parameters.items() if name not in base.trained}
        put_on = functools.partial(
            *(adapters.initial, config.model, config.tuning), structure=trainer.structure, seed=config.seed
        )
        parameters = base.trained | jax.jit(lambda base: put_on(base=base), out_shardings=new)(model)
    elif config.initial_checkpoint_path is None:
        parameters = jax.jit(lambda: t5.init(config.model, seed=config.seed)[1], out_shardings=saved.parameters)()
    else:
        parameters = checkpoints.load_parameters(config.initial_checkpoint_path, like=trainer.saved.parameters)
    optimizer = config.optimizer(learning_rate=config.learning_rate)
    state = jax.jit(optimizer.init, out_shardings=saved.optimizer)(parameters)
    zero = _number(0, saved.step)
    return trainer.stacked(TrainState(zero, parameters, state, _number(0, saved.skipped), base.frozen if base else {}))


def base_of(config: TrainConfig, trainer: Trainer) -> frozen.Base:
    """What a run with a tuning begins from, as it is held: read anew at every start, since no checkpoint has it."""
    assert config.tuning is not None
    return frozen.load(
        config.model,
        config.tuning,
        path=config.initial_checkpoint_path,
        seed=config.seed,
        like={**trainer.saved.frozen, **trainer.saved.parameters},
        partitioner=trainer.partitioner,
    )


def _number(value: int, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback((), sharding, lambda _: np.asarray(value, np.int32))


def train(config: TrainConfig, *, config_text: str, accept_changes: bool = False) -> dict[str, dict[str, Any]]:
    """Runs, or resumes, one training; returns the last line of metrics per kind (train, validation, test).

    `config_text` is the operative configuration, kept in the run directory. A directory that holds a run of another
    configuration, other data or other defaults is refused with the difference, unless `accept_changes`. The best
    checkpoint by validation is evaluated on test once, at the end. preemption.PreemptedError where the process was told
    to end and the run is saved; repeating the call goes on from there, as if it had not stopped.
    """
    datasets.configure(config.data)
    dataset = datasets.dataset_of_task(config.mixture_or_task_name)
    eval_task_name = graded_task(config)
    data = datasets.manifest(dataset.name)
    _check_vocabulary(config)
    hosts.agree({"data": _data_text(config, data)})
    trainer = prepare(config)
    base = None if config.tuning is None else base_of(config, trainer)
    manifest = _manifest(config, data=data, trainer=trainer)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preemption.listening())
        run = stack.enter_context(run_dir.RunDir(config.model_dir, config_text=config_text))
        watch = stack.enter_context(watchdog.Watchdog(config.stall_seconds))
        scores: dict[int, float] = {}
        saver = stack.enter_context(checkpoints.Checkpoints(run.path, retention=_retention(config), scores=scores))
        start = saver.newest_good() or 0
        run.begin(manifest, step=start, accept_changes=accept_changes)
        if start:
            log.info("Resuming at step %d of %d.", start, config.train_steps)
            restored = saver.restore(start, parameters=trainer.saved.parameters, optimizer=trainer.saved.optimizer)
            state, metadata = state_of(restored, trainer, base=base), restored.metadata
        else:
            state = initial_state(config, trainer, base=base)
            metadata = {"lines": 0, "window": [], "evaluation_due": False}
        # Its arrays are in the state now, stacked if layers are scanned: held here too, the base would be there twice.
        known, base = (base.identity if base else None), None
        if start == config.train_steps and any(line["kind"] == "test" for line in run.metrics()):
            return _last_lines(run)
        run.truncate_metrics(lines=metadata["lines"])
        scores |= dict(hosts.from_first(lambda: list(run_dir.read_scores(run.path).items())))
        evaluator = _evaluator(config, trainer, split=datasets.VALIDATION)
        found = batches(config, trainer, skip=start)
        ahead = stack.enter_context(features.Ahead(_put(found, trainer.partitioner, config.batch_size)))
        window = _Window(metadata["window"])
        progress = stack.enter_context(
            tqdm.tqdm(
                total=config.train_steps, initial=start, unit="step", desc=run.path.name, disable=not hosts.is_first()
            )
        )

        def before_batch() -> None:
            watch.at("evaluates", step=step)
            if hosts.told_to_end():
                raise preemption.PreemptedError

        def evaluate_now() -> bool:
            """False where the process is told to end meanwhile."""
            try:
                with window.paused():
                    result = evaluator.run(trainer.parameters(state), before_batch=before_batch)
            except preemption.PreemptedError:
                return False
            run.write_predictions(f"{eval_task_name}-{step}", result.rows)
            run.log("validation", step, result.metrics)
            scores[step] = result.metrics[evaluator.primary_metric]
            return True

        def leave() -> None:
            """After a save: the others leave at the same place."""
            run.flush()
            hosts.leave()
            raise preemption.PreemptedError(
                f"This run was told to end, and stopped after step {step} of {config.train_steps}, which is saved. "
                "Repeat the command to resume it."
            )

        step = start
        if metadata["evaluation_due"] and not evaluate_now():
            leave()
        for step in range(start + 1, config.train_steps + 1):
            watch.at(watchdog.INPUT, step=step)
            batch, tokens = window.wait_for(ahead)
            watch.at(watchdog.DEVICES, step=step)
            state, metrics = trainer.step(state, batch)
            window.add(metrics, tokens)
            progress.update()
            last = step == config.train_steps
            told = hosts.told_to_end()
            log_due = step % config.log_period == 0 or last
            evaluation_due = step % config.eval_period == 0 or last
            save_due = step % config.checkpoint_period == 0 or evaluation_due or told
            if log_due or save_due:
                skipped = _check_finite(config, window, state, trainer=trainer, run=run, base=known)
            if log_due:
                values = window.close() | {"learning_rate": float(np.asarray(config.learning_rate(step - 1 - skipped)))}
                if config.skip_non_finite:
                    values["skipped"] = float(skipped)
                run.log("train", step, values)
                loss = values.get("loss", math.nan)
                progress.set_postfix_str(f"loss {loss:.3f} {values['tokens_per_second']:.0f} tokens/s")
            if evaluation_due and not told:
                evaluation_due = told = not evaluate_now()
            if save_due:
                watch.at("saves", step=step)
                run.check()
                saved = trainer.unstacked(state)
                contents = {
                    "parameters": saved.parameters,
                    "optimizer": saved.optimizer,
                    "metadata": {
                        "step": step,
                        **described(config, known),
                        "skipped": skipped,
                        "lines": run.lines,
                        "window": window.rows(),
                        "evaluation_due": evaluation_due,
                    },
                }
                if told or last:
                    saver.finish(step, **contents, patience=config.save_patience)
                else:
                    saver.save(step, **contents)
            if told:
                leave()
        progress.close()
        if config.evaluate_test:
            try:
                others = {} if config.tuning is None else trainer.parameters(state)
                _test(config, trainer, run, frozen=others, before_batch=before_batch)
            except preemption.PreemptedError:
                leave()
        run.flush()
        return _last_lines(run)


def graded_task(config: TrainConfig) -> str:
    """The task by which a run is validated and tested."""
    name = datasets.graded_task(config.mixture_or_task_name)
    if name is None:
        raise ValueError(
            f"{config.mixture_or_task_name} has rationales alone, which nothing grades; train on the mixture "
            "<dataset>_step_by_step, with alpha 0 if the labels shall not count."
        )
    return name


def _check_vocabulary(config: TrainConfig) -> None:
    """A token id beyond the table would read and train garbage without a sound: indices are clamped inside jit."""
    tokens = datasets.vocabulary(config.data.vocabulary).vocab_size
    if tokens > config.model.vocab_size:
        raise ValueError(
            f"The vocabulary {config.data.vocabulary} has {tokens} ids, and the model's table "
            f"{config.model.vocab_size} rows. Set t5.T5Config.vocab_size to at least {tokens}, or "
            "give the model's own vocabulary."
        )


def _evaluator(config: TrainConfig, trainer: Trainer, *, split: str) -> evaluate.Evaluator:
    return evaluate.Evaluator(
        task_name=graded_task(config),
        split=split,
        structure=trainer.structure,
        partitioner=trainer.partitioner,
        task_feature_lengths=config.task_feature_lengths,
        batch_size=config.eval_batch_size,
        max_decode_length=config.max_decode_length,
    )


def _test(
    config: TrainConfig,
    trainer: Trainer,
    run: run_dir.RunDir,
    *,
    frozen: t5.Parameters,
    before_batch: Callable[[], None],
) -> None:
    """Grades the best checkpoint on test; what it has not is among `frozen`."""
    step = hosts.from_first(lambda: checkpoints.best_step(run.path))
    parameters = checkpoints.load_parameters(run.path / "checkpoints" / str(step), like=trainer.saved.parameters)
    result = _evaluator(config, trainer, split=datasets.TEST).run({**frozen, **parameters}, before_batch=before_batch)
    run.write_predictions(f"{graded_task(config)}-test-{step}", result.rows)
    run.log("test", step, result.metrics)


def _last_lines(run: run_dir.RunDir) -> dict[str, dict[str, Any]]:
    return {line.pop("kind"): line for line in run.metrics()}


def _retention(config: TrainConfig) -> checkpoints.Retention:
    return checkpoints.Retention(newest=config.keep_checkpoints, best=config.keep_best, period=config.keep_period)


def _manifest(config: TrainConfig, *, data: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """What a run consists of, logged and kept; and the warning about what the feature lengths cut."""
    lengths = {}
    for split, task in ((datasets.TRAIN, config.mixture_or_task_name), (datasets.TEST, graded_task(config))):
        if split in data["splits"]:
            lengths[split] = features.count_truncated(task, split, config.task_feature_lengths)
    for split, of_tasks in lengths.items():
        for task, counts in of_tasks.items():
            if counts["inputs cut"] or counts["targets cut"]:
                log.warning("%s, %s: sequences longer than the feature lengths are cut: %s", task, split, counts)
    parameters = {
        name: {"shape": leaf.shape, "dtype": str(leaf.dtype), "spec": str(leaf.sharding.spec)}
        for name, leaf in {**trainer.saved.frozen, **trainer.saved.parameters}.items()
    }
    total = sum(math.prod(leaf.shape) for leaf in t5.abstract(config.model)[1].values())
    partitioner = trainer.partitioner
    devices = [str(device) for device in partitioner.mesh.devices.flat]
    log.info("Devices: %s; mesh %s.", ", ".join(devices), partitioner.sizes)
    log.info("Parameters: %s in %d arrays.", f"{total:,}", len(parameters))
    if config.tuning is not None:
        log.info("%s", adapters.summary(config.model, trainer.saved.parameters, trainer.saved.frozen))
    log.info("Data: %s", {name: split["counts"] for name, split in data["splits"].items()})
    return {
        "data": data,
        "lengths": lengths,
        "run": {
            "mixture_or_task_name": config.mixture_or_task_name,
            "task_feature_lengths": dict(config.task_feature_lengths),
            "max_decode_length": config.max_decode_length,
            "primary_metric": datasets.dataset_of_task(config.mixture_or_task_name).primary_metric,
        },
        "settings": settings.settings(config),
        "model": dataclasses.asdict(config.model),
        "mesh": partitioner.sizes,
        "devices": devices,
        "parameter_count": total,
        "parameters": parameters,
    }


def described(config: TrainConfig, base: dict[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint's metadata say of the student; `base` is the identity of what adapters are trained on."""
    model = {"model": dataclasses.asdict(config.model)}
    if config.tuning is None or base is None:
        return model
    return model | {"tuning": dataclasses.asdict(config.tuning), "base": base}


def state_of(restored: checkpoints.Restored, trainer: Trainer, *, base: frozen.Base | None = None) -> TrainState:
    """The state that a checkpoint holds, as it is held in memory. ValueError where it belongs to another base."""
    saved = trainer.saved
    if base is not None:
        identity.check(base.identity, restored.metadata["base"], owner=f"The checkpoint of step {restored.step}")
    return trainer.stacked(
        TrainState(
            _number(restored.step, saved.step.sharding),
            restored.parameters,
            restored.optimizer,
            _number(restored.metadata["skipped"], saved.skipped.sharding),
            base.frozen if base else {},
        )
    )


def batches(config: TrainConfig, trainer: Trainer, *, skip: int) -> Iterator[dict[str, np.ndarray]]:
    """What this host's devices get of each batch, without the first `skip`."""
    rows = trainer.partitioner.local_rows(config.batch_size)
    return features.train_dataset(config.mixture_or_task_name, **_training_data(config), skip_batches=skip, rows=rows)


def _data_text(config: TrainConfig, data: Mapping[str, Any]) -> str:
    """What the processes compare of the data: the hashes of the records, and of the tokens they train on."""
    lines = [f"{name} {split['file']} {split['sha256']}" for name, split in data["splits"].items()]
    for task in datasets.subtasks(config.mixture_or_task_name):
        for feature, table in datasets.token_tables(task, datasets.TRAIN).items():
            lines.append(f"{task} {feature} tokens {hashlib.sha256(table.ids.data).hexdigest()}")
    return "\n".join(lines)


def _put(
    found: Iterator[dict[str, np.ndarray]], partitioner: partitioning.Partitioner, batch_size: int
) -> Iterator[tuple[Batch, float]]:
    """Batches on the devices, each with the tokens of the global batch (of several hosts: as many as here, per row)."""
    for batch in found:
        rows = len(batch["decoder_target_tokens"])
        yield partitioner.put_batch(batch), features.count_tokens(batch) * batch_size / rows


class _Window:
    """Metrics since the last line of the log, and speeds.

    Metrics stay on the device until they are asked for, so that the loop runs ahead of it. A checkpoint between two
    lines keeps them (`rows`), so that a resumed run writes the line that it would have written.
    """

    def __init__(self, rows: Sequence[Mapping[str, float]] = ()) -> None:
        self._rows = [dict(row) for row in rows]
        self._on_device: list[dict[str, jax.Array]] = []
        self._start = time.monotonic()
        self._waited = self._tokens = 0.0
        self._steps = 0

    def wait_for(self, batches: Iterator[tuple[Batch, float]]) -> tuple[Batch, float]:
        begin = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - begin
        return batch

    def add(self, metrics: dict[str, jax.Array], tokens: float) -> None:
        self._on_device.append(metrics)
        self._tokens += tokens
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count for the speeds."""
        begin = time.monotonic()
        yield
        self._start += time.monotonic() - begin

    def rows(self) -> list[dict[str, float]]:
        """Metrics of each step; waits for the last one."""
        self._rows += [{name: float(x) for name, x in row.items()} for row in jax.device_get(self._on_device)]
        self._on_device = []
        return list(self._rows)  # a save writes them down later, when this window may have more

    def close(self) -> dict[str, float]:
        """Means over the steps that were not left out (none if all were), and speeds; a new window begins."""
        rows = [row for row in self.rows() if _is_finite(row)]
        seconds = time.monotonic() - self._start
        values = {}
        for name in [name for name in rows[0] if name != "skipped"] if rows else ():
            # In float32, as the device had them.
            values[name] = float(np.mean(np.asarray([row[name] for row in rows], np.float32)))
        values |= {
            "tokens_per_second": self._tokens / seconds,
            "seconds_per_step": seconds / self._steps,
            "data_wait_share": self._waited / seconds,
        }
        _Window.__init__(self)
        return values


def batch_examples(config: TrainConfig, *, step: int) -> tuple[list[features.BatchExample], dict[str, np.ndarray]]:
    """The examples of a step's batch, and each in a row of its own."""
    return features.batch_examples(config.mixture_or_task_name, **_training_data(config), batch=step - 1)


def _training_data(config: TrainConfig) -> dict[str, Any]:
    """What decides which rows a step trains on; as features.py names it."""
    return {
        "lengths": config.task_feature_lengths,
        "split": datasets.TRAIN,
        "batch_size": config.batch_size,
        "pack": config.pack,
        "seed": config.seed,
    }


def _is_finite(row: Mapping[str, float]) -> bool:
    return all(math.isfinite(row[name]) for name in ("loss", "gradient_norm"))


def _check_finite(
    config: TrainConfig,
    window: _Window,
    state: TrainState,
    *,
    trainer: Trainer,
    run: run_dir.RunDir,
    base: dict[str, Any] | None,
) -> int:
    """The number of updates left out so far. FloatingPointError where they are too many, after saving the evidence."""
    rows = window.rows()
    skipped = int(rows[-1]["skipped"]) if rows else 0
    if skipped <= config.skip_non_finite:
        return skipped
    step = int(state.step) + 1  # the state is that before it
    first = next(index for index, row in enumerate(rows) if row["skipped"] > config.skip_non_finite)
    folder = failures.folder(run.path, step)
    failures.write(
        folder,
        step=step,
        rows=rows[: first + 1],
        examples=batch_examples(config, step=step)[0],
    )
    saved = trainer.unstacked(state)
    retention = checkpoints.Retention(newest=1, best=0, period=None)
    with checkpoints.Checkpoints(folder, retention=retention, scores={}) as saver:
        metadata = {"step": step - 1, **described(config, base), "skipped": skipped - 1}
        saver.finish(step - 1, parameters=saved.parameters, optimizer=saved.optimizer, metadata=metadata, patience=0.0)
    bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(rows[first][name])]
    left_out = f" after {config.skip_non_finite} steps left out for it" if config.skip_non_finite else ""
    raise FloatingPointError(
        f"The {' and '.join(bad)} of step {step} is not finite{left_out}. The state before it and the ids of its batch "
        f"are in {folder}; `sbs replay {run.path}` shows which examples and parameters are at fault. The newest "
        "checkpoint is good. Lower the learning rate or clip_norm, compute in float32, remove the example, or leave "
        "such steps out: SKIP_NON_FINITE=10."
    )
