"""Several rationales per row: in records, in the selection, in turns over epochs, in SeqIO and from `sbs teach`."""

import dataclasses
import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
from builders.cats import configure, register, row, write

from sbs_jax.data import batches, grading, records, registry, selection, table_cache, tokens
from sbs_jax.data.records import Rationale
from sbs_jax.teacher import command, prompts, sampler
from sbs_jax.teacher.clients import Parameters
from tasks import builtin

LENGTHS = {"inputs": 60, "targets": 48}
PACKED = pytest.mark.parametrize("pack", [False, True])


def others(*texts: str, label: str | None = None) -> tuple[Rationale, ...]:
    return tuple(Rationale(rationale=text, teacher_label=label) for text in texts)


def several(number: int, count: int) -> records.Record:
    """Makes a row with `count` rationales of different lengths."""
    texts = [f"{number}:{n}" + " so" * (n + number % 3) for n in range(count)]
    return row(number, rationale=texts[0], other_rationales=others(*texts[1:], label=f"{number}"))


@pytest.fixture
def cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with 12 training rows of `cats`, which have 1, 2, 3 and 3 rationales in turn."""
    write(tmp_path, [several(number, (1, 2, 3, 3)[number % 4]) for number in range(12)])
    register(tmp_path, monkeypatch)
    configure(tmp_path, validation_fraction=0, rationales_per_example="all")
    return tmp_path


def take(name: str, count: int, **changes: Any) -> list[dict[str, np.ndarray]]:
    arguments = {"lengths": LENGTHS, "split": "train", "batch_size": 4, "pack": False, "seed": 0, "skip_batches": 0}
    return list(itertools.islice(batches.train_dataset(name, **(arguments | changes)), count))


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    for left, right in zip(first, second, strict=True):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def texts(found: list[dict[str, np.ndarray]], key: str = "decoder_target_tokens") -> list[str]:
    vocabulary = registry.vocabulary("byte")
    return [vocabulary.decode(ids.tolist()) for batch in found for ids in batch[key]]


# ---------------------------------------------------------------------------------- records


def test_records_keep_them_and_others_are_written_as_before(tmp_path: Path):
    plain = row(1)
    full = row(2, other_rationales=(*others("é so", label="2"), *others("why")))
    sha256 = records.write_records(tmp_path / "train.jsonl", [plain, full])
    assert records.read_records(tmp_path / "train.jsonl") == [plain, full]
    first, second = (tmp_path / "train.jsonl").read_text("utf-8").splitlines()
    names = ["id", "input", "label", "choices", "teacher_text", "rationale", "teacher_label", "outcome"]
    assert list(json.loads(first)) == names
    assert list(json.loads(second)) == [*names, "other_rationales"]
    assert json.loads(second)["other_rationales"][0] == {"rationale": "é so", "teacher_label": "2"}
    # A file that its manifest describes is read without checks.
    counts = {"rows": 2, "outcomes": {"ok": 2}, "rationales": 2, "teacher_labels": 2, "labelled": 2, "teacher_right": 2}
    split = {**counts, "teacher_accuracy": 100.0, "sha256": sha256, "sources": {}}
    facts: Any = {"format": records.FORMAT, "dataset": "cats", "parser": "strict", "inputs": "records"}
    records.write_manifest(tmp_path, facts | {"sbs_jax": "0", "splits": {"train": split}, "skipped": {}})
    assert records.read_records(tmp_path / "train.jsonl", sha256=sha256) == [plain, full]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"rationale": " ", "teacher_label": "1"}], "has a blank rationale"),
        ([{"rationale": "so"}], r"'other_rationales\[0\]\.teacher_label' is missing"),
        (["so"], r"'other_rationales\[0\]' is \"so\"; expected an object"),
    ],
)
def test_bad_ones_are_refused_with_their_line(tmp_path: Path, value: Any, message: str):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"id": "a", "input": "x", "label": None, "other_rationales": value}) + "\n")
    with pytest.raises(ValueError, match=rf"train\.jsonl:1: .*{message}"):
        records.read_records(file)


# -------------------------------------------------------------------------------- selection


def select(found: list[records.Record], *, split: str = "train", **changes: Any) -> selection.Selection:
    options = selection.DataOptions(records_dir="records", vocabulary="byte", **changes)
    same = grading.same_text
    return selection.select(found, options, same_label=same, split=split, hold_out=False)


def test_counts_state_the_texts_only_where_there_are_several():
    found = [several(number, 3) for number in range(4)]
    assert "rationale: texts" not in select(found).counts
    counts = select(found, rationales_per_example=2).counts
    assert (counts["rationale"], counts["rationale: texts"], counts["rationale_then_label: texts"]) == (4, 8, 8)
    assert "label: texts" not in counts
    assert select(found, rationales_per_example="all").counts["rationale: texts"] == 12


def test_each_rationale_agrees_by_its_own_label():
    wrong = row(1, rationale="wrong", teacher_label="9", other_rationales=others("right", label="1") + others("none"))
    never = row(2, rationale="wrong", teacher_label="9", other_rationales=others("wrong too", label="8"))
    right = row(3, rationale="right", other_rationales=others("wrong", label="9") + others("also", label="3"))
    chosen = select([wrong, never, right], rationales="agreeing", rationales_per_example="all")
    assert list(chosen.examples["rationale"].texts("targets")) == ["right", "right", "also"]
    assert chosen.counts["rationale: not used, argues for another label"] == 1
    assert list(chosen.examples["label"].texts("targets")) == ["1", "2", "3"]
    teacher = select([wrong], rationales="agreeing", rationales_per_example="all", label_source="teacher")
    assert list(teacher.examples["rationale_then_label"].texts("targets")) == ["wrong Answer: 9"]
    everything = select([wrong, never, right], rationales_per_example="all")
    assert everything.counts["rationale: texts"] == 8


def test_a_row_whose_vote_has_no_rationale_uses_another():
    found = row(1, rationale=None, outcome="no_rationale", other_rationales=others("so", "and so", label="1"))
    assert list(select([found]).examples["rationale"].texts("targets")) == ["so"]
    single = dataclasses.replace(found, other_rationales=found.other_rationales[:1])
    assert "rationale: texts" not in select([single], rationales_per_example="all").counts
    assert list(select([found], rationales_per_example=2).examples["rationale"].texts("targets")) == ["so", "and so"]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "al"])
def test_other_numbers_are_refused(value: Any):
    with pytest.raises(Exception, match="rationales_per_example"):
        select([row(1)], rationales_per_example=value)


def test_numbers_become_slots_in_each():
    found = row(1, input="9 red, 4 blue.", rationale="9 is more.", other_rationales=others("9 minus 4."))
    options = selection.DataOptions(records_dir="r", vocabulary="byte", number_slots=True, rationales_per_example="all")
    chosen = selection.select([found], options, same_label=str.__eq__, split="train", hold_out=False)
    assert list(chosen.examples["rationale"].texts("targets")) == [
        "<extra_id_0> is more.",
        "<extra_id_0> minus <extra_id_1>.",
    ]
    assert list(chosen.examples["rationale"].texts("inputs")) == ["explain: <extra_id_0> red, <extra_id_1> blue."]


# ---------------------------------------------------------------------------------- batches


@PACKED
@pytest.mark.parametrize("name", ["cats_step_by_step", "cats_rationale_then_label"])
def test_equal_rationales_are_as_one(cats: Path, name: str, pack: bool):
    plain = [several(number, 1) for number in range(12)]
    write(cats, plain)
    configure(cats)
    wanted = take(name, 30, pack=pack)
    write(cats, [dataclasses.replace(each, other_rationales=each.rationales * 2) for each in plain])
    configure(cats, rationales_per_example="all")
    assert registry.counts("cats", "train")["rationale: texts"] == 30  # of 10 rows, since 2 are held out
    assert_same(take(name, 30, pack=pack), wanted)


@PACKED
def test_one_per_row_is_as_if_there_were_no_others(cats: Path, pack: bool):
    configure(cats)
    one = take("cats_step_by_step", 30, pack=pack)
    write(cats, [several(number, 1) for number in range(12)])
    configure(cats)
    assert_same(one, take("cats_step_by_step", 30, pack=pack))


def test_each_epoch_has_the_next(cats: Path):
    """12 rows with 1, 2 and 3 rationales: 6 epochs have each equally often, in their order."""
    epochs = [texts(take("cats_rationale", 3, skip_batches=3 * epoch)) for epoch in range(6)]
    of_row = defaultdict(list)
    for epoch in epochs:
        assert len({text.partition(":")[0] for text in epoch}) == 12
        for text in epoch:
            of_row[int(text.partition(":")[0])].append(text.split()[0])
    for number, found in of_row.items():
        assert found == [f"{number}:{n % (1, 2, 3, 3)[number % 4]}" for n in range(6)]
    both = take("cats_step_by_step", 18, batch_size=8)
    pairs = zip(texts(both)[::2], texts(both)[1::2], strict=True)
    assert all(rationale.startswith(f"{label}:") for label, rationale in pairs)
    single = texts(take("cats_rationale_then_label", 9))
    assert {text.split()[0] for text in single} == {text.split()[0] for epoch in epochs for text in epoch}
    configure(cats, validation_fraction=0, rationales_per_example=2)
    assert Counter(text.split()[0].partition(":")[2] for text in texts(take("cats_rationale", 6))) == {"0": 15, "1": 9}


@PACKED
def test_skipping_resumes_and_hosts_share(cats: Path, pack: bool):
    whole = take("cats_step_by_step", 30, pack=pack)
    assert_same(whole[17:], take("cats_step_by_step", 13, pack=pack, skip_batches=17))
    halves = [take("cats_step_by_step", 30, pack=pack, rows=mine) for mine in ([0, 1], [2, 3])]
    joined = [{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)]
    assert_same(whole, joined)


def test_packing_keeps_the_order_and_loses_nothing(cats: Path):
    """Sizes by epoch decide how many fit: 24 tokens hold two to five of these rationales."""
    lengths = {"inputs": 200, "targets": 24}
    plain = take("cats_rationale", 36, batch_size=1)
    packed = take("cats_rationale", 10, batch_size=1, pack=True, lengths=lengths)
    pieces = [ids[ids != 0] for batch in packed for ids in batch["decoder_target_tokens"]]
    wanted = [ids[ids != 0] for batch in plain for ids in batch["decoder_target_tokens"]]
    found = np.concatenate(pieces)
    np.testing.assert_array_equal(found, np.concatenate(wanted)[: len(found)])
    sizes = [*map(len, wanted)]
    for piece in pieces[:-1]:  # no room for the next one
        sizes = sizes[np.count_nonzero(piece == tokens.EOS_ID) :]
        assert len(piece) + sizes[0] > lengths["targets"]


def test_examples_of_a_batch_are_those_of_its_epoch(cats: Path):
    found, arrays = batches.batch_examples(
        "cats_rationale", lengths=LENGTHS, split="train", batch_size=4, pack=False, seed=0, batch=4
    )
    (batch,) = take("cats_rationale", 1, skip_batches=4)
    np.testing.assert_array_equal(arrays["decoder_target_tokens"], batch["decoder_target_tokens"])
    assert [each.id.removeprefix("row-") for each in found] == [text.partition(":")[0] for text in texts([batch])]


def test_all_texts_count_for_lengths_and_vocabularies(cats: Path):
    every = [each.rationale for record in registry.read_split("cats", "train") for each in record.rationales]
    lengths = {"inputs": 60, "targets": 8}
    counts = batches.count_truncated("cats_rationale", "train", lengths)["cats_rationale"]
    assert counts["rows"] == 12
    assert counts["targets cut"] == sum(len(text) + 1 > 8 for text in every)
    assert counts["targets longest"] == max(map(len, every)) + 1
    assert set(every) <= set(registry.texts(["cats"], "train"))
    assert registry.token_tables("cats_rationale", "train").keys() == {"inputs", "targets", tokens.TARGETS_OF}
    assert registry.token_tables("cats_label", "train").keys() == {"inputs", "targets"}


def test_kept_tables_have_them_too(cats: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = take("cats_step_by_step", 20, pack=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cats / "cache"))
    monkeypatch.setattr(table_cache, "LARGE", 0)
    for count in (1, "all", 1, "all"):
        configure(cats, validation_fraction=0, rationales_per_example=count)
        found = take("cats_step_by_step", 20, pack=True)
    assert_same(found, wanted)
    assert isinstance(registry.token_tables("cats_rationale", "train")[tokens.TARGETS_OF].starts.base, np.memmap)


def test_evaluation_reads_the_first(cats: Path):
    configure(cats, rationales_per_example="all")  # with validation rows
    for split in ("train", "validation"):
        found = batches.eval_examples("cats_rationale", split=split, lengths=LENGTHS)
        ids = [each.features["decoder_target_tokens"] for each in found]
        assert [registry.vocabulary("byte").decode(each.tolist()) for each in ids] == [each.targets for each in found]
        assert all(":0" in each.targets for each in found)


# ------------------------------------------------------------------------------------ SeqIO


def stream(name: str, count: int, **changes: Any) -> list[dict[str, Any]]:
    arguments = {"sequence_length": LENGTHS, "split": "train", "num_epochs": None, "seed": 0, **changes}
    found = seqio.get_mixture_or_task(name).get_dataset(**arguments)
    return list(found.take(count).as_numpy_iterator())


def test_an_epoch_of_seqio_is_a_round_for_each(cats: Path):
    found = stream("cats_rationale", 100, num_epochs=1)
    assert len(found) == 3 * 12
    vocabulary = registry.vocabulary("byte")
    for turn in range(3):
        of_round = found[12 * turn : 12 * turn + 12]
        assert len({each["id"] for each in of_round}) == 12
        for each in of_round:
            number = int(each["id"].decode().removeprefix("row-"))
            wanted = f"{number}:{turn % (1, 2, 3, 3)[number % 4]}"
            assert vocabulary.decode(each["targets"].tolist()).split()[0] == wanted
            assert each["targets_pretokenized"].decode().split()[0] == wanted
    configure(cats, rationales_per_example="all")
    assert len(stream("cats_rationale", 100, split="validation", num_epochs=1)) == 2


def test_label_and_rationale_stay_neighbours_in_seqio_also_on_hosts(cats: Path):
    for shard in (None, seqio.ShardInfo(index=1, num_shards=5)):  # 2 or 3 of the 12 rows
        found = stream("cats_step_by_step", 100, shard_info=shard, passthrough_features=["id"])
        names = [each["id"] for each in found]
        assert names[::2] == names[1::2]
    seen = Counter()
    for index in range(5):
        shard = seqio.ShardInfo(index=index, num_shards=5)
        for each in stream("cats_rationale", 100, num_epochs=1, shard_info=shard):
            seen[each["targets_pretokenized"].decode().split()[0]] += 1
    assert len(seen) == 27
    assert seen.total() == 36


# ----------------------------------------------------------------------------------- teacher


def test_teach_keeps_the_other_samples(tmp_path: Path):
    builtin.write_release(tmp_path / "inputs", rows={"train": 30}, seed=1)
    options = command.Options(
        dataset="builtin",
        inputs_dir=str(tmp_path / "inputs"),
        provider="scripted",
        template=prompts.read("builtin"),
        store=str(tmp_path / "store.sqlite"),
        records_dir=str(tmp_path / "records"),
        settings=sampler.Settings(
            model="scripted",
            form="chat",
            parameters=Parameters(temperature=0.7, max_tokens=200),
            samples=3,
            unusable=1.0,
        ),
    )
    command.teach(options)
    found = records.read_records(tmp_path / "records" / "builtin" / "train.jsonl")
    template, counts, reply_of = options.template, Counter(), builtin.DATASET.scripted_reply
    assert reply_of is not None
    for each in found:
        replies = [str(reply_of(template.asked(each.input), sample)) for sample in range(3)]
        asked = builtin.row({"input": each.input, "label": each.label})
        parsed = [builtin.DATASET.parse(reply, asked, parser="strict") for reply in replies]
        usable = {one.rationale: one.label for one in parsed if one.rationale and one.label}
        usable.pop(str(each.rationale), None)
        assert {one.rationale: one.teacher_label for one in each.other_rationales} == usable
        assert [one.rationale for one in each.other_rationales] == [*usable]
        counts[len(each.rationales)] += 1
    assert counts[2] + counts[3] >= 10, counts
