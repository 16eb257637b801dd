"""Configuration of a training run, in five parts. gin binds every field to the macro of its upper-case name."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from sbs_jax import checks
from sbs_jax.data import grading, selection, task_names
from sbs_jax.data import rewards as of_answers
from sbs_jax.data.dataset import STEP_BY_STEP, check_lengths
from sbs_jax.run import trackers
from sbs_jax.student import adapters, families, losses, partitioning, stacking, stacks
from sbs_jax.student.mutual_information import MutualInformation
from sbs_jax.student.on_policy import OnPolicy
from sbs_jax.student.policy import Policy

MEMORIES = ("device", "pinned_host")
_FEATURES = ("inputs", "targets")
_MARKER = 16  # tokens for selection.RATIONALE_MARKER, which has 12 bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """Loss, optimizer, and the size of an update."""

    batch_size: int  # rows per update, over all devices and micro-batches (see `rows_per_update`)
    micro_batches: int = 1  # sequential parts of a batch; gradients are those of the whole batch
    train_steps: int
    seed: int = 0
    alpha: float | optax.Schedule  # share of the label objective, of every step; the rationale's is 1 - alpha
    label_smoothing: float = 0.0  # share of a label token's probability that the whole vocabulary divides evenly
    mutual_information: str | None = None  # form of the loss that ties label and rationale (mutual_information.FORMS)
    mutual_information_weight: float = 0.1  # of that loss, beside the two tasks
    soft_targets: str | None = None  # store of a teacher's distributions (`sbs soft_targets`); None: without
    soft_share: float = 0.5  # of the divergence from them; the cross-entropy has the rest
    teacher: str | None = None  # run of a larger student that is kept in memory (on-policy distillation); None: without
    on_policy: float = 0.5  # share of steps whose divergence from it is on targets that the student samples
    jsd_beta: float = 0.5  # of the Jensen-Shannon divergence; 0: forward KL, 1: reverse KL
    jsd_share: float = 0.5  # of the divergence; the loss on the dataset's targets has the rest
    sampling_temperature: float = 1.0  # of the student's sampling
    rewards: Mapping[str, int | float] | None = None  # of sampled answers, by name (data/rewards.py), and their weights
    own_reward: Callable[[of_answers.Answer], Any] | None = None  # your function, of the weight rewards["own"]
    samples: int = 4  # answers per prompt and update
    kl_weight: float = 0.05  # of the penalty for leaving `teacher`, the student that policy optimization begins with
    advantage: str = "rloo"  # or "grpo", "dr_grpo" (policy.py)
    loss_weights: Mapping[str, int | float] | None = None  # of the datasets, or tasks, of a mixture; None: equal
    z_loss: float = 0.0  # weight of T5X's auxiliary loss
    optimizer: Callable[..., optax.GradientTransformation]  # called with learning_rate=
    learning_rate: optax.Schedule
    clip_norm: float | None = 1.0  # largest norm of the gradients; None: no clipping
    initial_checkpoint_path: str | None = None  # None: fresh parameters
    tuning: adapters.Tuning | None = None  # which parameters train; None trains all (gin_configs/adapters/)

    def __post_init__(self) -> None:
        _whole_numbers(self, "batch_size", "micro_batches", "train_steps", least=1)
        for step in (0, self.train_steps // 2, self.train_steps):
            alpha = np.asarray(self.alpha(step)).item() if callable(self.alpha) else self.alpha
            checks.number("TrainConfig.alpha", alpha)
            if not 0.0 <= alpha <= 1.0:
                when = f" at step {step}" if callable(self.alpha) else ""
                raise ValueError(
                    f"TrainConfig.alpha is {alpha!r}{when}; expected 0 (rationale only) to 1 (label only)."
                )
        checks.number("TrainConfig.label_smoothing", self.label_smoothing, least=0.0, below=1.0)
        for name in ("soft_targets", "teacher"):
            path = getattr(self, name)
            if path is not None and (not isinstance(path, str) or not path):
                raise ValueError(f"TrainConfig.{name} is {path!r}; expected a path or None.")
        _ = self.distillation, self.policy
        if self.rewards is not None or self.own_reward is not None:
            of_answers.check(self.rewards or {}, self.own_reward)
        checks.number("TrainConfig.soft_share", self.soft_share, above=0.0, most=1.0)
        checks.number("TrainConfig.z_loss", self.z_loss, least=0.0)
        if self.clip_norm is not None:
            checks.number("TrainConfig.clip_norm", self.clip_norm, above=0.0)
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.micro_batches} micro_batches; choose a "
                "multiple."
            )
        if not callable(self.optimizer) or not callable(self.learning_rate):
            raise ValueError(
                f"TrainConfig.optimizer and learning_rate are {self.optimizer!r} and {self.learning_rate!r}; expected "
                "an optimizer's constructor (gin: @optax.adamw) and a schedule (gin: @optax.constant_schedule())."
            )

    @property
    def distillation(self) -> OnPolicy | None:
        """Returns the term of a teacher in memory, None without one. ValueError for a number outside its range."""
        term = OnPolicy(
            share=self.jsd_share,
            beta=self.jsd_beta,
            probability=self.on_policy,
            temperature=self.sampling_temperature,
        )
        return None if self.teacher is None or self.rewards is not None else term

    @property
    def policy(self) -> Policy | None:
        """Returns what rewards do, None without rewards. ValueError for a number outside its range."""
        weights = {} if self.rewards is None else dict(self.rewards)
        policy = Policy(
            rewards=tuple(weights.items()),
            samples=self.samples,
            kl_weight=self.kl_weight,
            advantage=self.advantage,
        )
        return policy if self.rewards is not None else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Schedule of checkpoints, and the ones to keep: the newest, the best, the periodic."""

    checkpoint_period: int = 250  # steps
    keep_checkpoints: int = 2  # the newest; the older one is a fallback if the newest is damaged
    keep_best: int = 1  # by validation score
    keep_period: int | None = None  # or a number of steps: keep all of its multiples
    save_patience: float = 300.0  # seconds to retry the last checkpoint while the disk is full

    def __post_init__(self) -> None:
        _whole_numbers(self, "checkpoint_period", "keep_checkpoints", least=1)
        _whole_numbers(self, "keep_best", least=0)
        if self.keep_period is not None:
            _whole_numbers(self, "keep_period", least=1)
        checks.number("TrainConfig.save_patience", self.save_patience, least=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Validation during the run and the test at its end."""

    eval_period: int = 250  # steps
    eval_batch_size: int = 64  # rows graded at a time
    max_decode_length: int = 64  # tokens generated for an answer
    evaluate_test: bool = True  # grade the best checkpoint on test at the end
    patience: int | None = None  # evaluations without a better score until the run ends early; None: never

    def __post_init__(self) -> None:
        _whole_numbers(self, "eval_period", "eval_batch_size", "max_decode_length", least=1)
        if self.patience is not None:
            _whole_numbers(self, "patience", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """Devices and memory; they change speed, and results only by rounding."""

    execution: stacks.Execution
    layout: partitioning.Layout
    vocabulary_chunks: int = 1  # chunks of the vocabulary for the loss; one chunk of logits exists at a time
    optimizer_memory: str = "device"  # or "pinned_host": optimizer state in host memory between updates

    def __post_init__(self) -> None:
        _whole_numbers(self, "vocabulary_chunks", least=1)
        checks.choice("TrainConfig.optimizer_memory", self.optimizer_memory, MEMORIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guards:
    """Limits for failures that a run may survive, and a look at its steps."""

    skip_non_finite: int = 0  # updates with a non-finite loss or gradient to skip before the run stops
    stall_seconds: float = 300.0  # without progress, until the watchdog reports a stall
    profile_steps: Sequence[int] | None = None  # (first, last) step that the profiler traces

    def __post_init__(self) -> None:
        _whole_numbers(self, "skip_non_finite", least=0)
        checks.number("TrainConfig.stall_seconds", self.stall_seconds, above=0.0)
        steps = self.profile_steps
        if steps is not None and (
            not isinstance(steps, tuple | list)
            or len(steps) != 2
            or not all(type(step) is int for step in steps)
            or not 1 <= steps[0] <= steps[1]
        ):
            raise ValueError(
                f"TrainConfig.profile_steps is {steps!r}; expected the first and the last step, such as (10, 14), or "
                "None."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Optimization, Checkpointing, Evaluation, Compute, Guards):
    """A training run: model, data and five parts. A field's default is that of its macro; see gin_files.py."""

    model_dir: str
    model: families.ModelConfig
    data: selection.DataOptions
    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]  # tokens per row, {"inputs": .., "targets": ..}
    pack: bool = False  # several examples per row of TASK_FEATURE_LENGTHS
    log_period: int = 50  # steps
    trackers: Sequence[str] = ("tensorboard",)  # also "mlflow" and "wandb"

    def __post_init__(self) -> None:
        for part in TrainConfig.__bases__:
            part.__post_init__(self)
        _whole_numbers(self, "log_period", least=1)
        trackers.check(self.trackers)
        lengths = self.task_feature_lengths
        if set(lengths) != set(_FEATURES):
            raise ValueError(
                f"TrainConfig.task_feature_lengths is {dict(lengths)!r}; expected tokens of {' and '.join(_FEATURES)}: "
                "{'inputs': 176, 'targets': 112}."
            )
        for name in _FEATURES:
            checks.whole_number(f"TrainConfig.task_feature_lengths[{name!r}]", lengths[name], least=1)
        if self.pack and self.tuning is not None and self.tuning.prompt is not None:
            raise ValueError(
                "A prompt precedes each example, but packed rows hold several examples. Set PACK = False, or use "
                "prefix tuning, whose keys all examples of a row see."
            )
        self.loss(0)
        if self.mutual_information is not None:
            self._check_pairs()
        if self.soft_targets is not None and self.vocabulary_chunks > 1:
            raise ValueError(
                f"Soft targets need all logits at a time; got vocabulary_chunks {self.vocabulary_chunks}, expected 1."
            )
        if self.rewards is not None:
            self._check_rewards()
        elif self.teacher is not None and self.vocabulary_chunks > 1:
            raise ValueError(
                f"A teacher in memory needs all logits at a time; got vocabulary_chunks {self.vocabulary_chunks}, "
                "expected 1."
            )
        if self.teacher is not None and self.pack:
            raise ValueError(
                "The student samples one target per row, but packed rows hold several examples. Set PACK = False, or "
                "TEACHER = None."
            )
        self.gradient_transformation()  # a wrong optimizer argument fails here, before any compile

    def loss(self, step: Any) -> losses.Loss:
        """Returns the loss of a step, a number or an array. ValueError if `loss_weights` do not fit the mixture."""
        alpha = self.alpha(step) if callable(self.alpha) else self.alpha
        objectives = task_names.objectives(
            self.mixture_or_task_name, alpha=alpha, weights=self.loss_weights, smoothing=self.label_smoothing
        )
        term = None
        if self.mutual_information is not None:
            term = MutualInformation(self.mutual_information, self.mutual_information_weight)
        share = 0.0 if self.soft_targets is None else self.soft_share
        return losses.Loss(
            objectives=objectives,
            z_loss=self.z_loss,
            mutual_information=term,
            soft_share=share,
            on_policy=self.distillation,
            policy=self.policy,
        )

    @property
    def eval_task_names(self) -> tuple[str, ...]:
        """The tasks that validation and test grade.

        ValueError if only rationales are trained; ModuleNotFoundError if a metric needs a package that is missing.
        """
        names = task_names.graded(self.mixture_or_task_name)
        if not names:
            raise ValueError(
                f"{self.mixture_or_task_name} has only rationales, which cannot be graded; train on the mixture "
                "<dataset>_step_by_step, with ALPHA = 0 to ignore the labels."
            )
        for name in names:
            grading.check_installed(task_names.dataset_of(name).metric_fns)
        return names

    def _check_rewards(self) -> None:
        """Refuses rewards beside what they do not go with."""
        name = self.mixture_or_task_name
        kinds = [task_names.split(part)[1] for part in task_names.parts(name)]
        wrong = {
            f"{name} is trained; expected one task, <dataset>_label or <dataset>_rationale_then_label": (
                len(kinds) > 1 or kinds[0] not in of_answers.KINDS
            ),
            "teacher is None, but kl_weight is above 0; set TEACHER = %INITIAL_CHECKPOINT_PATH, or KL_WEIGHT = 0": (
                self.teacher is None and self.kl_weight > 0
            ),
            f"dropout_rate is {self.model.dropout_rate}; set DROPOUT_RATE = 0.0: a sampled answer has another "
            "probability under dropout": self.model.dropout_rate > 0,
            "pack is True; set PACK = False: the student samples one answer per row": self.pack,
            "number_slots is True; set NUMBER_SLOTS = False: answers are graded with their numbers": (
                self.data.number_slots
            ),
            "soft targets are given; set SOFT_TARGETS = None": self.soft_targets is not None,
            "mutual_information is given; set MUTUAL_INFORMATION = None": self.mutual_information is not None,
        }
        if found := [text for text, is_so in wrong.items() if is_so]:
            raise ValueError(f"Rewards are given, but {found[0]}.")

    def _check_pairs(self) -> None:
        """Refuses a mutual-information loss without pairs of label and rationale in every micro-batch."""
        together = 1 if self.pack else 2
        kinds = {task_names.split(part)[1] for part in task_names.parts(self.mixture_or_task_name)}
        if kinds != {STEP_BY_STEP} or not self.data.pairs:
            raise ValueError(
                "The mutual-information loss ties the label and the rationale of a row; got "
                f"{self.mixture_or_task_name} with pairs {self.data.pairs}. Train on <dataset>_step_by_step with PAIRS "
                "= True, as gin_configs/methods/mutual_information.gin does."
            )
        if self.batch_size % (together * self.micro_batches):
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.micro_batches} micro_batches of whole pairs; "
                f"choose a multiple of {together * self.micro_batches}."
            )
        if self.vocabulary_chunks > 1:
            raise ValueError(
                f"vocabulary_chunks is {self.vocabulary_chunks}, but the mutual-information loss needs all logits at a "
                "time; set it to 1."
            )

    def gradient_transformation(self) -> optax.GradientTransformation:
        """Makes the optimizer with its schedule; it sees one layer at a time, however layers are stored."""
        optimizer = self.optimizer(learning_rate=self.learning_rate)
        return stacking.layerwise(optimizer) if self.execution.layers == "scanned" else optimizer


def _whole_numbers(config: Any, *names: str, least: int) -> None:
    for name in names:
        checks.whole_number(f"TrainConfig.{name}", getattr(config, name), least=least)


def rows_per_update(*, mixture_or_task_name: str, examples: int, examples_per_row: int) -> int:
    """Returns the rows that hold `examples` of every task: 64 for `svamp_label`, 128 for `svamp_step_by_step`.

    So all methods see equally many label examples per update (the official code's batch size counts these). Of a task
    or mixture from outside (data/outside.py), they hold `examples` in all.
    `examples_per_row` is 1, or the average number that fit in a packed row.
    """
    tasks = 1 if task_names.is_outside(mixture_or_task_name) else len(task_names.subtasks(mixture_or_task_name))
    return math.ceil(examples * tasks / examples_per_row)


def lengths_with_rationale(*, lengths: Mapping[str, int]) -> dict[str, int]:
    """Adds room for a rationale, as long as the targets, and for its marker to the length of inputs.

    >>> lengths_with_rationale(lengths={"inputs": 176, "targets": 112})
    {'inputs': 304, 'targets': 112}
    """
    check_lengths(lengths)
    return {**lengths, "inputs": lengths["inputs"] + lengths["targets"] + _MARKER}


def rsqrt_schedule(*, peak: float, warmup_steps: int) -> optax.Schedule:
    """Makes T5's pre-training schedule, peak * sqrt(warmup / max(step, warmup)): constant until `warmup_steps`."""

    def schedule(step: Any) -> Any:
        return peak * jnp.sqrt(warmup_steps / jnp.maximum(step, warmup_steps))

    return schedule
