"""Number slots: inverse on any text, the same numbers in all texts of a row, and back in answers."""

import dataclasses
import itertools

import hypothesis
import optax
import pytest
import toy
from hypothesis import strategies

from sbs_jax.data import records, registry, selection
from sbs_jax.data.dataset import JOINT
from sbs_jax.data.slots import Numbers
from sbs_jax.prediction import engine
from sbs_jax.training import loop
from tasks import builtin

WORDS = strategies.sampled_from(
    ["84", "84.0", "2", "0.5", "1,200", " ", "  ", "(", ")", "+", ".", JOINT, "\n", "a", "5th"]
)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("( 84.0 / 2.0 )", "( <extra_id_1>.0 / 2.0 )"),
        ("(84 + 0.5)", "( <extra_id_51> + <extra_id_2>)"),
        ("84 pens, $84.", "<extra_id_1> pens, $ <extra_id_51>."),
        ("840 and 8.4 and 84.5", "840 and 8.4 and 84.5"),
        ("1,200 is not 1200", "<extra_id_0> is not 1200"),
    ],
)
def test_only_the_rows_own_numbers_become_slots(text, hidden):
    numbers = Numbers.of("Ann has 84 pens for 0.5 each, 84 in all, of 1,200.")
    assert numbers.texts == ("1,200", "84", "0.5")
    assert numbers.hide(text) == hidden
    assert numbers.fill(hidden) == text


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(row=strategies.lists(WORDS).map("".join), text=strategies.lists(WORDS).map("".join))
def test_every_text_comes_back(row, text):
    numbers = Numbers.of(row)
    assert numbers.fill(numbers.hide(text)) == text
    assert numbers.fill(numbers.hide(row)) == row


def test_a_slot_without_a_number_stays_and_an_input_with_a_slot_is_refused():
    assert Numbers.of("3 pens").fill("( <extra_id_0> + <extra_id_7> )") == "( 3 + <extra_id_7> )"
    with pytest.raises(ValueError, match="'<extra_id_0>'"):
        Numbers.of("3 <extra_id_0>")


def test_all_texts_of_a_row_have_its_slots_and_answers_are_graded_with_its_numbers(tmp_path, real_vocab):
    registry.add(toy.DATASET)
    row = records.Record(
        id="r", input="9 red, 4 blue.", label="( 9.0 - 4.0 )", rationale="9-4 is 5.", teacher_label="5", outcome="ok"
    )
    options = selection.DataOptions(records_dir=str(tmp_path), vocabulary=str(real_vocab), number_slots=True)
    found = selection.select([row], options, same_label=str.__eq__, split="train", hold_out=False).examples
    (label,), (rationale,) = found["label"], found["rationale"]
    assert label.inputs == "predict: <extra_id_0> red, <extra_id_1> blue."
    assert (label.label, label.targets) == ("( 9.0 - 4.0 )", "( <extra_id_0>.0 - <extra_id_1>.0 )")
    assert rationale.targets == "<extra_id_0>- <extra_id_51> is 5."
    vocabulary = registry.vocabulary(options.vocabulary)
    for text in (label.inputs, label.targets, rationale.targets):
        ids = vocabulary.encode(text)
        assert sum(i >= 32_000 for i in ids) == 2  # one token a slot
        assert vocabulary.decode(ids) == text
    assert rationale.numbers.fill(vocabulary.decode(vocabulary.encode(rationale.targets))) == "9-4 is 5."


def test_a_student_that_has_learned_a_template_answers_with_each_row_s_numbers(tmp_path):
    dataset = dataclasses.replace(toy.DATASET, name="slotted", labels=None)
    registry.add(dataset)
    pairs = list(itertools.permutations(range(11, 99, 7), 2))
    rows = [
        records.Record(id=f"{a}-{b}", input=f"red {a} and blue {b}", label=f"{max(a, b)} over {min(a, b)}")
        for a, b in pairs
    ]
    for number, split in enumerate(("train", "validation", "test")):
        records.write_records(tmp_path / "records" / "slotted" / f"{split}.jsonl", rows[number::3])
    vocabulary = registry.vocabulary(builtin.vocabulary_path())
    config = toy.config(
        tmp_path / "run",
        tmp_path / "records",
        data=selection.DataOptions(
            records_dir=str(tmp_path / "records"), vocabulary=builtin.vocabulary_path(), number_slots=True
        ),
        model=dataclasses.replace(toy.MODEL, vocab_size=vocabulary.vocab_size, dropout_rate=0.0),
        mixture_or_task_name="slotted_label",
        train_steps=30,
        eval_period=30,
        checkpoint_period=30,
        learning_rate=optax.constant_schedule(1e-2),
        max_decode_length=12,
    )
    assert loop.train(config, config_text="")["test"]["accuracy"] == 100.0
    predictor = engine.Predictor.load(tmp_path / "run", settings=engine.Settings(batch_size=3))
    asked = [("blue 5 and red 1,200", "1,200 over 5"), ("red 7.5 blue 88", "88 over 7.5"), ("red <extra_id_0>", None)]
    answers = predictor.answer([engine.Question(id=text, input=text) for text, _ in asked])
    assert [answer.prediction for answer in answers] == [label for _, label in asked]
    assert "'<extra_id_0>'" in str(answers[2].error)
