"""The loss of several objectives: one weight per target token, one weighted sum.

    L = sum over objectives of weight * mean CE over the objective's target tokens

Step-by-step is the case of two (Hsieh et al. 2023, Eq. 3, with the official code's weighting):

    L = alpha * mean CE over label tokens + (1 - alpha) * mean CE over rationale tokens

All means run over the tokens of the *global* batch, and may be weighted. So token weights are computed once on the
whole batch, before micro-batching and sharding. The loss is then a plain weighted sum, which micro-batches, sharding
and packing cannot change.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sbs_jax.student import layers, partitioning
from sbs_jax.student.mutual_information import MutualInformation
from sbs_jax.student.on_policy import OnPolicy
from sbs_jax.student.policy import Policy
from sbs_jax.student.soft_targets import Divergence

# Values of the `task_ids` feature for one dataset; 0 is padding.
LABEL, RATIONALE = 1, 2


@dataclasses.dataclass(frozen=True)
class Objective:
    """A part of the loss: the mean cross-entropy over its target tokens, times a weight.

    Of several objectives, the first has task id 1, the second 2, and so on.
    """

    name: str  # of its metrics: "label" gives "loss/label"
    weight: Any  # a number, or a scalar array that depends on the step
    smoothing: float = 0.0  # share of the target's probability that all tokens of the vocabulary divide evenly


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """Everything that a step minimizes: the objectives, and terms beside them."""

    objectives: Sequence[Objective]
    z_loss: float = 0.0
    mutual_information: MutualInformation | None = None
    soft_share: float = 0.0  # of the divergence from soft targets; the cross-entropy has the rest
    on_policy: OnPolicy | None = None  # the divergence from a teacher in memory
    policy: Policy | None = None  # rewards of sampled answers, instead of all the others

    @property
    def smooths(self) -> bool:
        """Tells whether an objective's targets are smoothed."""
        return any(objective.smoothing for objective in self.objectives)


def step_by_step(alpha: Any, *, smoothing: float = 0.0) -> tuple[Objective, ...]:
    """Returns the objectives of one dataset: labels with weight alpha, rationales with the rest.

    `smoothing` is of the labels.
    """
    return Objective("label", alpha, smoothing), Objective("rationale", 1.0 - alpha)


def token_weights(
    task_ids_BT: Int[Array, "B T"], objectives: Sequence[Objective], *, shares_BT: Array | None = None
) -> Float[Array, "B T"]:
    """Computes the weight of each target token: its objective's weight, times its share of that objective's tokens.

    `shares_BT` says how much each token counts beside the others of its objective; None: all alike. Call it on the
    whole global batch. Padding has 0. An objective without tokens in the batch contributes nothing (its mean is
    undefined), and the others keep their own weights.

    >>> token_weights(jnp.array([[1, 1, 0, 0], [2, 2, 2, 2]]), step_by_step(alpha=0.5))
    [[0.25 0.25 0. 0.] [0.125 0.125 0.125 0.125]]
    """
    counts_BT = (task_ids_BT > 0 if shares_BT is None else shares_BT).astype(jnp.float32)
    weights = jnp.zeros(task_ids_BT.shape, jnp.float32)
    for number, objective in enumerate(objectives, start=1):
        mine = (task_ids_BT == number).astype(jnp.float32) * counts_BT
        total = mine.sum()
        weights += mine * (objective.weight / jnp.where(total > 0.0, total, 1.0))
    return weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the target tokens of one objective; they add up over micro-batches."""

    # Typed Any because JAX transformations replace the scalars by shapes and placeholders.
    cross_entropy: Any
    correct: Any
    tokens: Any

    def means(self, name: str) -> dict[str, Float[Array, ""]]:
        """Returns `{"loss/label": nats per token, "token_accuracy/label": 0..1, "tokens/label": count}`."""
        # An objective without tokens gets 0, not NaN; its count of 0 shows why.
        count = jnp.maximum(self.tokens, 1.0)
        return {
            f"loss/{name}": self.cross_entropy / count,
            f"token_accuracy/{name}": self.correct / count,
            f"tokens/{name}": self.tokens,
        }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A metric that is a sum divided by a count, each of which adds up over micro-batches."""

    total: Any
    count: Any

    def means(self, name: str) -> dict[str, Float[Array, ""]]:
        """Returns the metric by its name; 0 of a count of 0."""
        return {name: self.total / jnp.where(self.count > 0.0, self.count, 1.0)}


def means(sums: Mapping[str, Sums | Mean]) -> dict[str, Float[Array, ""]]:
    """Returns the metrics of all sums by name."""
    return {metric: value for name, found in sums.items() for metric, value in found.means(name).items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """Statistics of each target token's logits for the loss, each float32 [B, T]."""

    log_z: Any  # log of the softmax's normalizer
    target: Any  # logit of the target
    correct: Any  # 1 if the target is the argmax (ties go to the first), which greedy decoding picks
    mean: Any  # mean logit of the vocabulary, for smoothed targets


def token_statistics(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> TokenStatistics:
    """Computes per-token statistics from float32 logits; under jit, those that nothing uses cost nothing."""
    # A masked sum instead of a gather: it fuses, and needs no communication if the vocabulary is sharded.
    is_target = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[..., None]
    return TokenStatistics(
        log_z=jax.nn.logsumexp(logits_BTV, axis=-1),
        target=jnp.sum(jnp.where(is_target, logits_BTV, 0.0), axis=-1),
        correct=(jnp.argmax(logits_BTV, axis=-1) == targets_BT).astype(jnp.float32),
        mean=jnp.mean(logits_BTV, axis=-1),
    )


def projected_token_statistics(
    y_BTD: Float[Array, "B T D"],
    kernel_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    chunks: int,
    cap: float | None = None,
    mean: bool = False,
) -> TokenStatistics:
    """Computes per-token statistics of the logits `y kernel`, one of `chunks` parts of the vocabulary at a time.

    The float32 logits of a batch are the largest array of a training step. Here they never exist as a whole; the
    backward pass computes each chunk again. `cap` is the logits' soft cap. The mean logit is computed only if `mean`,
    else it is 0. ValueError if `chunks` does not divide the vocabulary.
    """
    if kernel_DV.shape[1] % chunks:
        near = partitioning.nearest_divisor(kernel_DV.shape[1], chunks)
        raise ValueError(
            f"A vocabulary of {kernel_DV.shape[1]} does not divide into {chunks} chunks; the nearest number that "
            f"divides it is {near}."
        )
    statistics: Any = _projected(y_BTD, kernel_DV, targets_BT, chunks, cap, mean)
    return TokenStatistics(*statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _projected(
    y_BTD: Array, kernel_DV: Array, targets_BT: Array, chunks: int, cap: float | None, mean: bool
) -> tuple[Array, Array, Array, Array]:
    return _projected_forward(y_BTD, kernel_DV, targets_BT, chunks, cap, mean)[0]


def _chunked(kernel_DV: Array, chunks: int) -> tuple[Array, Array]:
    """Cuts the kernel into `[chunks, D, V / chunks]` and gives each chunk's token ids, `[chunks, 1, 1, V / chunks]`."""
    kernels = jnp.moveaxis(kernel_DV.reshape(kernel_DV.shape[0], chunks, -1), 1, 0)
    return kernels, jnp.arange(kernel_DV.shape[1]).reshape(chunks, 1, 1, -1)


def _logits(y_BTD: Array, kernel_DC: Array, cap: float | None) -> Array:
    logits_BTC = jnp.einsum("btd,dc->btc", y_BTD, kernel_DC, preferred_element_type=jnp.float32)
    return layers.capped(partitioning.constrain(logits_BTC, ("batch", "length", "activation_vocab")), cap)


def _projected_forward(
    y_BTD: Array, kernel_DV: Array, targets_BT: Array, chunks: int, cap: float | None, mean: bool
) -> tuple[Any, Any]:
    def add(carry: tuple[Array, ...], chunk: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        # So far: the largest logit, its first token id, the sum of exp(logit - largest), the target's logit, the sum.
        largest_BT, first_BT, total_BT, target_BT, sum_BT = carry
        kernel_DC, ids_11C = chunk
        logits_BTC = _logits(y_BTD, kernel_DC, cap)
        of_chunk_BT = jnp.max(logits_BTC, axis=-1)
        now_BT = jnp.maximum(largest_BT, of_chunk_BT)
        total_BT = total_BT * jnp.exp(largest_BT - now_BT) + jnp.sum(jnp.exp(logits_BTC - now_BT[..., None]), axis=-1)
        target_BT += jnp.sum(jnp.where(ids_11C == targets_BT[..., None], logits_BTC, 0.0), axis=-1)
        # Ties go to the smallest id, also across chunks.
        none = jnp.iinfo(jnp.int32).max
        found_BT = jnp.min(jnp.where(logits_BTC == now_BT[..., None], ids_11C, none), axis=-1)
        first_BT = jnp.minimum(jnp.where(largest_BT == now_BT, first_BT, none), found_BT)
        if mean:
            sum_BT += jnp.sum(logits_BTC, axis=-1)
        return (now_BT, first_BT, total_BT, target_BT, sum_BT), None

    zero_BT = jnp.zeros(targets_BT.shape, jnp.float32)
    start = (zero_BT - jnp.inf, jnp.zeros(targets_BT.shape, jnp.int32), zero_BT, zero_BT, zero_BT)
    (largest_BT, first_BT, total_BT, target_BT, sum_BT), _ = jax.lax.scan(add, start, _chunked(kernel_DV, chunks))
    log_z_BT = largest_BT + jnp.log(total_BT)
    correct_BT = (first_BT == targets_BT).astype(jnp.float32)
    found = (log_z_BT, target_BT, correct_BT, sum_BT / kernel_DV.shape[1])
    return found, (y_BTD, kernel_DV, targets_BT, log_z_BT)


def _projected_backward(
    chunks: int, cap: float | None, mean: bool, kept: Any, gradients: tuple[Array, Array, Array, Array]
) -> tuple[Any, ...]:
    y_BTD, kernel_DV, targets_BT, log_z_BT = kept
    dlog_z_BT, dtarget_BT, _, dmean_BT = gradients

    def add(dy_BTD: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        kernel_DC, ids_11C = chunk
        # d log_z / d logits is the softmax; d target / d logits is 1 at the target.
        logits_BTC = _logits(y_BTD, kernel_DC, cap)
        dlogits_BTC = dlog_z_BT[..., None] * jnp.exp(logits_BTC - log_z_BT[..., None])
        dlogits_BTC += jnp.where(ids_11C == targets_BT[..., None], dtarget_BT[..., None], 0.0)
        if mean:
            dlogits_BTC += dmean_BT[..., None] / kernel_DV.shape[1]
        if cap is not None:
            dlogits_BTC *= 1 - jnp.square(logits_BTC / cap)
        dlogits_BTC = dlogits_BTC.astype(y_BTD.dtype)
        dkernel_DC = partitioning.constrain(jnp.einsum("btd,btc->dc", y_BTD, dlogits_BTC), ("embed", "vocab"))
        dy_BTD += jnp.einsum("btc,dc->btd", dlogits_BTC, kernel_DC, preferred_element_type=jnp.float32)
        return dy_BTD, dkernel_DC

    dy_BTD, dkernels = jax.lax.scan(add, jnp.zeros(y_BTD.shape, jnp.float32), _chunked(kernel_DV, chunks))
    dkernel_DV = jnp.moveaxis(dkernels, 0, 1).reshape(kernel_DV.shape)
    return dy_BTD.astype(y_BTD.dtype), dkernel_DV, None


_projected.defvjp(_projected_forward, _projected_backward)


def weighted_cross_entropy(
    statistics: TokenStatistics,
    *,
    task_ids_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    objectives: Sequence[Objective],
    z_loss: float,
    soft_share: float = 0.0,
    divergence: Divergence | None = None,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Returns the sum of weight * (CE + z_loss * log(Z)^2), and unweighted `Sums` per objective, all in nats.

    Where there is a `divergence` from soft targets, (1 - soft_share) * CE + soft_share * KL replaces CE, and its `Mean`
    of each objective is among the sums.

    `z_loss` is T5X's auxiliary term (1e-4 there, 0 in the official code). It pulls log(Z), the log of the softmax's
    normalizer, towards 0, with the same token weights as the cross-entropy. The cross-entropy of the loss is that to
    the smoothed targets; that of the sums is not smoothed.
    """
    cross_entropy_BT = statistics.log_z - statistics.target
    z_BT = z_loss * jnp.square(statistics.log_z)
    of_token_BT = cross_entropy_BT + z_BT
    sums: dict[str, Any] = {}
    for number, objective in enumerate(objectives, start=1):
        mine = (task_ids_BT == number).astype(jnp.float32)
        if objective.smoothing:
            of_token_BT += mine * objective.smoothing * (statistics.target - statistics.mean)
        sums[objective.name] = Sums(
            cross_entropy=jnp.sum(mine * cross_entropy_BT),
            correct=jnp.sum(mine * statistics.correct),
            tokens=jnp.sum(mine),
        )
        if divergence is not None:
            mine *= divergence.there
            sums[f"kl/{objective.name}"] = Mean(jnp.sum(mine * divergence.kl), jnp.sum(mine))
    if divergence is not None:
        of_token_BT += soft_share * divergence.there * (divergence.kl + z_BT - of_token_BT)
    return jnp.sum(weights_BT * of_token_BT), sums
