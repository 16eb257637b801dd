"""Steps with rewards: the student samples answers on the devices, the host grades them, the devices update it.

Both programs are compiled. The samples are of (seed, step) alone, so a resumed run repeats them bit for bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbs_jax.data import features, registry, rewards, task_names
from sbs_jax.student import families, partitioning, rollouts, stacking
from sbs_jax.training import evaluate
from sbs_jax.training.config import TrainConfig

REWARDS = "rewards"  # feature of an update's batch, [answers, rewards]


def shapes(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of an update's batch, whose rows are answers."""
    assert config.policy is not None
    rows = config.batch_size * config.policy.samples
    graded = jax.ShapeDtypeStruct((rows, len(config.policy.rewards)), jnp.float32)
    return {**features.shapes(config.task_feature_lengths, batch_size=rows, pack=False), REWARDS: graded}


def sampled(state: Any, batch: Any, *, student: families.Structure, config: TrainConfig) -> tuple[Any, tuple[Any, Any]]:
    """Samples answers, K to a prompt; returns the batch of an update without rewards, and (answers, right targets).

    `student` is the structure with separate layers.
    """
    assert config.policy is not None
    count, key = config.policy.samples, jax.random.fold_in(jax.random.wrap_key_data(state.root_key), state.step)
    model = families.join(student, stacking.unstack({**state.frozen, **state.parameters}))
    sources, task_ids = (repeated(batch[name], count) for name in ("encoder_input_tokens", "decoder_task_ids"))
    tokens = rollouts.sample(
        *(model, sources),
        key=jax.random.fold_in(key, rollouts.KEY),
        length=config.task_feature_lengths["targets"],
        temperature=1.0,
    )
    inputs, task_ids = rollouts.as_targets(tokens, task_ids, eos_id=model.config.eos_id)
    answers = {
        "encoder_input_tokens": sources,
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": (task_ids > 0).astype(jnp.float32),
        "decoder_task_ids": task_ids,
    }
    return answers, (tokens, batch["decoder_target_tokens"])


def repeated(rows_B: jax.Array, count: int) -> jax.Array:
    """Repeats each row `count` times, after one another; each device keeps its own."""
    shape = (len(rows_B), count, *rows_B.shape[1:])
    return jnp.broadcast_to(rows_B[:, None], shape).reshape(-1, *rows_B.shape[1:])


@dataclasses.dataclass(frozen=True)
class RewardedStep:
    """A step of a run with rewards, called as any other; `lower` lowers its update."""

    config: TrainConfig
    partitioner: partitioning.Partitioner
    sample: Callable[..., Any]
    update: Any  # jitted

    def __call__(self, state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        answers, read = self.sample(state, batch)
        graded = self.partitioner.put_batch({REWARDS: self._graded(*map(np.asarray, read))})
        return self.update(state, {**answers, **graded})

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        return self.update.lower(*arguments)

    def _graded(self, answers: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Grades this process's answers; returns float32 [answers, rewards]."""
        config, policy = self.config, self.config.policy
        assert policy is not None
        dataset, kind = task_names.split(config.mixture_or_task_name)
        vocabulary, names = registry.vocabulary(config.data.vocabulary), tuple(name for name, _ in policy.rewards)
        found = []
        for row in self.partitioner.local_rows(len(answers)).tolist():
            tokens, expected = (
                evaluate.before_eos(ids, eos_id=config.model.eos_id)
                for ids in (answers[row], right[row // policy.samples])
            )
            has_ended = len(tokens) < answers.shape[1]
            answer = rewards.Answer(
                text=vocabulary.decode(tokens),
                right=vocabulary.decode(expected),
                dataset=dataset,
                kind=kind,
                tokens=len(tokens) + has_ended,
                most=answers.shape[1],
                ended=has_ended,
            )
            found.append(rewards.of(answer, names, config.own_reward))
        return np.asarray(found, np.float32)
