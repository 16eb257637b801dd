"""Conversion of a checkpoint from one form to another: `sbs convert`."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sbs_jax.data import tokens, vocabularies, vocabulary_cut
from sbs_jax.export import card as cards
from sbs_jax.export import transformers
from sbs_jax.run import checkpoints, directory
from sbs_jax.run import manifest as run_manifest
from sbs_jax.storage import atomic, places
from sbs_jax.student import families, t5
from sbs_jax.weights import hugging_face, merging, names, opening, peft, t5x
from sbs_jax.weights.arrays import Opened, Watched

log = logging.getLogger(__name__)

# Forms for other runtimes: written, never read.
STABLEHLO, ONNX = "stablehlo", "onnx"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a conversion; the flags of `sbs convert`.

    `from_form` None detects the form. `dtype` and `shard_bytes` apply to Hugging Face's files (`dtype` also to
    StableHLO's); the other forms hold float32. `base` and `vocabulary` are the new paths of the source's, if they have
    moved.

    For other runtimes: `platforms` and `shapes` (rows, tokens) of the programs, () for the defaults. `check` is the
    number of rows of `samples` (default: the inputs that the run was graded on) to answer with the written files.

    `dataset` chooses one of several that a student was trained on; only a copy as a run can do without.
    """

    to_form: str
    from_form: str | None = None
    dtype: str = "float32"
    shard_bytes: int = hugging_face.SHARD_BYTES
    base: str | None = None
    vocabulary: str | None = None
    cut: str | None = None
    platforms: Sequence[str] = ()
    shapes: Sequence[tuple[int, int]] = ()
    samples: str | None = None
    check: int = 32
    dataset: str | None = None


@dataclasses.dataclass(frozen=True)
class _Job:
    """One conversion: source and its form, target, opened checkpoint, and options."""

    source: str
    form: str
    target: Path
    opened: Opened
    options: Options

    def card(self) -> dict[str, Any] | None:
        return cards.of(self.source, self.opened, form=self.form)


def convert(source: str, target: str, options: Options) -> dict[str, Any]:
    """Converts a checkpoint and returns a summary. `target` must not exist; it appears when it is complete.

    The settings of a run (or of an export of one) go along, so that a conversion back is a run again. Adapters are
    merged into their base, unless PEFT's form is written, or a run from it.
    """
    to_form, base = options.to_form, options.base
    _check_options(options)
    source = opening.located(source)
    form = opening.form_of(source)
    if options.from_form not in (None, form.name):
        raise ValueError(f"{source} is of the form {form.name!r}; got --from {options.from_form!r}.")
    place = places.of(target)
    # T5X's writer adds a step to a model directory in a bucket, and looks at it itself.
    if not (to_form == opening.T5X and places.in_bucket(place)) and place.exists():
        raise FileExistsError(f"{target} exists already; choose another name, or remove it.")
    opened = form.open(source, base)
    if options.dataset is not None and opened.origin is None:
        raise ValueError(f"{source} says of no dataset that it was trained on it; leave --dataset out.")
    if opened.origin is not None:
        origin = run_manifest.one(opened.origin, options.dataset, where=source)
        if (several := run_manifest.parts(origin)) and to_form != opening.SBS:
            raise ValueError(
                f"{source} was trained on {', '.join(several)}, each with a prefix of its own; choose the one that the "
                "export answers for by --dataset."
            )
        opened = dataclasses.replace(opened, origin=origin)
    if base is not None and opened.tuning is None:
        raise ValueError(f"{source} has no adapters, and needs no base; got --base {base}.")
    if options.vocabulary is not None:
        opened = _with_vocabulary(opened, options.vocabulary, owner=source)
    summary: dict[str, Any] = {"from": form.name, "to": to_form}
    if to_form == opening.PEFT or (form.name, to_form) == (opening.PEFT, opening.SBS):
        summary |= _kept(opened, source, base=base, is_run=to_form == opening.SBS)
    elif opened.tuning is not None and (to_form != STABLEHLO or merging.can_merge(opened)):
        opened, more = _merged(opened, source, base=base)
        summary |= more
    if options.cut is not None:
        opened = _cut(opened, options.cut, owner=source)
    arrays = Watched(opened.arrays, dtype="float32" if options.dtype == "int8" else options.dtype)
    opened = dataclasses.replace(opened, arrays=arrays)
    summary |= {
        "arrays": len(opened.arrays),
        "parameters": names.size(names.parameters(opened.config)),
        "model": dataclasses.asdict(opened.config),
    }
    summary |= _WRITERS[to_form](_Job(source, form.name, place, opened, options)) or {}
    return summary | arrays.warn(source)


# ------------------------------------------------------------------------------------ writing, form by form


def _write_hugging_face(job: _Job) -> None:
    finish = functools.partial(transformers.finish, card=job.card(), dtype=job.options.dtype)
    hugging_face.write(
        *(job.target, job.opened), dtype=job.options.dtype, shard_bytes=job.options.shard_bytes, finish=finish
    )


def _write_t5x(job: _Job) -> None:
    job.opened.t5("T5X's form")
    parameters = _parameters(job.opened)
    if places.in_bucket(job.target):  # array by array, without a copy on this disk
        t5x.write(str(job.target), parameters, step=job.opened.step)
        return
    with atomic.new_folder(job.target) as folder:
        t5x.write(folder, parameters, step=job.opened.step)
        _write_json(folder / hugging_face.ORIGIN, job.opened.origin)
        _write_json(folder / cards.FILE, job.card())


def _write_run(job: _Job) -> None:
    opened, target = job.opened, job.target.absolute()
    vocabulary, manifest = opened.vocabulary, opened.origin
    with atomic.new_folder(target) as folder:
        checkpoints.save_parameters(
            *(folder, _parameters(opened)),
            config=opened.config,
            step=opened.step,
            tuning=opened.tuning,
            base=opened.base,
        )
        file = None if vocabulary is None else vocabularies.located(vocabulary)
        if vocabulary is not None and Path(str(file)).exists() and (name := vocabularies.kind_of(vocabulary).file):
            tokens.check_vocabulary(vocabulary)
            (folder / name).write_bytes(tokens.read_vocabulary(vocabulary))
            vocabulary = str(target / name)
        if manifest is not None and vocabulary is not None:
            data = manifest["data"] | {"options": manifest["data"]["options"] | {"vocabulary": vocabulary}}
            manifest = manifest | {"data": data}
        _write_json(folder / directory.MANIFEST, manifest)
        if opened.tuning is None:
            _write_json(folder / cards.FILE, job.card())


def _write_peft(job: _Job) -> None:
    assert job.opened.base is not None
    peft.write(job.target, job.opened, base=job.options.base or job.opened.base["path"])


def _write_programs(job: _Job) -> dict[str, Any]:
    from sbs_jax.export import onnx, stablehlo  # slow to import
    from sbs_jax.export.student import Student

    options = job.options
    student = Student.of(job.opened, source=job.source, form=job.form, base=options.base)
    samples = _samples(job, student.card)
    with atomic.new_folder(job.target) as folder:
        if options.to_form == ONNX:
            return onnx.write(folder, student, shapes=options.shapes, samples=samples)
        return stablehlo.write(
            *(folder, student),
            form=options.dtype,
            platforms=options.platforms,
            shapes=options.shapes,
            samples=samples,
        )


_WRITERS: Mapping[str, Callable[[_Job], dict[str, Any] | None]] = {
    opening.HUGGING_FACE: _write_hugging_face,
    opening.T5X: _write_t5x,
    opening.SBS: _write_run,
    opening.PEFT: _write_peft,
    STABLEHLO: _write_programs,
    ONNX: _write_programs,
}


def _parameters(opened: Opened) -> families.Parameters:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes: Mapping[str, Any] = opened.arrays if opened.tuning is not None else names.parameters(opened.config)
    return {
        name: opened.arrays[name].onto(jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=place))
        for name, leaf in shapes.items()
    }


def _write_json(path: Path, contents: Mapping[str, Any] | None) -> None:
    if contents is not None:
        path.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n", "utf-8")


# ------------------------------------------------------------------------------------ options, adapters, samples


def _check_options(options: Options) -> None:
    """Refuses options that the target's form does not have, before anything is read."""
    to_form, dtype = options.to_form, options.dtype
    types = {opening.HUGGING_FACE: ("float32", "bfloat16"), STABLEHLO: ("float32", "bfloat16", "int8")}
    if dtype not in types.get(to_form, ("float32",)):
        having = " and ".join(form for form, known in types.items() if dtype in known)
        raise ValueError(f"--to {to_form} has no --dtype {dtype}, which is for {having or 'no form'}.")
    if options.platforms and to_form != STABLEHLO:
        raise ValueError(f"--to {to_form} has no platforms; --platforms is for stablehlo.")
    if options.shapes and to_form not in (STABLEHLO, ONNX):
        raise ValueError(f"--to {to_form} has no programs; --shapes is for stablehlo and onnx.")
    if to_form == STABLEHLO:
        from sbs_jax.export import stablehlo

        stablehlo.check_platforms(options.platforms or stablehlo.DEFAULT_PLATFORMS)


def _with_vocabulary(opened: Opened, vocabulary: str, *, owner: str) -> Opened:
    """Uses a vocabulary that has moved. ValueError for another one."""
    expected = None if opened.origin is None else opened.origin["data"].get("vocabulary_sha256")
    found = tokens.vocabulary_sha256(vocabulary)
    if opened.origin is not None and found != expected:
        raise ValueError(
            f"{vocabulary} is another vocabulary than that of {owner}: SHA-256 {found}; expected {expected}."
        )
    return dataclasses.replace(opened, vocabulary=vocabulary)


def _cut(opened: Opened, folder: str, *, owner: str) -> Opened:
    """Cuts the tables of embeddings and logits to the rows of a cut vocabulary. ValueError for another vocabulary."""
    if opened.tuning is not None:
        raise ValueError(f"{owner} has adapters that are not merged; cut its base, then train adapters on that.")
    cut = vocabulary_cut.read(folder)
    vocabulary = str((Path(folder) / cut.file).absolute())
    known = opened.vocabulary not in (None, tokens.BYTE_VOCABULARY)
    if known and (found := tokens.vocabulary_sha256(str(opened.vocabulary))) != cut.sha256:
        raise ValueError(
            f"{folder} was cut from another vocabulary than that of {owner}: SHA-256 {cut.sha256}; expected {found}."
        )
    config = dataclasses.replace(opened.config, vocab_size=cut.vocab_size)
    if not isinstance(config, t5.T5Config):
        config = dataclasses.replace(config, **cut.renumbered(eos_id=config.eos_id, decoder_start=config.decoder_start))
    rows = cut.rows(opened.config.vocab_size)
    axes = {**dict.fromkeys(names.TABLES, 0), "logits_dense/kernel": 1}
    arrays = opened.arrays | {
        name: opened.arrays[name].picked(rows, axis=axis) for name, axis in axes.items() if name in opened.arrays
    }
    origin = opened.origin
    if origin is not None:
        data = origin["data"] | {"vocabulary_sha256": tokens.vocabulary_sha256(vocabulary)}
        data["options"] = data["options"] | {"vocabulary": vocabulary}
        origin = origin | {"data": data, "model": dataclasses.asdict(config)}
    return dataclasses.replace(opened, architecture=config, arrays=arrays, vocabulary=vocabulary, origin=origin)


def _samples(job: _Job, card: Mapping[str, Any]) -> list[str]:
    """Reads texts to answer with the written files."""
    given, rows = job.options.samples, job.options.check
    if given is not None:
        return cards.read_samples(given, card, rows=rows)
    texts = cards.sample_inputs(job.source, card, form=job.form, rows=rows)
    if rows and not texts:
        log.warning(
            "%s has no predictions, and so no sample inputs: the written files are not checked. Give samples with "
            '--samples FILE, lines of {"input": text}.',
            job.source,
        )
    return texts


def _kept(opened: Opened, source: str, *, base: str | None, is_run: bool) -> dict[str, Any]:
    """Checks adapters that are not merged; returns their part of the summary."""
    tuning = opened.tuning
    if is_run:
        if opened.origin is None:
            log.warning(
                "%s is not a run of ours, so the form of its inputs is unknown: the result can be merged and exported, "
                "but it cannot predict.",
                base,
            )
    else:
        peft.contents(opened, owner=source)
        if base is not None:
            opening.base_arrays(opened, given=base, owner=source)  # refuses another base
    assert tuning is not None
    if tuning.base != "float32":
        log.warning(
            "These adapters were trained on a base in %s; with another precision their answers differ. "
            "sbs convert --to hf merges them into the base in the precision of training.",
            tuning.base,
        )
    return {"base": opened.base, "base_held_in": tuning.base}


def _merged(opened: Opened, source: str, *, base: str | None) -> tuple[Opened, dict[str, Any]]:
    """Merges adapters into their base; returns the student and its part of the summary."""
    merging.check(opened, owner=source)
    arrays = opening.base_arrays(opened, given=base, owner=source)
    summary: dict[str, Any] = {"base": opened.base}
    lost = merging.quantization_error(opened, arrays)
    if lost:
        error = lost["relative_rms_error"]
        log.warning(
            "The base was quantized to %s in training: its %d kernels are written with those values and the adapters. "
            "They differ from float32 by %.4f of their size on average, at most %.4f (%s).",
            *(lost["form"], lost["kernels"], error["mean"], error["largest"], error["of"]),
        )
        summary["quantized"] = lost
    return merging.merged(opened, arrays), summary
