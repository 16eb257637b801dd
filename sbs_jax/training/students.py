"""Trained students of run directories: the best step, its options, and the base under its adapters."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sbs_jax.data import catalogue, registry, selection, tokens
from sbs_jax.run import directory, manifest
from sbs_jax.student import adapters, families, partitioning
from sbs_jax.weights import frozen, identity, names, opening, runs
from sbs_jax.weights.arrays import shapes


@dataclasses.dataclass(frozen=True)
class Student:
    """A trained model of a run directory, with the options of its training."""

    config: families.ModelConfig
    structure: families.Structure
    parameters: families.Parameters
    partitioner: partitioning.Partitioner
    step: int
    manifest: dict[str, Any]
    options: selection.DataOptions

    def identity(self) -> dict[str, Any]:
        """Returns its step, a checksum of its parameters and its vocabulary's hash, as JSON.

        Every process of those whose devices hold the parameters must call this.
        """
        checksum = 0
        for name, array in sorted(self.parameters.items()):
            if not array.is_fully_addressable:
                array = jax.jit(lambda x: x, out_shardings=self.partitioner.replicated)(array)
            checksum = zlib.crc32(np.asarray(array).tobytes(), zlib.crc32(name.encode(), checksum))
        vocabulary = tokens.vocabulary_sha256(self.options.vocabulary)
        return {"step": self.step, "checksum": f"{checksum:08x}", "vocabulary": vocabulary}


def load_student(
    path: str | Path,
    *,
    layout: partitioning.Layout,
    records_dir: str | None = None,
    base: str | None = None,
    dataset: str | None = None,
    register: bool = True,
) -> Student:
    """Loads the student of a run directory (its best step) or of one `checkpoints/<step>`; registers its tasks.

    With `register` False, the options of the registry stay those of the run that it teaches.
    Vocabulary, prefixes and lengths are those of its training. If the records or the base of an adapter run have moved,
    `records_dir` and `base` name their new paths. Of a student of several datasets, `dataset` chooses one, and the
    manifest and options are those of it.
    """
    options = {"records_dir": records_dir, "base": base, "dataset": dataset, "register": register}
    return _load_sharing(path, {}, partitioner=layout.partitioner(), **options)[0]


def load_students(
    path: str | Path,
    others: Mapping[str, str | Path],
    *,
    layout: partitioning.Layout,
    base: str | None = None,
    dataset: str | None = None,
    devices: Sequence[Any] | None = None,
) -> tuple[Student, dict[str, Student]]:
    """Loads an adapter run and further ones by name over one base, which is read and stored once.

    Registers the tasks of the first. ValueError if their bases differ, or differ in precision. Of students of several
    datasets, `dataset` chooses one. `devices` are all by default, those of other processes too.
    """
    return _load_sharing(path, others, partitioner=layout.partitioner(devices), base=base, dataset=dataset)


@dataclasses.dataclass(frozen=True)
class _Trained:
    """The trained parameters of a run, and the shapes of its whole student."""

    owner: str
    config: families.ModelConfig
    tuning: adapters.Tuning | None
    adapted: adapters.Adapted
    like: dict[str, jax.ShapeDtypeStruct]
    parameters: families.Parameters
    base: dict[str, Any] | None
    step: int
    manifest: dict[str, Any]

    def student(
        self, frozen: Mapping[str, jax.Array], *, partitioner: partitioning.Partitioner, options: selection.DataOptions
    ) -> Student:
        parameters = {**{name: frozen[name] for name in self.like if name in frozen}, **self.parameters}
        return Student(
            *(self.config, self.adapted.structure, parameters, partitioner, self.step, self.manifest, options)
        )


def _load_sharing(
    path: str | Path,
    others: Mapping[str, str | Path],
    *,
    partitioner: partitioning.Partitioner,
    base: str | None,
    dataset: str | None,
    records_dir: str | None = None,
    register: bool = True,
) -> tuple[Student, dict[str, Student]]:
    first = _read_trained(path, partitioner, dataset)
    named = {name: _read_trained(place, partitioner, dataset) for name, place in others.items()}
    held: families.Parameters = {}
    for each in (first, *named.values()):
        if each.tuning is None and (named or base is not None):
            raise ValueError(
                f"{each.owner} has no adapters: everything was trained, so it needs no base. Predict with this run "
                "alone."
            )
    if first.tuning is not None and first.base is not None:
        for each in named.values():
            _check_shared(first, each)
        found = frozen.load(
            *(first.config, first.tuning),
            path=identity.base_path(first.base, base, owner=first.owner),
            seed=first.base["seed"],
            like=first.like,
            partitioner=partitioner,
        )
        identity.check(found.identity, first.base, owner=first.owner)
        held = {**found.frozen, **found.trained}
    options = _options(first)
    if records_dir is not None:
        options = dataclasses.replace(options, records_dir=records_dir)
    if register:
        registry.configure(options)
    return (
        first.student(held, partitioner=partitioner, options=options),
        {name: each.student(held, partitioner=partitioner, options=_options(each)) for name, each in named.items()},
    )


def _options(trained: _Trained) -> selection.DataOptions:
    """Returns the options of the run without its further training rows, which no answer depends on."""
    return selection.DataOptions(**trained.manifest["data"]["options"] | {"augmentation": None})


def _read_trained(path: str | Path, partitioner: partitioning.Partitioner, dataset: str | None) -> _Trained:
    """Reads a run, and registers its datasets if the manifest defines them."""
    opened = runs.open_run(path)
    if opened.origin is None:
        raise FileNotFoundError(f"{path} is not a run directory: its {directory.MANIFEST} is missing.")
    catalogue.restore_from(opened.origin["data"], where=f"{path}, its manifest")
    origin = manifest.one(opened.origin, dataset, where=str(path))
    config, tuning = opened.config, opened.tuning
    adapted = adapters.abstract(config, tuning)
    like = partitioner.with_shardings(adapted.shapes, parameters=adapted.shapes, axes=adapted.axes)
    wanted = adapted.split(like)[0]
    names.check(path, shapes(opened.arrays), shapes(wanted), kind=opening.SBS)
    parameters = {name: opened.arrays[name].onto(leaf) for name, leaf in wanted.items()}
    return _Trained(*(str(path), config, tuning, adapted, like, parameters, opened.base, opened.step, origin))


def _check_shared(first: _Trained, other: _Trained) -> None:
    """Refuses another adapter run unless the base in memory is also its base."""
    assert first.base is not None
    assert other.base is not None
    if first.base["fingerprint"] != other.base["fingerprint"]:
        raise ValueError(
            f"{first.owner} and {other.owner} have adapters of different bases: {identity.described(first.base)} "
            f"(fingerprint {first.base['fingerprint'][:16]}) and {identity.described(other.base)} "
            f"({other.base['fingerprint'][:16]}). Predict with these runs one by one."
        )
    needed = other.adapted.split(other.like)[1]
    for name, leaf in needed.items():
        held = first.like.get(name)
        if held is None or (held.shape, held.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{first.owner} and {other.owner} hold their base in different ways ({_holding(first)}, "
                f"{_holding(other)}), which differ in {name}. Predict with these runs one by one."
            )


def _holding(trained: _Trained) -> str:
    assert trained.tuning is not None
    return trained.tuning.base
