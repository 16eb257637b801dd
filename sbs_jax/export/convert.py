"""Convert a checkpoint from one form to another: `sbs convert`."""

import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sbs_jax.data import tokens
from sbs_jax.export import card as cards
from sbs_jax.export import transformers
from sbs_jax.run import checkpoints, directory
from sbs_jax.storage import atomic
from sbs_jax.student import t5
from sbs_jax.weights import hugging_face, merging, names, opening, peft, t5x
from sbs_jax.weights.arrays import Opened

log = logging.getLogger(__name__)

# Forms for other runtimes: written, never read.
STABLEHLO, ONNX = "stablehlo", "onnx"
VOCABULARY = "sentencepiece.model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """One conversion: what was opened, where it goes, and the settings of the form to write."""

    source: str
    target: str
    form: str
    opened: Opened
    base: str | None
    dtype: str
    shard_bytes: int
    platforms: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    samples: str | None
    check: int


def convert(
    source: str,
    target: str,
    *,
    from_form: str | None,
    to_form: str,
    dtype: str,
    shard_bytes: int,
    base: str | None = None,
    vocabulary: str | None = None,
    platforms: Sequence[str] = (),
    shapes: Sequence[tuple[int, int]] = (),
    samples: str | None = None,
    check: int = 32,
) -> dict[str, Any]:
    """Converts a checkpoint and returns a summary. `target` must not exist; it appears when it is complete.

    `from_form` None detects the form. `dtype` and `shard_bytes` are those of Hugging Face's files; the other forms hold
    float32. The settings of a run (or of an export of one) go along, so that a conversion back is a run again. Adapters
    are merged into their base, now at `base` if it has moved, unless PEFT's form is written, or a run from it.
    `vocabulary` is where the run's is now, if it has moved.

    Of the forms for other runtimes: `platforms` and `shapes` (rows, tokens) of the programs, () for the defaults, and
    how many rows (`check`) of `samples` (default: what the run was graded on) to answer with what was written.
    """
    _check_options(to_form, dtype=dtype, platforms=platforms, shapes=shapes)
    form = opening.form_of(source)
    if from_form not in (None, form.name):
        raise ValueError(f"{source} is of the form {form.name!r}; got --from {from_form!r}.")
    if "://" in target:
        if to_form != opening.T5X:
            raise ValueError(
                f"{target}: only T5X checkpoints are written to a bucket; convert to a folder and copy it."
            )
    elif Path(target).exists():
        raise FileExistsError(f"{target} exists already; choose another name, or remove it.")
    opened = form.open(source, base)
    if base is not None and opened.tuning is None:
        raise ValueError(f"{source} has no adapters, and needs no base; got --base {base}.")
    if vocabulary is not None:
        opened = _with_vocabulary(opened, vocabulary, owner=source)
    summary: dict[str, Any] = {"from": form.name, "to": to_form}
    if to_form == opening.PEFT or (form.name, to_form) == (opening.PEFT, opening.SBS):
        summary |= _kept(opened, source, base=base, is_run=to_form == opening.SBS)
    elif opened.tuning is not None and (to_form != STABLEHLO or merging.possible(opened)):
        opened, more = _merged(opened, source, base=base)
        summary |= more
    summary |= {
        "arrays": len(opened.arrays),
        "parameters": names.size(names.parameters(opened.config)),
        "model": dataclasses.asdict(opened.config),
    }
    job = _Job(
        source=source,
        target=target,
        form=form.name,
        opened=opened,
        base=base,
        dtype=dtype,
        shard_bytes=shard_bytes,
        platforms=platforms,
        shapes=shapes,
        samples=samples,
        check=check,
    )
    return summary | (_WRITERS[to_form](job) or {})


# ------------------------------------------------------------------------------------ writing, form by form


def _write_hugging_face(job: _Job) -> None:
    card = cards.of(job.source, job.opened, form=job.form)
    finish = functools.partial(transformers.finish, card=card, dtype=job.dtype)
    hugging_face.write(job.target, job.opened, dtype=job.dtype, shard_bytes=job.shard_bytes, finish=finish)


def _write_t5x(job: _Job) -> None:
    if "://" in job.target:
        t5x.write(job.target, _parameters(job.opened), step=job.opened.step)
        return
    with atomic.new_folder(Path(job.target)) as folder:
        t5x.write(folder, _parameters(job.opened), step=job.opened.step)
        _write_json(folder / hugging_face.ORIGIN, job.opened.origin)
        _write_json(folder / cards.FILE, cards.of(job.source, job.opened, form=job.form))


def _write_run(job: _Job) -> None:
    opened = job.opened
    with atomic.new_folder(Path(job.target)) as folder:
        checkpoints.save_parameters(
            *(folder, _parameters(opened)),
            config=opened.config,
            step=opened.step,
            tuning=opened.tuning,
            base=opened.base,
        )
        vocabulary = opened.vocabulary
        if vocabulary not in (None, tokens.BYTE_VOCABULARY) and Path(vocabulary).is_file():
            shutil.copyfile(vocabulary, folder / VOCABULARY)
            vocabulary = str(Path(job.target).absolute() / VOCABULARY)
        manifest = opened.origin
        if manifest is not None and vocabulary is not None:
            data = manifest["data"] | {"options": manifest["data"]["options"] | {"vocabulary": vocabulary}}
            manifest = manifest | {"data": data}
        _write_json(folder / directory.MANIFEST, manifest)
        if opened.tuning is None:
            _write_json(folder / cards.FILE, cards.of(job.source, opened, form=job.form))


def _write_peft(job: _Job) -> None:
    assert job.opened.base is not None
    peft.write(job.target, job.opened, base=job.base or job.opened.base["path"])


def _write_programs(job: _Job, *, to_form: str) -> dict[str, Any]:
    from sbs_jax.export import onnx, stablehlo  # slow to import
    from sbs_jax.export.student import Student

    student = Student.of(job.opened, source=job.source, form=job.form, base=job.base)
    texts = _samples(job.source, student.card, form=job.form, given=job.samples, rows=job.check)
    with atomic.new_folder(Path(job.target)) as folder:
        if to_form == ONNX:
            return onnx.write(folder, student, shapes=job.shapes, samples=texts)
        return stablehlo.write(
            *(folder, student), form=job.dtype, platforms=job.platforms, shapes=job.shapes, samples=texts
        )


_WRITERS: Mapping[str, Callable[[_Job], dict[str, Any] | None]] = {
    opening.HUGGING_FACE: _write_hugging_face,
    opening.T5X: _write_t5x,
    opening.SBS: _write_run,
    opening.PEFT: _write_peft,
    STABLEHLO: functools.partial(_write_programs, to_form=STABLEHLO),
    ONNX: functools.partial(_write_programs, to_form=ONNX),
}


def _parameters(opened: Opened) -> t5.Parameters:
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


def _check_options(to_form: str, *, dtype: str, platforms: Sequence[str], shapes: Sequence[tuple[int, int]]) -> None:
    """Refuses options that a form does not have, before anything is read."""
    types = {opening.HUGGING_FACE: ("float32", "bfloat16"), STABLEHLO: ("float32", "bfloat16", "int8")}
    if dtype not in types.get(to_form, ("float32",)):
        having = [form for form, known in types.items() if dtype in known]
        raise ValueError(
            f"--to {to_form} has no --dtype {dtype}: "
            + (f"{' and '.join(having)} {'has' if len(having) == 1 else 'have'}." if having else "nothing has.")
        )
    if to_form == STABLEHLO:
        from sbs_jax.export import stablehlo

        stablehlo.check_platforms(platforms or stablehlo.DEFAULT_PLATFORMS)
    elif to_form == ONNX:
        from sbs_jax.export import onnx

        onnx.check_installed()
    if platforms and to_form != STABLEHLO:
        raise ValueError(f"--to {to_form} has no platforms; --platforms is of stablehlo.")
    if shapes and to_form not in (STABLEHLO, ONNX):
        raise ValueError(f"--to {to_form} has no programs; --shapes is of stablehlo and onnx.")


def _with_vocabulary(opened: Opened, vocabulary: str, *, owner: str) -> Opened:
    """Uses a vocabulary that has moved. ValueError for another one."""
    expected = None if opened.origin is None else opened.origin["data"].get("vocabulary_sha256")
    found = tokens.vocabulary_sha256(vocabulary)
    if opened.origin is not None and found != expected:
        raise ValueError(
            f"{vocabulary} is another vocabulary than that of {owner}: SHA-256 {found}, and it was trained with "
            f"{expected}."
        )
    return dataclasses.replace(opened, vocabulary=vocabulary)


def _samples(source: str, card: Mapping[str, Any], *, form: str, given: str | None, rows: int) -> list[str]:
    """Reads texts to answer with what was written."""
    if not rows:
        return []
    texts = (
        cards.sample_inputs(source, card, form=form, rows=rows)
        if given is None
        else cards.read_samples(given, card, rows=rows)
    )
    if not texts:
        log.warning(
            "%s left no predictions behind, and so no sample inputs: what was written is not checked. Give some by "
            '--samples FILE, lines of {"input": text}.',
            source,
        )
    return texts


def _kept(opened: Opened, source: str, *, base: str | None, is_run: bool) -> dict[str, Any]:
    """Checks adapters that stay adapters; returns what a summary says of them."""
    tuning = opened.tuning
    if is_run:
        if opened.origin is None:
            log.warning(
                "%s is no run of ours, so that nothing says how inputs are written for it: what is converted can be "
                "merged and exported, and does not predict.",
                base,
            )
    else:
        peft.contents(opened, owner=source)
        if base is not None:
            opening.base_arrays(opened, given=base, owner=source)  # refuses another base
    assert tuning is not None
    if tuning.base != "float32":
        log.warning(
            "These adapters were trained on a base held in %s. On the base in another precision they give other "
            "answers; the base as it was held is what sbs convert --to hf writes, merged with them.",
            tuning.base,
        )
    return {"base": opened.base, "base_held_in": tuning.base}


def _merged(opened: Opened, source: str, *, base: str | None) -> tuple[Opened, dict[str, Any]]:
    """Merges adapters into their base; returns the student and what a summary says of it."""
    merging.check(opened, owner=source)
    arrays = opening.base_arrays(opened, given=base, owner=source)
    told: dict[str, Any] = {"base": opened.base}
    lost = merging.lost(opened, arrays)
    if lost:
        error = lost["relative_rms_error"]
        log.warning(
            "The base was held in %s: the weights that are written are its %d kernels as they were held, with the "
            "adapters. They differ from the base in float32 by %.4f of their size on average, at most %.4f (%s).",
            *(lost["form"], lost["kernels"], error["mean"], error["largest"], error["of"]),
        )
        told["quantized"] = lost
    return merging.merged(opened, arrays), told
