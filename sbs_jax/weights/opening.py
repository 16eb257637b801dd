"""Open weights of any form: a run, Hugging Face, T5X, PEFT, an .npz file."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath

from sbs_jax.run import directory, saving
from sbs_jax.run.checkpoints import METADATA, PARAMETERS, locate, refuse_damaged
from sbs_jax.student import adapters, t5
from sbs_jax.weights import hugging_face, identity, merging, names, npz, peft, t5x

# Forms of checkpoints, as `sbs convert` names them.
SBS, HUGGING_FACE, T5X, PEFT = "sbs", "hf", "t5x", "peft"


def form(path: str | Path) -> str:
    """Which form the checkpoint at a path has. FileNotFoundError, with what is expected, where there is none."""
    text = str(path)
    if text.endswith(".npz"):
        return SBS
    if "://" not in text:
        local = Path(text)
        if not local.exists():
            raise FileNotFoundError(f"There is no checkpoint at {path}: nothing is there.")
        if peft.is_directory(local):
            return PEFT
        if hugging_face.is_directory(local):
            return HUGGING_FACE
        if (
            (local / "checkpoints").is_dir()
            or local.parent.name == "checkpoints"
            or (local / directory.MANIFEST).is_file()
        ):
            return SBS
    if t5x.is_checkpoint(text):
        return T5X
    raise FileNotFoundError(
        f"{path} holds no checkpoint: expected a run directory (with checkpoints/<step>) or one such step, a Hugging "
        "Face directory (config.json), a T5X model directory (checkpoint_<step>/) or checkpoint, adapters of PEFT "
        "(adapter_config.json), or an .npz file."
    )


def open_any(path: str | Path, *, kind: str, base: str | None = None) -> names.Opened:
    """Architecture and arrays of a checkpoint; arrays are read when they are asked for, by slices.

    Adapters of a run are merged into the base that they were trained on, which lies at `base` if it has moved.
    """
    if kind == HUGGING_FACE:
        return hugging_face.open_directory(path)
    if kind == T5X:
        return t5x.open_checkpoint(path)
    if kind == PEFT:
        raise ValueError(
            f"{path} holds adapters of PEFT, and no base. Make a run of both: sbs convert --to sbs {path} RUN "
            "--base BASE."
        )
    opened = open_run(path)
    if opened.tuning is None:
        return opened
    merging.check(opened, owner=str(path))
    return merging.merged(opened, base_arrays(opened, given=base, owner=str(path)))


def open_run(path: str | Path) -> names.Opened:
    """As `open_any`, of a run or one of its steps; adapters are not merged."""
    run, step = locate(path)
    refuse_damaged(run, step, items=(PARAMETERS, METADATA))
    checkpoint = run / "checkpoints" / str(step)
    metadata = saving.read_json(checkpoint)
    origin, vocabulary = None, None
    if (run / directory.MANIFEST).is_file():
        origin = directory.read_manifest(run)
        vocabulary = origin["data"]["options"]["vocabulary"]
    return names.Opened(
        config=t5.T5Config.of(metadata["model"]),
        arrays=t5x.orbax_arrays(checkpoint / PARAMETERS),
        step=step,
        vocabulary=vocabulary,
        origin=origin,
        tuning=adapters.Tuning.of(metadata.get("tuning")),
        base=metadata.get("base"),
    )


def base_arrays(opened: names.Opened, *, given: str | None, owner: str) -> dict[str, names.LazyArray]:
    """The arrays of the base that adapters were trained on: of a checkpoint, now at `given`, or fresh from a seed.

    Every array is read once for the fingerprint. ValueError where it is another base.
    """
    assert opened.base is not None
    path = identity.place(opened.base, given, owner=owner)
    shapes = {name: leaf.shape for name, leaf in names.parameters(opened.config).items()}
    if path is None:
        made = t5.init(opened.config, seed=opened.base["seed"])[1]
        arrays = {name: names.of_array(np.asarray(x)) for name, x in made.items()}
    elif str(path).endswith(".npz"):
        arrays = {name: names.of_array(array) for name, array in npz.arrays(path, shapes=shapes).items()}
    else:
        arrays = arrays_of(path, shapes=shapes)
    found = {"path": path, "seed": opened.base["seed"], "fingerprint": identity.of_arrays(arrays)}
    identity.check(found, opened.base, owner=owner)
    return arrays


def load_parameters(path: str | Path, *, like: Mapping[str, jax.ShapeDtypeStruct]) -> t5.Parameters:
    """Parameters from a checkpoint of any form (`form`), on the shardings and in the types of `like`.

    A host reads what its own devices hold, one array after the other. A parameter that is missing, left over or of
    another shape is an error that lists them: it is another architecture. An `.npz` holds one array per parameter under
    its full name.
    """
    kind = form(path)
    wanted = {name: tuple(leaf.shape) for name, leaf in like.items()}
    if str(path).endswith(".npz"):
        found = npz.arrays(path, shapes=wanted)
        return {
            name: jax.make_array_from_callback(leaf.shape, leaf.sharding, found[name].astype(leaf.dtype).__getitem__)
            for name, leaf in like.items()
        }
    if kind != SBS:
        return _from_any(path, like=like)
    directory, step = locate(path)
    refuse_damaged(directory, step, items=(PARAMETERS, METADATA))
    place, handler = directory / "checkpoints" / str(step) / PARAMETERS, saving.array_handler()
    try:
        tree = handler.metadata(epath.Path(place)).tree
        if set(tree) != set(like) and saving.read_json(place.parent).get("tuning") is not None:
            return _from_any(path, like=like)  # a plain student is asked for, of a run that trained adapters
        names.check(path, {name: tuple(leaf.shape) for name, leaf in tree.items()}, wanted, kind=kind)
        return saving.restore(handler, place, like=dict(like))
    except (OSError, ValueError):
        if not place.is_dir():  # the run went on
            refuse_damaged(directory, step, items=(PARAMETERS, METADATA))
        raise


def _from_any(path: str | Path, *, like: Mapping[str, jax.ShapeDtypeStruct]) -> t5.Parameters:
    arrays = arrays_of(path, shapes={name: tuple(leaf.shape) for name, leaf in like.items()})
    return {name: arrays[name].onto(leaf) for name, leaf in like.items()}


def arrays_of(path: str | Path, *, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, names.LazyArray]:
    """The arrays of a checkpoint of any form but `.npz`. ValueError where they are not those of the given shapes."""
    kind = form(path)
    arrays = open_any(path, kind=kind).arrays
    names.check(path, {name: array.shape for name, array in arrays.items()}, shapes, kind=kind)
    return dict(arrays)
