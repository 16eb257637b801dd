"""Configuration of a training run: everything it depends on, as dataclasses that gin binds."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from sbs_jax.data import registry, selection
from sbs_jax.student import adapters, partitioning, stacking, t5

log = logging.getLogger(__name__)


MEMORIES = ("device", "pinned_host")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on. Bound by `gin_configs/runs/train.gin`; the macros there carry T5X's names."""

    model_dir: str
    model: t5.T5Config
    data: selection.DataOptions
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
    return math.ceil(examples * len(registry.subtasks(mixture_or_task_name)) / examples_per_row)


def rsqrt_schedule(*, peak: float, warmup_steps: int) -> optax.Schedule:
    """peak * sqrt(warmup / max(step, warmup)): T5's pre-training schedule, at its peak until `warmup_steps`."""

    def schedule(step: Any) -> Any:
        return peak * jnp.sqrt(warmup_steps / jnp.maximum(step, warmup_steps))

    return schedule
