"""Exports: StableHLO that runs without this package, int8 weights, the card, and refusals."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import students
import toy
from builders.exported import answered, converted
from conftest import REPOSITORY
from jax import export

from sbs_jax.data import grading
from sbs_jax.export import card as cards
from sbs_jax.student import decoding, families, quantized
from sbs_jax.student.adapters import Prompt, Tuning
from sbs_jax.weights import hugging_face
from sbs_jax.weights.arrays import Opened


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return students.write(tmp_path_factory.mktemp("student") / "run")


@pytest.fixture(scope="module")
def label_student(tmp_path_factory) -> Path:
    """Exports a student for labels only: one program."""
    return students.write(tmp_path_factory.mktemp("student") / "run", task="toy_label")


# ------------------------------------------------------------------------------------ StableHLO


def test_stablehlo_answers_without_this_package(student, tmp_path):
    """Labels and rationales, two more rows than a program takes, inputs that are truncated or contain an end token."""
    summary = converted(student, tmp_path / "out", check=0)
    assert summary["check"] is None
    assert summary["platforms"] == ["cpu", "tpu", "cuda"]
    found = answered(tmp_path / "out")
    labels = [text for text, _ in found["answer"]]
    assert labels == [answer.prediction for answer in students.answers(student)]
    assert len(set(labels)) > 3
    rationales = students.answers(student, objective="rationale")
    assert [text for text, _ in found["rationale"]] == [answer.prediction for answer in rationales]
    assert [answer.prediction for answer in rationales] != labels
    scores = [answer.score or 0.0 for answer in rationales]
    np.testing.assert_allclose([score for _, score in found["rationale"]], scores, rtol=1e-5)
    assert found["graded"] == {"accuracy": 100.0}


def test_a_program_holds_no_weights_and_nothing_that_may_change(label_student, tmp_path):
    """A program's size does not grow with the weights; `jax.export` refuses operations without a promise."""
    converted(label_student, tmp_path / "out", platforms=("cpu", "cuda"), check=0)
    (file,) = (tmp_path / "out").glob("*.jax_export")
    exported = export.deserialize(bytearray(file.read_bytes()))
    assert exported.platforms == ("cpu", "cuda")
    assert not exported.disabled_safety_checks
    assert [leaf.shape for leaf in exported.out_avals] == [(4, 6), (4,)]
    text = exported.mlir_module()
    largest = max(math.prod(shape) for shape in _constants(text))
    assert largest <= 20 * 20, "a constant larger than a table of positions"
    assert len(exported.in_avals) == len(families.abstract(toy.MODEL)[1]) + 1


def _constants(text: str) -> list[list[int]]:
    found = re.findall(r"stablehlo\.constant dense<.*> : tensor<((?:\d+x)*)\w+>", text)
    return [[int(part) for part in shape.split("x") if part] for shape in found]


def test_int8_weights_are_a_quarter_and_say_what_they_lose(label_student, tmp_path):
    summary = converted(label_student, tmp_path / "out", dtype="int8", samples=str(students.questions(tmp_path)))
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    structure, parameters = students.parameters(label_student)
    unpacked = {}
    for name, values in parameters.items():
        if name in stored:
            assert not name.endswith("/kernel")
            unpacked[name] = jnp.asarray(stored[name])
            continue
        codes, scale = stored[f"{name}/codes"], stored[f"{name}/scale"]
        assert (codes.dtype, scale.dtype) == (np.int8, np.float32)
        by_row = name == "token_embedder/embedding"
        unpacked[name] = jnp.asarray(codes * (scale[:, None] if by_row else scale[None, :]))
        bound = scale[:, None] if by_row else scale[None, :]
        assert np.all(np.abs(np.asarray(values) - unpacked[name]) <= 0.5001 * bound)
    matrices = sum(x.size for name, x in parameters.items() if name not in stored)
    assert matrices > 0.98 * sum(x.size for x in parameters.values())
    assert sum(x.nbytes for x in stored.values()) < 0.3 * sum(x.nbytes for x in parameters.values())
    # The program answers as the student with those weights.
    rows = jnp.asarray([[5, 9, 7, 1] + 16 * [0], [80, 81, 82, 83, 1] + 15 * [0]] * 2)
    found = _program(tmp_path / "out")(stored, rows)
    expected = greedy(structure, unpacked, rows)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)
    error = summary["int8_error"]
    kernels = [x for name, x in parameters.items() if name.endswith("/kernel")]
    largest = max(quantized.error(np.asarray(x), form="int8") for x in kernels)
    assert error["mean"] <= error["largest"]
    assert largest <= error["largest"] < 0.02
    assert summary["check"]["samples"] == 6
    told = json.loads((tmp_path / "out" / cards.FILE).read_text())
    assert told["check"] == summary["check"]
    assert f"{summary['check']['same_answers']} of 6 sample inputs" in (tmp_path / "out" / cards.README).read_text()


def greedy(structure, parameters, rows):
    return jax.jit(lambda parameters: decoding.greedy(families.join(structure, parameters), rows, length=6))(parameters)


def _program(folder: Path):
    (file,) = folder.glob("answer_*.jax_export")
    return export.deserialize(bytearray(file.read_bytes())).call


def test_bfloat16_is_half(label_student, tmp_path):
    converted(label_student, tmp_path / "out", dtype="bfloat16", platforms=("cpu",), check=0)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 0.55 * 4 * sum(x.size for x in students.parameters(label_student)[1].values())
    header = safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="np")
    types = {name: header.get_slice(name).get_dtype() for name in header.keys()}  # noqa: SIM118
    assert types["token_embedder/embedding"] == "BF16"
    assert types["encoder/encoder_norm/scale"] == "F32"


def test_what_cannot_be_merged_is_carried(student, tmp_path):
    tuning = Tuning(prompt=Prompt(length=3))
    run = students.write_adapters(tmp_path / "run", tuning, base=student)
    with pytest.raises(ValueError, match=r"has a prompt .* cannot be merged"):
        converted(run, tmp_path / "hf", "hf")
    summary = converted(run, tmp_path / "out", platforms=("cpu",), samples=str(students.questions(tmp_path)))
    assert summary["check"]["same_answers"] == 6
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert stored["prompt/embedding"].shape == (3, toy.MODEL.emb_dim)
    rows = jnp.asarray([[5, 9, 7, 1] + 16 * [0]] * 4)
    found, expected = _program(tmp_path / "out")(stored, rows), greedy(*students.parameters(run), rows)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
    assert "a prompt of 3" in (tmp_path / "out" / cards.README).read_text()


# ------------------------------------------------------------------------------------ the card


def test_a_run_s_export_tells_all_there_is_to_know(toy_run, tmp_path):
    converted(Path(toy_run.model_dir), tmp_path / "out", "hf")
    card = json.loads((tmp_path / "out" / cards.FILE).read_text())
    assert card["input"] == {
        "prefix": "predict: ",
        "max_tokens": 20,
        "longer": "cut to max_tokens, of which the last is EOS",
        "joint": "</s>",
        "number_slots": False,
        "rationale_after": None,
    }
    assert card["answer"]["labels"] == list(toy.LETTERS)
    assert (card["answer"]["max_new_tokens"], card["answer"]["parser"]["after_last"]) == (4, None)
    assert card["rationale"] == {"prefix": "explain: ", "max_new_tokens": 16}
    lines = [json.loads(line) for line in (Path(toy_run.model_dir) / "metrics.jsonl").read_text().splitlines()]
    (test,) = [line for line in lines if line["kind"] == "test"]
    assert card["test"]["accuracy"] == test["accuracy"]
    assert card["test"]["rows"] == 16
    low, high = card["test"]["interval_95"]
    assert low <= test["accuracy"] <= high
    assert card["training"]["method"] == "step-by-step"
    assert card["training"]["rows"]["used"] == 48
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["max_new_tokens"], generation["do_sample"]) == (4, False)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 20
    readme = (tmp_path / "out" / cards.README).read_text()
    assert f"accuracy {test['accuracy']:.2f} (95 % interval" in readme
    origin = (tmp_path / "out" / hugging_face.ORIGIN).read_text()
    ours = json.loads((Path(toy_run.model_dir) / "manifest.json").read_text())
    assert json.loads(origin)["data"]["splits"] == ours["data"]["splits"]
    assert json.loads(origin)["data"]["options"] == ours["data"]["options"] | {"records_dir": "records"}
    for text in (json.dumps(card), readme, origin):
        assert str(Path(toy_run.model_dir).parent) not in text
        assert str(REPOSITORY) not in text
    grades: dict = {}
    exec((tmp_path / "out" / cards.GRADING).read_text(), grades)
    assert grades["accuracy"](["a", "b"], ["a", "c"]) == grading.accuracy(["a", "b"], ["a", "c"])
    # The card survives every form.
    for before, to_form in (("out", "t5x"), ("t5x", "sbs"), ("sbs", "hf")):
        converted(tmp_path / before, tmp_path / to_form, to_form)
    again = json.loads((tmp_path / "hf" / cards.FILE).read_text())
    assert again == card


def test_of_a_dataset_that_is_not_known_here_the_card_has_less(tmp_path, caplog):
    run = students.write(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text().replace('"toy', '"elsewhere'))
    (run / "manifest.json").write_text(json.dumps(manifest))
    converted(run, tmp_path / "out", "hf")
    assert "'elsewhere' is not known here" in caplog.text
    card = json.loads((tmp_path / "out" / cards.FILE).read_text())
    assert (card["dataset"], card["input"]["prefix"]) == ("elsewhere", "predict: ")
    assert (card["answer"]["labels"], card["grading"]["file"]) == (None, None)


def test_of_another_step_nothing_was_tested(toy_run, tmp_path):
    tested = json.loads((Path(toy_run.model_dir) / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    other = next(p for p in (Path(toy_run.model_dir) / "checkpoints").iterdir() if int(p.name) != tested)
    converted(other, tmp_path / "out", "hf")
    assert json.loads((tmp_path / "out" / cards.FILE).read_text())["test"] is None
    assert "| on test | not measured |" in (tmp_path / "out" / cards.README).read_text()


def test_a_run_is_checked_with_what_it_was_graded_on(toy_run):
    source = str(toy_run.model_dir)
    card = {"input": {"prefix": "predict: "}}
    texts = cards.sample_inputs(source, card, form="sbs", rows=5)
    file = next((Path(source) / "predictions").glob("*-test-*.jsonl"))
    assert texts == [json.loads(line)["input"] for line in file.read_text().splitlines()[:5]]
    assert all(text.startswith("predict: ") and not text.startswith("predict: predict") for text in texts)


def test_a_single_task_s_parser_takes_what_follows_the_marker(tmp_path):
    run = students.write(tmp_path / "run", task="toy_rationale_then_label")
    converted(run, tmp_path / "out", "hf")
    card = json.loads((tmp_path / "out" / cards.FILE).read_text())
    assert card["answer"]["is"] == "rationale, then label"
    assert card["answer"]["parser"]["after_last"] == "Answer:"
    assert ".rpartition('Answer:')[2].strip()" in (tmp_path / "out" / cards.README).read_text()


def test_a_cascade_answers_in_two_steps_wherever_it_goes(tmp_path):
    """The program, the card and the README's code; ONNX, which is one program, is refused by name."""
    run, one = (students.write(tmp_path / name, task=f"toy_{name}", inputs=48) for name in ("cascade", "step_by_step"))
    converted(run, tmp_path / "hlo", platforms=("cpu",), shapes=[(4, 48)], check=0)
    card = json.loads((tmp_path / "hlo" / cards.FILE).read_text())
    assert (card["input"]["rationale_after"], card["answer"]["is"]) == (" Rationale: ", "label")
    assert card["rationale"] == {"prefix": "explain: ", "max_new_tokens": students.LENGTHS["targets"]}
    found = answered(tmp_path / "hlo")
    for name, objective in (("answer", "label"), ("rationale", "rationale")):
        assert [text for text, _ in found[name]] == [
            answer.prediction for answer in students.answers(run, objective=objective)
        ]
    assert [text for text, _ in found["answer"]] != [answer.prediction for answer in students.answers(one)]

    converted(run, tmp_path / "hf", "hf")
    for folder in ("hlo", "hf"):
        readme = (tmp_path / folder / cards.README).read_text()
        assert "It answers in two steps. First it writes a rationale, of `explain: ` and the text" in readme
        assert "| input | `predict: ` and the text, then ` Rationale: ` and the rationale, up to 48 tokens |" in readme
    assert "texts = [text + ' Rationale: ' + read.strip() for text, read in zip(texts, rationales)]" in readme
    row = {"input": "predict: a b c", "rationale": "last is c."}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row))
    assert cards.read_samples(tmp_path / "samples.jsonl", card, rows=1) == ["predict: a b c Rationale: last is c."]
    with pytest.raises(ValueError, match=r"toy_cascade answers in two steps.*--to stablehlo"):
        converted(run, tmp_path / "onnx", "onnx")


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("to_form", "changes", "message"),
    [
        ("stablehlo", {"platforms": ("cpu", "gpu")}, r"--platforms is 'gpu'; expected one of cpu, tpu, cuda, rocm"),
        ("stablehlo", {"platforms": ("cpu", "cpu")}, r"each once"),
        ("stablehlo", {"shapes": [(4, 21)]}, r"shape 4x21 .* up to 20 tokens\. Give at most 4x20"),
        ("stablehlo", {"shapes": [(4, 10), (8, 12)]}, r"No shape holds .* 20 tokens.* such as 8x20"),
        ("hf", {"dtype": "int8"}, r"--to hf has no --dtype int8, which is for stablehlo"),
        ("t5x", {"dtype": "bfloat16"}, r"--to t5x has no --dtype bfloat16, which is for hf and stablehlo"),
        ("hf", {"platforms": ("cpu",)}, r"--to hf has no platforms"),
        ("hf", {"shapes": [(1, 20)]}, r"--to hf has no programs"),
    ],
)
def test_what_a_form_has_not(student, to_form, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        converted(student, tmp_path / "out", to_form, **changes)
    assert not list(tmp_path.glob("out*"))


def test_weights_alone_are_no_student(tmp_path):
    students.write(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    converted(tmp_path / "run", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf" / cards.FILE).exists()
    for source in (tmp_path / "run", tmp_path / "hf"):
        with pytest.raises(ValueError, match=r"neither a run of ours nor an export of one"):
            converted(source, tmp_path / "out")


def test_a_vocabulary_that_is_gone_is_missed_before_anything_is_written(tmp_path, real_vocab):
    here = tmp_path / "here.model"
    here.write_bytes(real_vocab.read_bytes())
    run = students.write(tmp_path / "run", vocabulary=str(here))
    here.unlink()
    for to_form in ("hf", "stablehlo"):
        with pytest.raises(FileNotFoundError, match=r"no SentencePiece model at .*here\.model"):
            converted(run, tmp_path / "out", to_form)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"another vocabulary than that of .*: SHA-256 None"):
        converted(run, tmp_path / "out", "hf", vocabulary="byte")
    converted(run, tmp_path / "out", "hf", vocabulary=str(real_vocab))
    assert (tmp_path / "out" / hugging_face.SENTENCEPIECE).read_bytes() == real_vocab.read_bytes()


def test_a_student_without_tokenizer_is_refused_by_programs(student, tmp_path):
    converted(student, tmp_path / "hf", "hf")
    for name in ("tokenizer_config.json", hugging_face.SENTENCEPIECE):
        (tmp_path / "hf" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"has no tokenizer: .* --vocabulary"):
        converted(tmp_path / "hf", tmp_path / "out")
    summary = converted(tmp_path / "hf", tmp_path / "out", "hf", vocabulary="byte")
    assert summary["to"] == "hf"


@pytest.mark.parametrize("name", ["jax2onnx", "onnxruntime"])
def test_a_missing_exporter_says_what_to_install(student, name, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda asked: None if asked == name else True)
    with pytest.raises(ModuleNotFoundError, match=rf"--to onnx needs {name}, .* pip install 'sbs-jax\[onnx\]'"):
        converted(student, tmp_path / "out", "onnx")


def test_samples_that_are_none_are_named(student, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r'rows.jsonl:2: expected {"input": text}'):
        converted(student, tmp_path / "out", samples=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("text", ["8", "0x20", "8x", "8x20,", "8X20", "-1x3"])
def test_shapes_on_the_command_line(text, capsys):
    from sbs_jax.cli.main import main

    assert main(["convert", "--to", "stablehlo", f"--shapes={text}", "SRC", "DST"]) == 1
    assert "is not ROWSxTOKENS, such as 32x88" in capsys.readouterr().err


def test_a_damaged_card_is_refused(student, tmp_path):
    converted(student, tmp_path / "hf", "hf")
    (tmp_path / "hf" / cards.FILE).write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"sbs_student.json: got format 99; expected .* format 1"):
        converted(tmp_path / "hf", tmp_path / "out", "hf")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/somebody/t5-v1_1-base", "t5-v1_1-base"),
        ("t5x/t5_1_1_base/checkpoint_1000000", "t5_1_1_base/checkpoint_1000000"),
        ("gs://t5-data/pretrained_models/t5x/t5_1_1_base", "gs://t5-data/pretrained_models/t5x/t5_1_1_base"),
    ],
)
def test_a_base_is_named_without_where_it_lies(path, name, student):
    manifest = json.loads((student / "manifest.json").read_text())
    manifest["settings"]["initial_checkpoint_path"] = path
    card = cards.of(str(student / "nowhere"), Opened(toy.MODEL, {}, origin=manifest), form="hf")
    assert card is not None
    assert card["training"]["base"] == name


def test_a_card_with_anything_else_in_any_place_is_refused_or_still_a_card(student, tmp_path):
    converted(student, tmp_path / "hf", "hf")
    card = json.loads((tmp_path / "hf" / cards.FILE).read_text())
    refused = []
    for place in _places(card):
        for value in (None, [1], {"a": {}}, -1, "x"):
            changed = json.loads(json.dumps(card))
            holder = changed
            for name in place[:-1]:
                holder = holder[name]
            holder[place[-1]] = value
            (tmp_path / "card.json").write_text(json.dumps(changed))
            try:
                found = cards.read(tmp_path / "card.json")
            except ValueError as error:
                assert "card.json: " in str(error)  # noqa: PT017  (and no other error, whatever the value)
                refused.append(".".join(place))
                continue
            (tmp_path / "out").mkdir(exist_ok=True)
            cards.write(tmp_path / "out", found, usage="")
    for place in (
        "format",
        "input.max_tokens",
        "answer.parser.after_last",
        "rationale.max_new_tokens",
        "training.rows",
    ):
        assert place in refused


def _places(value, before=()):
    for name, each in value.items():
        yield (*before, name)
        if isinstance(each, dict) and name not in ("model", "versions", "rows"):
            yield from _places(each, (*before, name))
