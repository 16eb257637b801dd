"""Readers of configurations, foreign checkpoints, and run directories of a report, tested as in test_fuzz.py."""

import dataclasses
import json
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import jaxtyping
import ml_dtypes
import numpy as np
import parity_cases as cases
import pytest
from builders import flax_files, old_t5x, report_runs
from flax import serialization, traverse_util
from fuzzing import Tape

from sbs_jax.cli import main
from sbs_jax.run import saving
from sbs_jax.stats import results
from sbs_jax.storage import checksums
from sbs_jax.student import adapters, families
from sbs_jax.training import gin_files
from sbs_jax.weights import hugging_face, names, opening, t5x

Fuzz = Callable[[Callable[[Tape], None]], None]

# ------------------------------------------------------------------------------------------- gin

SCHEDULE = {"init_value": "1.0", "end_value": "%END", "transition_steps": "10", "transition_begin": "0"}
LAYOUT = {"slice": "1", "data": "%DATA", "fsdp": "-1", "tensor": "1"}
VALUES = (
    *("1", "-1", "0.5", "1e400", "1e9999", "9**9**9", "None", "True", "[1, 2]", "(1,", "{", "}", "{'a': 1}", "@", "%"),
    *("%X", "@X", "@X()", "@evaluate.EvaluateConfig()", "@partitioning.Layout", "%gin.REQUIRED", "@optax.adamw()", "'"),
    *('"""', "b'x'", "@train.hosts.os.system()", "@evaluate.json.loads()", "@os.system()", "@builtins.exec()"),
    *("@partitioning.Layout.of()", "[" * 20 + "]" * 20, "[" * 150 + "]" * 150, "(" * 3_000, "-" * 3_000 + "1"),
    *("1" * 5_000, "[@X(), %Y]", "0x", "1 if", "a b", "@evaluate.subprocess.run()", "@evaluate.jax.os.system()"),
    *("@datasets.tempfile.mkdtemp()", "lambda: 1", "f'{1}'", "\\", "@a/b/partitioning.Layout()"),
    *("@/partitioning.Layout()", "@partitioning..Layout()", "1 # x", "1; import os", "'\\ud800'"),
)
STATEMENTS = (
    *("import os", "import os.path as path", "from os import system", "import antigravity_"),
    *("from __gin__ import dynamic_registration", "include 'nowhere.gin'", "include '/etc/passwd'", "include 1"),
    *("X = @os.system()", f"os.system.command = 'touch {fuzzing.CANARY}'", "X = 1", "X = %X", "X = %Y\nY = %X"),
    *("a/b/c.d = 1", "evaluate.EvaluateConfig:", "  split = 'x'", "partitioning.Layout.data = 2", "= 1", "X =", "X"),
    *("X == 1", "\t", "# -*- coding: latin-1 -*-", "from . import x", "from sbs_jax import nothing"),
    *("import sbs_jax.nowhere", "import builtins", "X = @builtins.eval()", "builtins.eval.source = '1'"),
    *("import subprocess", "X = @subprocess.getoutput()"),
)


def prepared() -> None:
    main.import_tensorflow()
    gin_files.configure(
        "evaluate.EvaluateConfig", gin_files=["gin_configs/runs/evaluate.gin"], bindings=["CHECKPOINT_PATH=/x"]
    )


def configured(name: str, files: list[str], bindings: list[str]) -> None:
    """gin's messages name the line and the file, if any; ours name the binding."""
    fuzzing.read(
        lambda: gin_files.configure(name, gin_files=files, bindings=bindings), raises=gin_files.UsageError, names=[""]
    )


def test_bindings_of_the_command_line(fuzz: Fuzz) -> None:
    prepared()
    # Bound functions have no annotations: describing a wrong argument takes the tests' type checker long.
    whole = [*(f"optax.linear_schedule.{name}={value}" for name, value in SCHEDULE.items()), "END=0.5"]
    gin_files.configure("optax.linear_schedule", gin_files=[], bindings=whole)

    def case(tape: Tape) -> None:
        bindings = list(whole)
        for _ in range(1 + tape.below(2)):
            at = tape.below(len(bindings))
            name, _, value = bindings[at].partition("=")
            kind = tape.below(6)
            if kind < 3:
                bindings[at] = f"{name}={tape.one_of(VALUES)}"
            elif kind == 3:
                bindings[at] = f"{name}={tape.text()}"
            elif kind == 4:
                text = tape.text()
                bindings[at] = tape.one_of((name + text, text, f"{text}={value}", f"{name[:-1]}={value}"))
            else:
                bindings[at] += "\n" + tape.one_of(STATEMENTS)
        configured("optax.linear_schedule", [], bindings)

    fuzz(case)


def test_gin_files(fuzz: Fuzz, memory: Path) -> None:
    prepared()
    path = memory / "mine.gin"
    lines = ["from __gin__ import dynamic_registration", "from sbs_jax.student import partitioning", "DATA = 1"]
    lines += [f"partitioning.Layout.{name} = {value}" for name, value in LAYOUT.items()]
    path.write_text("\n".join(lines))
    gin_files.configure("partitioning.Layout", gin_files=[str(path)], bindings=[])

    def case(tape: Tape) -> None:
        text = list(lines)
        for _ in range(1 + tape.below(2)):
            at = tape.below(len(text))
            kind = tape.below(4)
            if kind == 0:
                text.insert(at, tape.one_of(STATEMENTS))
            elif kind == 1:
                text[at] = text[at].partition("=")[0] + "= " + tape.one_of(VALUES)
            elif kind == 2:
                del text[at]
            else:
                text[at] = tape.text()
            if not text:
                break
        fuzzing.put(tape, path, fuzzing.scratched(tape, fuzzing.encoded("\n".join(text) + "\n"), most=1))
        configured("partitioning.Layout", [str(path)], [])

    fuzz(case)


# ---------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def exported(memory: Path) -> Path:
    """A small model as a Hugging Face directory, in two shards."""
    opened = cases.opened(small())
    size = sum(np.prod(array.shape) for array in opened.arrays.values()) * 4
    hugging_face.write(memory / "out", opened, dtype="float32", shard_bytes=int(size * 0.6))
    assert len(list((memory / "out").glob("*.safetensors"))) == 2
    return memory / "out"


def small() -> Any:
    return dataclasses.replace(cases.config("v1_1"), num_encoder_layers=1, num_decoder_layers=1)


def test_settings_of_hugging_face(fuzz: Fuzz, exported: Path) -> None:
    """config.json, the index, and the settings of a run beside them."""
    origin = {"data": {"options": {"vocabulary": "byte"}}, "model": {}}
    (exported / hugging_face.ORIGIN).write_text(json.dumps(origin))
    valid = {
        name: (exported / name).read_bytes() for name in (hugging_face.CONFIG, hugging_face.INDEX, hugging_face.ORIGIN)
    }
    fragments = (
        *fuzzing.FRAGMENTS,
        '"../../x.safetensors"',
        '"/etc/passwd"',
        '"model-00001-of-00002.safetensors"',
        '"t5"',
        "1e3",
    )

    def case(tape: Tape) -> None:
        name = tape.one_of(list(valid))
        node = fuzzing.damaged(tape, json.loads(valid[name]), fragments=fragments, most=2)
        fuzzing.put(tape, exported / name, fuzzing.scratched(tape, fuzzing.encoded(fuzzing.written(node)), most=1))
        fuzzing.read(
            lambda: hugging_face.open_directory(exported), raises=(ValueError, FileNotFoundError), names=[exported]
        )
        fuzzing.replace(exported / name, valid[name])

    fuzz(case)


def test_headers_of_safetensors(fuzz: Fuzz, exported: Path) -> None:
    file = sorted(exported.glob("*.safetensors"))[0]
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    fragments = (
        *fuzzing.FRAGMENTS,
        "[0, 1152921504606846976]",
        "[1152921504606846976]",
        '"F64"',
        '"I8"',
        '"BF16"',
        "[-1, 8]",
    )

    def case(tape: Tape) -> None:
        text = fuzzing.encoded(fuzzing.written(fuzzing.damaged(tape, header, fragments=fragments, most=2)))
        size = len(text) if not tape.chance(6) else tape.one_of((0, 1, 2**60, 2**64 - 1, len(text) + 1, 10**8, 7))
        fuzzing.put(tape, file, fuzzing.scratched(tape, struct.pack("<Q", size) + text + values, most=1), any_size=True)
        fuzzing.read(
            lambda: hugging_face.open_directory(exported), raises=(ValueError, FileNotFoundError), names=[exported]
        )

    fuzz(case)


def test_files_of_flax(fuzz: Fuzz, memory: Path) -> None:
    """`flax_model.msgpack`: names, shapes, types and sizes, and bytes that are lost or changed."""
    folder = memory / "out"
    hugging_face.write(folder, cases.opened(small()), dtype="float32")
    tree = traverse_util.unflatten_dict(flax_files.flat(folder), sep="/")
    file = flax_files.replace_weights(folder) / hugging_face.FLAX_WEIGHTS
    valid = file.read_bytes()
    leaves = (
        *(np.zeros((0, 3), np.float32), np.zeros(3, np.complex64), np.zeros((2, 2), ml_dtypes.bfloat16), np.float32(1)),
        *({"__msgpack_chunked_array__": True, "shape": [2**60], "chunks": {}}, {}, 1.5, None, b"bytes", "text"),
        *({"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": np.zeros(1)}}, np.zeros(2, np.int8)),
        {"__msgpack_chunked_array__": True, "shape": {"0": 2**62}, "chunks": {"0": np.zeros(2), "2": np.zeros(2)}},
    )
    heads = [at for at in range(len(valid)) if valid[at] in (0xC7, 0xC8, 0xC9, 0xC4, 0xC5, 0x93, 0x92)]

    def case(tape: Tape) -> None:
        kind = tape.below(3)
        if kind == 0:
            data = fuzzing.scratched(tape, valid)
        elif kind == 1:  # sizes that are claimed
            at = tape.one_of(heads)
            data = valid[:at] + bytes([tape.one_of((0xC6, 0xC9, 0xDF, 0xDD, 0xDB, 0xCF, 0xD8, 0xC1))])
            data += bytes([tape.one_of((0, 1, 127, 255)) for _ in range(4)]) + valid[at + 2 :]
        else:
            node = fuzzing.damaged(tape, fuzzing.tree(tree), most=2)
            fuzzing.put_leaf(tape, node, leaves)
            data = packed(node)
        fuzzing.put(tape, file, data, any_size=True)
        fuzzing.read(lambda: opened_whole(folder), raises=(ValueError, FileNotFoundError), names=[folder])

    def opened_whole(folder: Path) -> None:
        for array in hugging_face.open_directory(folder).arrays.values():
            array.whole()

    fuzz(case)


# -------------------------------------------------------------------------------------------- T5X


def t5x_tree(config: Any) -> dict[str, Any]:
    """Builds the content of T5X's older file, arrays included."""
    parameters = cases.parameters(config)
    tree: dict[str, Any] = {}
    for name in names.of(parameters):
        *parents, last = name.t5x.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = parameters[name.ours]
    return {"version": 3, "optimizer": {"state": {"step": np.int32(3)}, "target": tree}}


def packed(node: Any) -> bytes:
    """Packs a tree from `fuzzing.damaged` as msgpack; valid JSON fragments become their values."""

    def plain(value: Any) -> Any:
        if isinstance(value, fuzzing.Fragment):
            try:
                found = json.loads(value)
                serialization.msgpack_serialize(found)
            except (ValueError, RecursionError, OverflowError):
                return str(value).encode("utf-8", "replace").decode()
            return found
        if isinstance(value, fuzzing.Pairs):
            return {str(name).encode("utf-8", "replace").decode(): plain(each) for name, each in value}
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, str):
            return value.encode("utf-8", "replace").decode()
        return max(-(2**63), min(value, 2**64 - 1)) if isinstance(value, int) else value

    return serialization.msgpack_serialize(plain(node))


def test_files_of_t5x(fuzz: Fuzz, memory: Path) -> None:
    """The older form, one msgpack file; and the settings of a run beside it."""
    tree = t5x_tree(small())
    file = memory / "checkpoint"
    origin = memory / hugging_face.ORIGIN
    valid = packed(fuzzing.tree(tree))
    leaves = (
        *("PLACEHOLDER://target.x", "PLACEHOLDER://../../x", "PLACEHOLDER:///etc", "PLACEHOLDER://"),
        *("PLACEHOLDER://a\x00b", {"driver": "zarr", "kvstore": {"driver": "file", "path": "/etc/"}}),
        *({"driver": "zarr", "kvstore": 1}, {"driver": 1}, {"driver": "zarr", "path": "../../x"}, np.zeros((0, 3))),
        *(np.zeros(3, np.complex64), np.zeros((2, 2), ml_dtypes.bfloat16), np.zeros((25, 24), np.float32)),
        *(np.float32(1), {"__msgpack_chunked_array__": True, "shape": [2**60], "chunks": {}}),
        {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": np.zeros(1)}},
    )

    def case(tape: Tape) -> None:
        if tape.chance(2):
            data = fuzzing.scratched(tape, valid)
        else:
            node = fuzzing.damaged(tape, tree, most=2)
            fuzzing.put_leaf(tape, node, leaves)
            data = packed(node)
        fuzzing.put(tape, file, data, any_size=True)
        if tape.chance(8):
            node = fuzzing.damaged(tape, {"data": {"options": {"vocabulary": "byte"}}, "model": {"vocab_size": 44}})
            origin.write_bytes(fuzzing.encoded(fuzzing.written(node)))
        fuzzing.read(lambda: t5x.open_checkpoint(memory), raises=(ValueError, FileNotFoundError), names=[memory])
        origin.unlink(missing_ok=True)

    fuzz(case)


def test_arrays_of_t5x(fuzz: Fuzz, memory: Path) -> None:
    """Arrays beside the older file, as zarr describes them; and Orbax's form, whose files have checksums."""
    config = small()
    older, newer = memory / "older", memory / "newer"
    older.mkdir()
    old_t5x.old_form(older, config, scanned=False)
    # All but two of its arrays in the file: every one that lies beside it takes time to open.
    contents = t5x_tree(config)
    for name in ("token_embedder/embedding", "decoder/logits_dense/kernel"):
        node, place = contents["optimizer"]["target"], "target." + name.replace("/", ".")
        *parents, last = name.split("/")
        for parent in parents:
            node = node[parent]
        node[last] = f"PLACEHOLDER://{place}"
    (older / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    t5x.open_checkpoint(older)
    (zarr,) = older.glob("*token_embedder*/.zarray")
    metadata = json.loads(zarr.read_text())
    _, parameters = cases.model(config)
    t5x.write(newer, parameters, step=9)
    state = newer / "checkpoint_9" / "state"
    files = {path: path.read_bytes() for path in [state / "manifest.ocdbt", *(state / "d").iterdir()]}
    fragments = (
        *fuzzing.FRAGMENTS,
        "[1152921504606846976, 24]",
        "[1, 1152921504606846976]",
        '"<f8"',
        '"|O"',
        '"|S9"',
        '"<i4"',
    )

    def case(tape: Tape) -> None:
        if tape.chance(4):
            path = tape.one_of(list(files))
            fuzzing.put(tape, path, fuzzing.scratched(tape, files[path]), any_size=path.parent.name == "d")
            fuzzing.read(lambda: t5x.open_checkpoint(newer), raises=(ValueError, FileNotFoundError), names=[newer])
            fuzzing.replace(path, files[path])
        else:
            node = fuzzing.damaged(tape, metadata, fragments=fragments, most=2)
            fuzzing.put(tape, zarr, fuzzing.scratched(tape, fuzzing.encoded(fuzzing.written(node)), most=1))
            fuzzing.read(lambda: t5x.open_checkpoint(older), raises=(ValueError, FileNotFoundError), names=[older])

    fuzz(case)


# -------------------------------------------------------------------------------------------- npz


def test_npz(fuzz: Fuzz, memory: Path) -> None:
    """Members of a zip file, each with a header of NumPy's."""
    path = memory / "student.npz"
    arrays = {"a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    np.savez_compressed(path, allow_pickle=False, **arrays)
    whole = path.read_bytes()
    wanted = {name: array.shape for name, array in arrays.items()}
    pickled = memory / "pickled.npz"
    np.savez(pickled, a=np.array([Canary()], dtype=object))
    headers = (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        *("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", "{}", "[", "", "__import__('os').system('x')"),
        *("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (6,), }", "(" * 300, "1" * 5_000),
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, " + "1, " * 60 + "), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 400 + ",), }",
    )

    def case(tape: Tape) -> None:
        if tape.chance(2):
            data = tape.one_of((whole, whole, whole, pickled.read_bytes()))
            fuzzing.put(tape, path, fuzzing.scratched(tape, data))
        else:
            text = tape.one_of(headers).encode()
            member = (
                b"\x93NUMPY"
                + bytes(tape.one_of(((1, 0), (2, 0), (3, 0), (9, 9))))
                + struct.pack("<H", len(text))
                + text
            )
            fuzzing.replace(path, b"")
            with zipfile.ZipFile(path, "w") as archive:
                for name in (tape.one_of(("a/kernel", "../../x", "b", "/etc/x", "a")), "b"):
                    if f"{name}.npy" not in archive.namelist():
                        archive.writestr(
                            f"{name}.npy", fuzzing.scratched(tape, member + arrays["a/kernel"].tobytes(), most=1)
                        )
        fuzzing.read(
            lambda: [array.whole() for array in opening.arrays_of(path, wanted=wanted).values()],
            raises=ValueError,
            names=[path],
        )

    fuzz(case)


class Canary:
    """A payload that a pickle could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path(fuzzing.CANARY).write_text, ("was run",))


def test_the_valid_inputs_are_read(memory: Path, exported: Path) -> None:
    """Without damage these read, so the tests above do not see a single refusal only."""
    hugging_face.open_directory(exported)
    (memory / "checkpoint").write_bytes(packed(fuzzing.tree(t5x_tree(small()))))
    shutil.rmtree(exported)
    assert t5x.open_checkpoint(memory).config == cases.t5x_default(small())


# ------------------------------------------------------------------------------------------ runs


def test_checksums(fuzz: Fuzz, memory: Path) -> None:
    """Lists of files with names that lead elsewhere, sizes and hashes of other types, and a hash that is right."""
    folder = memory / "1"
    (folder / "parameters").mkdir(parents=True)
    contents = {"parameters/a": b"weights", "metadata": b"{}", "empty": b""}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (memory / "secret").write_bytes(b"secret")
    checksums.write(folder)
    listed = folder / checksums.FILE
    whole = listed.read_bytes()
    files = json.loads(whole)["files"]
    secret = {"bytes": 6, "sha256": checksums.file_sha256(memory / "secret")}
    nothing = {"bytes": 0, "sha256": checksums.file_sha256(folder / "empty")}
    elsewhere = {"../secret": secret, str(memory / "secret"): secret, "parameters/../../secret": secret}
    elsewhere |= dict.fromkeys(
        ("/dev/zero", "/dev/null", ".", "", "parameters", "parameters/", "//a", "a\x00"), nothing
    )
    assert checksums.problem(folder) is None

    def case(tape: Tape) -> None:
        node = fuzzing.damaged(tape, files, most=1 + tape.below(2))
        if isinstance(node, fuzzing.Pairs) and tape.chance(3):
            name = tape.one_of(list(elsewhere))
            node.append([name, fuzzing.tree(elsewhere[name])])
        text = fuzzing.written(node)
        try:
            right = checksums._of_list(json.loads(text))
        except (ValueError, RecursionError):
            right = ""
        outer = fuzzing.damaged(tape, {"files": 0, "sha256": right}, most=tape.below(2))
        data = fuzzing.encoded(fuzzing.written(outer).replace("0", text, 1))
        fuzzing.put(tape, listed, fuzzing.scratched(tape, data, most=1))
        other = tape.one_of(list(contents))
        fuzzing.put(tape, folder / other, contents[other])
        problem = fuzzing.read(lambda: checksums.problem(folder), raises=(), names=())
        assert problem is None or (isinstance(problem, str) and len(problem) < fuzzing.LONGEST_MESSAGE)
        if problem is None:
            for name, entry in json.loads(listed.read_bytes())["files"].items():
                assert (name, entry) in [*files.items()], "a file outside the folder was accepted"
        fuzzing.replace(folder / other, contents[other])

    fuzz(case)


def test_metadata_of_a_checkpoint(fuzz: Fuzz, memory: Path) -> None:
    (memory / "metadata").mkdir()
    path = memory / "metadata" / "metadata"
    tuning = adapters.Tuning(lora=adapters.LoRA(rank=2, alpha=4.0))
    valid = {
        "step": 3,
        "model": dataclasses.asdict(small()),
        "tuning": dataclasses.asdict(tuning),
        "base": {"path": "/some/where", "seed": None, "fingerprint": "ab" * 32},
        "skipped": 0,
        "lines": 4,
        "window": [[1.0, 2]],
        "evaluation_due": False,
    }
    path.write_text(json.dumps(valid))
    assert saving.read_json(memory)["step"] == 3

    def case(tape: Tape) -> None:
        text = fuzzing.encoded(fuzzing.written(fuzzing.damaged(tape, valid)))
        fuzzing.put(tape, path, fuzzing.scratched(tape, text, most=1))
        try:
            found = fuzzing.read(lambda: saving.read_json(memory), raises=ValueError, names=[path])
        except jaxtyping.TypeCheckError:  # a whole number for a float: only these tests' own checks refuse it
            return
        if isinstance(found, dict) and "model" in found:
            families.config_of(found["model"])
            adapters.Tuning.of(found.get("tuning"))

    fuzz(case)


def test_run_directories_of_a_report(fuzz: Fuzz, memory: Path) -> None:
    path = report_runs.write_run(memory / "run", right=[True, False, True, True])
    (predictions,) = (path / "predictions").iterdir()
    valid = {file: file.read_bytes() for file in (path / "manifest.json", path / "metrics.jsonl", predictions)}
    manifest = json.loads(valid[path / "manifest.json"])
    rows = {file: [json.loads(line) for line in valid[file].splitlines()] for file in list(valid)[1:]}
    results.load(results.identify(path))

    def case(tape: Tape) -> None:
        file = tape.one_of(list(valid))
        if tape.chance(3):
            data = valid[file]
        elif file.suffix == ".json":
            data = fuzzing.encoded(fuzzing.written(fuzzing.damaged(tape, manifest)))
        else:
            lines = [fuzzing.tree(row) for row in rows[file]]
            at = tape.below(len(lines))
            lines[at] = fuzzing.damaged(tape, lines[at])
            data = fuzzing.encoded("".join(fuzzing.written(line) + "\n" for line in lines))
        fuzzing.put(tape, file, fuzzing.scratched(tape, data, most=1))

        def opened() -> None:
            result = results.load(results.identify(path))
            _ = result.accuracy, result.updates, result.label_rows, result.kind, result.train_seconds

        fuzzing.read(opened, raises=(ValueError, FileNotFoundError), names=[path])
        fuzzing.replace(file, valid[file])

    fuzz(case)


# ---------------------------------------------------------------------------- what they found


@pytest.mark.parametrize(
    "binding",
    [
        "END=(",
        "END='",
        "END=" + "(" * 3_000,
        "END=" + "-" * 5_000 + "1",
        "END=" + "1" * 5_000,
        "END=" + "[" * 1_500,
        "A B=1",
        "=1",
    ],
)
def test_a_value_that_does_not_end_or_nests_too_deeply_is_a_mistake(binding: str) -> None:
    with pytest.raises(gin_files.UsageError) as caught:
        gin_files.configure("optax.linear_schedule", gin_files=[], bindings=[binding])
    assert 10 < len(str(caught.value)) < fuzzing.LONGEST_MESSAGE


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (hugging_face.CONFIG, {"num_layers": None}, r"config\.json: 'num_layers' is None"),
        (hugging_face.CONFIG, {"model_type": []}, r"a model of type \[\]"),
        (hugging_face.CONFIG, {"architectures": "T5"}, r"config\.json: 'architectures' is 'T5'"),
        (hugging_face.CONFIG, {"feed_forward_proj": {}}, r"feed_forward_proj is \{\}"),
        (hugging_face.CONFIG, {"d_kv": "64"}, r"config\.json: 'd_kv' is '64'"),
        (hugging_face.CONFIG, {"layer_norm_epsilon": "x"}, r"config\.json: 'layer_norm_epsilon' is 'x'"),
        (hugging_face.INDEX, {"weight_map": []}, r"index\.json: 'weight_map' is \[\]"),
        (hugging_face.INDEX, {"weight_map": {"a": "x\x00"}}, r"index\.json: 'a' is in"),
        (hugging_face.ORIGIN, {"data": 1}, r"sbs_run\.json: got"),
    ],
)
def test_settings_of_another_type_are_named(exported: Path, file: str, change: dict, message: str) -> None:
    path = exported / file
    whole = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(whole | change))
    with pytest.raises(ValueError, match=message):
        hugging_face.open_directory(exported)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"a": 1}\x80', b"[" * 9_000])
def test_settings_that_are_no_json_object_are_named(exported: Path, data: bytes) -> None:
    for name in (hugging_face.CONFIG, hugging_face.INDEX):
        valid = (exported / name).read_bytes()
        (exported / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            hugging_face.open_directory(exported)
        (exported / name).write_bytes(valid)


@pytest.mark.parametrize(
    "contents",
    [
        *(1, [], {}, {"target": 1}, {"optimizer": 2}, {"target": {"a": "text"}}, {"target": {}, "version": "3"}),
        *({"target": {"a": None}}, {"target": {"token_embedder": {"embedding": np.zeros(3, np.float32)}}}),
        {"target": {"a": {"__msgpack_chunked_array__": True}}},
        {"target": {"token_embedder": {"embedding": {"driver": "zarr"}}}},
    ],
)
def test_a_file_of_t5x_with_something_else_in_it_is_refused(tmp_path: Path, contents: Any) -> None:
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        t5x.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            "manifest.json",
            '"fraction": 1.0',
            '"fraction": "all"',
            r"manifest\.json: .*data\.options\.fraction' is \"all\"",
        ),
        ("manifest.json", '"run": {', '"ran": {', r"manifest\.json: the field 'run' is missing"),
        ("manifest.json", '"label": ', '"lable": ', r"manifest\.json: data\.splits\.train\.counts"),
        ("metrics.jsonl", '"step": 20', '"step": "../20"', r"metrics\.jsonl:1: got"),
        ("metrics.jsonl", '"loss": ', '"loss": null, "x": ', r"metrics\.jsonl:1: got"),
        ("predictions", '"correct": true', '"correct": "yes"', r"-test-100\.jsonl:1: the field 'correct'"),
        ("predictions", '"target": "', '"target": 5, "x": "', r"-test-100\.jsonl:1: the field 'target'"),
    ],
)
def test_a_run_directory_with_something_else_in_it_is_refused(
    tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    path = report_runs.write_run(tmp_path / "run", right=[True, False, True])
    changed = path / file if "." in file else next((path / file).iterdir())
    text = changed.read_text()
    assert old in text
    changed.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        results.load(results.identify(path))
