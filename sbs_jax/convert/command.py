"""`sbs convert`: a checkpoint of one form to another."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from sbs_jax import checkpoints, run_dir, t5, tokens
from sbs_jax.convert import hugging_face, names, t5x

FORMS = (checkpoints.HUGGING_FACE, checkpoints.T5X, checkpoints.SBS)
VOCABULARY = "sentencepiece.model"


def convert(
    source: str, target: str, *, from_form: str | None, to_form: str, dtype: str, shard_bytes: int
) -> dict[str, Any]:
    """Converts, and returns what it did. `target` must not exist, and appears when it is complete.

    `from_form` None means: as it looks. `dtype` and `shard_bytes` are those of Hugging Face's files; the other forms
    hold float32. Where the source is a run (or an export of one), its settings go along, so that a conversion back is a
    run again.
    """
    found = checkpoints.form(source)
    if from_form not in (None, found):
        raise ValueError(f"{source} is of the form {found!r}; got --from {from_form!r}.")
    remote = "://" in target
    if remote and to_form != checkpoints.T5X:
        raise ValueError(f"{target}: only T5X checkpoints are written to a bucket; convert to a folder and copy it.")
    if not remote and Path(target).exists():
        raise FileExistsError(f"{target} exists already; choose another name, or remove it.")
    opened = checkpoints.open_any(source, kind=found)
    summary = {
        "from": found,
        "to": to_form,
        "arrays": len(opened.arrays),
        "parameters": names.size(names.parameters(opened.config)),
        "model": dataclasses.asdict(opened.config),
    }
    if to_form == checkpoints.HUGGING_FACE:
        hugging_face.write(target, opened, dtype=dtype, shard_bytes=shard_bytes)
    elif remote:
        t5x.write(target, _parameters(opened), step=opened.step)
    else:
        with hugging_face.beside(Path(target)) as folder:
            if to_form == checkpoints.T5X:
                t5x.write(folder, _parameters(opened), step=opened.step)
                _write_origin(folder / hugging_face.ORIGIN, opened.origin)
            else:
                checkpoints.save_parameters(folder, _parameters(opened), config=opened.config, step=opened.step)
                _write_run(folder, opened, home=Path(target).absolute())
    return summary


def _parameters(opened: names.Opened) -> t5.Parameters:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        name: opened.arrays[name].onto(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place))
        for name, leaf in names.parameters(opened.config).items()
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
    _write_origin(folder / run_dir.MANIFEST, origin)


def _write_origin(path: Path, origin: dict[str, Any] | None) -> None:
    if origin is not None:
        path.write_text(json.dumps(origin, indent=1, sort_keys=True) + "\n", "utf-8")
