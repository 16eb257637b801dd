"""Weights of any form, opened by one table: each form has a name, a detector and an opener.

A new form is one module and one row of `FORMS`. The row's `open` returns an `Opened` whose arrays are read by slices;
checking shapes, merging adapters and placing arrays on devices follow here, once for all forms.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import jax
import numpy as np

from sbs_jax.storage import hub, places
from sbs_jax.student import families
from sbs_jax.weights import gguf, hugging_face, identity, merging, names, npz, peft, runs, t5gemma_flax, t5x
from sbs_jax.weights.arrays import LazyArray, Opened, Shapes, Watched, shapes

# Names of forms, as `sbs convert` spells them.
NPZ, GGUF, PEFT, HUGGING_FACE, SBS, FLAX, T5X = "npz", "gguf", "peft", "hf", "sbs", "flax", "t5x"
_FILES = (".npz", ".gguf")


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of checkpoint.

    `detects` is called with URLs only if the form is `remote`. `open(path, base)` reads headers and merges nothing;
    `base` is the path of the base of adapters (None: the one that the checkpoint names). `described` is the form's name
    in errors.
    """

    name: str
    detects: Callable[[str], bool]
    open: Callable[[str, str | None], Opened]
    described: str
    remote: bool = False


def form_of(path: str | Path) -> Form:
    """Detects the checkpoint at a path. FileNotFoundError names the forms that exist."""
    text = str(path)
    remote = "://" in text
    if not remote and not Path(text).exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}: the path does not exist.")
    for form in FORMS.values():
        if (form.remote or not remote) and form.detects(text):
            return form
    expected = ", ".join(form.described for form in FORMS.values())
    what = "holds no checkpoint" if remote or Path(text).is_dir() else "is a file and no checkpoint; give the folder"
    raise FileNotFoundError(f"{path} {what}; expected one of: {expected}.")


def located(path: str | Path) -> str:
    """Returns the local copy of a model of the Hugging Face Hub, or of files in a bucket that only a disk can serve.

    It is fetched if need be. Other paths are returned as they are.
    """
    if places.in_bucket(path):
        place = places.of(path)
        if place.suffix in _FILES:
            return str(places.fetched(place))
        if any((place / name).is_file() for name in (hugging_face.CONFIG, peft.CONFIG)):
            return str(places.fetched(place, _needed))
    return hub.folder(str(path), hugging_face.needed, needed=f"{hugging_face.CONFIG} and weights that are read")


def _needed(names: Collection[str]) -> list[str]:
    adapters = (peft.CONFIG, peft.WEIGHTS, peft.TORCH_WEIGHTS)
    return hugging_face.needed(names) or [name for name in adapters if name in names]


def load_parameters(
    path: str | Path, *, like: Mapping[str, jax.ShapeDtypeStruct], config: families.ModelConfig | None = None
) -> families.Parameters:
    """Loads parameters from a checkpoint of any form, on the shardings and in the types of `like`.

    A host reads what its own devices hold, one array after the other, and warns of numbers that are not finite.
    ValueError lists parameters that are missing, left over or of another shape, and settings of the architecture that
    are not those of `config`.
    """
    arrays = Watched(arrays_of(path, wanted=shapes(like), config=config))
    loaded = {name: arrays[name].onto(leaf) for name, leaf in like.items()}
    arrays.warn(path)
    return loaded


def arrays_of(path: str | Path, *, wanted: Shapes, config: families.ModelConfig | None = None) -> dict[str, LazyArray]:
    """Opens the arrays of a checkpoint of any form. ValueError unless they have the wanted names and shapes.

    With `config`, it must also be what the checkpoint says of its architecture. Adapters are merged into their base,
    unless the wanted names are exactly those of the adapters.
    """
    place = located(path)
    form = form_of(place)
    opened = form.open(place, None)
    if opened.tuning is not None and set(opened.arrays) != set(wanted):
        opened = merged(opened, base=None, owner=str(path))
    names.check(path, shapes(opened.arrays), wanted, kind=form.name)
    # T5X's checkpoints say nothing but shapes, from which the rest is guessed.
    if config is not None and opened.architecture is not None and form.name != T5X:
        found = families.differences(config, opened.architecture)
        if found:
            raise ValueError(
                f"{path} ({form.name}) has the shapes of the configured model and computes something else: the model "
                f"has {'; '.join(found)}. Include the gin file of the model that the checkpoint was trained with, or "
                "correct these settings."
            )
    return opened.arrays


def open_any(path: str | Path, *, base: str | None = None) -> Opened:
    """Opens a checkpoint of any form, its adapters merged into their base, now at `base` if it has moved."""
    place = located(path)
    opened = form_of(place).open(place, base)
    return opened if opened.tuning is None else merged(opened, base=base, owner=str(path))


def merged(opened: Opened, *, base: str | None, owner: str) -> Opened:
    """Merges adapters into the base they were trained on. ValueError for those that no plain T5 can hold."""
    merging.check(opened, owner=owner)
    return merging.merged(opened, base_arrays(opened, given=base, owner=owner))


def base_arrays(opened: Opened, *, given: str | None, owner: str) -> dict[str, LazyArray]:
    """Opens the base that adapters were trained on: a checkpoint, now at `given`, or fresh parameters from a seed.

    Reads every array once for the fingerprint. ValueError if it is another base.
    """
    assert opened.base is not None
    path = identity.base_path(opened.base, given, owner=owner)
    if path is None:
        made = families.init(opened.config, seed=opened.base["seed"])[1]
        arrays = {name: LazyArray.of(np.asarray(x)) for name, x in made.items()}
    else:
        arrays = arrays_of(path, wanted=shapes(names.parameters(opened.config)))
    found = {"path": path, "seed": opened.base["seed"], "fingerprint": identity.of_arrays(arrays)}
    identity.check(found, opened.base, owner=owner)
    return arrays


def _open_peft(path: str, base: str | None) -> Opened:
    if base is None:
        said = peft.said_base(path)
        raise ValueError(
            f"{path} holds adapters of PEFT and no base{f' (they say: {said})' if said else ''}. Name it with --base: "
            f"sbs convert --to sbs {path} RUN --base BASE makes a run of both."
        )
    under = open_any(base)
    known = {"path": identity.absolute(base), "seed": None, "fingerprint": identity.of_arrays(under.arrays)}
    return peft.open_directory(path, base=under, base_identity=known)


# Forms are tried in this order.
FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form(NPZ, npz.is_file, lambda path, _: npz.open_file(path), "an .npz file"),
        Form(GGUF, gguf.is_file, lambda path, _: gguf.open_file(path), "a GGUF file"),
        Form(PEFT, peft.is_directory, _open_peft, f"adapters of PEFT ({peft.CONFIG})"),
        Form(
            HUGGING_FACE,
            hugging_face.is_directory,
            lambda path, _: hugging_face.open_directory(path),
            f"a Hugging Face directory ({hugging_face.CONFIG})",
        ),
        Form(
            SBS,
            runs.is_run,
            lambda path, _: runs.open_run(path),
            "a run directory or one of its checkpoints/<step>",
            remote=True,
        ),
        Form(
            FLAX,
            t5gemma_flax.is_checkpoint,
            lambda path, _: t5gemma_flax.open_checkpoint(path),
            "T5Gemma's Flax checkpoint",
            remote=True,
        ),
        Form(
            T5X,
            t5x.is_checkpoint,
            lambda path, _: t5x.open_checkpoint(path),
            "a T5X model directory or one of its checkpoint_<step>",
            remote=True,
        ),
    )
}
