"""The parsers: the official one bug for bug, the strict one by its rules, on invented replies."""

# ruff: noqa: RUF001  (mathematical signs)

import random
import time

import pytest

from sbs_jax.data import markup, parsing, registry
from sbs_jax.data.dataset import Row
from sbs_jax.data.parsing import OUTCOMES, Parsed
from tasks import anli1, builtin, cqa, esnli, svamp

PLAIN = Row(input="x", label=None)
DRINKS = Row(input="x", label="tea", choices=("sand", "tea", "milk", "oat milk.", "tea"))

# (reply, rationale, label, outcome) per dataset and parser.
CASES = {
    (esnli, "official"): [
        (
            "Sleepers do not run.\nAnswer: contradiction\n\nPremise: A\nAnswer: neutral",
            *("Sleepers do not run.", "contradiction", "ok"),
        ),
        ("A.\nAnswer: entailment\n\nPre", "A.", "entailment\n\nPre", "ok"),
        ("A.\nAnswer: neutral\n\nPremise", "A.", "neutral", "ok"),
        (" A.  \nAnswer: neutral.", " A.", "neutral.", "ok"),
        # Nothing stops the rationale but "Answer:".
        ("A.\n\nPremise: B", "A.\n\nPremise: B", None, "no_answer"),
        ("A.\nAnswer:neutral", "A.", None, "no_answer"),
        ("A.\nAnswer:neutral\n\nPremise: B\nAnswer: entailment", "A.", "entailment", "ok"),
        ("A.\nAnswer: \n\nPremise: B", "A.", None, "no_label"),
        ("\nAnswer: neutral\n", None, "neutral", "no_rationale"),
        ("", None, None, "no_answer"),
    ],
    (esnli, "strict"): [
        ("Sleepers rest.\nAnswer: neutral\n\nPremise: A", "Sleepers rest.", "neutral", "ok"),
        ("A.\nAnswer: entailment\n\nPre", "A.", "entailment", "ok"),
        ("A.\nAnswer: Neutral.", "A.", "neutral", "ok"),
        ("A.\nAnswer: maybe", None, None, "label_not_in_set"),
        ("A.\nAnswer: entail", None, None, "label_not_in_set"),
        ("A.\nAnswer:", None, None, "no_label"),
        ("A.\n\nPremise: B\nAnswer: neutral", None, None, "no_answer"),
        ("Premise: B\nAnswer: neutral", None, None, "blank"),
        ("A.\nAnswer: neutral\nAnswer: entailment", None, None, "several_answers"),
        ("Answer: neutral", None, "neutral", "no_rationale"),
        ("The Premise: it rains.\nAnswer: neutral", "The Premise: it rains.", "neutral", "ok"),
        # The invented next example may go on in the same line, and in another case.
        ("A.\nAnswer: neutral Premise: B\nAnswer: entailment", "A.", "neutral", "ok"),
        ("A.\nAnswer: neutral.Premise: B\nAnswer: entailment", "A.", "neutral", "ok"),
        ("A.\nAnswer: neutral\n\npremise: B\nanswer: entailment", "A.", "neutral", "ok"),
        ("A.\nAnswer: neutral PREMISE: B\nAnswer: entailment", "A.", "neutral", "ok"),
        ('A. "Premise: B\nAnswer: entailment', None, None, "no_answer"),
        ("A.\nanswer: neutral", "A.", "neutral", "ok"),
        ("My answer: neutral", None, None, "no_answer"),
    ],
    (anli1, "official"): [
        ("It opened. So the answer is neutral.\n\nPremise: B", "It opened.", "neutral", "ok"),
        ("It opened. So the answer is neutral", "It opened.", "neutra", "ok"),
        ("It opened, so the answer is neutral.", None, None, "no_answer"),
        ("So the answer is a. So the answer is b.", None, None, "several_answers"),
        ("It opened. So the answer is", "It opened.", None, "no_label"),
        ("It opened. So the answer is .", "It opened.", None, "no_label"),
        ("Premise: B. So the answer is neutral.", None, None, "blank"),
    ],
    (anli1, "strict"): [
        ("It opened. So the answer is neutral.\n\nPremise: B", "It opened.", "neutral", "ok"),
        ("It opened. So the answer is neutral", "It opened.", "neutral", "ok"),
        ("It opened. So the answer is false.", None, None, "label_not_in_set"),
        (
            "It opened. So the answer is neutral. premise: B. So the answer is entailment.",
            "It opened.",
            "neutral",
            "ok",
        ),
        ("It opened. so the answer is neutral.", "It opened.", "neutral", "ok"),
        ("It opened, so the answer is neutral.", None, None, "no_answer"),
    ],
    (cqa, "official"): [
        ("Not sand. So the answer is (b) tea.\n\nQ: B", "Not sand.", "tea", "ok"),
        ("Not sand. So the answer is (b) coffee.", "Not sand.", "coffee", "ok"),
        # The letter is not read; what stands between two letters is the label.
        ("A. So the answer is (b) tea or (c) milk.", "A.", "tea or", "ok"),
        ("A. So the answer is either (b) tea, or (c) milk.", "A.", "tea, or", "ok"),
        ("A. So the answer is (d) oat milk.", "A.", "oat milk", "ok"),
        ("A. So the answer is (z) ape.", "A.", "ape", "ok"),
        ("A. So the answer is one of these.", "A.", None, "no_label"),
        ("A. So the answer is (b)", "A.", None, "no_label"),
        ("A. So the answer is (b) .", "A.", None, "no_label"),
        # Here the official code raises.
        ("A.", None, None, "no_answer"),
        ("", None, None, "blank"),
        ("A. So the answer is (a). So the answer is (b).", None, None, "several_answers"),
    ],
    (cqa, "strict"): [
        ("Not sand. So the answer is (b) tea.\n\nQ: B", "Not sand.", "tea", "ok"),
        ("A. So the answer is (c).", "A.", "milk", "ok"),
        ("A. So the answer is (b) coffee.", "A.", "tea", "letter_text_disagreement"),
        ("A. So the answer is (b) Tea.", "A.", "tea", "letter_text_disagreement"),
        ("A. So the answer is (c) tea.", "A.", "milk", "letter_text_disagreement"),
        ("A. So the answer is (b) tea or (c) milk.", "A.", "tea", "letter_text_disagreement"),
        ("A. So the answer is either (b) tea or (c) milk.", None, None, "label_not_in_set"),
        ("A. So the answer is (f) ape.", None, None, "label_not_in_set"),
        ("A. So the answer is one of these.", None, None, "label_not_in_set"),
        ("A. So the answer is tea.", "A.", "tea", "ok"),
        ("A. So the answer is", None, None, "no_label"),
        ("Q: B", None, None, "blank"),
        ("See the FAQ: tea. So the answer is (b) tea.", "See the FAQ: tea.", "tea", "ok"),
        ("Not sand. So the answer is (b) tea. Q: B? A: So the answer is (a) ape.", "Not sand.", "tea", "ok"),
        ("A. So the answer is the FAQ: tea.", None, None, "label_not_in_set"),
    ],
    (svamp, "official"): [
        ("3 + 4 = 7. The answer is (3 + 4).\n\nQ: B", "3 + 4 = 7.", "(3 + 4)", "ok"),
        # The greedy pattern ends at the last parenthesis.
        ("A. The answer is (3 + 4) * 2.", "A.", "(3 + 4)", "ok"),
        ("A. The answer is (8 / 4) and (6 / 4).", "A.", "(8 / 4) and (6 / 4)", "ok"),
        ("A. The answer is (14, 21).", "A.", "(14, 21)", "ok"),
        ("A. The answer is 7.", "A.", None, "no_label"),
        ("A. The answer is (3 +\n4).", "A.", None, "no_label"),
        ("A.", None, None, "no_answer"),
        ("A. The answer is (1). The answer is (2).", None, None, "several_answers"),
    ],
    (svamp, "strict"): [
        ("3 + 4 = 7. The answer is (3 + 4).\n\nQ: B", "3 + 4 = 7.", "(3 + 4)", "ok"),
        ("A. The answer is (3 + 4) * 2.", "A.", "(3 + 4) * 2", "ok"),
        ("A. The answer is 7.", "A.", "7", "ok"),
        ("A. The answer is (14, 21).", None, None, "not_arithmetic"),
        ("A. The answer is (some - 8).", None, None, "not_arithmetic"),
        ("A. The answer is ((415 - 309) - (41", None, None, "not_arithmetic"),
        ("A. The answer is (1 / 0).", None, None, "not_arithmetic"),
        ("A. The answer is __import__('os').getcwd().", None, None, "not_arithmetic"),
        ("\n\nQ: B", None, None, "blank"),
        # As Llama 3 goes on.
        (
            "3 + 4 = 7. The answer is (3 + 4). Q: Bo has 2. A: 2 + 1 = 3. The answer is (2 + 1). Q: C",
            *("3 + 4 = 7.", "(3 + 4)", "ok"),
        ),
        # The answer to an invented question is none to ours.
        ("I cannot tell. Q: Bo has 2. A: The answer is (2 + 1).", None, None, "no_answer"),
    ],
}


# Decorated replies: (reply, rationale, label); the outcome is "ok". The official parsers read none of these like this.
DECORATED = {
    svamp: [
        ("3 + 4 = 7. **The answer is (3 + 4).**", "3 + 4 = 7.", "(3 + 4)"),
        ("**3 + 4 = 7. The answer is (3 + 4).**", "3 + 4 = 7.", "(3 + 4)"),
        ("A. **The answer is** (3 + 4).", "A.", "(3 + 4)"),
        ("A. The **answer** is: **(3 + 4)**.", "A.", "(3 + 4)"),
        ("A. *The answer is (3 * 4).*", "A.", "(3 * 4)"),
        ("A.\n\n### The answer is (3 + 4).", "A.", "(3 + 4)"),
        ("A.\n- The answer is `(3 + 4)`.", "A.", "(3 + 4)"),
        (r"A. The answer is \( (3 + 4) \).", "A.", "(3 + 4)"),
        (r"A. The answer is \boxed{(3 + 4)}.", "A.", "(3 + 4)"),
        (r"A. The answer is $\boxed{\text{(3 + 4)}}$.", "A.", "(3 + 4)"),
        ("A. The answer is:\n\n\\[\n\\boxed{(3 + 4)}\n\\]", "A.", "(3 + 4)"),
        ("A. The answer is:\n```text\n(3 + 4)\n```", "A.", "(3 + 4)"),
        ("A. The answer is (**3** + **4**).", "A.", "(3 + 4)"),
        ("A. The answer is “(3 + 4)”.", "A.", "(3 + 4)"),
        ("A. The answer is (3 × 4).", "A.", "(3 * 4)"),
        ("A. The answer is (3 · 4) − (8 ÷ 4).", "A.", "(3 * 4) - (8 / 4)"),
        (r"A. The answer is $(3 \times 4) - (8 \div 4)$.", "A.", "(3 * 4) - (8 / 4)"),
        (r"A. The answer is \(\frac{8}{4}\).", "A.", "((8) / (4))"),
        ("A. The answer is (3 x 4).", "A.", "(3 * 4)"),
        ("A. The answer is (1,200 + 34).", "A.", "(1200 + 34)"),
        (r"A. The answer is \(1{,}200{,}000 - 34\).", "A.", "1200000 - 34"),
        (r"A. The answer is ($3 + \$1,000).", "A.", "(3 + 1000)"),
        ("A. The answer is （３ ＋ ４）。", "A.", "(3 + 4)"),
        ("<think>A draft: The answer is (1).</think>\n\nA. The answer is (3 + 4).", "A.", "(3 + 4)"),
    ],
    esnli: [
        ("A.\nAnswer: **entailment**", "A.", "entailment"),
        ("A.\n**Answer: Entailment.**", "A.", "entailment"),
        ("A.\n**Answer:** `neutral`.", "A.", "neutral"),
        ("A.\n**Answer**: neutral\n\nPremise: B\n**Answer**: entailment", "A.", "neutral"),
        ("A.\n### Answer: neutral", "A.", "neutral"),
        ("A.\n> *Answer:* neutral", "A.", "neutral"),
        (r"A. Answer: $\boxed{\text{neutral}}$", "A.", "neutral"),
        ("Premise: hm.</think>A.\nAnswer: neutral", "A.", "neutral"),
    ],
    anli1: [("A. **So the answer is** “neutral”.", "A.", "neutral")],
    builtin: [("Iron sinks. So the answer is **no**.", "Iron sinks.", "no")],
    cqa: [
        ("A. So the answer is **(b) tea**.", "A.", "tea"),
        ("A. **So the answer is (b) tea.**", "A.", "tea"),
        ("A. So the answer is **(b)** tea.", "A.", "tea"),
        ("A. So the answer is (b) *tea*.", "A.", "tea"),
        ("A. So the answer is (B) tea.", "A.", "tea"),
        (r"A. So the answer is \boxed{(b)}.", "A.", "tea"),
        ("A. So the answer is `tea`.", "A.", "tea"),
    ],
}


def test_strict_reads_decorated_answers():
    for module, cases in DECORATED.items():
        row = DRINKS if module is cqa else PLAIN
        for reply, rationale, label in cases:
            found = module.DATASET.parsers["strict"](reply, row)
            assert found == Parsed(rationale=rationale, label=label, outcome="ok"), reply


@pytest.mark.parametrize(
    "answer",
    [
        "(3 + 4)*",
        "(3 + 4) **",
        "(3 ** -4)",
        "*(3 + 4) *",
        "(14, 21)",
        "(3 + 4) pens",
        "(3 + **4)",
        "(2 *-3* x)",
        "(1,20)",
    ],
)
def test_removing_decoration_makes_no_value_of_other_text(answer):
    assert svamp.strict(f"A. The answer is {answer}.", PLAIN).outcome == "not_arithmetic"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<think>a</think>b", "b"),
        ("<think>\n\n</think>\n\nb", "b"),
        ("a</think>\nb", "b"),
        ("<think>a, all of it", ""),
        ("<think>a <think> tag</think>b", "b"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<THINKING>a</THINKING> b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("<|START_THINKING|>a<|END_THINKING|>b", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "b"),
        ("<seed:think>a</seed:think>b", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", "b"),
        # The second one closes the thinking of an invented example.
        ("a</think>b\n\nQ: c\nd</think>e", "b\n\nQ: c\nde"),
        (" I think <b>this</b>, [thinking] aloud ", " I think <b>this</b>, [thinking] aloud "),
    ],
)
def test_thinking_is_removed(reply, expected):
    assert markup.without_thinking(reply) == expected


def test_every_parser_gets_the_reply_without_thinking():
    reply = "<think>The answer is (9).</think>A. The answer is (3 + 4)."
    for parser in ("strict", "official"):
        parsed = svamp.DATASET.parse(reply, PLAIN, parser=parser)
        assert parsed == Parsed(rationale="A.", label="(3 + 4)", outcome="ok")
    assert svamp.official(reply, PLAIN).outcome == "several_answers"  # bug for bug


@pytest.mark.parametrize(
    "text", ["*" * 10**6, "**a " * 250_000, "<think>" * 150_000, "The answer is " + "**a" * 300_000, "$" * 10**6]
)
def test_a_long_reply_is_read_in_linear_time(text):
    began = time.process_time()
    assert svamp.strict(text, PLAIN).label is None
    assert time.process_time() - began < 2  # 0.1 s; a square of the length would take hours


@pytest.mark.parametrize(
    ("module", "parser", "reply", "expected"),
    [
        pytest.param(module, parser, reply, expected, id=f"{module.DATASET.name}-{parser}-{number}")
        for (module, parser), cases in CASES.items()
        for number, (reply, *expected) in enumerate(cases)
    ],
)
def test_reply_is_read_as_expected(module, parser, reply, expected):
    row = DRINKS if module is cqa else PLAIN
    rationale, label, outcome = expected
    assert module.DATASET.parsers[parser](reply, row) == Parsed(rationale=rationale, label=label, outcome=outcome)


def test_strict_never_gives_an_impossible_label_and_no_parser_raises():
    pieces = [
        *("So the answer is", "The answer is", "Answer:", " (b)", " (z)", " tea", " neutral", "."),
        *("\n", "\nQ:", "\n\nPremise:", " (3 + 4)", " * 2", " (", ")", "It is.", " ", "\u2028", "é"),
    ]
    generator = random.Random(0)
    for _ in range(300):
        reply = "".join(generator.choices(pieces, k=generator.randrange(12)))
        for module in (esnli, anli1, cqa, svamp):
            dataset, row = module.DATASET, DRINKS if module is cqa else PLAIN
            for name, parse in dataset.parsers.items():
                parsed = parse(reply, row)
                assert parsed.outcome in OUTCOMES, (name, reply)
                for text in (parsed.rationale, parsed.label):
                    assert text is None or text.strip(), (name, reply)
                if parsed.outcome == "ok":
                    assert parsed.rationale is not None, (name, reply)
                    assert parsed.label is not None, (name, reply)
            label = dataset.parsers["strict"](reply, row).label
            if label is not None:
                possible = row.choices or dataset.labels
                assert label in possible if possible else svamp.is_arithmetic(label), reply


def test_every_outcome_occurs_in_the_cases():
    seen = {case[-1] for cases in CASES.values() for case in cases}
    assert seen == set(OUTCOMES)


def test_every_dataset_has_both_parsers():
    for module in (esnli, anli1, cqa, svamp):
        assert set(module.DATASET.parsers) == {"official", "strict"}
        assert registry.get(module.DATASET.name) is module.DATASET


def test_member_ignores_case_only_where_that_is_unambiguous():
    assert parsing.member("TEA", ("sand", "tea", "tea")) == "tea"
    assert parsing.member("us", ("US", "Us")) is None
    assert parsing.member("US", ("US", "Us")) == "US"
    assert parsing.member("", ("US", "Us")) is None
