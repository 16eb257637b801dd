"""Readers of text from outside return or raise an error that says what is wrong and where, whatever the file holds.

The same cases of each reader every time; how many says --fuzz-cases, and others are drawn with --fuzz-seed random.
How cases are made, and what is watched meanwhile (hangs, memory, inputs that run): tests/fuzzing.py. Below them, each
fault that they found in its smallest form. Checkpoints and configurations: test_fuzz_checkpoints.py.
"""

import dataclasses
import gzip
import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import fuzzing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import Tape
from sentencepiece import sentencepiece_model_pb2
from seqio import vocabularies

import tasks  # noqa: F401  (registers the datasets)
from sbs_jax.data import grading, parsing, records, registry, release, tokens
from sbs_jax.data.dataset import Row
from sbs_jax.data.vocabularies import SentencePiece
from sbs_jax.prediction import inputs
from sbs_jax.storage import json_files
from sbs_jax.teacher import batches, clients, gemini, openai, prompts, store
from tasks import builtin, svamp

Fuzz = Callable[..., None]
PROTO = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]

RECORDS = (
    {
        "id": "toy-1",
        "input": "Ann has 3 pens.\nHow many?",
        "label": "( 3.0 + 4.0 )",
        "choices": [],
        "teacher_text": "3 + 4. The answer is (3 + 4).",
        "rationale": "3 + 4.",
        "teacher_label": "(3 + 4)",
        "outcome": "ok",
        "prompt": "0123456789ab",
        "hinted": True,
        "votes": [2, 3],
    },
    {"id": "toy-2", "input": "i", "label": None},
    {"id": "toy-3", "input": "\u00e9\u4e2d", "label": "b", "choices": ["a", "b"], "outcome": "no_teacher"},
)
INPUTS = {
    "esnli": {"premise": "A dog barks.", "hypothesis": "An animal is heard.", "label": 0},
    "anli1": {"uid": "u1", "premise": "A dog barks.", "hypothesis": "An animal is heard.", "label": 2},
    "cqa": {"id": "c1", "question": "What do people drink?", "choices": ["sand", "tea"], "answer": "tea"},
    "svamp": {"input": "Ann has 3 pens.", "label": "( 3.0 + 4.0 )"},
    "builtin": {"input": "A tiny red iron lamp. Will it float?", "label": "no"},
}
# Texts that the rules of the datasets look for.
REPLIES = (
    *("Iron sinks. ", "So the answer is", " no.", "The answer is", " (3 + 4).", "Answer:", " neutral"),
    *("(b) tea", "(a)"),
    *("\n\nQ: next", "Q:", "Premise:", "Premise", "\n", "(", ")", "(14, 21)", ".", "( 84.0 / 2.0 )", "yes", " "),
    "((1)",
    *fuzzing.TEXTS,
)


def test_records(fuzz: Fuzz, memory: Path) -> None:
    path = memory / "train.jsonl"

    def case(tape: Tape) -> None:
        fuzzing.put(tape, path, fuzzing.lines(tape, RECORDS))
        found = fuzzing.read(lambda: records.read_records(path), raises=ValueError, names=[path])
        if isinstance(found, list):
            for record in found:
                assert json_files.typed(dataclasses.asdict(record), records.Record) == record
                json.dumps(records.fields_of(record), ensure_ascii=False).encode()

    fuzz(case)


def test_manifest_of_records(fuzz: Fuzz, memory: Path) -> None:
    path = memory / records.MANIFEST
    summary = {
        "rows": 2,
        "sha256": "ab" * 32,
        "sources": {"svamp_train.json": "cd" * 32},
        "outcomes": {"ok": 2},
        "rationales": 2,
        "teacher_labels": 2,
        "labelled": 2,
        "teacher_right": 1,
        "teacher_accuracy": 50.0,
    }
    manifest = {
        "format": records.FORMAT,
        "dataset": "svamp",
        "parser": "strict",
        "inputs": "release",
        "sbs_jax": "0.1.0",
        "splits": {"train": summary, "test": summary},
        "skipped": {"validation": "no inputs"},
    }
    other = memory / "other"
    records.write_manifest(other, manifest)  # type: ignore[arg-type]
    for split in manifest["splits"]:
        (other / f"{split}.jsonl").write_text("")

    def case(tape: Tape) -> None:
        fuzzing.put(
            tape, path, fuzzing.scratched(tape, fuzzing.encoded(fuzzing.written(fuzzing.damaged(tape, manifest))))
        )
        damage = (ValueError, FileNotFoundError)
        found = fuzzing.read(lambda: records.read_manifest(memory), raises=damage, names=[memory])
        if isinstance(found, dict):
            fuzzing.read(lambda: records._differences(other, memory), raises=ValueError, names=[path])

    fuzz(case)


def test_inputs_of_the_release(fuzz: Fuzz, memory: Path) -> None:
    paths = {}
    for name in INPUTS:
        paths[name] = memory / name / f"{name}_test.json"
        paths[name].parent.mkdir()

    def case(tape: Tape) -> None:
        name = tape.one_of(list(INPUTS))
        fuzzing.put(tape, paths[name], fuzzing.lines(tape, [INPUTS[name]]))
        fuzzing.read(
            lambda: release.read_unanswered(registry.get(name), inputs_dir=memory, inputs="release"),
            raises=(ValueError, FileNotFoundError),
            names=[memory],
        )

    fuzz(case)


def test_shards_of_the_release(fuzz: Fuzz, memory: Path) -> None:
    shards = memory / "svamp" / "llm"
    shards.mkdir(parents=True)
    replies = ["3 + 4 = 7. The answer is (3 + 4).\n\nQ: ..", "x", ""]
    ends = ("0", "1", "2", "00", "01", "10", "", "-1", "1_0", "٣", "0 ", "999999999", "9" * 30, "0.json", "\n", "a")

    def case(tape: Tape) -> None:
        names = {f"test_CoT_{tape.one_of(ends) if tape.chance(3) else number}.json" for number in range(2)}
        for name in names:
            text = fuzzing.encoded(fuzzing.written(fuzzing.damaged(tape, replies, most=1)))
            fuzzing.put(tape, shards / name, fuzzing.scratched(tape, text, most=1))
        found = fuzzing.read(
            lambda: release.read_replies(memory, "svamp", "test"),
            raises=(ValueError, FileNotFoundError),
            names=[shards],
        )
        if isinstance(found, dict):
            assert all(isinstance(text, str) for texts in found.values() for text in texts)
        for name in names:
            fuzzing.replace(shards / name, b"")
            (shards / name).unlink()

    fuzz(case)


def test_teacher_text(fuzz: Fuzz) -> None:
    """Every parser of every dataset, strict and official: none raises, and each returns an outcome."""
    rows = {
        name: Row(id="r", input="i", label=None, choices=("sand", "tea", "(", "", "Tea") if name == "cqa" else ())
        for name in INPUTS
    }
    parsers = [(rows[name], parse) for name in INPUTS for parse in registry.get(name).parsers.values()]
    assert len(parsers) == 2 * len(INPUTS)

    def case(tape: Tape) -> None:
        text = "".join(tape.one_of(REPLIES) for _ in range(tape.below(12)))
        for row, parse in parsers:
            parsed = fuzzing.read(lambda parse=parse, row=row: parse(text, row), raises=(), names=())
            assert isinstance(parsed, parsing.Parsed)
            assert parsed.outcome in parsing.OUTCOMES
            for part in (parsed.rationale, parsed.label):
                assert part is None or (part.strip() and len(part) <= len(text) + 10)

    fuzz(case)


def test_equations(fuzz: Fuzz) -> None:
    """Expressions made together with their value, and damaged ones."""
    numbers = ("1", "2", "3.0", "0.5", ".25", "7.", "84.0", "10", "0", "007", "9" * 100)
    pieces = (
        *"()+-*/.",
        *("**", "9**9**9", "1e9", "1e999999999", "٣", "²", "1_000", "0x10", "1j", ",", " ", "x"),
        *numbers,
    )
    pieces += ("/0", "/(1-1)", "/ 0.0", "(" * 240 + "1" + ")" * 240, "-" * 480, "(" * 490, "-(" * 200)

    def made(tape: Tape, depth: int) -> tuple[str, Fraction]:
        kind = tape.below(6) if depth < 6 else 0
        if kind < 2:
            text = tape.one_of(numbers)
            return text, Fraction(text)
        if kind == 2:
            text, value = made(tape, depth + 1)
            return f"-({text})", -value
        (left, a), (right, b) = made(tape, depth + 1), made(tape, depth + 1)
        sign = tape.one_of("+-*/" if b else "+-*")
        value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[sign]()
        return f"( {left} {sign} {right} )", value

    def case(tape: Tape) -> None:
        text, value = made(tape, 0)
        found = fuzzing.read(lambda: grading.equation_value(text), raises=(), names=())
        assert found == (value if len(text) <= grading.MAX_CHARACTERS else None), text
        for _ in range(1 + tape.below(4)):
            at = tape.below(len(text) + 1)
            text = text[:at] + tape.one_of(pieces if tape.chance(2) else fuzzing.TEXTS) + text[at + tape.below(3) :]
        found = fuzzing.read(lambda: grading.equation_value(text), raises=(), names=())
        assert found is None or isinstance(found, Fraction)
        same = fuzzing.read(lambda: grading.same_equation_value(text, text), raises=(), names=())
        assert same == (found is not None)

    fuzz(case)


def check_entries(found: Any) -> None:
    """Each row is a question of valid UTF-8, or an error of one line."""
    for entry in found if isinstance(found, list) else []:
        assert (entry.question is None) != (entry.error is None)
        if entry.question is None:
            assert 0 < len(entry.error) < fuzzing.LONGEST_MESSAGE
            json.dumps(entry.id)
            continue
        for text in (entry.id, entry.question.input, entry.question.adapter or "", *(entry.question.choices or ())):
            assert isinstance(text, str)
            text.encode()


QUESTIONS = [{"id": "a", "input": "Is it?"}, {"id": "b", "input": "\u00e9", "more": 1, "choices": ["x", "y"]}]


def test_inputs_of_predict(fuzz: Fuzz, memory: Path) -> None:
    path = memory / "questions.jsonl"

    def case(tape: Tape) -> None:
        data = (
            fuzzing.lines(tape, QUESTIONS)
            if tape.chance(2)
            else fuzzing.scratched(tape, json.dumps(QUESTIONS).encode())
        )
        packed = tape.chance(8)
        fuzzing.put(tape, path, fuzzing.scratched(tape, gzip.compress(data, 1), most=1) if packed else data)
        check_entries(fuzzing.read(lambda: list(inputs.read(path)), raises=ValueError, names=[path]))

    fuzz(case)


def test_csv_inputs_of_predict(fuzz: Fuzz, memory: Path) -> None:
    path = memory / "questions.csv"
    valid = 'id,input,adapter,choices\r\na,"Is it, or\nnot?",,\r\nb,"\u00e9 ""quoted""",x,"[""p"", ""q""]"\r\n'.encode()

    def case(tape: Tape) -> None:
        fuzzing.put(tape, path, fuzzing.scratched(tape, valid, most=3))
        check_entries(fuzzing.read(lambda: list(inputs.read(path)), raises=ValueError, names=[path]))

    fuzz(case)


def test_parquet_inputs_of_predict(fuzz: Fuzz, memory: Path) -> None:
    path = memory / "questions.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "input": ["Is it?", None], "choices": [None, ["x", "y"]]}), path)
    valid = path.read_bytes()

    def case(tape: Tape) -> None:
        fuzzing.put(tape, path, fuzzing.scratched(tape, valid, most=3))
        check_entries(fuzzing.read(lambda: list(inputs.read(path)), raises=ValueError, names=[path]))

    fuzz(case)


def test_prompt_files(fuzz: Fuzz, memory: Path) -> None:
    path = memory / "mine.json"
    seeds = [json.loads((prompts.FOLDER / f"{name}.json").read_text("utf-8")) for name in ("svamp", "esnli")]
    for value in seeds:
        value["exemplars"] = value["exemplars"][:2]
    fragments = (*fuzzing.FRAGMENTS, '"{input}"', '"{input} {input}"', '"{0} {1}"', '["", "\\nQ:"]', '"{label}"', '"{"')

    def case(tape: Tape) -> None:
        node = fuzzing.damaged(tape, tape.one_of(seeds), fragments=fragments)
        fuzzing.put(tape, path, fuzzing.scratched(tape, fuzzing.encoded(fuzzing.written(node)), most=1))
        found = fuzzing.read(lambda: prompts.read(path), raises=(ValueError, FileNotFoundError), names=[path])
        if isinstance(found, prompts.Template):
            assert len(found.hash) == 12
            asked = tape.one_of(("Ann has 3 pens.", "A dog barks.</s>An animal is heard.", tape.text()))
            made = fuzzing.read(
                lambda: prompts.render(found, asked, hint="{label}"), raises=ValueError, names=["input", "hint"]
            )
            if isinstance(made, prompts.Prompt):
                made.text.encode("utf-8", "surrogatepass")

    fuzz(case)


def test_vocabularies(fuzz: Fuzz, memory: Path) -> None:
    """A SentencePiece model with 40 pieces, damaged as bytes and as what they mean."""
    path = memory / "sentencepiece.model"
    whole = PROTO.FromString(Path(builtin.vocabulary_path()).read_bytes())
    del whole.pieces[40:]
    path.write_bytes(whole.SerializeToString())
    assert tokens.encode(["a</s>b"], registry.vocabulary(str(path)))[0].count(tokens.EOS_ID) == 2
    texts = (*fuzzing.TEXTS[:40], "\u2581", "<s>", "a" * 300)

    def case(tape: Tape) -> None:
        model = PROTO()
        model.CopyFrom(whole)
        for _ in range(tape.below(3)):
            at = tape.below(len(model.pieces))
            kind = tape.below(6)
            if kind == 0:
                del model.pieces[at:]
            elif kind == 1:
                model.pieces[at].piece = tape.one_of(texts).encode("utf-8", "replace").decode()
            elif kind == 2:
                model.pieces[at].type = 1 + tape.below(6)
            elif kind == 3:
                model.pieces[at].score = tape.one_of((0.0, -1e30, float("nan"), float("inf")))
            elif kind == 4:
                model.trainer_spec.model_type = 1 + tape.below(4)
            else:
                model.normalizer_spec.precompiled_charsmap = tape.text().encode("utf-8", "replace")
            if not model.pieces:
                break
        fuzzing.put(tape, path, fuzzing.scratched(tape, model.SerializeToString()))
        vocabularies._load_model_internal.cache_clear()
        tokens.vocabulary.cache_clear()
        found = fuzzing.read(lambda: registry.vocabulary(str(path)), raises=ValueError, names=[path])
        if isinstance(found, SentencePiece):
            ids = fuzzing.read(lambda: tokens.encode(["Is it a</s>b\u4e2d?", ""], found), raises=(), names=())
            assert all(row[-1] == tokens.EOS_ID for row in ids)
            fuzzing.read(lambda: found.decode(ids[0]), raises=(), names=())

    fuzz(case)


def test_stores(fuzz: Fuzz, memory: Path) -> None:
    """A teacher's SQLite file and its log, damaged as bytes: every reply that is found is one that was stored."""
    folder = memory / "store"
    folder.mkdir()
    path, log = folder / "store.sqlite", folder / "store.sqlite-wal"
    stored = {
        f"{number:064x}": clients.Reply(
            text=f"Reply {number}. " * 9, finish="stop", input_tokens=5, output_tokens=number, model="m"
        )
        for number in range(40)
    }
    with store.Store(path) as made:
        made.put_all({key: stored[key] for key in list(stored)[:20]})
        made._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        made.put_all({key: stored[key] for key in list(stored)[20:]})
        whole, rest = path.read_bytes(), log.read_bytes()

    def opened() -> dict[str, Any]:
        with store.Store(path) as found:
            assert isinstance(found.counts(), dict)
            list(found.jobs("new", "running"))
            return found.find(list(stored))

    def case(tape: Tape) -> None:
        for other in folder.iterdir():
            fuzzing.replace(other, b"")
            other.unlink()
        fuzzing.put(tape, path, fuzzing.scratched(tape, whole, most=3))
        if tape.chance(2):
            log.write_bytes(fuzzing.scratched(tape, rest))
        found = fuzzing.read(opened, raises=(ValueError, OSError), names=[path, "/dev/"], writes=folder)
        if isinstance(found, dict):
            assert all(isinstance(reply, clients.Reply | store.Failure) for reply in found.values())

    fuzz(case, one_in=10)  # a case takes 50 ms


def test_results_of_batch_jobs(fuzz: Fuzz) -> None:
    """Lines of a provider's result file give a reply, a failure, or nothing (asked again)."""
    chat = {
        "custom_id": "ab" * 32,
        "error": None,
        "response": {
            "status_code": 200,
            "body": {
                "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes."}}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 2},
            },
        },
    }
    refused = {
        "custom_id": "cd" * 32,
        "response": {"status_code": 400, "body": {"error": {"message": "too long", "code": "context_length_exceeded"}}},
    }
    answer = {
        "candidates": [{"content": {"parts": [{"text": "Yes."}], "role": "model"}, "finishReason": "STOP"}],
        "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 2},
        "modelVersion": "m",
    }
    answered = {"key": "ab" * 32, "response": answer}
    failed = {"key": "ab" * 32, "error": {"code": 3, "message": "INVALID_ARGUMENT: .."}}
    vertex = {"request": {"labels": {"sbs-key-0": "ab" * 16, "sbs-key-1": "cd" * 16}}, "status": "", "response": answer}
    kinds = {
        "openai": ([chat, refused], openai.OpenAIBatches),
        "gemini": ([answered, failed], gemini.GeminiBatches),
        "vertex": (
            [vertex, {**vertex, "status": "Error: INVALID_ARGUMENT"}],
            gemini.VertexBatches,
        ),
    }

    def case(tape: Tape) -> None:
        seeds, kind = kinds[tape.one_of(list(kinds))]
        data = fuzzing.lines(tape, seeds)
        for key, outcome in fuzzing.read(
            lambda: list(batches.answers(data, kind.key_of, kind.reply_of)), raises=(), names=()
        ):
            assert len(bytes.fromhex(key)) == 32
            assert isinstance(outcome, clients.Reply | clients.Problem)
            if isinstance(outcome, clients.Reply):
                f"{outcome.text} {outcome.finish} {outcome.model}".encode()  # a store takes it
                for tokens in (outcome.input_tokens, outcome.output_tokens):
                    assert tokens is None or (type(tokens) is int and tokens < 2**63)

    fuzz(case)


# ---------------------------------------------------------------------------- what they found


def test_a_message_shows_the_beginning_of_what_was_got(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    long = "x" * 50_000
    for line in (
        {"id": "a", "input": "i", "label": None, long: 1},
        {"id": "a", "input": [long] * 3, "label": None},
        {long: 1},
    ):
        path.write_text(json.dumps(line) + "\n")
        with pytest.raises(ValueError, match=r"train\.jsonl:1: ") as caught:
            records.read_records(path)
        assert len(str(caught.value)) < 1_000
    path.write_text(f"{json.dumps({'id': long, 'input': 'i', 'label': None})}\n" * 2)
    with pytest.raises(ValueError, match=r"train\.jsonl:2: the id 'x+\.\. is already that of line 1") as caught:
        records.read_records(path)
    assert len(str(caught.value)) < 1_000


def test_json_nested_to_any_depth_is_refused_by_file_and_line(tmp_path: Path) -> None:
    """Near Python's recursion limit a value can be read but not shown."""
    path = tmp_path / "train.jsonl"
    for depth in (*range(850, 1000, 3), 100_000):
        path.write_text(f'{{"id": "a", "input": {"[" * depth}{"]" * depth}, "label": null}}\n')
        with pytest.raises(ValueError, match=r"train\.jsonl:1: "):
            records.read_records(path)
        (entry,) = inputs.read(path)
        assert entry.line == 1
        assert entry.error is not None


def test_a_manifest_of_records_with_other_types_is_refused(tmp_path: Path) -> None:
    whole = {"format": 1, "dataset": "d", "parser": "p", "inputs": "i", "sbs_jax": "0", "splits": {}, "skipped": {}}
    for change in (
        {"splits": None},
        {"splits": {"train": None}},
        {"splits": {"../../x": {}}},
        {"dataset": 1},
        {"skipped": []},
    ):
        (tmp_path / records.MANIFEST).write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=r"manifest\.json: "):
            records.read_manifest(tmp_path)


def test_a_shard_of_any_number_is_a_gap_and_no_list_of_what_lies_below(tmp_path: Path) -> None:
    folder = tmp_path / "svamp" / "llm"
    folder.mkdir(parents=True)
    (folder / f"test_CoT_{'9' * 30}.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"test_CoT_0\.json is missing"):
        release.read_replies(tmp_path, "svamp", "test")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"id": "a", "input": "\x80"}\n', "is not UTF-8"),
        (b'{"id": "a", "input": "\\ud800"}\n', "unpaired surrogate"),
        (b"[" * 5_000, "unreadable JSON"),
        (b'{"id": "a", "input": ' + b"1" * 5_000 + b"}\n", "unreadable JSON"),
    ],
)
def test_what_predict_cannot_read_is_named_by_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"id": "0", "input": "i"}\n' + data)
    first, second = inputs.read(path)
    assert first.error is None
    assert second.line == 2
    assert message in (second.error or "")


def test_predict_s_rows_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"id": "a", "input": "one\u2028two\x85three"}, ensure_ascii=False) + "\r\n", "utf-8")
    assert [row.question.input for row in inputs.read(path) if row.question] == ["one\u2028two\x85three"]


@pytest.mark.parametrize(
    "text", ["", "(", "((1)", "a (b) c (d\n) e (f)", ")(", "x\n(y\nz)", "(1)\r(2)", "\u2028(a\u2028)"]
)
def test_svamp_s_official_label_is_what_its_expression_finds(text: str) -> None:
    found = re.search(r"\(.*\)", text)
    assert svamp._in_parentheses(text) == (found[0] if found else "")


def test_parsing_takes_time_in_proportion_to_the_reply() -> None:
    """A million opening parentheses took SVAMP's official pattern hours."""
    reply = "The answer is " + "(" * 1_000_000
    for name in INPUTS:
        row = Row(id="r", input="i", label=None, choices=("a", "b"))
        for parse in registry.get(name).parsers.values():
            fuzzing.read(lambda parse=parse, row=row: parse(reply, row), raises=(), names=())


def test_a_blank_choice_is_no_label() -> None:
    row = Row(id="r", input="i", label=None, choices=("tea", " "))
    assert registry.get("cqa").parsers["strict"]("So the answer is (b)", row).label is None


@pytest.mark.parametrize(
    "line", [{"response": True}, {"response": {"body": 1}}, {"error": 5}, {"response": {"status_code": []}}]
)
def test_a_line_of_a_batch_in_another_form_has_no_answer(line: dict) -> None:
    data = json.dumps({"custom_id": "ab" * 32, **line}).encode()
    ((key, outcome),) = batches.answers(data, openai.OpenAIBatches.key_of, openai.OpenAIBatches.reply_of)
    assert (key, type(outcome)) == ("ab" * 32, clients.Again)
    assert list(batches.answers(b"[" * 100_000, openai.OpenAIBatches.key_of, openai.OpenAIBatches.reply_of)) == []


def test_what_a_batch_answers_can_be_stored() -> None:
    """An unpaired surrogate, token counts beyond 64 bits, and a key that is not a hash raised errors in the store."""
    body = {
        "model": "m\ud800",
        "choices": [{"finish_reason": "stop\udfff", "message": {"content": "Yes\ud800 \U0001f600"}}],
        "usage": {"prompt_tokens": 2**70, "completion_tokens": "2"},
    }
    response = {"status_code": 200, "body": body}
    text = "".join(json.dumps({"custom_id": key, "response": response}) + "\n" for key in ("ab" * 32, "no key", "AB"))
    ((key, reply),) = batches.answers(text.encode(), openai.OpenAIBatches.key_of, openai.OpenAIBatches.reply_of)
    assert key == "ab" * 32
    assert isinstance(reply, clients.Reply)
    assert (reply.text, reply.finish, reply.model) == ("Yes\ufffd \U0001f600", "stop", "m\ufffd")
    assert (reply.input_tokens, reply.output_tokens) == (None, None)
