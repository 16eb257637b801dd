"""The summary of parsed replies: what it shows, what it warns of, and the exit status."""

import dataclasses
import json
import logging
import re

import pytest
from builders import real_records

from sbs_jax.cli import main
from sbs_jax.data import records, summary
from sbs_jax.data.dataset import Row
from sbs_jax.data.records import Record
from tasks import builtin, cqa, svamp

MISALIGNED = "Do the replies belong to other rows?"


def row(number: int, reply: str | None, **changes) -> Record:
    """Returns row `number` of the built-in dataset, label yes and no in turns, with a parsed reply."""
    plain = Record(id=f"r{number}", input=f"q{number}", label=("yes", "no")[number % 2])
    if reply is not None:
        parsed = builtin.strict(reply, Row(input=plain.input, label=plain.label))
        read = {"rationale": parsed.rationale, "teacher_label": parsed.label, "outcome": parsed.outcome}
        changes = {"teacher_text": reply, **read, **changes}
    return dataclasses.replace(plain, **changes)


def right(number: int, **changes) -> Record:
    return row(number, f"It is so. So the answer is {('yes', 'no')[number % 2]}.", **changes)


def wrong(number: int) -> Record:
    return row(number, f"It is so. So the answer is {('no', 'yes')[number % 2]}.")


def summarized(rows, *, dataset=builtin.DATASET, parser="strict", **changes) -> summary.Summary:
    found = summary.Summary(**changes)
    found.add(dataset, "train", rows, summary.count(dataset, rows), parser=parser)
    return found


def test_outcomes_accuracy_and_three_replies_of_the_commonest_failure():
    rows = [right(n) for n in range(80)] + [wrong(n) for n in range(80, 95)]
    rows += [row(95, "So the answer is maybe."), *(row(n, f"Reply {n}.") for n in range(96, 100))]
    found = summarized(rows)
    assert (found.status, found.warnings) == (0, [])
    assert found.splits == [
        "builtin train: 100 rows, parser strict\n"
        "  ok                      95   95.0 %  rationale and label can be used\n"
        "  no_answer                4    4.0 %  there is no answer marker\n"
        "  label_not_in_set         1    1.0 %  the text after the marker is not a possible label (strict only)\n"
        "  teacher's label equals the human one: 80 of 100 rows (80.0 %); always 'yes' would be right in 50.0 %\n"
        "  no_answer, 3 of 4:\n"
        "    r96: 'Reply 96.'\n"
        "    r97: 'Reply 97.'\n"
        "    r98: 'Reply 98.'"
    ]


@pytest.mark.parametrize(("unusable", "status"), [(0.29, 3), (0.3, 0), (1.0, 0)])
def test_more_unusable_replies_than_the_limit_give_status_3_and_the_other_parser_s_count(unusable, status):
    rows = [right(n) for n in range(13)] + [wrong(13)] + [row(n, "So the answer is maybe.") for n in range(14, 20)]
    rows += [row(20, None), row(21, None, outcome="not_asked")]  # rows without a reply do not count
    found = summarized(rows, unusable=unusable)
    assert found.status == status
    if status:
        [warning] = found.warnings
        assert "builtin train: 6 of 20 asked rows (30.0 %) have no usable label, and the limit is 29 %" in warning
        assert "The parser 'official' reads 20 labels." in warning
    else:
        assert found.warnings == []
    # A failure without a reply is as unusable.
    failed = summarized([right(0), row(1, None, outcome="length")])
    assert failed.status == 3
    assert "length, 1 of 1:\n    r1: no reply" in failed.splits[0]


def test_a_share_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"unusable is 30\.0; expected a number of at least 0 and at most 1"):
        summary.Summary(unusable=30.0)


@pytest.mark.parametrize(
    ("rows", "warning"),
    [
        (
            [right(n) for n in range(20)] + [wrong(n) for n in range(20, 40)],
            f"right in 50.0 %, .* 'yes' .*{MISALIGNED}",
        ),
        ([wrong(n) for n in range(20)], f"right in 0.0 %, which is not above always 'yes' .50.0 %.*{MISALIGNED}"),
        ([right(n) for n in range(20)], "all 20 teacher labels equal the human ones"),
        ([right(n) for n in range(19)] + [row(19, "")], None),  # too few to tell
        ([right(n, hinted=n == 3) for n in range(20)], None),
        ([right(n, label=None) for n in range(20)], None),
        ([right(2 * n) for n in range(20)], None),  # a file of one label
        ([right(n) for n in range(36)] + [wrong(36), wrong(37), row(38, ""), row(39, "")], None),
    ],
    ids=["chance", "below", "perfect", "few", "hinted", "unlabelled", "one label", "as usual"],
)
def test_an_accuracy_that_is_not_above_chance_or_is_perfect_is_doubted(rows, warning):
    found = summarized(rows)
    assert found.status == 0
    assert [bool(warning)] * len(found.warnings) == [True] * bool(warning)
    if warning:
        assert re.search(warning, found.warnings[0])


def test_no_accuracy_without_labels_of_either_kind():
    assert summary.count(builtin.DATASET, [right(0, label=None)])["teacher_accuracy"] is None
    assert summary.count(builtin.DATASET, [row(0, "I cannot say.")])["teacher_accuracy"] is None
    assert summary.count(builtin.DATASET, [row(0, None)])["teacher_accuracy"] is None
    assert summary.count(builtin.DATASET, [wrong(0)])["teacher_accuracy"] == 0.0


@pytest.mark.parametrize(
    ("dataset", "parser", "status", "doubts"),
    [
        (
            *(cqa.DATASET, "official", 3),
            ["1,205 of 1,221 teacher labels are no possible label of their row", "not above a guess among the choices"],
        ),
        (
            *(cqa.DATASET, "strict", 0),
            ["in 1,202 of 1,221 replies the text after the choice's letter is not", "above a guess among the choices"],
        ),
        (svamp.DATASET, "official", 0, ["right for their own row, and 147 for the row before or after it"]),
    ],
    ids=["cqa-official", "cqa-strict", "svamp-official"],
)
def test_replies_shifted_by_a_row_are_noticed(dataset, parser, status, doubts, real_data_dir, tmp_path_factory):
    """Real replies, as they are and each one row too late."""
    name = dataset.name
    folder = real_records.imported(name, parser, release_dir=real_data_dir, tmp_path_factory=tmp_path_factory)[1]
    rows = records.read_records(folder / name / "test.jsonl")
    aligned = summarized(rows, dataset=dataset, parser=parser)
    assert aligned.status == 0
    assert all(MISALIGNED not in warning for warning in aligned.warnings)
    parse = dataset.parsers[parser]
    shifted = []
    for here, before in zip(rows, [rows[-1], *rows], strict=False):
        parsed = parse(before.teacher_text or "", Row(input=here.input, label=here.label, choices=here.choices))
        fields = {"rationale": parsed.rationale, "teacher_label": parsed.label, "outcome": parsed.outcome}
        shifted.append(dataclasses.replace(here, teacher_text=before.teacher_text, **fields))
    found = summarized(shifted, dataset=dataset, parser=parser)
    assert found.status == status
    said = [warning for warning in found.warnings if MISALIGNED in warning]
    assert len(said) == len(doubts)
    for warning, doubt in zip(said, doubts, strict=True):
        assert doubt in warning


@pytest.mark.parametrize("parser", ["official", "strict"])
def test_sbs_records_ends_with_the_summary(parser, tmp_path, capsys):
    """40 replies as Llama 3 writes them, and 10 that no parser reads."""
    folder = tmp_path / "release" / "svamp"
    (folder / "llm").mkdir(parents=True)
    rows = [{"input": f"Ann has {n} pens.\nShe buys {n % 7}?", "label": f"( {n}.0 + {n % 7}.0 )"} for n in range(50)]
    texts = [f"It is so. The answer is ({n} + {n % 7}). Q: Bo has 2. A: The answer is (2 + 1)." for n in range(40)]
    texts[0] = texts[0].replace("0 + 0", "1 + 0")
    texts += [f"I cannot solve number {n}." for n in range(40, 50)]
    (folder / "svamp_train.json").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (folder / "llm" / "train_CoT_0.json").write_text(json.dumps(texts))
    words = f"records --dataset svamp --release {tmp_path}/release --records_dir {tmp_path}/{{}} --parser {parser}"
    assert main.main(words.format("a").split()) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["splits"]["train"]["teacher_right"] == 39
    assert "  ok               40   80.0 %" in told.err
    assert "equals the human one: 39 of 50 rows (78.0 %)" in told.err
    assert "no_answer, 3 of 10:" in told.err
    assert "'I cannot solve number 40.'" in told.err
    assert "Warning" not in told.err
    assert main.main([*words.format("b").split(), "--unusable", "0.1"]) == 3
    assert "10 of 50 asked rows (20.0 %) have no usable label, and the limit is 10 %" in capsys.readouterr().err
    assert (tmp_path / "a" / "svamp" / "train.jsonl").read_bytes() == (
        tmp_path / "b" / "svamp" / "train.jsonl"
    ).read_bytes()


def test_the_summary_is_shown_once_with_warnings_last(caplog):
    caplog.set_level(logging.INFO, logger="sbs_jax")
    found = summarized([row(n, "I cannot say.") for n in range(30)])
    assert found.show() == 3
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_the_totals_of_all_splits_and_the_next_command_come_last(caplog):
    caplog.set_level(logging.INFO, logger="sbs_jax")
    found = summarized([*(row(n, "I cannot say.") for n in range(30)), *(right(n) for n in range(30, 40))])
    found.show(command="sbs train")
    usable, agreeing, following = caplog.records[-1].message.splitlines()
    assert usable == "usable: 10 of 40 rows (25.0 %)"
    assert agreeing == "right: 10 of 40 rows (25.0 %)"
    assert following == "next: sbs train"
    unlabelled = summary.Summary()
    assert unlabelled.totals() == ("usable: no row was asked about", "right: not known, the rows have no human labels")
