"""Conversions: names, round trips, T5X's forms, buckets, memory, and refusals."""

import dataclasses
import json
import logging
import math
import re
from pathlib import Path

import buckets
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity_cases as cases
import pytest
import safetensors.numpy
import toy
from builders.exported import converted
from builders.old_t5x import old_form
from flax import serialization, traverse_util

from sbs_jax.prediction import engine, files
from sbs_jax.run import checkpoints
from sbs_jax.storage import places
from sbs_jax.student import families, layers, t5
from sbs_jax.training import students
from sbs_jax.training.state import initial_state
from sbs_jax.training.step import prepare
from sbs_jax.weights import hugging_face, names, npz, opening, runs, t5x
from sbs_jax.weights.arrays import LazyArray, Opened

ALL = list(cases.CASES)


def same(opened: Opened, config: families.ModelConfig) -> None:
    """Requires the case's weights, bit for bit."""
    expected = cases.parameters(config)
    assert set(opened.arrays) == set(expected)
    for name, values in expected.items():
        found = opened.arrays[name].whole()
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values, err_msg=name)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The v1.1 case as a Hugging Face directory."""
    hugging_face.write(tmp_path / "exported", cases.opened(cases.config("v1_1")), dtype="float32")
    return tmp_path / "exported"


def edit(path: Path, **changes) -> None:
    settings = json.loads((path / hugging_face.CONFIG).read_text())
    settings |= changes
    (path / hugging_face.CONFIG).write_text(json.dumps(settings))


@pytest.mark.parametrize("case", ALL)
def test_the_table_names_every_parameter_once_on_each_side(case):
    parameters = names.parameters(cases.config(case))
    table = names.of(parameters)
    assert [name.ours for name in table] == list(parameters)
    assert len({name.hugging_face for name in table}) == len(table)
    assert len({name.t5x for name in table}) == len(table)
    # Arrays scanned together differ only in the layer.
    assert len({(name.scanned, name.layer) for name in table}) == len(table)


def test_a_parameter_without_a_row_is_named_with_its_nearest():
    with pytest.raises(ValueError, match=r"attention/qeury/kernel'.*Did you mean .*attention/query/kernel"):
        names.of(["encoder/layers/0/attention/qeury/kernel"])


@pytest.mark.parametrize(("case", "shard_bytes"), [*((case, 10**9) for case in ALL), ("v1_1", 9_000)])
def test_hugging_face_round_trip_is_bit_identical(case, shard_bytes, tmp_path):
    config = cases.config(case)
    hugging_face.write(tmp_path / "out", cases.opened(config), dtype="float32", shard_bytes=shard_bytes)
    opened = hugging_face.open_directory(tmp_path / "out")
    assert opened.config == config
    same(opened, config)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 10**9)
    # The library reads what our writer wrote.
    loaded = {}
    for file in files:
        loaded |= safetensors.numpy.load_file(tmp_path / "out" / file)
    for name in names.of(opened.arrays):
        values = loaded[name.hugging_face]
        np.testing.assert_array_equal(values.T if name.transposed else values, opened.arrays[name.ours].whole())


def test_bfloat16_export_rounds_once(tmp_path):
    config = cases.config("v1_1")
    hugging_face.write(tmp_path / "out", cases.opened(config), dtype="bfloat16")
    opened = hugging_face.open_directory(tmp_path / "out")
    for name, values in cases.parameters(config).items():
        assert opened.arrays[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(opened.arrays[name].whole(), values.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("case", ALL)
def test_t5x_round_trip_is_bit_identical(case, tmp_path):
    config = cases.config(case)
    path = t5x.write(tmp_path / "model", cases.model(config)[1], step=7)
    assert Path(path).name == "checkpoint_7"
    for place in (tmp_path / "model", path, f"{path}/state"):
        opened = t5x.open_checkpoint(place)
        assert opened.step == 7
        same(opened, opened.config)
    assert opened.config == cases.t5x_default(config)


FORMS = [(True, 1, False), (True, 0, False), (True, 1, True)]


@pytest.mark.parametrize(
    ("case", "scanned", "axis", "heads_apart"),
    [*((case, False, 1, False) for case in ALL), *((case, *form) for case in ("v1_0", "umt5") for form in FORMS)],
)
def test_t5x_s_older_form_is_read(case, scanned, axis, heads_apart, tmp_path):
    config = cases.config(case)
    folder = tmp_path / "checkpoint_1000"
    folder.mkdir()
    old_form(folder, config, scanned=scanned, axis=axis, heads_apart=heads_apart)
    for place in (tmp_path, folder):
        opened = t5x.open_checkpoint(place)
        assert opened.config == cases.t5x_default(config)
        assert opened.step == 1000
        same(opened, opened.config)


def test_bfloat16_of_the_second_version_is_read_from_its_bits(tmp_path):
    config = cases.config("v1_1")
    old_form(tmp_path, config, scanned=False, version=2)
    opened = t5x.open_checkpoint(tmp_path)
    kernel = "encoder/layers/1/mlp/wo/kernel"
    expected = cases.parameters(config)[kernel].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(opened.arrays[kernel].whole(), expected)


def test_of_several_t5x_checkpoints_the_newest_is_taken(tmp_path):
    _, parameters = cases.model(cases.config("v1_0"))
    t5x.write(tmp_path, parameters, step=9)
    t5x.write(tmp_path, jax.tree.map(lambda x: x + 1, parameters), step=10)
    name = "encoder/encoder_norm/scale"
    np.testing.assert_array_equal(t5x.open_checkpoint(tmp_path).arrays[name].whole(), np.asarray(parameters[name]) + 1)
    with pytest.raises(FileExistsError, match="checkpoint_9 exists already"):
        t5x.write(tmp_path, parameters, step=9)


@pytest.mark.parametrize("form", ["orbax", "older"])
def test_a_bucket_is_read(starter, form, tmp_path, monkeypatch):
    """Uses TensorStore's client on a loopback bucket, in a fresh process: it reads its settings once."""
    config = cases.config("v1_0")
    folder = tmp_path / "pretrained" / "t5" / "checkpoint_5"
    if form == "orbax":
        t5x.write(folder.parent, cases.model(config)[1], step=5)
    else:
        folder.mkdir(parents=True)
        old_form(folder, config, scanned=False)
    program = (
        "import sys, numpy as np\n"
        "from sbs_jax.weights import opening\n"
        "for file, place in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    assert opening.form_of(place).name == 't5x'\n"
        "    opened = opening.open_any(place)\n"
        "    np.savez(file, **{name: array.whole() for name, array in opened.arrays.items()})\n"
    )
    model = f"gs://{buckets.BUCKET}/t5"
    found = {str(tmp_path / "1.npz"): model, str(tmp_path / "2.npz"): f"{model}/checkpoint_5"}
    with buckets.emulator() as url, buckets.connected(url, monkeypatch):
        buckets.upload(folder.parent, places.of(model))
        arguments = [each for pair in found.items() for each in pair]
        done = starter.run(tmp_path, arguments, command=["-c", program], environment=buckets.environment(url))
    assert done.returncode == 0, done.stderr
    for file in found:
        with np.load(file) as got:
            for name, values in cases.parameters(config).items():
                np.testing.assert_array_equal(got[name], values)


def test_shards_of_an_array_are_read_alone():
    """Eight devices read an eighth each, never the whole."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    values = np.arange(160, dtype=np.float32).reshape(16, 10)
    read = []

    def part(index):
        read.append(values[index].shape)
        return values[index]

    array = LazyArray(values.shape, values.dtype, part).transposed()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    made = array.onto(jax.ShapeDtypeStruct((10, 16), jnp.float32, sharding=sharding))
    np.testing.assert_array_equal(made, values.T)
    assert read == [(2, 10)] * 8


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_of_joined_axes(axis):
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    array = LazyArray(values.shape, values.dtype, values.__getitem__).joined(axis)
    expected = values.reshape(6, 4) if axis == 0 else values.reshape(2, 12)
    assert array.shape == expected.shape
    np.testing.assert_array_equal(array.whole(), expected)
    np.testing.assert_array_equal(array.read((slice(1, 2), slice(2, 4))), expected[1:2, 2:4])


def test_arrays_on_devices_are_copies():
    """JAX takes over aligned memory where it can, and the source may be a mapped file."""
    spare = np.zeros(2**16 + 64, np.uint8)
    start = -spare.ctypes.data % 64
    values = spare[start : start + 2**16].view(np.float32)
    array = LazyArray(values.shape, values.dtype, values.__getitem__)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    made = array.onto(jax.ShapeDtypeStruct(values.shape, jnp.float32, sharding=place))
    values[:] = 1
    assert not np.asarray(made).any()


def test_a_step_that_its_run_removed_is_not_read_as_zeros(tmp_path):
    config = cases.config("v1_0")
    checkpoints.save_parameters(tmp_path, cases.model(config)[1], config=config, step=1)
    opened = runs.open_run(tmp_path)
    same(opened, config)
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "1.removing")
    for array in opened.arrays.values():
        with pytest.raises(FileNotFoundError, match="no longer has a checkpoint of step 1"):
            array.whole()


# What is said about weights that convert.


def rewritten(folder: Path, change) -> None:
    """Rewrites the weights of a Hugging Face directory: `change` takes and returns {name: array}."""
    weights = folder / hugging_face.WEIGHTS
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(weights)), weights)


NORM, QUERY = "decoder.final_layer_norm.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"
OUR_NORM, OUR_QUERY = "decoder/decoder_norm/scale", "encoder/layers/0/attention/query/kernel"


@pytest.mark.parametrize("to_form", ["hf", "sbs", "t5x"])
def test_numbers_that_are_not_finite_are_counted_by_name(exported, tmp_path, caplog, to_form):
    def broken(arrays):
        arrays[NORM][:3] = np.nan
        arrays[QUERY][0, :2] = np.inf, -np.inf
        return arrays

    rewritten(exported, broken)
    summary = converted(exported, tmp_path / "out", to_form)
    assert summary["not_finite"] == {OUR_NORM: 3, OUR_QUERY: 2}
    assert re.search(rf"NaN or infinite, in 2 of \d+ arrays: {OUR_NORM} \(3 of 24\), {OUR_QUERY} \(2 of", caplog.text)
    # Training, prediction and service read weights here.
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=place)
        for name, leaf in names.parameters(cases.config("v1_1")).items()
    }
    caplog.clear()
    opening.load_parameters(tmp_path / "out", like=like)
    assert f"{OUR_NORM} (3 of 24)" in caplog.text


@pytest.mark.parametrize(
    ("stored", "value", "dtype"), [(np.float64, 1e39, "float32"), (np.float32, 3.4e38, "bfloat16")]
)
def test_numbers_that_become_infinite_are_counted(exported, tmp_path, caplog, stored, value, dtype):
    def broken(arrays):
        arrays[NORM] = arrays[NORM].astype(stored)
        arrays[NORM][:2] = value
        return arrays

    rewritten(exported, broken)
    assert converted(exported, tmp_path / "out", "hf", dtype=dtype)["too_large"] == {OUR_NORM: 2}
    assert f"too large for {dtype}, in 1 of" in caplog.text


def test_float16_weights_that_overflowed_are_counted(exported, tmp_path):
    with np.errstate(over="ignore"):
        rewritten(exported, lambda arrays: {name: (x * 1e6).astype(np.float16) for name, x in arrays.items()})
    assert len(converted(exported, tmp_path / "out", "sbs")["not_finite"]) > 5


def test_finite_weights_are_converted_without_a_word(exported, tmp_path, caplog):
    assert converted(exported, tmp_path / "out", "hf").keys().isdisjoint({"not_finite", "too_large"})
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("added_tokens.json", {"<step>": 32100, "<extra_id_0>": 32099}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "</s>"}, "9": {"content": "<step>"}}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<extra_id_1>", "<step>"]}),
        ("special_tokens_map.json", {"additional_special_tokens": [{"content": "<step>"}]}),
        ("tokenizer.json", {"added_tokens": [{"id": 0, "content": "<pad>"}, {"id": 9, "content": "<step>"}]}),
    ],
)
def test_tokens_that_are_not_read_are_named(exported, caplog, file, contents):
    (exported / file).write_text(json.dumps(contents))
    (exported / hugging_face.SENTENCEPIECE).write_bytes(b"")
    hugging_face.open_directory(exported)
    assert "adds 1 tokens to its SentencePiece model (<step>), which are not read" in caplog.text


def test_a_tokenizer_without_a_sentencepiece_model_is_named(exported, caplog):
    (exported / "tokenizer.json").write_text("{}")
    hugging_face.open_directory(exported)
    assert "has tokenizer.json and no spiece.model, so its tokenizer is not read" in caplog.text


@pytest.mark.parametrize(
    "wrapped",
    [
        *("module.", "_orig_mod.", "module._orig_mod.", "model.", "net.t5.", "module.model."),
        "_fsdp_wrapped_module.",
    ],
)
def test_a_model_that_was_saved_wrapped_is_opened_and_said(exported, caplog, wrapped):
    def renamed(name):
        return wrapped + name.replace("block.0.", "block.0._fsdp_wrapped_module._checkpoint_wrapped_module.")

    caplog.set_level(logging.INFO)
    rewritten(exported, lambda arrays: {renamed(name): x for name, x in arrays.items()})
    same(hugging_face.open_directory(exported), cases.config("v1_1"))
    assert wrapped.rstrip(".").rpartition(".")[2] in caplog.text


def test_two_models_in_one_file_are_refused(exported):
    rewritten(exported, lambda arrays: {f"{at}.{name}": x for name, x in arrays.items() for at in ("ema", "model")})
    with pytest.raises(ValueError, match=r"holds more than one model: 'model\..*Save the one to convert by itself"):
        hugging_face.open_directory(exported)


def test_the_exact_gelu_is_computed_as_such(tmp_path):
    config = dataclasses.replace(cases.config("v1_0"), mlp_activations=("gelu_exact",))
    hugging_face.write(tmp_path / "out", cases.opened(config), dtype="float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["feed_forward_proj"] == "gelu"
    assert hugging_face.open_directory(tmp_path / "out").config == config
    x = jnp.linspace(-4.0, 4.0, 33)
    exact = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x.tolist()]
    np.testing.assert_allclose(layers.ACTIVATIONS["gelu_exact"](x), exact, atol=2e-7)
    assert np.abs(layers.ACTIVATIONS["gelu"](x) - np.array(exact)).max() > 1e-4


def test_a_head_that_is_missing_is_said(tmp_path, caplog):
    hugging_face.write(tmp_path / "out", cases.opened(cases.config("v1_0")), dtype="float32")
    edit(tmp_path / "out", tie_word_embeddings=False)
    hugging_face.open_directory(tmp_path / "out")
    assert "has no lm_head.weight, although its config.json says tie_word_embeddings false" in caplog.text


@pytest.fixture(scope="module")
def run(toy_run):
    return toy_run


def student_of(path):
    student = students.load_student(path, layout=toy.config(Path("a"), Path("b")).layout)
    return jax.tree.map(np.asarray, student.parameters), student.config


@pytest.fixture(scope="module", params=["hf", "t5x", "sbs"])
def through(request, run, tmp_path_factory) -> Path:
    """Converts the run to another form."""
    folder = tmp_path_factory.mktemp("through") / request.param
    assert converted(run.model_dir, folder, request.param)["from"] == "sbs"
    assert opening.form_of(folder).name == request.param
    return folder


def test_a_run_comes_back_from_every_form_as_a_run_that_predicts(run, through, tmp_path):
    converted(through, tmp_path / "back", "sbs", from_form=through.name)
    before, after = student_of(run.model_dir), student_of(tmp_path / "back")
    assert before[1] == after[1]
    for name, values in before[0].items():
        np.testing.assert_array_equal(values, after[0][name])
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"id": "1", "input": "three and four"}\n{"id": "2", "input": "nine"}\n')
    answers = []
    for model in (run.model_dir, tmp_path / "back"):
        predictor = engine.Predictor.load(model, settings=engine.Settings(batch_size=2))
        files.predict(predictor, input_path=rows, output_path=tmp_path / "out")
        answers.append((tmp_path / "out").read_text())
    assert answers[0] == answers[1]


def test_training_starts_from_every_form(run, through, tmp_path):
    config = toy.config(tmp_path / "next", Path(run.data.records_dir), initial_checkpoint_path=str(through))
    trainer = prepare(config)
    state = initial_state(config, trainer)
    for name, values in student_of(run.model_dir)[0].items():
        np.testing.assert_array_equal(state.parameters[name], values)
        assert state.parameters[name].sharding == trainer.abstract.parameters[name].sharding


def test_the_command_line_converts(starter, run, tmp_path):
    command_line = ["convert", "--to", "hf", run.model_dir, str(tmp_path / "out")]
    done = starter.run(tmp_path, command_line)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["to"] == "hf"
    assert hugging_face.open_directory(tmp_path / "out").origin is not None
    again = starter.run(tmp_path, command_line)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr


def test_an_export_carries_its_tokenizer(tmp_path, real_vocab):
    opened = cases.opened(cases.config("v1_1"))
    with_pieces = Opened(opened.config, opened.arrays, vocabulary=str(real_vocab))
    hugging_face.write(tmp_path / "pieces", with_pieces, dtype="float32")
    assert (tmp_path / "pieces" / hugging_face.SENTENCEPIECE).read_bytes() == real_vocab.read_bytes()
    assert hugging_face.open_directory(tmp_path / "pieces").vocabulary == str(tmp_path / "pieces" / "spiece.model")


# What is refused.


def test_missing_and_unmapped_arrays_are_named(exported):
    weights = exported / hugging_face.WEIGHTS
    arrays = safetensors.numpy.load_file(weights)
    norm = arrays.pop("decoder.final_layer_norm.weight")
    safetensors.numpy.save_file(arrays, weights)
    with pytest.raises(ValueError, match=r"missing \(1\): decoder/decoder_norm/scale"):
        hugging_face.open_directory(exported)
    arrays["decoder.final_layer_norm.weight"] = arrays["encoder.block.0.layer.0.SelfAttention.qq.weight"] = norm
    safetensors.numpy.save_file(arrays, weights)
    with pytest.raises(ValueError, match=r"SelfAttention\.qq\.weight Did you mean '.*SelfAttention\.q\.weight'"):
        hugging_face.open_directory(exported)


def test_a_wrong_shape_names_the_array_and_both_shapes(exported):
    edit(exported, d_ff=41)
    with pytest.raises(ValueError, match=r"mlp/wi_0/kernel: checkpoint \(24, 40\), model \(24, 41\)"):
        hugging_face.open_directory(exported)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, r"'gpt2' \(GPT2LMHeadModel\)"),
        ({"model_type": "longt5"}, "'longt5'"),
        ({"architectures": ["T5EncoderModel"]}, "holds a T5EncoderModel"),
        ({"feed_forward_proj": "quick_gelu"}, r"'quick_gelu', which is not computed here; expected one of relu, "),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs from 'shared.weight'"),
    ],
)
def test_another_kind_of_model_is_refused_by_name(exported, changes, message):
    edit(exported, **changes)
    with pytest.raises(ValueError, match=message):
        hugging_face.open_directory(exported)


def test_a_missing_shard_is_named(tmp_path):
    hugging_face.write(tmp_path / "out", cases.opened(cases.config("v1_0")), dtype="float32", shard_bytes=9_000)
    (tmp_path / "out" / "model-00002-of-00009.safetensors").unlink(missing_ok=True)
    gone = sorted((tmp_path / "out").glob("model-00001-*"))[0]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(gone.name)):
        hugging_face.open_directory(tmp_path / "out")


def test_a_cut_file_is_refused(exported):
    weights = exported / hugging_face.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        hugging_face.open_directory(exported)


def test_a_missing_array_of_t5x_s_older_form_is_named(tmp_path):
    old_form(tmp_path, cases.config("v1_0"), scanned=False)
    folder = tmp_path / "target.encoder.layers_0.mlp.wo.kernel"
    (folder / ".zarray").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(folder.name)):
        t5x.open_checkpoint(tmp_path)


def test_an_unmapped_name_of_t5x_is_listed(tmp_path):
    _, parameters = cases.model(cases.config("v1_0"))
    flat = {f"target/{name.t5x}": np.asarray(parameters[name.ours]) for name in names.of(parameters)}
    flat["target/decoder/odd_norm/scale"] = np.ones(3)
    tree = traverse_util.unflatten_dict(flat, sep="/")
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(ValueError, match=r"left over \(1\): decoder/odd_norm/scale"):
        t5x.open_checkpoint(tmp_path)


def test_a_half_written_export_does_not_look_complete(tmp_path):
    config = cases.config("v1_0")
    opened = cases.opened(config)

    def fails(index):
        raise OSError("disk full")

    mine = tmp_path / "out.incomplete"
    mine.mkdir()
    broken = dict(opened.arrays)
    name = sorted(broken)[-1]
    broken[name] = LazyArray(broken[name].shape, broken[name].dtype, fails)
    with pytest.raises(OSError, match="disk full"):
        hugging_face.write(tmp_path / "out", Opened(config, broken), dtype="float32")
    assert not (tmp_path / "out").exists()
    # Its remains do not block a second conversion.
    hugging_face.write(tmp_path / "out", opened, dtype="float32")
    same(hugging_face.open_directory(tmp_path / "out"), config)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", mine.name]


def test_what_is_no_checkpoint_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        opening.form_of(tmp_path / "none")
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(FileNotFoundError) as error:
        opening.form_of(tmp_path)
    assert all(form.described in str(error.value) for form in opening.FORMS.values())


@pytest.mark.parametrize("form", ["orbax", "older"])
def test_a_file_or_folder_of_a_t5x_checkpoint_says_what_is_expected(tmp_path, form):
    config, folder = cases.config("v1_0"), tmp_path / "checkpoint_5"
    if form == "orbax":
        t5x.write(tmp_path, cases.model(config)[1], step=5)
    else:
        folder.mkdir()
        old_form(folder, config, scanned=False)
    opening.form_of(folder)
    inside = [path for path in folder.rglob("*") if path.is_file() or not (path / "manifest.ocdbt").is_file()]
    assert len(inside) > 5
    for path in inside:
        with pytest.raises(FileNotFoundError, match=r"(holds no|is a file and no) checkpoint.*expected one of: .*T5X"):
            opening.form_of(path)


def test_weights_without_their_configuration_are_named(exported):
    (exported / hugging_face.CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"has weights and no config\.json"):
        opening.open_any(exported)


@pytest.mark.parametrize("to_form", ["hf", "sbs"])
def test_a_damaged_vocabulary_is_not_converted(exported, tmp_path, to_form):
    (exported / hugging_face.SENTENCEPIECE).write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"spiece\.model is not a SentencePiece model"):
        converted(exported, tmp_path / "out", to_form)
    assert not (tmp_path / "out").exists()


def test_the_stated_form_must_be_the_form(exported, tmp_path):
    with pytest.raises(ValueError, match="form 'hf'; got --from 't5x'"):
        converted(exported, tmp_path / "out", "sbs", from_form="t5x")


def test_weights_without_an_architecture_are_not_converted(tmp_path):
    npz.save_npz(tmp_path / "student.npz", cases.model(cases.config("v1_0"))[1], dtype="float32")
    with pytest.raises(ValueError, match="do not say their architecture"):
        converted(tmp_path / "student.npz", tmp_path / "out", "hf")


def test_weights_of_another_size_than_the_configured_model_are_refused(exported, tmp_path):
    config = toy.config(tmp_path / "run", tmp_path, initial_checkpoint_path=str(exported))
    with pytest.raises(ValueError, match=r"another architecture[\s\S]*gin_configs/models"):
        initial_state(config, prepare(config))


@pytest.mark.slow
def test_weights_are_streamed_and_never_held_together(starter, tmp_path):
    """Converts 0.3 GB from a sparse file: peak memory is a few arrays, not the model."""
    config = t5.T5Config(
        vocab_size=32128,
        emb_dim=512,
        num_heads=6,
        head_dim=64,
        mlp_dim=1024,
        num_encoder_layers=8,
        num_decoder_layers=8,
        mlp_activations=("gelu", "linear"),
        logits_via_embedding=False,
        dropout_rate=0.0,
    )
    shapes = names.parameters(config)
    holes = np.memmap(tmp_path / "holes", np.float32, "w+", shape=(max(np.prod(x.shape) for x in shapes.values()),))
    arrays = {
        name: LazyArray(leaf.shape, holes.dtype, holes[: np.prod(leaf.shape)].reshape(leaf.shape).__getitem__)
        for name, leaf in shapes.items()
    }
    hugging_face.write(tmp_path / "source", Opened(config, arrays), dtype="float32")
    program = (
        "import re, threading, time, sys, pathlib\n"
        "from sbs_jax.export import convert\n"
        "def held():\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
        "before, peak, done = held(), 0, False\n"
        "def watch():\n"
        "    global peak\n"
        "    while not done:\n"
        "        peak = max(peak, held())\n"
        "        time.sleep(0.005)\n"
        "thread = threading.Thread(target=watch)\n"
        "thread.start()\n"
        "convert.convert(*sys.argv[1:3], convert.Options(to_form='hf'))\n"
        "done = True\n"
        "thread.join()\n"
        "print((peak - before) * 1024)\n"
    )
    done = starter.run(tmp_path, [str(tmp_path / "source"), str(tmp_path / "target")], command=["-c", program])
    assert done.returncode == 0, done.stderr
    largest = max(int(np.prod(leaf.shape)) for leaf in shapes.values()) * 4
    assert 0 < int(done.stdout) < 3 * largest < names.size(shapes) * 4
