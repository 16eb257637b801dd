"""The step-by-step loss: by hand, and unchanged by devices, micro-batches and packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from sbs_jax.student import families, layers, losses, mutual_information, partitioning, soft_targets, stacking, stacks
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


def batch_of(rows, *, packed, examples, lengths=(24, 20), teacher=None, weights=None):
    """Builds model features of rows of example numbers, independently of the package.

    `teacher` has the soft targets of some examples, by number: ids [n, K], log_p [n, K], log_p_rest [n]. `weights` has
    the weights of some, too; the others have 1.
    """
    names = ("encoder_input_tokens", "encoder_segment_ids")
    target_names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_task_ids", "decoder_segment_ids")
    batch: dict[str, np.ndarray] = {name: np.zeros((len(rows), lengths[0]), np.int32) for name in names}
    batch |= {name: np.zeros((len(rows), lengths[1]), np.int32) for name in target_names}
    batch["decoder_loss_weights"] = np.zeros((len(rows), lengths[1]), np.float32)
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
            batch["decoder_loss_weights"][row, span] = (weights or {}).get(number, 1.0)
            for name, values in zip(soft_targets.FEATURES, (teacher or {}).get(number, ()), strict=False):
                empty = 0 if name == soft_targets.IDS else -np.inf
                shape = (len(rows), lengths[1], *values.shape[1:])
                batch.setdefault(name, np.full(shape, empty, values.dtype))[row, span] = values
            source_at, target_at = source_at + len(source), target_at + len(target)
    if not packed:
        batch = {name: x for name, x in batch.items() if not name.endswith("segment_ids")}
    return batch


ALONE = [[i] for i in range(16)]
# About two to a row, in another order, in a number of rows that 8 devices can share.
PACKED = [[0, 3], [2, 1], [5, 4], [6, 7], [9, 8], [10, 11], [13, 12], [14, 15]]


def prepared(
    *,
    packed,
    devices,
    micro_batches,
    alpha=0.5,
    mesh=None,
    vocabulary_chunks=1,
    execution=stacks.UNROLLED,
    lengths=(24, 20),
    tie=None,
    soft_share=0.0,
):
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
        loss=losses.Loss(
            objectives=losses.step_by_step(alpha), z_loss=1e-4, mutual_information=tie, soft_share=soft_share
        ),
        micro_batches=micro_batches,
        vocabulary_chunks=vocabulary_chunks,
        dropout_key=jax.random.key(0),
    )

    @jax.jit
    def constrained(parameters, batch):
        with partitioner.active():
            return run(parameters, batch)

    def compute(rows, examples=EXAMPLES, teacher=None, weights=None):
        batch = batch_of(rows, packed=packed, examples=examples, lengths=lengths, teacher=teacher, weights=weights)
        loss, compute.sums, gradients = jax.device_get(constrained(parameters, partitioner.put_batch(batch)))
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


def test_a_weight_of_two_is_the_row_twice():
    """Every third example has weight 2, or is there twice; also on 8 devices, packed."""
    heavy = set(range(0, 16, 3))
    examples = [EXAMPLES[number] for number in range(16)] + [EXAMPLES[n] for n in heavy]
    twice = prepared(packed=False, devices=1, micro_batches=1)([[n] for n in range(len(examples))], examples)
    for rows, options in (
        (ALONE, {"packed": False, "devices": 1, "micro_batches": 1}),
        (PACKED, {"packed": True, "devices": 8, "micro_batches": 1}),
        (ALONE, {"packed": False, "devices": 2, "micro_batches": 4}),
    ):
        loss, gradients = prepared(**options)(rows, weights=dict.fromkeys(heavy, 2.0))
        assert loss == pytest.approx(twice[0], rel=1e-5)
        for name, want in twice[1].items():
            np.testing.assert_allclose(gradients[name], want, rtol=1e-4, atol=2e-5 * np.abs(want).max(), err_msg=name)
    plain = prepared(packed=False, devices=1, micro_batches=1)(ALONE)
    assert abs(plain[0] - twice[0]) > 1e-3


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


# ------------------------------------------------------------------------- terms beside cross-entropy


def test_tokens_count_by_their_shares():
    shares = jnp.array([[1.0, 0.5, 0, 0], [0.25] * 4, [0.25, 0.25, 1.5, 0]])
    weights = losses.token_weights(TASKS, losses.step_by_step(0.6), shares_BT=shares)
    of_label, of_rationale = 0.6 / 3.0, 0.4 / 1.5
    want = [[of_label, of_label / 2, 0, 0], [of_rationale / 4] * 4, [of_rationale / 4] * 2 + [1.5 * of_label, 0]]
    np.testing.assert_allclose(weights, want, rtol=1e-6)
    # Shares below one token in all still make a mean.
    small = losses.token_weights(TASKS, losses.step_by_step(0.6), shares_BT=shares / 100)
    np.testing.assert_allclose(small, want, rtol=1e-6)


@pytest.mark.parametrize("chunks", [1, 3])
def test_smoothed_labels_have_the_cross_entropy_to_their_distribution(chunks):
    random = np.random.default_rng(0)
    y, kernel = random.normal(size=(1, 2, 5)), random.normal(size=(5, 6))
    targets, tasks = np.array([[1, 4]]), np.array([[LABEL, RATIONALE]])

    def loss(y):
        if chunks == 1:
            statistics = losses.token_statistics(y @ jnp.float32(kernel), jnp.array(targets))
        else:
            statistics = losses.projected_token_statistics(
                y, jnp.float32(kernel), jnp.array(targets), chunks=chunks, mean=True
            )
        value, sums = losses.weighted_cross_entropy(
            statistics,
            task_ids_BT=jnp.array(tasks),
            weights_BT=jnp.array([[2.0, 3.0]]),
            objectives=losses.step_by_step(0.5, smoothing=0.2),
            z_loss=0.0,
        )
        return value, sums["label"].cross_entropy

    logits = y @ kernel
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = np.stack([0.8 * np.eye(6)[1] + 0.2 / 6, np.eye(6)[4]])
    want = -(np.array([2.0, 3.0])[:, None] * wanted * np.log(p[0])).sum()
    (value, plain), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.float32(y))
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert float(plain) == pytest.approx(-np.log(p[0, 0, 1]), rel=1e-5)  # the metric is not smoothed
    dlogits = np.array([2.0, 3.0])[:, None] * (p[0] - wanted)
    np.testing.assert_allclose(gradient[0], dlogits @ kernel.T, rtol=1e-4, atol=1e-5)


def pooled(logits: np.ndarray, targets: int) -> np.ndarray:
    logits = logits[:targets].astype(np.float64)
    return (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).max(axis=0)


def mutual_information_by_hand(label: np.ndarray, rationale: np.ndarray, form: str) -> float:
    if form == "as_written":
        return float(-(label * np.log(rationale)).sum())
    return float(-(label * (rationale - np.log(np.exp(rationale).sum()))).sum())


@pytest.mark.parametrize("form", mutual_information.FORMS)
def test_mutual_information_by_hand_packed_and_not(form):
    random = np.random.default_rng(1)
    lengths = [2, 3, 1, 4]  # label and rationale of two rows
    logits = [random.normal(size=(5, 7)) for _ in lengths]
    want = sum(
        mutual_information_by_hand(pooled(logits[i], lengths[i]), pooled(logits[i + 1], lengths[i + 1]), form)
        for i in (0, 2)
    )
    tasks = np.array([[1 + i % 2] * n + [0] * (5 - n) for i, n in enumerate(lengths)])
    alone = np.stack(logits)
    packed = np.concatenate([each[:n] for each, n in zip(logits, lengths, strict=True)])[None]
    segments = np.repeat([1, 2, 3, 4], lengths)[None]

    def found(logits, tasks, segments=None):
        logits = jnp.float32(logits)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        segments = None if segments is None else jnp.array(segments)
        return mutual_information.sum_over_pairs(
            logits, log_z, task_ids_BT=jnp.array(tasks), segments_BT=segments, form=form
        )

    assert float(found(alone, tasks)) == pytest.approx(want, rel=1e-5)
    packed_tasks = np.where(segments % 2, LABEL, RATIONALE)
    assert float(found(packed, packed_tasks, segments)) == pytest.approx(want, rel=1e-5)
    # Padding rows, which hold no pair, change neither value nor gradient.
    gradient = jax.grad(found)(jnp.float32(np.concatenate([alone, alone[:2]])), np.concatenate([tasks, tasks[:2] * 0]))
    np.testing.assert_allclose(gradient[:4], jax.grad(found)(jnp.float32(alone), tasks), rtol=1e-5)
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all()
    assert not gradient[4:].any()
    label_gradient = np.abs(gradient[[0, 2]]).max()
    assert (label_gradient == 0) == (form == "as_released")  # its target is held constant


# Two pairs to a row, in another order.
PACKED_PAIRS = [[2, 3, 0, 1], [6, 7, 4, 5], [10, 11], [8, 9], [12, 13], [14, 15], [], []]


@pytest.fixture(scope="module")
def tied():
    return prepared(packed=False, devices=1, micro_batches=1, tie=TIE)(ALONE)


TIE = mutual_information.MutualInformation("as_written", 0.3)


def test_the_mutual_information_loss_adds_its_mean_over_pairs(reference, tied):
    twice = mutual_information.MutualInformation("as_written", 0.6)
    other, _ = prepared(packed=False, devices=1, micro_batches=1, tie=twice)(ALONE)
    assert tied[0] > reference[0]
    assert other - reference[0] == pytest.approx(2 * (tied[0] - reference[0]), rel=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"devices": 4, "micro_batches": 4}, id="both"),
        pytest.param({"rows": PACKED_PAIRS, "devices": 8, "micro_batches": 1}, id="packed on 8"),
        pytest.param({"rows": PACKED_PAIRS, "devices": 2, "micro_batches": 4}, id="packed, both"),
    ],
)
def test_the_mutual_information_loss_does_not_depend_on_how_pairs_lie(tied, how):
    rows = how.pop("rows", ALONE)
    lengths = (48, 40) if rows is PACKED_PAIRS else (24, 20)
    loss, gradients = prepared(packed=rows is PACKED_PAIRS, lengths=lengths, **how, tie=TIE)(rows)
    assert loss == pytest.approx(tied[0], rel=1e-5)
    for name, want in tied[1].items():
        np.testing.assert_allclose(gradients[name], want, rtol=1e-4, atol=2e-5 * np.abs(want).max(), err_msg=name)


# ------------------------------------------------------------------------------------ soft targets


def soft_targets_of(numbers, *, top_k=6, seed=3):
    """Draws a teacher's distributions for these examples, in the types of a store."""
    random = np.random.default_rng(seed)
    found = {}
    for number in numbers:
        logits = jnp.asarray(3 * random.normal(size=(1, len(EXAMPLES[number][1]), 384)), jnp.float32)
        largest = soft_targets.largest(logits, count=top_k)
        ids, log_p, rest = (np.asarray(x)[0] for x in (largest.ids, largest.log_p, largest.log_p_rest))
        found[number] = ids.astype(np.uint16), log_p.astype(np.float16), rest.astype(np.float16)
    return found


TEACHER = soft_targets_of(range(12))  # the last examples have none


@pytest.fixture(scope="module")
def distilled():
    compute = prepared(packed=False, devices=1, micro_batches=1, soft_share=0.7)
    return compute(ALONE, teacher=TEACHER), compute.sums


@pytest.mark.parametrize(
    "how", [pytest.param(QUICK[name], id=name) for name in ("both", "packed on 8", "packed, both", "2x2x2 mesh")]
)
def test_the_loss_of_soft_targets_does_not_depend_on_how_the_batch_lies(distilled, how):
    options = dict(how)
    rows = options.pop("rows", ALONE)
    how = {"packed": rows is PACKED, "devices": 1, "micro_batches": 1, "soft_share": 0.7, **options}
    compute = prepared(**how)
    loss, gradients = compute(rows, teacher=TEACHER)
    (want, expected), sums = distilled
    assert loss == pytest.approx(want, rel=1e-5)
    for name in ("label", "rationale"):
        for each in (f"kl/{name}", name):
            got, expected_sums = compute.sums[each].means("x"), sums[each].means("x")
            np.testing.assert_allclose([*got.values()], [*expected_sums.values()], rtol=1e-5)
    for name, x in expected.items():
        np.testing.assert_allclose(gradients[name], x, rtol=1e-4, atol=2e-5 * np.abs(x).max(), err_msg=name)


def test_soft_targets_are_mixed_in_by_their_share_where_there_are_some(reference, distilled):
    """The loss is linear in the share, whose value for 1 is read off; tokens without a teacher keep their own loss."""
    without = prepared(packed=False, devices=1, micro_batches=1, soft_share=0.0)(ALONE, teacher=TEACHER)[0]
    compute = prepared(packed=False, devices=1, micro_batches=1, soft_share=1.0)
    whole = compute(ALONE, teacher=TEACHER)[0]
    assert without == pytest.approx(reference[0], rel=1e-6)
    assert distilled[0][0] == pytest.approx(0.3 * without + 0.7 * whole, rel=1e-5)
    batch = batch_of(ALONE, packed=False, examples=EXAMPLES, teacher=TEACHER)
    taught, gain = np.isfinite(batch[soft_targets.LOG_P_REST]), 0.0
    for number, name in enumerate(("label", "rationale"), start=1):
        mine = batch["decoder_task_ids"] == number
        assert 0 < (mine & taught).sum() < mine.sum()
        assert float(compute.sums[f"kl/{name}"].count) == (mine & taught).sum()
        assert float(compute.sums[f"kl/{name}"].total) > 0.0
        gain += 0.5 * float(compute.sums[f"kl/{name}"].total) / mine.sum()
    nothing = {number: tuple(np.where(x < 0, -np.inf, x) for x in each) for number, each in TEACHER.items()}
    none = prepared(packed=False, devices=1, micro_batches=1, soft_share=1.0)(ALONE, teacher=nothing)[0]
    assert none == pytest.approx(reference[0], rel=1e-6)
    assert gain < whole


def test_with_the_whole_share_the_targets_of_taught_tokens_do_not_count():
    """The last target of an example is no input of the decoder, so another one changes nothing."""
    compute = prepared(packed=False, devices=1, micro_batches=1, soft_share=1.0)
    teacher = soft_targets_of(range(16))
    changed = [(source, np.append(target[:-1], target[-1] % 380 + 2), task) for source, target, task in EXAMPLES]
    _, gradients = compute(ALONE, teacher=teacher)
    _, again = compute(ALONE, changed, teacher=teacher)
    for name, want in gradients.items():
        np.testing.assert_allclose(again[name], want, rtol=1e-6, atol=1e-7 * np.abs(want).max(), err_msg=name)
