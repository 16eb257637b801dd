"""One training step: loss and gradients of a global batch, the update, and compiling it for a mesh."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sbs_jax.data import features
from sbs_jax.data import soft_targets as stored
from sbs_jax.student import adapters, families, losses, mutual_information, partitioning, soft_targets, stacking, stacks
from sbs_jax.student import policy as policies
from sbs_jax.training import lessons, rewarded, teachers
from sbs_jax.training.config import Compute, TrainConfig

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes; or the same tree of shapes or shardings."""

    step: Any  # int32 scalar, updates made or skipped
    parameters: Any  # the trained families.Parameters
    optimizer: Any
    skipped: Any  # int32 scalar, updates skipped because they were not finite
    root_key: Any  # uint32 data of the key of all dropout: no constant, so that runs of other seeds share the program
    frozen: Any = dataclasses.field(default_factory=dict)  # the other families.Parameters; no step changes them
    teacher: Any = dataclasses.field(default_factory=dict)  # a teacher's families.Parameters; in memory alone


Batch = dict[str, Any]  # arrays, or their shapes


def loss_and_gradients(
    parameters: families.Parameters,
    batch: Batch,
    *,
    structure: families.Structure,
    loss: losses.Loss,
    micro_batches: int,
    vocabulary_chunks: int,
    dropout_key: jax.Array,
    frozen: families.Parameters | None = None,
    lesson: lessons.Lesson | None = None,
    reference: families.Model | None = None,
) -> tuple[Float[Array, ""], dict[str, Any], families.Parameters]:
    """Returns the loss, `losses.Sums` and `Mean` by name, and gradients of a global batch, however it is cut.

    `parameters` and `frozen` together are the whole model; gradients are of `parameters` only. `lesson` has the targets
    of `loss.on_policy`, `reference` is the student that `loss.policy` must not leave.
    """
    # Token weights depend on the whole batch, so they are computed before it is cut: see losses.py.
    task_ids, shares = batch["decoder_task_ids"], batch["decoder_loss_weights"]
    weights = losses.token_weights(task_ids, loss.objectives, shares_BT=shares)
    pairs = mutual_information.pairs_in(batch["decoder_input_tokens"], task_ids)
    batch = {**batch, "weights": weights, **({} if lesson is None else lessons.rows(lesson, loss))}

    def loss_of(parameters: families.Parameters, rows: Batch, index: jax.Array):
        model = families.join(structure, {**(frozen or {}), **parameters})
        key = jax.random.fold_in(dropout_key, index)
        states = model.states(
            rows["encoder_input_tokens"],
            rows["decoder_input_tokens"],
            encoder_segment_ids=rows.get("encoder_segment_ids"),
            decoder_segment_ids=rows.get("decoder_segment_ids"),
            dropout_key=key,
        )
        statistics, logits = _statistics(model, states, rows["decoder_target_tokens"], loss, chunks=vocabulary_chunks)
        if loss.policy is not None:
            prompts = len(batch["decoder_task_ids"]) // loss.policy.samples
            return _of_rewards(statistics, rows, loss, prompts=prompts, reference=reference, chunks=vocabulary_chunks)
        task_ids, teacher = rows["decoder_task_ids"], soft_targets.SoftTargets.of(rows)
        total, sums = losses.weighted_cross_entropy(
            statistics,
            task_ids_BT=task_ids,
            weights_BT=rows["weights"],
            objectives=loss.objectives,
            z_loss=loss.z_loss,
            soft_share=loss.soft_share,
            divergence=teacher and soft_targets.divergence(logits, statistics.log_z, teacher=teacher),
        )
        if (term := loss.mutual_information) is not None:
            segments = rows.get("decoder_segment_ids")
            of_pairs = mutual_information.sum_over_pairs(
                logits, statistics.log_z, task_ids_BT=task_ids, segments_BT=segments, form=term.form
            )
            mean = losses.Mean(of_pairs, mutual_information.pairs_in(rows["decoder_input_tokens"], task_ids))
            total += term.weight * of_pairs / jnp.maximum(pairs, 1.0)
            sums = {**sums, "loss/mutual_information": mean}
        if (taught := loss.on_policy) is not None and lesson is not None:
            of_teacher, found = lessons.divergence(model, rows, logits, lesson=lesson, loss=loss, key=key)
            total, sums = (1 - taught.share) * total + taught.share * of_teacher, {**sums, **found}
        return total, sums

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    # The two rows of a pair stay together, as the answers to a prompt do; packed rows hold whole pairs.
    together = 2 if loss.mutual_information and "decoder_segment_ids" not in batch else 1
    together = together if loss.policy is None else loss.policy.samples
    pieces = (_cut(batch, micro_batches, together=together), jnp.arange(micro_batches))
    first = jax.tree.map(lambda x: x[0], pieces)
    if micro_batches == 1:
        (value, sums), gradients = gradient_of(parameters, *first)
        return value, sums, gradients

    def add(total, piece):
        return jax.tree.map(jnp.add, total, gradient_of(parameters, *piece)), None

    shapes = jax.eval_shape(gradient_of, parameters, *first)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((value, sums), gradients), _ = jax.lax.scan(add, zero, pieces)
    return value, sums, gradients


def _of_rewards(
    statistics: losses.TokenStatistics,
    rows: Batch,
    loss: losses.Loss,
    *,
    prompts: int,
    reference: families.Model | None,
    chunks: int,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Returns the loss of sampled answers by their rewards, and its metrics."""
    assert loss.policy is not None
    log_p = statistics.target - statistics.log_z
    of_reference = jax.lax.stop_gradient(log_p)
    if reference is not None:
        states = reference.states(rows["encoder_input_tokens"], rows["decoder_input_tokens"])
        found, _ = _statistics(reference, states, rows["decoder_target_tokens"], loss, chunks=chunks)
        of_reference = jax.lax.stop_gradient(found.target - found.log_z)
    total, metrics = policies.loss(
        *(log_p, of_reference),
        real_BT=(rows["decoder_task_ids"] > 0).astype(jnp.float32),
        rewards_BR=rows[rewarded.REWARDS],
        policy=loss.policy,
        prompts=prompts,
    )
    return total, {name: losses.Mean(*parts) for name, parts in metrics.items()}


def _statistics(
    model: families.Model, states: Any, targets_BT: jax.Array, loss: losses.Loss, *, chunks: int
) -> tuple[losses.TokenStatistics, Any]:
    """Returns the statistics of the targets, and the logits unless they only exist in chunks."""
    if chunks == 1:
        logits = model.logits(states)
        return losses.token_statistics(logits, targets_BT), logits
    cap, mean = model.config.logits_cap, loss.smooths
    projected = functools.partial(losses.projected_token_statistics, chunks=chunks, cap=cap, mean=mean)
    return projected(*model.projection(states), targets_BT), None


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    structure: families.Structure,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    separate: families.Structure,  # of the student with separate layers, to sample from
    teacher: families.Structure | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Makes one update from one global batch; returns the new state and metrics. Randomness is of (seed, step) only.

    An update whose loss or gradient is not finite changes neither parameters nor optimizer. After more than
    `config.skip_non_finite` of them, no further step changes anything and `step` stays at the last good one: the loop
    reads metrics later, and then finds the state from which the failure can be replayed.
    """
    key, terms = jax.random.fold_in(jax.random.wrap_key_data(state.root_key), state.step), config.loss(state.step)
    whole = {**state.frozen, **state.parameters}
    lesson = lessons.of(batch, whole, state.teacher, student=separate, structure=teacher, term=terms.on_policy, key=key)
    loss, sums, gradients = loss_and_gradients(
        state.parameters,
        batch,
        structure=structure,
        loss=terms,
        micro_batches=config.micro_batches,
        vocabulary_chunks=config.vocabulary_chunks,
        dropout_key=key,
        frozen=state.frozen,
        lesson=lesson,
        reference=families.join(teacher, state.teacher) if terms.policy is not None and teacher is not None else None,
    )
    norm, gradients = _clipped(gradients, norm=config.clip_norm)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
    new = (optax.apply_updates(state.parameters, updates), optimizer_state)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    running = state.skipped <= config.skip_non_finite
    skipped = state.skipped + (running & ~finite)
    parameters, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(running & finite, new, old), new, (state.parameters, state.optimizer)
    )
    metrics = {"loss": loss, "gradient_norm": norm, "skipped": skipped, **losses.means(sums)}
    step = state.step + (skipped <= config.skip_non_finite)
    kept = (state.root_key, state.frozen, state.teacher)
    return TrainState(step, parameters, optimizer_state, skipped, *kept), metrics


def root_key(seed: int) -> jax.Array:
    """Returns `TrainState.root_key` of a run's seed."""
    return jax.random.key_data(jax.random.key(seed))


def _clipped(gradients: families.Parameters, *, norm: float | None) -> tuple[Float[Array, ""], families.Parameters]:
    """Returns the global norm of the gradients, and the gradients scaled down to at most `norm` (None: unchanged)."""
    found = optax.tree.norm(gradients)
    if norm is None:
        return found, gradients
    scale = jnp.where(found > norm, norm / found, 1.0)
    return found, jax.tree.map(lambda x: x * scale, gradients)


def _cut(batch: Batch, pieces: int, *, together: int) -> Batch:
    """Reshapes `[B, ..]` to `[pieces, B / pieces, ..]`, with groups of `together` rows whole.

    Group i goes to piece i mod pieces, so rows need not move.
    """

    def one(x: jax.Array) -> jax.Array:
        groups = x.reshape(-1, pieces, together, *x.shape[1:]).swapaxes(0, 1)
        return groups.reshape(pieces, -1, *x.shape[1:])

    return {name: one(x) for name, x in batch.items()}


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled step and the shardings of its state; shared by `train`, `sbs plan` and the benchmarks."""

    partitioner: partitioning.Partitioner
    abstract: TrainState  # shapes with shardings, as in memory
    saved: TrainState  # the same, with separate arrays for every layer, as on disk (without `frozen` and `teacher`)
    batch: Batch  # shapes with shardings of one global batch
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    unstacked: Callable[[TrainState], TrainState]  # from memory to disk, without `frozen` and `teacher`
    stacked: Callable[[TrainState], TrainState]  # from disk to memory, with them
    parameters: Callable[[TrainState], families.Parameters]  # trained and frozen, with separate arrays for every layer
    structure: families.Structure  # of a model with these parameters
    teacher: families.Structure | None  # of a teacher, as in memory


def prepare(config: TrainConfig, *, devices: Sequence[Any] | None = None) -> Trainer:
    """Makes mesh, shardings and the jitted step. Computes no parameter and reads no data.

    `devices` may be those of an absent machine (`sbs plan`); by default all of this one.
    """
    partitioner = config.layout.partitioner(devices)
    _check_divisible(config, partitioner)
    optimizer = config.gradient_transformation()

    def placed(
        execution: stacks.Execution, optimizer: optax.GradientTransformation
    ) -> tuple[families.Structure, families.Structure | None, TrainState]:
        adapted = adapters.abstract(config.model, config.tuning, execution=execution)
        trained, rest = adapted.split(adapted.shapes)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        key = jax.eval_shape(lambda: root_key(0))
        state = TrainState(number, trained, jax.eval_shape(optimizer.init, trained), number, key, rest)
        state = partitioner.with_shardings(state, parameters=adapted.shapes, axes=adapted.axes)
        teacher, of_teacher = teachers.abstract(config, partitioner, execution=execution)
        state = dataclasses.replace(state, optimizer=_in_memory(state.optimizer, config), teacher=of_teacher)
        return adapted.structure, teacher, state

    structure, teacher, abstract = placed(config.execution, optimizer)
    if config.execution.layers == "scanned":
        saved_structure, _, saved = placed(stacks.UNROLLED, config.optimizer(learning_rate=config.learning_rate))
        unstack = jax.jit(stacking.unstack, out_shardings=shardings(dataclasses.replace(saved, frozen={}, teacher={})))
        unstack_all = jax.jit(stacking.unstack, out_shardings=shardings({**saved.frozen, **saved.parameters}))
        stacked = jax.jit(stacking.stack, out_shardings=shardings(abstract))
    else:
        saved_structure, saved = structure, abstract
        unstack = unstack_all = stacked = _as_it_is

    def unstacked(state: TrainState) -> TrainState:
        return unstack(dataclasses.replace(state, frozen={}, teacher={}))

    def parameters(state: TrainState) -> families.Parameters:
        return unstack_all({**state.frozen, **state.parameters})

    on_device = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), abstract.optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if config.optimizer_memory != "device":
            state = dataclasses.replace(state, optimizer=jax.device_put(state.optimizer, on_device))
        with partitioner.active():
            return train_step(
                *(state, batch),
                structure=structure,
                config=config,
                optimizer=optimizer,
                separate=saved_structure,
                teacher=teacher,
            )

    compiled = jax.jit(
        step,
        in_shardings=(shardings(abstract), partitioner.batch),
        out_shardings=(shardings(abstract), partitioner.replicated),
        donate_argnums=0,
        compiler_options=partitioner.compiler_options,
    )
    shapes = _batch_shapes(config)
    batch = {
        name: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=partitioner.batch) for name, each in shapes.items()
    }
    if config.policy is not None:

        def sample(state: TrainState, batch: Batch) -> Any:
            with partitioner.active():
                return rewarded.sampled(state, batch, student=saved_structure, config=config)

        sharded, everywhere = partitioner.batch, partitioner.replicated
        places = {"in_shardings": (shardings(abstract), sharded), "out_shardings": (sharded, everywhere)}
        compiled = rewarded.RewardedStep(config, partitioner, jax.jit(sample, **places), compiled)
    as_saved = unstacked, stacked, parameters, saved_structure
    return Trainer(partitioner, abstract, saved, batch, compiled, *as_saved, teacher)


def _batch_shapes(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of the batch of an update."""
    if config.policy is not None:
        return rewarded.shapes(config)
    return features.shapes(
        config.task_feature_lengths,
        batch_size=config.batch_size,
        pack=config.pack,
        teacher=None if config.soft_targets is None else stored.form(config.soft_targets),
    )


def _in_memory(optimizer: Any, config: Compute) -> Any:
    """Places the optimizer's abstract arrays in `optimizer_memory`; scalars (step counts) stay on the device."""
    if config.optimizer_memory == "device":
        return optimizer

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding: Any = leaf.sharding
        if leaf.ndim == 0:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.with_memory_kind(config.optimizer_memory))

    return jax.tree.map(one, optimizer)


def shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _as_it_is(tree: Any) -> Any:
    return tree


def _check_divisible(config: TrainConfig, partitioner: partitioning.Partitioner) -> None:
    """Refuses rows that do not divide over devices and micro-batches, and heads over splits, before any compile."""
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
