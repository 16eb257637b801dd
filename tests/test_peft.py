"""Adapters outside of training: PEFT's form and back, merging, bases that moved or differ, several at once."""

import dataclasses
import functools
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ours
import parity_cases as cases
import pytest
import safetensors.numpy
import toy
from builders.exported import converted

from sbs_jax.cli import main
from sbs_jax.cli.commands import predict
from sbs_jax.prediction import engine, files
from sbs_jax.run import checkpoints
from sbs_jax.student import adapters, families, partitioning, quantized, t5
from sbs_jax.training import evaluate, gin_files, students
from sbs_jax.training.state import load_base
from sbs_jax.training.step import TrainState, prepare, root_key
from sbs_jax.weights import frozen, hugging_face, identity, names, npz, opening, peft, runs
from sbs_jax.weights.arrays import LazyArray, Opened

LORA = adapters.LoRA(rank=4, alpha=8.0)
TUNINGS = {
    "lora": adapters.Tuning(lora=LORA),
    "lora everywhere": adapters.Tuning(lora=adapters.LoRA(rank=3, alpha=4.5, dropout=0.1, modules=(".*",))),
    "lora in one layer": adapters.Tuning(
        lora=adapters.LoRA(rank=2, alpha=2.0, modules=("encoder/layers/1/attention/(query|out)", "mlp/wo"))
    ),
    "lora over bfloat16": adapters.Tuning(base="bfloat16", lora=LORA),
    "lora over int8": adapters.Tuning(base="int8", quantized=("encoder/.*/wo", "query"), lora=LORA),
    "ia3": adapters.Tuning(ia3=adapters.IA3()),
    "ia3 in one layer": adapters.Tuning(ia3=adapters.IA3(outputs=("decoder/layers/0/.*/key",), inputs=("wo",))),
}
# Tunings that PEFT's LoRA and IA3 cannot hold, and their names in the error.
WITHOUT_A_PLACE = {
    "bottlenecks": adapters.Tuning(lora=LORA, bottleneck=adapters.Bottleneck(width=3)),
    "a prompt": adapters.Tuning(prompt=adapters.Prompt(length=2)),
    "prefixes": adapters.Tuning(lora=LORA, prefix=adapters.Prefix(length=2)),
    "biases": adapters.Tuning(biases=adapters.Biases()),
    "trained parameters of the base": adapters.Tuning(lora=LORA, trained=(".*norm/scale",)),
    "both LoRA and IA3": adapters.Tuning(lora=LORA, ia3=adapters.IA3()),
    "factors on both sides": adapters.Tuning(ia3=adapters.IA3(outputs=("wo",), inputs=("wo",))),
}
# Two layers in one stack, so that an adapter can be in one of them.
CONFIG = t5.T5Config(**{**cases.SHAPE, "num_encoder_layers": 2, "num_decoder_layers": 1}, **cases.CASES["v1_1"])


def trained_values(config: t5.T5Config, tuning: adapters.Tuning) -> families.Parameters:
    """Makes trained values far from the initial ones."""
    adapted = adapters.abstract(config, tuning)
    found = {}
    for number, name in enumerate(sorted(adapted.trained)):
        shape = adapted.shapes[name].shape
        values = 0.1 * np.random.default_rng(number).standard_normal(shape)
        found[name] = jnp.asarray(values + name.endswith(("scale",)), jnp.float32)
    return found


@functools.cache
def fingerprint_of(config: t5.T5Config) -> str:
    return identity.of_arrays(cases.opened(config).arrays)


def identity_of(config: t5.T5Config, path: Path) -> dict[str, Any]:
    return {"path": str(path), "seed": None, "fingerprint": fingerprint_of(config)}


def write_run(folder: Path, config: t5.T5Config, tuning: adapters.Tuning, *, base: Path) -> families.Parameters:
    """Writes a run's checkpoint of adapters over the case's weights."""
    values = trained_values(config, tuning)
    checkpoints.save_parameters(folder, values, config=config, step=3, tuning=tuning, base=identity_of(config, base))
    return values


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The case as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("base") / "base"
    hugging_face.write(folder, cases.opened(CONFIG), dtype="float32")
    return folder


@pytest.fixture(scope="module")
def run(base) -> Path:
    """A run of LoRA over it."""
    write_run(base.with_name("run"), CONFIG, TUNINGS["lora"], base=base)
    return base.with_name("run")


@pytest.fixture(scope="module")
def first_export(run) -> Path:
    converted(run, run.with_name("exported"), "peft")
    return run.with_name("exported")


@pytest.fixture
def exported(tmp_path, first_export) -> Path:
    """A copy of that run in PEFT's form, which tests may change."""
    return Path(shutil.copytree(first_export, tmp_path / "exported"))


def imported(folder: Path, base: Path, *, config: t5.T5Config = CONFIG) -> Opened:
    """Opens a directory of PEFT's without reading its base."""
    return peft.open_directory(folder, base=cases.opened(config), base_identity=identity_of(config, base))


def edit(folder: Path, **changes) -> None:
    settings = json.loads((folder / peft.CONFIG).read_text()) | changes
    (folder / peft.CONFIG).write_text(json.dumps(settings))


def edit_arrays(folder: Path, change) -> None:
    arrays = safetensors.numpy.load_file(folder / peft.WEIGHTS)
    change(arrays)
    safetensors.numpy.save_file(arrays, folder / peft.WEIGHTS)


# ------------------------------------------------------------------------------------ PEFT's form


def test_an_export_of_lora_has_peft_s_names_shapes_and_settings(tmp_path, base):
    values = write_run(tmp_path / "run", CONFIG, TUNINGS["lora everywhere"], base=base)
    summary = converted(tmp_path / "run", tmp_path / "out", "peft")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "SEQ_2_SEQ_LM", "r": 3, "lora_alpha": 4.5, "lora_dropout": 0.1}
    assert {name: settings[name] for name in expected} == expected
    assert settings["target_modules"] == ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]
    assert settings["base_model_name_or_path"] == str(base)
    assert summary["base"]["fingerprint"] == identity_of(CONFIG, base)["fingerprint"]
    arrays = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(arrays) == len(values)
    a = arrays["base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"]
    b = arrays["base_model.model.decoder.block.0.layer.2.DenseReluDense.wi_1.lora_B.weight"]
    np.testing.assert_array_equal(a, values["encoder/layers/0/attention/query/lora/a"].T)
    np.testing.assert_array_equal(b, values["decoder/layers/0/mlp/wi_1/lora/b"].T)
    assert (a.shape, b.shape) == ((3, 24), (40, 3))


def test_an_export_of_ia3_has_peft_s_names_and_shapes(tmp_path, base):
    values = trained_values(CONFIG, TUNINGS["ia3"])
    peft.write(tmp_path / "out", opened_run(TUNINGS["ia3"], base), base=None)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "IA3"
    assert (settings["target_modules"], settings["feedforward_modules"]) == (["k", "v", "wo"], ["wo"])
    arrays = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    key = arrays["base_model.model.decoder.block.0.layer.1.EncDecAttention.k.ia3_l"]
    wo = arrays["base_model.model.encoder.block.1.layer.1.DenseReluDense.wo.ia3_l"]
    assert (key.shape, wo.shape) == ((18, 1), (1, 40))
    np.testing.assert_array_equal(key[:, 0], values["decoder/layers/0/encoder_decoder_attention/key/out_scale"])
    np.testing.assert_array_equal(wo[0], values["encoder/layers/1/mlp/wo/in_scale"])


def opened_run(tuning: adapters.Tuning, base: Path) -> Opened:
    """Opens a run of adapters, as if from disk."""
    arrays = {name: LazyArray.of(np.asarray(values)) for name, values in trained_values(CONFIG, tuning).items()}
    return Opened(CONFIG, arrays, step=3, tuning=tuning, base=identity_of(CONFIG, base))


@pytest.mark.parametrize("name", TUNINGS)
def test_there_and_back_are_the_same_adapters_bit_for_bit(name, tmp_path, base):
    before = opened_run(TUNINGS[name], base)
    peft.write(tmp_path / "out", before, base=str(base))
    assert opening.form_of(tmp_path / "out").name == "peft"
    after = imported(tmp_path / "out", base)
    assert after.base == before.base
    assert after.tuning is not None
    assert adapters.abstract(CONFIG, after.tuning).shapes == adapters.abstract(CONFIG, TUNINGS[name]).shapes
    parts = [(tuning.lora, tuning.ia3) for tuning in (TUNINGS[name], after.tuning)]
    patterns = {"modules": (), "outputs": (), "inputs": ()}
    numbers = [[None if part is None else vars(part) | patterns for part in each] for each in parts]
    assert numbers[0] == numbers[1]
    assert set(after.arrays) == set(before.arrays) == adapters.abstract(CONFIG, after.tuning).trained
    for each, array in before.arrays.items():
        np.testing.assert_array_equal(after.arrays[each].whole(), array.whole(), err_msg=each)
    # The modules that are named select what has adapters and nothing else, by PEFT's own rule: a name, or the end of
    # one after a dot.
    everything = {each.hugging_face.removesuffix(".weight") for each in names.of(names.parameters(CONFIG))}
    stored = safetensors.numpy.load_file(tmp_path / "out" / peft.WEIGHTS)
    meant = {key.removeprefix("base_model.model.").partition(".lora_")[0].removesuffix(".ia3_l") for key in stored}
    targets = json.loads((tmp_path / "out" / peft.CONFIG).read_text())["target_modules"]
    assert {each for each in everything if any(each == t or each.endswith(f".{t}") for t in targets)} == meant


@pytest.mark.parametrize("what", WITHOUT_A_PLACE)
def test_what_peft_cannot_hold_is_named(what, tmp_path, base):
    with pytest.raises(ValueError, match=what):
        peft.write(tmp_path / "out", opened_run(WITHOUT_A_PLACE[what], base), base=None)
    assert not (tmp_path / "out").exists()


def test_a_plain_student_has_no_adapters_to_export(tmp_path, base):
    with pytest.raises(ValueError, match="has no adapters"):
        converted(base, tmp_path / "out", "peft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q": 8}}, "'rank_pattern' is .*not read here"),
        ({"alpha_pattern": {"q": 8}}, "'alpha_pattern'"),
        ({"use_rslora": True}, "'use_rslora' is True"),
        ({"use_dora": True}, "'use_dora' is True"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication'"),
        ({"of_a_later_peft": 3}, "'of_a_later_peft' is 3"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base"),
        ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING'; expected one of LORA, IA3"),
        ({"peft_type": None}, "peft_type is None"),
        ({"task_type": "CAUSAL_LM"}, "'CAUSAL_LM'; expected SEQ_2_SEQ_LM"),
        ({"r": 5}, r"lora_A.weight \[4, 24\] is of rank 4, and adapter_config.json says r 5"),
        ({"r": None}, "says r None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a number"),
        ({"lora_alpha": -8}, "LoRA.alpha is -8"),
        ({"target_modules": ["q", "v", "wo"]}, "selects have no weights, such as .*wo"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"target_modules": 3}, "target_modules is 3; expected names"),
    ],
)
def test_settings_that_are_not_read_are_refused_by_name(changes, message, exported, base):
    edit(exported, **changes)
    with pytest.raises(ValueError, match=message):
        imported(exported, base)


Q = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop(f"{Q}.lora_A.weight"), "SelfAttention.q has one of lora_A and lora_B"),
        (
            lambda arrays: arrays.update({Q.replace("Self", "Sefl") + ".lora_A.weight": np.zeros((4, 24))}),
            r"SeflAttention.q is not a kernel .*Did you mean .*SelfAttention.q'",
        ),
        (
            lambda arrays: arrays.update({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 24))}),
            "lm_head is not a kernel",
        ),
        (
            lambda arrays: arrays.update({f"{Q}.lora_magnitude_vector": np.zeros(3)}),
            "lora_magnitude_vector' is not part of LoRA or IA3",
        ),
        (lambda arrays: arrays.update({f"{Q}.ia3_l": np.zeros((18, 1))}), "is IA3's, and .* says peft_type LORA"),
        (
            lambda arrays: arrays.update({f"{Q}.lora_A.weight": np.zeros((4, 25), np.float32)}),
            r"does not fit .*query/lora/a is \[25, 4\]; expected \[24, 4\]",
        ),
        (lambda arrays: arrays.update({f"{Q}.lora_A.weight": np.zeros(4)}), "expected two dimensions"),
        (lambda arrays: arrays.clear(), "holds no adapters"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, message, exported, base):
    edit_arrays(exported, change)
    with pytest.raises(ValueError, match=message):
        imported(exported, base)


def test_factors_on_the_other_side_than_the_settings_say_are_refused(tmp_path, base):
    peft.write(tmp_path / "out", opened_run(TUNINGS["ia3"], base), base=None)
    edit(tmp_path / "out", feedforward_modules=[])
    with pytest.raises(ValueError, match=r"wo.ia3_l has the shape \[1, 40\], and feedforward_modules are \[\]"):
        imported(tmp_path / "out", base)


def test_a_pattern_from_outside_is_not_run(exported, base):
    """A pattern with exponential backtracking must not hang."""
    edit(exported, target_modules=r"((\w+\.?)+)+!", feedforward_modules=r"((\w+\.?)+)+!")
    with pytest.raises(ValueError, match="'feedforward_modules' is"):
        imported(exported, base)
    edit(exported, feedforward_modules=None)
    assert len(imported(exported, base).arrays) == 16
    held = json.loads((exported / peft.BASE).read_text()) | {"held": "int8", "quantized": [r"((\w+/?)+)+!"]}
    (exported / peft.BASE).write_text(json.dumps(held))
    with pytest.raises(ValueError, match="is not a kernel of the base's layers"):
        imported(exported, base)


def test_adapters_of_peft_need_their_base(exported, base, tmp_path):
    with pytest.raises(ValueError, match=rf"no base \(they say: {base}\)"):
        converted(exported, tmp_path / "out", "sbs")
    with pytest.raises(ValueError, match=r"sbs convert --to sbs .* makes a run of both"):
        opening.open_any(exported)
    (exported / peft.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected adapter_model.safetensors"):
        converted(exported, tmp_path / "out", "sbs", base=str(base))


def test_adapters_of_peft_over_another_base_are_refused_where_they_say_which(exported, tmp_path, base):
    other = tmp_path / "other"
    arrays = {
        name: LazyArray.of(values * np.float32(1.01 if name == "encoder/encoder_norm/scale" else 1))
        for name, values in cases.parameters(CONFIG).items()
    }
    hugging_face.write(other, Opened(CONFIG, arrays), dtype="float32")
    with pytest.raises(ValueError, match=rf"adapters of another base: trained on {base} .* got {other}"):
        converted(exported, tmp_path / "out", "sbs", base=str(other))
    (exported / peft.BASE).write_text('{"base": 3}')
    with pytest.raises(ValueError, match=r"expected what sbs convert --to peft writes. Remove it"):
        converted(exported, tmp_path / "out", "sbs", base=str(other))
    (exported / peft.BASE).unlink()  # as PEFT itself saves: nothing says which base it is
    converted(exported, tmp_path / "out", "sbs", base=str(other))
    assert runs.open_run(tmp_path / "out").base == identity_of(CONFIG, other) | {
        "fingerprint": identity.of_arrays(arrays)
    }


# ------------------------------------------------------------------------------------ merged

# A layer on each side; nf4 needs widths that divide by 64.
WIDE = t5.T5Config(
    **{**cases.SHAPE, "emb_dim": 64, "num_heads": 2, "head_dim": 32, "mlp_dim": 64},
    **cases.CASES["v1_1"],
)
WIDE = dataclasses.replace(WIDE, num_encoder_layers=1, num_decoder_layers=1)
ALL = adapters.LoRA(rank=3, alpha=4.5, dropout=0.1, modules=(".*",))
MERGED = {
    # A kernel that is itself trained has LoRA and a factor too.
    "float32": adapters.Tuning(lora=ALL, ia3=adapters.IA3(), trained=(".*norm/scale", "encoder/.*/wo/kernel")),
    "nf4": adapters.Tuning(base="nf4", lora=ALL),
}


def held_parameters(
    config: t5.T5Config, tuning: adapters.Tuning, base: Path
) -> tuple[adapters.Adapted, families.Parameters]:
    """Loads the base as a run does."""
    adapted = adapters.abstract(config, tuning)
    partitioner = partitioning.DATA_PARALLEL.partitioner()
    like = partitioner.with_shardings(adapted.shapes, parameters=adapted.shapes, axes=adapted.axes)
    found = frozen.load(config, tuning, path=str(base), seed=0, like=like, partitioner=partitioner)
    return adapted, found.frozen


def logits(structure: families.Structure, parameters: families.Parameters) -> np.ndarray:
    source, target = jnp.asarray(cases.source()), jnp.asarray(cases.shifted(cases.target()))
    return np.asarray(jax.jit(lambda parameters: families.join(structure, parameters)(source, target))(parameters))


@pytest.mark.parametrize("name", MERGED)
def test_merged_answers_as_base_and_adapters_do(name, tmp_path, caplog):
    tuning = MERGED[name]
    hugging_face.write(tmp_path / "base", cases.opened(WIDE), dtype="float32")
    values = write_run(tmp_path / "run", WIDE, tuning, base=tmp_path / "base")
    adapted, held = held_parameters(WIDE, tuning, tmp_path / "base")
    summary = converted(tmp_path / "run", tmp_path / "merged", "sbs")
    opened = runs.open_run(tmp_path / "merged")
    assert (opened.tuning, opened.base) == (None, None)
    separate = logits(adapted.structure, jax.device_get({**held, **values}))
    plain = {each: jnp.asarray(array.whole()) for each, array in opened.arrays.items()}
    together = logits(families.abstract(WIDE)[0], plain)
    np.testing.assert_allclose(together, separate, rtol=0, atol=1e-5)
    weights = cases.parameters(WIDE)
    assert np.max(np.abs(plain["decoder/layers/0/mlp/wo/kernel"] - weights["decoder/layers/0/mlp/wo/kernel"])) > 0.01
    if name == "float32":
        assert "quantized" not in summary
        return
    layers = [each for each in weights if each.endswith("/kernel") and "layers" in each]
    errors = {each: quantized.error(weights[each], form="nf4") for each in layers}
    told = summary["quantized"]
    assert (told["form"], told["kernels"]) == ("nf4", len(errors))
    error = told["relative_rms_error"]
    assert error["largest"] == pytest.approx(max(errors.values())) == pytest.approx(errors[error["of"]])
    assert error["mean"] == pytest.approx(np.mean(list(errors.values())))
    assert "nf4" in caplog.text


def test_peft_s_adapters_are_merged_as_well(exported, run, base, tmp_path):
    converted(run, tmp_path / "of_run", "hf")
    converted(exported, tmp_path / "of_peft", "hf", base=str(base))
    mine, theirs = (hugging_face.open_directory(tmp_path / name).arrays for name in ("of_run", "of_peft"))
    for name, array in mine.items():
        np.testing.assert_array_equal(array.whole(), theirs[name].whole())


def test_a_base_that_moved_is_named_and_may_be_given_anew(tmp_path, base):
    shutil.copytree(base, tmp_path / "before")
    write_run(tmp_path / "run", CONFIG, TUNINGS["lora"], base=tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(FileNotFoundError, match=r"before, the base of .* does not exist.*--base"):
        converted(tmp_path / "run", tmp_path / "out", "hf")
    converted(tmp_path / "run", tmp_path / "out", "hf", base=str(tmp_path / "after"))
    converted(tmp_path / "run", tmp_path / "peft", "peft", base=str(tmp_path / "after"))
    said = json.loads((tmp_path / "peft" / peft.CONFIG).read_text())["base_model_name_or_path"]
    assert said == str(tmp_path / "after")
    with pytest.raises(FileNotFoundError, match=r"nowhere, the base of .* does not exist\.$"):
        converted(tmp_path / "run", tmp_path / "out2", "hf", base="nowhere")


def test_another_base_is_refused_wherever_adapters_meet_it(run, tmp_path, base):
    other = tmp_path / "other.npz"
    values = cases.parameters(CONFIG)
    values["encoder/layers/0/mlp/wo/kernel"][3, 5] = np.nextafter(values["encoder/layers/0/mlp/wo/kernel"][3, 5], 9)
    npz.save_npz(other, {name: jnp.asarray(array) for name, array in values.items()}, dtype="float32")
    for to_form in ("hf", "t5x", "sbs", "peft"):
        with pytest.raises(ValueError, match=rf"{run} has adapters of another base: trained on {base}"):
            converted(run, tmp_path / "out", to_form, base=str(other))
    with pytest.raises(ValueError, match="has adapters of another base"):
        opening.open_any(run, base=str(other))
    # The same numbers of another form are the same base.
    same = tmp_path / "same.npz"
    npz.save_npz(same, cases.model(CONFIG)[1], dtype="float32")
    converted(run, tmp_path / "out", "t5x", base=str(same))


def test_a_base_for_what_has_no_adapters_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="has no adapters, and needs no base; got --base"):
        converted(base, tmp_path / "out", "sbs", base=str(base))


def test_what_cannot_be_merged_is_refused_before_the_base_is_read(tmp_path, base):
    write_run(tmp_path / "run", CONFIG, WITHOUT_A_PLACE["prefixes"], base=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has prefixes .* cannot be merged"):
        converted(tmp_path / "run", tmp_path / "out", "hf")


# ------------------------------------------------------------------------------------ predicting


SMALL = dataclasses.replace(toy.MODEL, dropout_rate=0.0)
OVER_ONE_BASE = {
    "own": TUNINGS["lora"],
    "prefix": adapters.Tuning(prefix=adapters.Prefix(length=3)),
    "norms": adapters.Tuning(trained=(".*norm/scale",)),
    "int8": adapters.Tuning(base="int8", lora=LORA),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """Writes the toy's records, a base, and runs over it with the data part of their manifests."""
    folder = tmp_path_factory.mktemp("task")
    options = dataclasses.asdict(toy.options(toy.write_records(folder / "records")))
    weights = {name: jnp.asarray(values) for name, values in cases.parameters(SMALL).items()}
    npz.save_npz(folder / "base.npz", weights, dtype="float32")
    for name, tuning in OVER_ONE_BASE.items():
        write_run(folder / name, SMALL, tuning, base=folder / "base.npz")
        manifest = {
            "data": {"dataset": "toy", "options": options | {"label_prefix": f"{name}: "}},
            "run": {
                "mixture_or_task_name": "toy_label",
                "task_feature_lengths": {"inputs": 20 if name == "own" else 18, "targets": 16},
                "max_decode_length": 3 if name == "prefix" else 5,
            },
        }
        (folder / name / "manifest.json").write_text(json.dumps(manifest))
    return folder


def answered(folder: Path, rows: list[dict[str, Any]], model: str, **options) -> list[dict[str, Any]]:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictor = engine.Predictor.load(model, settings=engine.Settings(batch_size=8), **options)
    files.predict(predictor, input_path=folder / "in.jsonl", output_path=folder / "out.jsonl")
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_rows_are_answered_by_the_adapters_they_name_in_their_order(task, tmp_path):
    named = {name: str(task / name) for name in ("prefix", "norms")}
    turns = (None, "prefix", "norms", None, "prefix")
    rows = [
        {"id": f"{number}", "input": f"{number} a {'b' * number}", **({} if name is None else {"adapter": name})}
        for number, name in enumerate(turns)
    ]
    found = answered(tmp_path, rows, str(task / "own"), adapters=named)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert len({row["score"] for row in found}) == len(rows)
    for name in ("own", "prefix"):
        mine = [{"id": row["id"], "input": row["input"]} for row in rows if row.get("adapter", "own") == name]
        alone = answered(tmp_path, mine, str(task / name))
        assert alone == [row for row in found if row["id"] in {each["id"] for each in mine}]


def test_the_base_is_held_once(task):
    layout = partitioning.DATA_PARALLEL
    first, others = students.load_students(
        task / "own", {"prefix": task / "prefix", "norms": task / "norms"}, layout=layout
    )
    for name, other in others.items():
        shared = [each for each in first.parameters if other.parameters.get(each) is first.parameters[each]]
        norms = sum("norm" in each for each in first.parameters)
        own = sum("lora" in each for each in first.parameters)
        assert len(shared) == len(first.parameters) - own - (norms if name == "norms" else 0)
        assert other.options.label_prefix == f"{name}: "


def test_a_row_of_an_unknown_adapter_is_an_error_and_the_others_are_answered(task, tmp_path):
    rows = [
        {"id": "1", "input": "a", "adapter": "norns"},
        {"id": "2", "input": "b", "adapter": "norms"},
        {"id": "3", "input": "a", "adapter": 3},
    ]
    found = answered(tmp_path, rows, str(task / "own"), adapters={"norms": task / "norms"})
    assert [row["id"] for row in found] == ["1", "2", "3"]
    assert found[0]["line"] == 1
    assert found[0]["error"].startswith("no adapter is named 'norns'. Did you mean 'norms'?")
    assert "error" not in found[1]
    assert found[2]["error"].startswith("no adapter is named 3")
    (alone,) = answered(tmp_path, rows[:1], str(task / "own"))
    assert alone["error"] == "no adapter is named 'norns'. None are loaded: give --adapters NAME=RUN."


def test_adapters_that_cannot_share_a_base_are_refused(task, tmp_path):
    rows = [{"id": "1", "input": "a", "adapter": "other"}]
    with pytest.raises(ValueError, match=r"own and .*int8 hold their base in different ways \(float32, int8\)"):
        answered(tmp_path, rows, str(task / "own"), adapters={"other": str(task / "int8")})
    other = tmp_path / "other"
    shutil.copytree(task / "own", other)
    shutil.rmtree(other / "checkpoints")
    values = trained_values(SMALL, OVER_ONE_BASE["own"])
    fresh = {"path": None, "seed": 3, "fingerprint": "0" * 64}
    checkpoints.save_parameters(other, values, config=SMALL, step=3, tuning=OVER_ONE_BASE["own"], base=fresh)
    with pytest.raises(
        ValueError, match=r"different bases: .*base.npz \(fing.* fresh from seed 3 \(0000000000000000\)"
    ):
        answered(tmp_path, rows, str(task / "own"), adapters={"other": str(other)})
    plain = tmp_path / "plain"
    converted(task / "own", plain, "sbs")
    with pytest.raises(ValueError, match="plain has no adapters: everything was trained"):
        answered(tmp_path, rows, str(task / "own"), adapters={"other": str(plain)})
    with pytest.raises(ValueError, match="plain has no adapters: everything was trained"):
        answered(tmp_path, rows[:0], str(plain), base=str(task / "base.npz"))


def test_predict_and_evaluate_take_a_base_that_moved(task, tmp_path):
    shutil.copytree(task / "own", tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "checkpoints")
    write_run(tmp_path / "own", SMALL, OVER_ONE_BASE["own"], base=tmp_path / "gone.npz")
    rows = [{"id": "1", "input": "a b c"}]
    with pytest.raises(FileNotFoundError, match=r"gone.npz, the base of .* does not exist"):
        answered(tmp_path, rows, str(tmp_path / "own"))
    moved = str(task / "base.npz")
    assert answered(tmp_path, rows, str(tmp_path / "own"), base=moved)[0]["id"] == "1"
    config = evaluate.EvaluateConfig(
        checkpoint_path=str(tmp_path / "own"),
        split="test",
        mixture_or_task_name=None,
        records_dir=None,
        batch_size=16,
        max_decode_length=None,
        output_dir=None,
        layout=partitioning.DATA_PARALLEL,
        base=moved,
    )
    assert "accuracy" in evaluate.evaluate(config)


def test_the_command_line_takes_bases_and_adapters(task, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"id": "1", "input": "a", "adapter": "norms"}\n')
    other = tmp_path / "other.npz"
    weights = {name: jnp.asarray(values) for name, values in cases.parameters(SMALL).items()}
    npz.save_npz(other, {**weights, "encoder/encoder_norm/scale": jnp.ones(32)}, dtype="float32")
    flags = ["predict", str(task / "own"), "--adapters", f"norms={task / 'norms'}"]
    flags += ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main.main([*flags, "--base", str(other)]) == 1
    assert "own has adapters of another base" in capsys.readouterr().err
    assert main.main([*flags, "--base", str(task / "base.npz")]) == 0
    assert main.main(["convert", "--to", "peft", "--base", str(other), str(task / "own"), str(tmp_path / "out")]) == 1
    assert "own has adapters of another base" in capsys.readouterr().err
    assert main.main(["convert", "--to", "peft", str(task / "own"), str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["base"]["path"] == str(task / "base.npz")


def test_gin_binds_the_base_of_an_evaluation():
    bindings = ["CHECKPOINT_PATH=run", "BASE_PATH=moved"]
    config, _ = gin_files.configure(
        "evaluate.EvaluateConfig", gin_files=["gin_configs/runs/evaluate.gin"], bindings=bindings
    )
    assert config.base == "moved"


def test_adapters_of_the_command_line_have_names():
    assert predict.named(["a=runs/a", "b=c=d"]) == {"a": "runs/a", "b": "c=d"}
    for flag in ("runs/a", "=runs/a", "a="):
        with pytest.raises(gin_files.UsageError, match="expected NAME=DIR"):
            predict.named([flag])
    with pytest.raises(gin_files.UsageError, match="names 'a' twice: x and y"):
        predict.named(["a=x", "a=y"])


def test_an_imported_run_predicts_as_the_one_it_was_exported_from(task, tmp_path):
    """A run's settings are kept; if PEFT's directory has none, a base that is a run provides them."""
    rows = [{"id": "1", "input": "a b c"}, {"id": "2", "input": "d"}]
    expected = answered(tmp_path, rows, str(task / "own"))
    converted(task / "own", tmp_path / "out", "peft")
    weights = {name: jnp.asarray(values) for name, values in cases.parameters(SMALL).items()}
    base = tmp_path / "base"
    checkpoints.save_parameters(base, weights, config=SMALL, step=0)
    (base / "manifest.json").write_text((task / "norms" / "manifest.json").read_text())
    converted(tmp_path / "out", tmp_path / "back", "sbs", base=str(base))
    assert answered(tmp_path, rows, str(tmp_path / "back")) == expected
    (tmp_path / "out" / hugging_face.ORIGIN).unlink()
    converted(tmp_path / "out", tmp_path / "again", "sbs", base=str(base))
    options = json.loads((tmp_path / "again" / "manifest.json").read_text())["data"]["options"]
    assert options["label_prefix"] == "norms: "


# ------------------------------------------------------------------------------------ against PEFT itself


@pytest.fixture(scope="module", params=["v1_0", "v1_1"])
def theirs(request, tmp_path_factory) -> tuple[t5.T5Config, Path, Any, Any]:
    """Returns a case's configuration and base, and the modules of PEFT and of our reference in PyTorch."""
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed; `make test-parity` installs it")
    reference, library = importlib.import_module("torch_reference"), importlib.import_module("peft")
    folder = tmp_path_factory.mktemp(request.param) / "base"
    reference.exported(request.param, folder)
    return cases.config(request.param), folder, reference, library


def torch_logits(reference: Any, model: Any) -> np.ndarray:
    source, inputs = (reference.torch.from_numpy(x).long() for x in (cases.source(), cases.shifted(cases.target())))
    with reference.torch.no_grad():
        return model(input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=inputs).logits.numpy()


def our_logits(config: t5.T5Config, tuning: adapters.Tuning, values: families.Parameters) -> np.ndarray:
    return logits(adapters.abstract(config, tuning).structure, {**cases.model(config)[1], **values})


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora everywhere", "lora in one layer", "ia3"])
def test_an_export_answers_in_peft_as_our_run_does(name, theirs, tmp_path):
    config, base, reference, library = theirs
    values = write_run(tmp_path / "run", config, TUNINGS[name], base=base)
    converted(tmp_path / "run", tmp_path / "out", "peft")
    model = library.PeftModel.from_pretrained(reference.load(base), tmp_path / "out").eval()
    found = torch_logits(reference, model)
    np.testing.assert_allclose(our_logits(config, TUNINGS[name], values), found, rtol=0, atol=2e-5)
    assert np.max(np.abs(found - torch_logits(reference, reference.load(base)))) > 0.1
    # PEFT saves the same again.
    model.save_pretrained(tmp_path / "saved")
    first, again = (safetensors.numpy.load_file(tmp_path / each / peft.WEIGHTS) for each in ("out", "saved"))
    assert set(first) == set(again)
    for each, array in first.items():
        np.testing.assert_array_equal(array, again[each])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_an_update_is_the_one_that_pytorch_makes_with_peft(theirs, tmp_path):
    config, base, reference, library = theirs
    torch, tuning = reference.torch, TUNINGS["lora"]
    values = write_run(tmp_path / "run", config, tuning, base=base)
    converted(tmp_path / "run", tmp_path / "out", "peft")
    model = library.PeftModel.from_pretrained(reference.load(base), tmp_path / "out", is_trainable=True).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.5)
    expected = []
    for _ in range(2):
        mean = []
        for source, target in cases.training_rows().values():
            ids, labels = torch.from_numpy(source).long(), torch.from_numpy(target).long()
            labels = labels.masked_fill(labels == 0, -100)
            mean.append(model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss)
        loss = cases.ALPHA * mean[0] + (1 - cases.ALPHA) * mean[1]
        expected.append(loss.item())
        if len(expected) == 1:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
    model.save_pretrained(tmp_path / "trained")

    settings = toy.config(
        tmp_path / "own",
        tmp_path,
        model=config,
        tuning=tuning,
        initial_checkpoint_path=str(base),
        batch_size=16,
        optimizer=optax.sgd,
        learning_rate=optax.constant_schedule(0.5),
    )
    trainer = prepare(settings)
    held = load_base(settings, trainer).frozen
    state = TrainState(
        jnp.int32(0), values, settings.gradient_transformation().init(values), jnp.int32(0), root_key(0), held
    )
    found = []
    for step in range(2):
        state, metrics = trainer.step(jax.tree.map(jnp.array, state), ours.batch())
        found.append(float(metrics["loss"]))
        if step == 0:
            trained = jax.tree.map(np.asarray, state.parameters)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert expected[0] - expected[1] > 0.01
    updated = imported(tmp_path / "trained", base, config=config).arrays
    for each, array in trained.items():
        np.testing.assert_allclose(array, updated[each].whole(), rtol=0, atol=2e-6, err_msg=each)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "lora by a pattern", "lora of pytorch's format", "ia3"])
def test_what_peft_itself_saved_is_imported_and_answers_alike(kind, theirs, tmp_path):
    config, base, reference, library = theirs
    targets = r".*SelfAttention\.(q|o)" if "pattern" in kind else None
    if kind == "ia3":
        settings = library.IA3Config(task_type="SEQ_2_SEQ_LM")
    else:
        settings = library.LoraConfig(
            task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False
        )
    reference.torch.manual_seed(0)
    model = library.get_peft_model(reference.load(base), settings).eval()
    with reference.torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * reference.torch.randn_like(weight))
    model.save_pretrained(tmp_path / "saved")
    if "format" in kind:
        arrays = safetensors.numpy.load_file(tmp_path / "saved" / peft.WEIGHTS)
        (tmp_path / "saved" / peft.WEIGHTS).unlink()
        tensors = {name: reference.torch.from_numpy(array) for name, array in arrays.items()}
        reference.torch.save(tensors, tmp_path / "saved" / peft.TORCH_WEIGHTS)
    summary = converted(tmp_path / "saved", tmp_path / "run", "sbs", base=str(base))
    assert summary["base"]["path"] == str(base)
    opened = runs.open_run(tmp_path / "run")
    assert opened.tuning is not None
    values = {name: jnp.asarray(array.whole()) for name, array in opened.arrays.items()}
    found = our_logits(config, opened.tuning, values)
    np.testing.assert_allclose(found, torch_logits(reference, model), rtol=0, atol=2e-5)
    assert np.max(np.abs(found - torch_logits(reference, reference.load(base)))) > 0.1
