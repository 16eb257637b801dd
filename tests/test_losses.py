"""The step-by-step loss: by hand, and unchanged by devices, micro-batches and packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from sbs_jax.student import families, layers, losses, partitioning, stacking, stacks
from sbs_jax.student.losses import LABEL, RATIONALE
from sbs_jax.training.step import loss_and_gradients

TASKS = jnp.array([[LABEL, LABEL, 0, 0], [RATIONALE] * 4, [RATIONALE, RATIONALE, LABEL, 0]])


def test_weights_are_shares_over_token_counts():
    weights = losses.token_weights(TASKS, losses.step_by_step(0.6))
    label, rationale = 0.6 / 3, 0.4 / 6
    want = [[label, label, 0, 0], [rationale] * 4, [rationale, rationale, label, 0]]
    np.testing.assert_allclose(weights, want, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_weights_of_a_task_sum_to_its_share_whatever_its_length(alpha):
    weights = np.asarray(losses.token_weights(TASKS, losses.step_by_step(alpha)))
    assert weights[np.asarray(TASKS) == LABEL].sum() == pytest.approx(alpha)
    assert weights[np.asarray(TASKS) == RATIONALE].sum() == pytest.approx(1 - alpha)


def test_a_task_that_is_absent_leaves_the_other_s_weight_alone():
    weights = losses.token_weights(jnp.array([[LABEL, LABEL, 0]]), losses.step_by_step(0.5))
    np.testing.assert_allclose(weights, [[0.25, 0.25, 0]])
    assert not np.asarray(losses.token_weights(jnp.zeros((2, 3), jnp.int32), losses.step_by_step(0.5))).any()


def test_cross_entropy_and_sums_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]]))
    targets, tasks = jnp.array([[1, 2]]), jnp.array([[LABEL, RATIONALE]])
    loss, sums = losses.weighted_cross_entropy(
        losses.token_statistics(logits, targets),
        task_ids_BT=tasks,
        weights_BT=jnp.array([[2.0, 1.0]]),
        objectives=losses.step_by_step(0.5),
        z_loss=0.0,
    )
    assert float(loss) == pytest.approx(2 * np.log(4) + np.log(4 / 3), rel=1e-6)
    assert float(sums["label"].cross_entropy) == pytest.approx(np.log(4), rel=1e-6)
    assert (float(sums["label"].correct), float(sums["rationale"].correct)) == (0.0, 1.0)
    assert sums["rationale"].means("rationale") == {
        "loss/rationale": pytest.approx(np.log(4 / 3), rel=1e-6),
        "token_accuracy/rationale": 1.0,
        "tokens/rationale": 1.0,
    }


def test_z_loss_is_the_square_of_the_log_normaliser():
    logits = jnp.zeros((1, 1, 8)) + 3.0
    arguments = {"task_ids_BT": jnp.array([[LABEL]]), "weights_BT": jnp.array([[0.5]])}
    loss_of = functools.partial(
        losses.weighted_cross_entropy,
        losses.token_statistics(logits, jnp.array([[0]])),
        objectives=losses.step_by_step(0.5),
        **arguments,
    )
    (plain, _), (with_z, _) = loss_of(z_loss=0.0), loss_of(z_loss=0.1)
    assert float(with_z - plain) == pytest.approx(0.5 * 0.1 * (3 + np.log(8)) ** 2, rel=1e-5)


@pytest.mark.parametrize(("chunks", "cap"), [(2, None), (3, None), (4, None), (3, 60.0)])
def test_statistics_in_chunks_are_those_of_the_logits(chunks, cap):
    random = np.random.default_rng(chunks)
    y, kernel = random.normal(size=(2, 6, 8)), random.normal(size=(8, 12))
    # The largest logit of every token, twice: only the first of the two is right.
    kernel[:, [4, 9]] = 0.0
    kernel[0, [4, 9]] = 50.0
    y[..., 0] = np.abs(y[..., 0]) + 1.0
    y, kernel = jnp.float32(y), jnp.float32(kernel)
    targets = jnp.array([[4, 9, 0, 4, 9, 11], [4, 4, 4, 9, 1, 2]])

    def whole(y, kernel):
        return losses.token_statistics(layers.capped(jnp.einsum("btd,dv->btv", y, kernel), cap), targets)

    def in_chunks(y, kernel):
        return losses.projected_token_statistics(y, kernel, targets, chunks=chunks, cap=cap)

    want, got = whole(y, kernel), in_chunks(y, kernel)
    np.testing.assert_array_equal(got.correct, targets == 4)
    np.testing.assert_array_equal(got.correct, want.correct)
    np.testing.assert_allclose(got.log_z, want.log_z, rtol=1e-6)
    np.testing.assert_allclose(got.target, want.target, rtol=1e-5, atol=1e-5)

    def loss(of):
        return lambda *arguments: jnp.sum(jnp.sin(of(*arguments).log_z) - of(*arguments).target)

    for ours, theirs in zip(*(jax.grad(loss(of), (0, 1))(y, kernel) for of in (in_chunks, whole)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_chunks_that_do_not_divide_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"vocabulary of 12 does not divide into 5 chunks; the nearest .* is 4"):
        losses.projected_token_statistics(
            jnp.zeros((1, 1, 2)), jnp.zeros((2, 12)), jnp.zeros((1, 1), jnp.int32), chunks=5
        )


# Sixteen examples of both tasks, of uneven lengths: (source tokens, target tokens, task).
_random = np.random.default_rng(7)
EXAMPLES = [
    (
        _random.integers(2, 384, _random.integers(3, 11)),
        _random.integers(2, 384, _random.integers(1, 3) if task == LABEL else _random.integers(4, 9)),
        task,
    )
    for _ in range(8)
    for task in (LABEL, RATIONALE)
]


def batch_of(rows, *, packed, examples, lengths=(24, 20)):
    """Builds model features of rows of example numbers, independently of the package."""
    names = ("encoder_input_tokens", "encoder_segment_ids")
    target_names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_task_ids", "decoder_segment_ids")
    batch = {name: np.zeros((len(rows), lengths[0]), np.int32) for name in names}
    batch |= {name: np.zeros((len(rows), lengths[1]), np.int32) for name in target_names}
    for row, members in enumerate(rows):
        source_at = target_at = 0
        for segment, number in enumerate(members, start=1):
            source, target, task = examples[number]
            span = slice(source_at, source_at + len(source))
            batch["encoder_input_tokens"][row, span] = source
            batch["encoder_segment_ids"][row, span] = segment
            span = slice(target_at, target_at + len(target))
            batch["decoder_target_tokens"][row, span] = target
            batch["decoder_input_tokens"][row, span] = [0, *target[:-1]]
            batch["decoder_task_ids"][row, span] = task
            batch["decoder_segment_ids"][row, span] = segment
            source_at, target_at = source_at + len(source), target_at + len(target)
    if not packed:
        batch = {name: x for name, x in batch.items() if not name.endswith("segment_ids")}
    return batch


ALONE = [[i] for i in range(16)]
# About two to a row, in another order, in a number of rows that 8 devices can share.
PACKED = [[0, 3], [2, 1], [5, 4], [6, 7], [9, 8], [10, 11], [13, 12], [14, 15]]


def prepared(*, packed, devices, micro_batches, alpha=0.5, mesh=None, vocabulary_chunks=1, execution=stacks.UNROLLED):
    """Makes the function of (rows, examples) that computes loss and gradients, split and laid out as asked."""
    # No dropout: its masks are drawn for the rows as they lie.
    config = dataclasses.replace(toy.MODEL, dropout_rate=0.0)
    structure, shapes, axes = families.abstract(config, execution=execution)
    parameters = families.init(config, seed=0)[1]
    scanned = execution.layers == "scanned"
    parameters = stacking.stack(parameters) if scanned else parameters
    layout = partitioning.DATA_PARALLEL if mesh is None else partitioning.Layout(**mesh)
    partitioner = layout.partitioner(jax.devices()[:devices])
    parameters = jax.device_put(parameters, partitioner.shardings(shapes, parameters=shapes, axes=axes))
    run = functools.partial(
        loss_and_gradients,
        structure=structure,
        objectives=losses.step_by_step(alpha),
        z_loss=1e-4,
        micro_batches=micro_batches,
        vocabulary_chunks=vocabulary_chunks,
        dropout_key=jax.random.key(0),
    )

    @jax.jit
    def constrained(parameters, batch):
        with partitioner.active():
            return run(parameters, batch)

    def compute(rows, examples=EXAMPLES):
        batch = partitioner.put_batch(batch_of(rows, packed=packed, examples=examples))
        loss, _, gradients = jax.device_get(constrained(parameters, batch))
        return float(loss), stacking.unstack(gradients) if scanned else gradients

    return compute


@pytest.fixture(scope="module")
def reference():
    return prepared(packed=False, devices=1, micro_batches=1)(ALONE)


SLICES = {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
CUBE = {"slice": 1, "data": 2, "fsdp": 2, "tensor": 2}
QUICK = {
    "both": {"devices": 4, "micro_batches": 4},
    "packed on 8": {"rows": PACKED, "devices": 8},
    "packed, both": {"rows": PACKED, "devices": 2, "micro_batches": 4},
    "2x2x2 mesh": {"devices": 8, "mesh": CUBE},
    "slices, scanned, chunks": {
        "rows": PACKED,
        "devices": 8,
        "mesh": SLICES,
        "vocabulary_chunks": 4,
        "execution": stacks.Execution(layers="scanned", remat="attended"),
    },
    "minimal remat": {"execution": stacks.Execution(layers="unrolled", remat="minimal")},
    "scanned, full remat": {
        "devices": 4,
        "micro_batches": 2,
        "execution": stacks.Execution(layers="scanned", remat="full"),
    },
}
# Each is part of one above.
LONG = {
    "8 devices": {"devices": 8},
    "4 micro-batches": {"micro_batches": 4},
    "packed": {"rows": PACKED},
    "vocabulary in chunks": {"vocabulary_chunks": 4},
}


@pytest.mark.parametrize(
    "how",
    [
        *(pytest.param(how, id=name) for name, how in QUICK.items()),
        *(pytest.param(how, id=name, marks=pytest.mark.faults) for name, how in LONG.items()),
    ],
)
def test_loss_and_gradients_do_not_depend_on_how_the_batch_lies(reference, how):
    options = dict(how)
    rows = options.pop("rows", ALONE)
    loss, gradients = prepared(**{"packed": rows is PACKED, "devices": 1, "micro_batches": 1, **options})(rows)
    assert loss == pytest.approx(reference[0], rel=1e-5)
    for name, want in reference[1].items():
        scale = np.abs(want).max()
        assert scale > 0
        np.testing.assert_allclose(gradients[name], want, rtol=1e-4, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize(("alpha", "silent"), [(0.0, LABEL), (1.0, RATIONALE)])
def test_an_extreme_alpha_silences_the_other_task_exactly(reference, alpha, silent):
    compute = prepared(packed=False, devices=1, micro_batches=1, alpha=alpha)
    _, gradients = compute(ALONE)
    # Other targets for the silent task must change not one bit.
    changed = [
        (source, target if task != silent else (target + 5) % 380 + 2, task) for source, target, task in EXAMPLES
    ]
    _, again = compute(ALONE, changed)
    for name, want in gradients.items():
        np.testing.assert_array_equal(again[name], want, err_msg=name)
    assert not np.array_equal(reference[1]["logits_dense/kernel"], gradients["logits_dense/kernel"])
