"""Weights of transformers' Flax T5 (`flax_model.msgpack`), compared with the same weights as safetensors."""

import struct

import numpy as np
import parity_cases as cases
import pytest
from builders import flax_files
from flax import serialization

from sbs_jax.weights import flax_msgpack, hugging_face, opening


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", list(cases.CASES))
def test_the_same_weights_bit_for_bit(case, shards, tmp_path):
    config = cases.config(case)
    hugging_face.write(tmp_path / "out", cases.opened(config), dtype="float32")
    expected = hugging_face.open_directory(tmp_path / "out")
    flax_files.replace_weights(tmp_path / "out", shards=shards)
    found = opening.open_any(tmp_path / "out")
    assert found.config == expected.config == config
    assert set(found.arrays) == set(cases.parameters(config))
    for name, values in cases.parameters(config).items():
        np.testing.assert_array_equal(found.arrays[name].whole(), values, err_msg=name)
        part = (slice(1, 2), *(slice(0, 3) for _ in values.shape[1:]))
        np.testing.assert_array_equal(found.arrays[name].read(part), values[part], err_msg=name)


def test_flax_itself_reads_what_the_builder_writes(tmp_path):
    hugging_face.write(tmp_path / "out", cases.opened(cases.config("v1_1")), dtype="float32")
    arrays = flax_files.flat(tmp_path / "out")
    tree = serialization.msgpack_restore(flax_files.packed(arrays))
    query = tree["encoder"]["block"]["0"]["layer"]["0"]["SelfAttention"]["q"]["kernel"]
    np.testing.assert_array_equal(
        query, cases.parameters(cases.config("v1_1"))["encoder/layers/0/attention/query/kernel"]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_types(dtype, tmp_path):
    values = np.arange(6).reshape(2, 3).astype(np.dtype(dtype))
    (tmp_path / "x.msgpack").write_bytes(flax_files.packed({"a/kernel": values, "b/embedding": values}))
    found = flax_msgpack.read(tmp_path / "x.msgpack")
    assert {name: (array.shape, array.dtype.name) for name, array in found.items()} == {
        "a.weight": ((3, 2), dtype),
        "b.weight": ((2, 3), dtype),
    }
    np.testing.assert_array_equal(found["a.weight"].whole(), values.T)


def test_an_array_that_flax_cut_into_chunks(tmp_path, monkeypatch):
    values = np.arange(77, dtype=np.float32).reshape(7, 11)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    data = flax_files.packed({"shared/embedding": values})
    assert b"__msgpack_chunked_array__" in data
    (tmp_path / "x.msgpack").write_bytes(data)
    (array,) = flax_msgpack.read(tmp_path / "x.msgpack").values()
    np.testing.assert_array_equal(array.whole(), values)
    np.testing.assert_array_equal(array.read((slice(2, 5), slice(None))), values[2:5])


def test_damage_is_named(tmp_path):
    whole = flax_files.packed({"a/kernel": np.zeros((2, 3), np.float32)})
    at = whole.index(b"float32")
    cases = {
        "it ends too early": whole[:-1],
        "1 bytes follow its end": whole + b"x",
        "is empty": b"",
        "claims the shape": whole[: at - 3] + struct.pack("B", 9) + whole[at - 2 :],
        "of type 'flOat32'; expected one of float32": whole.replace(b"float32", b"flOat32"),
        "a number where a map belongs": b"\x07",
        "the name 'a/kernel'": flax_files.serialization.msgpack_serialize({"a/kernel": np.zeros(1, np.float32)}),
        "'a.weight' stands there twice": flax_files.packed(
            {"a/kernel": np.zeros(1, np.float32), "a/weight": np.zeros(1, np.float32)}
        ),
    }
    for said, data in cases.items():
        (tmp_path / "x.msgpack").write_bytes(data)
        with pytest.raises(ValueError, match=said) as error:
            flax_msgpack.read(tmp_path / "x.msgpack")
        assert str(tmp_path / "x.msgpack") in str(error.value)
