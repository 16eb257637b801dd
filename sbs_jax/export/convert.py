"""`sbs convert`: a checkpoint of one form to another."""

import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sbs_jax.data import tokens
from sbs_jax.export import card as cards
from sbs_jax.export import transformers
from sbs_jax.run import checkpoints, directory
from sbs_jax.student import t5
from sbs_jax.weights import hugging_face, identity, merging, names, opening, peft, t5x

log = logging.getLogger(__name__)

FORMS = (opening.HUGGING_FACE, opening.T5X, opening.SBS, opening.PEFT)
# Forms for other runtimes, which are written and not read (sbs_jax/export/).
STABLEHLO, ONNX = "stablehlo", "onnx"
VOCABULARY = "sentencepiece.model"


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
    """Converts, and returns what it did. `target` must not exist, and appears when it is complete.

    `from_form` None means: as it looks. `dtype` and `shard_bytes` are those of Hugging Face's files; the other forms
    hold float32. Where the source is a run (or an export of one), its settings go along, so that a conversion back is a
    run again. Adapters are merged into their base, which lies at `base` if it has moved; but to PEFT's form, and from
    that to a run, they stay adapters. `vocabulary` is where the run's lies now, if it has moved.

    Of the forms for other runtimes: `platforms` and `shapes` (rows, tokens) of the programs, () for the usual ones, and
    so many rows (`check`) of `samples` (default: what the run was graded on) to answer with what was written.
    """
    _check_options(to_form, dtype=dtype, platforms=platforms, shapes=shapes)
    found = opening.form(source)
    if from_form not in (None, found):
        raise ValueError(f"{source} is of the form {found!r}; got --from {from_form!r}.")
    remote = "://" in target
    if remote and to_form != opening.T5X:
        raise ValueError(f"{target}: only T5X checkpoints are written to a bucket; convert to a folder and copy it.")
    if not remote and Path(target).exists():
        raise FileExistsError(f"{target} exists already; choose another name, or remove it.")
    opened = _open(source, kind=found, base=base)
    if vocabulary is not None:
        opened = _with_vocabulary(opened, vocabulary, owner=source)
    summary = {"from": found, "to": to_form}
    if to_form == opening.PEFT:
        summary |= _to_peft(opened, source, target, base=base)
    elif opened.tuning is not None and found == opening.PEFT and to_form == opening.SBS:
        if opened.origin is None:
            log.warning(
                "%s is no run of ours, so that nothing says how inputs are written for it: %s can be merged and "
                "exported, and does not predict.",
                base,
                target,
            )
        summary |= _told_of(opened)
    elif opened.tuning is not None and (to_form != STABLEHLO or merging.possible(opened)):
        opened, told = _merged(opened, source, base=base)
        summary |= told
    summary |= {
        "arrays": len(opened.arrays),
        "parameters": names.size(names.parameters(opened.config)),
        "model": dataclasses.asdict(opened.config),
    }
    if to_form in (STABLEHLO, ONNX):
        from sbs_jax.export import onnx, stablehlo
        from sbs_jax.export.student import Student

        student = Student.of(opened, source=source, form=found, base=base)
        texts = _samples(source, student.card, form=found, given=samples, rows=check)
        with hugging_face.beside(Path(target)) as folder:
            if to_form == STABLEHLO:
                summary |= stablehlo.write(
                    folder, student, form=dtype, platforms=platforms, shapes=shapes, samples=texts
                )
            else:
                summary |= onnx.write(folder, student, shapes=shapes, samples=texts)
    elif to_form == opening.HUGGING_FACE:
        card = cards.of(source, opened, form=found)
        finish = functools.partial(transformers.finish, card=card, dtype=dtype)
        hugging_face.write(target, opened, dtype=dtype, shard_bytes=shard_bytes, finish=finish)
    elif remote:
        t5x.write(target, _parameters(opened), step=opened.step)
    elif to_form != opening.PEFT:
        with hugging_face.beside(Path(target)) as folder:
            if to_form == opening.T5X:
                t5x.write(folder, _parameters(opened), step=opened.step)
                _write_origin(folder / hugging_face.ORIGIN, opened.origin)
            else:
                checkpoints.save_parameters(
                    *(folder, _parameters(opened)),
                    config=opened.config,
                    step=opened.step,
                    tuning=opened.tuning,
                    base=opened.base,
                )
                _write_run(folder, opened, home=Path(target).absolute())
            card = None if opened.tuning is not None else cards.of(source, opened, form=found)
            _write_origin(folder / cards.FILE, card)
    return summary


def _check_options(to_form: str, *, dtype: str, platforms: Sequence[str], shapes: Sequence[tuple[int, int]]) -> None:
    """ValueError for what a form has not, before anything is read."""
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


def _with_vocabulary(opened: names.Opened, vocabulary: str, *, owner: str) -> names.Opened:
    """With a vocabulary that lies elsewhere now. ValueError where it is another one."""
    expected = None if opened.origin is None else opened.origin["data"].get("vocabulary_sha256")
    found = tokens.vocabulary_sha256(vocabulary)
    if opened.origin is not None and found != expected:
        raise ValueError(
            f"{vocabulary} is another vocabulary than that of {owner}: SHA-256 {found}, and it was trained with "
            f"{expected}."
        )
    return dataclasses.replace(opened, vocabulary=vocabulary)


def _samples(source: str, card: Mapping[str, Any], *, form: str, given: str | None, rows: int) -> list[str]:
    """Texts to answer with what was written."""
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


def _open(source: str, *, kind: str, base: str | None) -> names.Opened:
    """The source as it is: adapters are not merged, and of a run's the base is not read yet."""
    if kind == opening.PEFT:
        if base is None:
            said = peft.said_base(source)
            raise ValueError(
                f"{source} holds adapters of PEFT; give the base they were trained on by --base"
                f"{f' (they say: {said})' if said else ''}."
            )
        under = opening.open_any(base, kind=opening.form(base))
        path = base if "://" in base else str(Path(base).absolute())
        known = {"path": path, "seed": None, "fingerprint": identity.of_arrays(under.arrays)}
        return peft.open_directory(source, base=under, identity=known)
    opened = opening.open_run(source) if kind == opening.SBS else opening.open_any(source, kind=kind, base=base)
    if base is not None and opened.tuning is None:
        raise ValueError(f"{source} has no adapters, and needs no base; got --base {base}.")
    return opened


def _to_peft(opened: names.Opened, source: str, target: str, *, base: str | None) -> dict[str, Any]:
    peft.contents(opened, owner=source)
    assert opened.base is not None
    if base is not None:
        opening.base_arrays(opened, given=base, owner=source)  # whether it is the same
    peft.write(target, opened, base=base or opened.base["path"])
    return _told_of(opened)


def _told_of(opened: names.Opened) -> dict[str, Any]:
    """What a summary says of adapters that stay adapters."""
    tuning = opened.tuning
    assert tuning is not None
    if tuning.base != "float32":
        log.warning(
            "These adapters were trained on a base held in %s. On the base in another precision they give other "
            "answers; the base as it was held is what sbs convert --to hf writes, merged with them.",
            tuning.base,
        )
    return {"base": opened.base, "base_held_in": tuning.base}


def _merged(opened: names.Opened, source: str, *, base: str | None) -> tuple[names.Opened, dict[str, Any]]:
    """Base and adapters as one student, and what a summary says of that."""
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


def _parameters(opened: names.Opened) -> t5.Parameters:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes: Mapping[str, Any] = opened.arrays if opened.tuning is not None else names.parameters(opened.config)
    return {
        name: opened.arrays[name].onto(jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=place))
        for name, leaf in shapes.items()
    }


def _write_run(folder: Path, opened: names.Opened, *, home: Path) -> None:
    """What makes parameters a run: its manifest, and the vocabulary, which lies beside it from now on."""
    vocabulary = opened.vocabulary
    if vocabulary not in (None, tokens.BYTE_VOCABULARY) and Path(vocabulary).is_file():
        shutil.copyfile(vocabulary, folder / VOCABULARY)
        vocabulary = str(home / VOCABULARY)
    origin = opened.origin
    if origin is not None and vocabulary is not None:
        data = origin["data"] | {"options": origin["data"]["options"] | {"vocabulary": vocabulary}}
        origin = origin | {"data": data}
    _write_origin(folder / directory.MANIFEST, origin)


def _write_origin(path: Path, origin: dict[str, Any] | None) -> None:
    if origin is not None:
        path.write_text(json.dumps(origin, indent=1, sort_keys=True) + "\n", "utf-8")
