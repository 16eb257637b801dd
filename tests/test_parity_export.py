"""Exports in their runtimes: transformers, CTranslate2, onnxruntime, and JAX without this package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import students
from builders import bpe, decoders
from builders.exported import answered, converted

from sbs_jax.export import card as cards

pytestmark = [
    pytest.mark.parity,
    # the runtimes' own warnings, which differ by release
    pytest.mark.filterwarnings("ignore"),
]
VOCABULARIES = ("byte", "pieces")


# What is not installed is seen before a student is made.
@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed; `make test-parity` installs it")


@pytest.fixture(scope="module")
def ctranslate2():
    return pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed; `make test-parity` installs it")


@pytest.fixture(scope="module")
def jax2onnx():
    return pytest.importorskip("jax2onnx", reason="jax2onnx is not installed; `make test-parity` installs it")


@pytest.fixture(scope="module", params=VOCABULARIES)
def student(request, tmp_path_factory) -> tuple[Path, list[str]]:
    """Writes a run; returns it with the answers of `sbs predict` to `students.TEXTS`."""
    folder = tmp_path_factory.mktemp("student")
    pieces = request.param == "pieces"
    vocabulary = str(request.getfixturevalue("real_vocab")) if pieces else "byte"
    run = students.write(folder / "run", vocabulary=vocabulary, num_encoder_layers=2, num_decoder_layers=2)
    labels = [str(answer.prediction) for answer in students.answers(run)]
    assert len(set(labels)) > 3
    return run, labels


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory) -> Path:
    """The run as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    converted(student[0], folder, "hf")
    return folder


def test_the_card_s_program_answers_in_transformers(transformers, student, exported):
    assert answers_of_the_readme(exported) == student[1]


def test_the_card_s_program_of_a_cascade_answers_in_two_steps(transformers, tmp_path):
    run = students.write(tmp_path / "run", task="toy_cascade", inputs=48)
    converted(run, tmp_path / "out", "hf")
    assert answers_of_the_readme(tmp_path / "out") == [answer.prediction for answer in students.answers(run)]


def answers_of_the_readme(exported: Path) -> list[str]:
    """Runs the README's text, with the directory and the questions filled in."""
    readme = (exported / cards.README).read_text("utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    program = program.replace('"DIRECTORY"', repr(str(exported))).replace('["..."]', repr(list(students.TEXTS)))
    found: dict = {}
    exec(program, found)
    return found["answers"]


def to_ctranslate2(exported: Path, folder: Path) -> None:
    command = [str(Path(sys.executable).with_name("ct2-transformers-converter")), "--model", str(exported)]
    done = subprocess.run([*command, "--output_dir", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_ctranslate2_makes_of_the_directory_answers_alike(ctranslate2, transformers, student, exported, tmp_path):
    """Follows docs/export.md: CTranslate2's command and the directory's tokenizer."""
    to_ctranslate2(exported, tmp_path / "ct2")
    card = json.loads((exported / cards.FILE).read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), device="cpu", compute_type="float32")
    texts = [card["input"]["prefix"] + text for text in students.TEXTS]
    rows = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts, truncation=True).input_ids]
    length = card["answer"]["max_new_tokens"]
    results = translator.translate_batch(rows, beam_size=1, max_decoding_length=length)
    ids = [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]
    assert [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)] == student[1]


# What differs from the tests' own architectures is what CTranslate2 computes (docs/export.md).
ROTARY = {
    "t5gemma2": {"window": 64, "query_scale": None},
    "t5gemma": {"window": 64, "rope_base": 1e4, "query_scale": None, "attention_cap": 50.0, "logits_cap": 30.0},
    "llama": {"head_dim": 6},
    "qwen3": {},
    "gemma3": {"window": 64, "query_scale": None, "rope_factor": 1.0, "rope_base": 1e6, "local_rope_base": 1e4},
}


@pytest.fixture(scope="module", params=ROTARY)
def rotary(request, tmp_path_factory) -> tuple[Path, list[str], dict]:
    """Exports a student of a family that rotates; returns the directory, its answers, and its README's program."""
    folder, kind = tmp_path_factory.mktemp("rotary"), request.param
    library = bpe.with_byte_pieces(list(students.TEXTS) * 9, size=400)
    vocabulary = bpe.write(folder, library)
    config = decoders.config(kind, vocab_size=library.get_vocab_size(), decoder_start=2, **ROTARY[kind])
    values = decoders.parameters(config)
    run = students.write_model(folder / "run", config, values, vocabulary=vocabulary, task="toy_label")
    labels = [str(answer.prediction) for answer in students.answers(run)]
    assert len(set(labels)) > 1
    converted(run, folder / "out", "hf")
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "out" / cards.README).read_text("utf-8"), re.DOTALL)
    return folder / "out", labels, {"program": program.replace('"DIRECTORY"', repr(str(folder / "out")))}


def test_a_model_that_rotates_answers_in_transformers(transformers, rotary):
    """Runs its README's program; Llama's and Qwen3's are in test_decoder_weights.py too."""
    _, labels, found = rotary
    exec(found["program"], found)
    assert [found["answer"](text) for text in students.TEXTS] == labels


def test_a_model_that_rotates_answers_in_ctranslate2(ctranslate2, transformers, rotary, tmp_path):
    """Follows docs/export.md: an input at a time, encoded by the README's program."""
    exported, labels, found = rotary
    exec(found["program"], found)
    tokenizer = found["tokenizer"]
    to_ctranslate2(exported, tmp_path / "ct2")
    length = json.loads((exported / cards.FILE).read_text())["answer"]["max_new_tokens"]
    rows = [tokenizer.convert_ids_to_tokens(found["encode"](text)) for text in students.TEXTS]
    how = {"beam_size": 1, "max_batch_size": 1}
    if "START" in found:
        generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", compute_type="float32")
        made = generator.generate_batch(rows, max_length=length, include_prompt_in_result=False, **how)
        answers = [result.sequences[0] for result in made]
    else:
        translator = ctranslate2.Translator(str(tmp_path / "ct2"), device="cpu", compute_type="float32")
        made = translator.translate_batch(rows, max_decoding_length=length, **how)
        answers = [result.hypotheses[0] for result in made]
    ids = [tokenizer.convert_tokens_to_ids(answer) for answer in answers]
    assert [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)] == labels


def test_onnx_answers_in_onnxruntime(jax2onnx, student, tmp_path):
    """Without JAX; with fewer rows than a call takes, none of full length."""
    summary = converted(student[0], tmp_path / "out", "onnx", samples=str(students.questions(tmp_path)))
    assert summary["check"] == {"samples": 6, "same_answers": 6, "percent": 100.0}
    found = answered(tmp_path / "out", also_refused=("jax", "jaxlib", "onnx", "jax2onnx"))
    assert [text for text, _ in found["answer"]] == student[1]
    assert "rationale" not in found


@pytest.mark.parametrize("student", ["pieces"], indirect=True)  # of bytes: test_export.py
@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=pytest.mark.faults)])  # int8: test_export.py
def test_stablehlo_reads_pieces(student, dtype, tmp_path):
    """Uses SentencePiece without TensorFlow; int8 answers agree as often as the export says."""
    samples = str(students.questions(tmp_path))
    summary = converted(student[0], tmp_path / "out", dtype=dtype, platforms=("cpu",), samples=samples)
    labels = [text for text, _ in answered(tmp_path / "out")["answer"]]
    same = sum(a == b for a, b in zip(labels, student[1], strict=True))
    assert same >= summary["check"]["same_answers"]
    if dtype == "float32":
        assert labels == student[1]


def test_the_program_compiles_for_a_tpu(tmp_path):
    """Compiles with the TPU compiler, on a machine without a TPU."""
    import jax
    from jax import export

    from sbs_jax import chips

    pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed: pip install libtpu")
    converted(students.write(tmp_path / "run"), tmp_path / "out", dtype="int8", check=0)
    (file,) = (tmp_path / "out").glob("answer_*.jax_export")
    exported = export.deserialize(bytearray(file.read_bytes()))
    place = jax.sharding.SingleDeviceSharding(chips.topology("v5e:1x1").describe()[0])
    (stored, rows), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (stored, rows))
    text = jax.jit(exported.call).lower(*like).compile().as_text()
    assert text is not None
    assert "s8[32,384]" in text
    assert re.search(r"ROOT .* \(s32\[4,6\]\S*, f32\[4\]", text)
