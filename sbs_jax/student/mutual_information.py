"""The mutual-information loss, which ties the label and the rationale of a row (Chen et al. 2024, arXiv 2403.03348).

    L = alpha * CE(label) + (1 - alpha) * CE(rationale) + weight * mean over rows of M

    y[v], r[v] = the largest probability of token v at any target position of the label, of the rationale
    as_written:   M = - sum over v of y[v] log r[v]
    as_released:  M = - sum over v of y[v] log softmax(r)[v], with y held constant

The released code gives its probabilities to a cross-entropy that takes another softmax, and sends no gradient into the
label. It also takes the maximum over the padding of its batch, which would make a row's loss depend on its neighbours;
neither form here does.

Label and rationale of a row are neighbours: rows 2i and 2i + 1 of a batch or, packed, segments 2i + 1 and 2i + 2 of a
row (`DataOptions.pairs`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sbs_jax import checks

FORMS = AS_WRITTEN, AS_RELEASED = ("as_written", "as_released")
MOST_PAIRS = 8  # in a packed row; the pooled probabilities are [rows, 2 * MOST_PAIRS, V]
_NONE = -1e30  # log-probability in place of -inf, whose gradient is not finite


@dataclasses.dataclass(frozen=True)
class MutualInformation:
    """The term of the loss: its form, and its weight beside the objectives."""

    form: str = AS_WRITTEN
    weight: int | float = 0.1

    def __post_init__(self) -> None:
        checks.choice("The mutual-information loss", self.form, FORMS)
        checks.number("The weight of the mutual-information loss", self.weight, above=0)


def pairs_in(inputs_BT: Int[Array, "B T"], task_ids_BT: Int[Array, "B T"]) -> Float[Array, ""]:
    """Counts the pairs of a global batch, packed or not; the decoder reads 0 at the start of each example."""
    return jnp.sum((inputs_BT == 0) & (task_ids_BT > 0)) / 2


def sum_over_pairs(
    logits_BTV: Float[Array, "B T V"],
    log_z_BT: Float[Array, "B T"],
    *,
    task_ids_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"] | None,
    form: str,
) -> Float[Array, ""]:
    """Returns the sum of M over the pairs of these rows, in nats; `segments_BT` are those of packed rows."""
    most = 1 if segments_BT is None else 2 * MOST_PAIRS
    numbers_BT = jnp.where(task_ids_BT > 0, 1 if segments_BT is None else segments_BT, 0)
    mine_BST = numbers_BT[:, None, :] == jnp.arange(1, most + 1)[None, :, None]
    log_p_BTV = logits_BTV - log_z_BT[..., None]
    pooled_BSV = jnp.max(jnp.where(mine_BST[..., None], log_p_BTV[:, None], _NONE), axis=2)
    pooled_P2V = pooled_BSV.reshape(-1, 2, pooled_BSV.shape[-1])
    # Places without a pair have probability 0 for every label token, and so add 0.
    label_PV, rationale_PV = jnp.exp(pooled_P2V[:, 0]), pooled_P2V[:, 1]
    if form == AS_RELEASED:
        label_PV = jax.lax.stop_gradient(label_PV)
        rationale_PV = jax.nn.log_softmax(jnp.exp(rationale_PV), axis=-1)
    return -jnp.sum(label_PV * rationale_PV)
