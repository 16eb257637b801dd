"""The method on unmodified T5X: its encoder-decoder model and trainer, with our loss. See docs/t5x.md.

Needs T5X (scripts/t5x.txt). Only the gin files in `gin_configs/t5x/` import it.
"""

# T5X may be missing where types are checked; if it is installed, its annotations name NumPy arrays for JAX's.
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from t5x import decoding, models, state_utils, trainer

from sbs_jax.data import batches, registry, selection, task_names
from sbs_jax.student import losses

# Feature that `StepByStepTrainer` adds to a batch; T5X cuts it into micro-batches with the others.
TOKEN_WEIGHTS = "decoder_token_weights"


class StepByStepModel(models.EncoderDecoderModel):
    """T5X's encoder-decoder with the step-by-step loss.

    Adds to T5X's metrics `loss/label`, `loss/rationale` (nats per token), `token_accuracy/..` and `tokens/..`; of
    several datasets `loss/svamp/label` and so on.
    """

    FEATURE_CONVERTER_CLS = batches.StepByStepFeatureConverter

    def __init__(
        self,
        *,
        module: Any,
        optimizer_def: Any,
        data: selection.DataOptions,
        alpha: float,
        mixture_or_task_name: str | None = None,
        loss_weights: Mapping[str, float] | None = None,
        z_loss: float = 0.0,
        decode_fn: Callable[..., Any] = decoding.beam_search,
        default_decoder_params: models.DecoderParams | None = None,
    ):
        """Configures every task with `data`: T5X builds its model before it opens a dataset.

        `module` is T5X's `network.Transformer`, `optimizer_def` one of T5X's optimizers, `alpha` the share of the label
        task. A mixture of several datasets needs its name, and may have `loss_weights`, as in
        `task_names.objectives`. ValueError if the network's table is smaller than the vocabulary.
        """
        if not 0.0 <= alpha <= 1.0 or z_loss < 0.0:
            raise ValueError(f"Got alpha {alpha!r} and z_loss {z_loss!r}; expected 0 <= alpha <= 1 and z_loss >= 0.")
        registry.configure(data)
        vocabulary = registry.vocabulary(data.vocabulary)
        if data.number_slots:
            raise ValueError(
                "NUMBER_SLOTS is True, but T5X grades answers without putting the numbers back; train with sbs train."
            )
        if vocabulary.vocab_size > module.config.vocab_size:
            raise ValueError(
                f"The vocabulary {data.vocabulary} has {vocabulary.vocab_size} ids, and the network's table "
                f"{module.config.vocab_size} rows. Set network.T5Config.vocab_size, or another --gin.VOCABULARY."
            )
        super().__init__(
            module=module,
            input_vocabulary=vocabulary,
            output_vocabulary=vocabulary,
            optimizer_def=optimizer_def,
            decode_fn=decode_fn,
            default_decoder_params=default_decoder_params,
            z_loss=z_loss,
        )
        if mixture_or_task_name is None:
            self._objectives = losses.step_by_step(alpha)
        else:
            self._objectives = task_names.objectives(mixture_or_task_name, alpha=alpha, weights=loss_weights)

    def with_token_weights(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Adds to a global batch the weight of each target token, float32 [B, T]."""
        task_ids, shares = batch["decoder_task_ids"], batch["decoder_loss_weights"]
        return {**batch, TOKEN_WEIGHTS: losses.token_weights(task_ids, self._objectives, shares_BT=shares)}

    def loss_fn(
        self, params: Any, batch: Mapping[str, jax.Array], dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, models.MetricsMap]:
        """Returns loss and metrics of a batch, or of a micro-batch with its share of the global batch's weights.

        In evaluation (no key) a batch is never cut. ValueError in training for a batch without weights.
        """
        if TOKEN_WEIGHTS not in batch and dropout_rng is not None:
            raise ValueError(
                "A training batch has no token weights, and T5X's own trainer may have cut it, so they cannot be "
                "computed. Bind trainer_cls = @t5x_model.StepByStepTrainer, as gin_configs/t5x/finetune.gin does."
            )
        batch = batch if TOKEN_WEIGHTS in batch else self.with_token_weights(batch)
        logits = self._compute_logits(params, batch, dropout_rng).astype(jnp.float32)
        targets, mask = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        loss_of = functools.partial(
            losses.weighted_cross_entropy,
            losses.token_statistics(logits, targets),
            task_ids_BT=batch["decoder_task_ids"],
            weights_BT=batch[TOKEN_WEIGHTS],
            objectives=self._objectives,
        )
        loss, sums = loss_of(z_loss=self._z_loss)
        z_loss = loss - loss_of(z_loss=0.0)[0]  # XLA computes once what the two calls share
        packed = {name.removesuffix("_segment_ids"): x for name, x in batch.items() if name.endswith("_segment_ids")}
        unpacked = {name: batch[name] != 0 for name in ("encoder_input_tokens", "decoder_target_tokens")}
        metrics = self._compute_metrics(logits, targets, mask, loss, z_loss, packed or unpacked)
        for name, mine in sums.items():
            # Gives 0 instead of 0 / 0 for an objective without tokens; other counts are at least 1 and do not change.
            count = jnp.maximum(mine.tokens, 1e-9)
            metrics |= {
                f"loss/{name}": models.clu_metrics.Average(total=mine.cross_entropy, count=count),
                f"token_accuracy/{name}": models.clu_metrics.Average(total=mine.correct, count=count),
                f"tokens/{name}": models.metrics_lib.AveragePerStep(total=mine.tokens),
            }
        return loss, metrics


class StepByStepTrainer(trainer.Trainer):
    """T5X's trainer, with token weights computed before a batch is cut into micro-batches."""

    @functools.cached_property
    def _partitioned_train_step(self) -> Any:
        def step(state: Any, batch: Mapping[str, jax.Array]) -> Any:
            return trainer.train_with_lr(
                state,
                self._model.with_token_weights(batch),
                learning_rate=self._learning_rate_fn(state.step),
                dropout_rng=self._get_step_rng(state.step),
                model=self._model,
                num_microbatches=self._num_microbatches,
                weight_metrics_computer=self._weight_metrics_computer,
                data_partition_spec=self._partitioner.data_partition_spec,
            )

        axes, of_batch = self._train_state_axes, self._partitioner.data_partition_spec
        return self._partitioner.partition(
            step, in_axis_resources=(axes, of_batch), out_axis_resources=(axes, None), donate_argnums=(0,)
        )


def only_parameters(checkpoint: Mapping[str, Any], model: Mapping[str, Any], *, is_resuming: bool = False) -> Any:
    """Keeps the parameters of a stored state, so that a run starts at step 0 with a fresh optimizer.

    For `utils.RestoreCheckpointConfig.state_transformation_fns`; takes the state as stored and as the model has it.
    T5X silently initializes missing parameters (`fallback_to_scratch`), so here they are a ValueError.
    """
    if is_resuming:
        return checkpoint
    wanted, found = (set(state_utils.flatten_state_dict(tree["target"])) for tree in (model, checkpoint))
    if missing := sorted(wanted - found):
        raise ValueError(
            f"The checkpoint lacks {len(missing)} of the model's {len(wanted)} parameters, {missing[0]} for one. "
            "Include T5X's gin file of the model that the checkpoint was trained with."
        )
    return {"target": checkpoint["target"]}
