"""Every task of the four datasets on the released data, with the real T5 vocabulary."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import seqio
from builders import real_records

import tasks  # noqa: F401  # registers the datasets
from sbs_jax.data import batches, records, registry, selection, tokens
from sbs_jax.student import losses

# Used training rows of the label and the rationale task with the strict parser, and held-out rows.
# e-SNLI and ANLI train on their validation files: their train inputs are not in the release folder.
SIZES = {
    "svamp": {"label": 720, "rationale": 689, "validation": 80, "test": 200},
    "cqa": {"label": 8766, "rationale": 8599, "validation": 975, "test": 1221},
    "esnli": {"label": 8857, "rationale": 8853, "validation": 985, "test": 9824},
    "anli1": {"label": 900, "rationale": 893, "validation": 100, "test": 1000},
}
# Longest sequence of any split: inputs, rationale, rationale_then_label (docs/lengths.md).
LONGEST = {
    "svamp": (83, 99, 110),
    "cqa": (105, 71, 75),
    "esnli": (132, 71, 74),
    "anli1": (200, 119, 122),
}


@pytest.fixture(scope="module", params=SIZES)
def name(request: pytest.FixtureRequest, real_data_dir: Path, real_vocab: Path, tmp_path_factory):
    """A dataset's name, with its records imported and configured."""
    before = registry.options()
    _, folder = real_records.imported(
        request.param, "strict", release_dir=real_data_dir, tmp_path_factory=tmp_path_factory
    )
    has_train = (folder / request.param / "train.jsonl").exists()
    registry.configure(
        selection.DataOptions(
            records_dir=str(folder),
            vocabulary=str(real_vocab),
            train_split="train" if has_train else "validation",
        )
    )
    yield request.param
    registry.configure(before)


def test_sizes_and_lengths(name: str):
    lengths = registry.get(name).feature_lengths
    longest: dict[str, int] = {"inputs": 0}
    for split in ("train", "validation", "test"):
        for kind in ("label", "rationale", "rationale_then_label"):
            task = f"{name}_{kind}"
            counts = batches.count_truncated(task, split, lengths)[task]
            assert counts["inputs cut"] == counts["targets cut"] == 0
            longest["inputs"] = max(longest["inputs"], counts["inputs longest"])
            longest[kind] = max(longest.get(kind, 0), counts["targets longest"])
            if split == "train" and kind != "rationale_then_label":
                assert counts["rows"] == SIZES[name][kind]
            if split != "train" and kind == "label":
                assert counts["rows"] == SIZES[name][split]
    assert (longest["inputs"], longest["rationale"], longest["rationale_then_label"]) == LONGEST[name]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", ["label", "rationale", "rationale_then_label", "step_by_step"])
def test_valid_batches(name: str, kind: str, pack: bool):
    lengths = registry.get(name).feature_lengths
    found = batches.train_dataset(
        f"{name}_{kind}", lengths=lengths, split="train", batch_size=16, pack=pack, seed=0, skip_batches=0
    )
    for batch in itertools.islice(found, 5):
        source, target = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
        assert source.shape == (16, lengths["inputs"])
        assert target.shape == (16, lengths["targets"])
        assert source.min() == target.min() == 0
        assert max(source.max(), target.max()) < 32_100
        assert (source[:, 0] > 1).all()
        assert (target[:, 0] > 1).all()
        expected = {losses.RATIONALE} if kind == "rationale" else {losses.LABEL}
        expected = {losses.LABEL, losses.RATIONALE} if kind == "step_by_step" else expected
        assert set(np.unique(batch["decoder_task_ids"])) == {0} | expected
        np.testing.assert_array_equal(batch["decoder_task_ids"] > 0, target > 0)
        ends = (target == tokens.EOS_ID).sum(axis=1)  # no target has "</s>" within
        if pack:
            np.testing.assert_array_equal(ends, batch["decoder_segment_ids"].max(axis=1))
        else:
            assert (ends == 1).all()


def test_texts_survive_the_vocabulary(name: str):
    """Labels survive encoding and decoding, except for one letter."""
    vocabulary = registry.vocabulary(registry.options().vocabulary)
    lost = set()
    for split in ("train", "validation", "test"):
        labels = {example.label for example in registry.examples(f"{name}_label", split)}
        for label in labels:
            decoded = vocabulary.decode(tokens.encode([label], vocabulary)[0])
            if registry.graded_text(decoded, kind="label") != label:
                lost.add(label)
    assert lost == ({"tromsø"} if name == "cqa" else set())


def test_premise_and_hypothesis_are_joined_by_eos(name: str):
    examples = batches.eval_examples(f"{name}_label", split="test", lengths=registry.get(name).feature_lengths)
    vocabulary = registry.vocabulary(registry.options().vocabulary)
    joints = {int((e.features["encoder_input_tokens"] == tokens.EOS_ID).sum()) for e in examples}
    assert joints == ({2} if name in ("esnli", "anli1") else {1})
    if name in ("esnli", "anli1"):
        premise, hypothesis = examples[0].inputs.split("</s>")
        ids = examples[0].features["encoder_input_tokens"]
        expected = [*vocabulary.encode(premise), 1, *vocabulary.encode(hypothesis), 1]
        assert ids[ids != 0].tolist() == expected


def test_seqio_reads_the_same_rows(name: str):
    lengths = dict(registry.get(name).feature_lengths)
    task = seqio.TaskRegistry.get(f"{name}_rationale_then_label")
    rows = task.get_dataset({**lengths, "task_ids": lengths["targets"]}, split="validation", shuffle=False)
    ours = batches.eval_examples(f"{name}_rationale_then_label", split="validation", lengths=lengths)
    for row, example in zip(itertools.islice(rows.as_numpy_iterator(), 50), ours, strict=False):
        assert row["id"].decode() == example.id
        assert row["label"].decode() == example.label
        for feature, key in (("inputs", "encoder_input_tokens"), ("targets", "decoder_target_tokens")):
            array = example.features[key]
            np.testing.assert_array_equal(row[feature], array[array != 0])


def test_held_out_rows_stay_out_of_training(name: str):
    split_ids = [
        {example.id for example in registry.examples(f"{name}_label", split)} for split in ("train", "validation")
    ]
    assert split_ids[0].isdisjoint(split_ids[1])
    options = registry.options()
    folder = Path(options.records_dir) / name
    found = records.read_records(folder / f"{options.train_split}.jsonl")
    assert len(found) == len(split_ids[0]) + len(split_ids[1])
