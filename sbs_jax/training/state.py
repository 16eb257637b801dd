"""Initial and restored states of a run: parameters, optimizer and frozen base, on their shardings."""

import functools
import logging
from typing import Any

import jax
import numpy as np

from sbs_jax import compiling
from sbs_jax.run import checkpoints
from sbs_jax.student import adapters, families
from sbs_jax.training import teachers
from sbs_jax.training.config import TrainConfig
from sbs_jax.training.step import Trainer, TrainState, root_key, shardings
from sbs_jax.training.students import Student
from sbs_jax.weights import frozen, identity, opening

log = logging.getLogger(__name__)


def initial_state(
    config: TrainConfig, trainer: Trainer, *, base: frozen.Base | None = None, teacher: Student | None = None
) -> TrainState:
    """Initializes step 0: parameters from the seed or from `initial_checkpoint_path`, and a fresh optimizer."""
    saved = shardings(trainer.saved)
    if config.tuning is not None:
        base = base or load_base(config, trainer)
        model = {**base.frozen, **base.trained}
        new = {name: sharding for name, sharding in saved.parameters.items() if name not in base.trained}
        initialize = functools.partial(
            *(adapters.init, config.model, config.tuning), structure=trainer.structure, seed=config.seed
        )
        with compiling.Progress().compiling("random adapters"):
            parameters = base.trained | jax.jit(lambda base: initialize(base=base), out_shardings=new)(model)
    elif config.initial_checkpoint_path is None:
        with compiling.Progress().compiling("random parameters"):
            initialize = jax.jit(
                lambda: families.init(config.model, seed=config.seed)[1], out_shardings=saved.parameters
            )
            parameters = initialize()
    else:
        parameters = opening.load_parameters(
            config.initial_checkpoint_path, like=trainer.saved.parameters, config=config.model
        )
    optimizer = config.optimizer(learning_rate=config.learning_rate)
    state = jax.jit(optimizer.init, out_shardings=saved.optimizer)(parameters)
    zero, key = _number(0, saved.step), _key(config, trainer)
    frozen_parameters = base.frozen if base else {}
    skipped, taught_by = _number(0, saved.skipped), _teacher(config, teacher)
    return trainer.stacked(TrainState(zero, parameters, state, skipped, key, frozen_parameters, taught_by))


def load_base(config: TrainConfig, trainer: Trainer) -> frozen.Base:
    """Loads the weights under adapters. Every start reads them again, since checkpoints do not hold them."""
    assert config.tuning is not None
    return frozen.load(
        config.model,
        config.tuning,
        path=config.initial_checkpoint_path,
        seed=config.seed,
        like={**trainer.saved.frozen, **trainer.saved.parameters},
        partitioner=trainer.partitioner,
    )


def _teacher(config: TrainConfig, loaded: Student | None) -> families.Parameters:
    """Returns the parameters of the teacher, which is loaded unless it is already; {} without one."""
    if config.teacher is None:
        return {}
    return (loaded or teachers.load(config)).parameters


def _number(value: int, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback((), sharding, lambda _: np.asarray(value, np.int32))


def _key(config: TrainConfig, trainer: Trainer) -> jax.Array:
    data = np.asarray(root_key(config.seed))
    return jax.make_array_from_callback(data.shape, trainer.saved.root_key.sharding, lambda _: data)


def restored_state(
    config: TrainConfig,
    restored: checkpoints.Restored,
    trainer: Trainer,
    *,
    base: frozen.Base | None = None,
    teacher: Student | None = None,
) -> TrainState:
    """Makes the state from a restored checkpoint. ValueError if its adapters belong to another base."""
    saved = trainer.saved
    if base is not None:
        identity.check(base.identity, restored.metadata["base"], owner=f"The checkpoint of step {restored.step}")
    return trainer.stacked(
        TrainState(
            _number(restored.step, saved.step.sharding),
            restored.parameters,
            restored.optimizer,
            _number(restored.metadata["skipped"], saved.skipped.sharding),
            _key(config, trainer),
            base.frozen if base else {},
            _teacher(config, teacher),
        )
    )
