"""Grading: exact values, hostile text, percentages, and the alarm."""

import functools
import importlib.util
import time
from fractions import Fraction

import pytest

from sbs_jax.data import grading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( 84.0 / 2.0 )", Fraction(42)),
        ("( ( 12.0 * 8.0 ) - 95.0 )", Fraction(1)),
        ("1 + 2 * 3", Fraction(7)),
        ("8 - 2 - 1", Fraction(5)),
        ("8 / 2 / 2", Fraction(2)),
        ("(8 - (2 - 1))", Fraction(7)),
        ("-3 - -4", Fraction(1)),
        ("--3", Fraction(3)),
        ("-(1 + 2) * 2", Fraction(-6)),
        ("2 * -3", Fraction(-6)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("1 / 3", Fraction(1, 3)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("007", Fraction(7)),
        (" \t1\n+ 1 ", Fraction(2)),
        ("9" * 400, Fraction(int("9" * 400))),
    ],
)
def test_value_is_exact(text: str, value: Fraction):
    assert grading.equation_value(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "   ", "9**9**9", "2 ** 3", "7 // 2", "7 % 2", "1 << 9", "__import__('os').system('true')"),
        *("().__class__", "x", "True", "(2 > 1)", "1 == 1", "(14, 21)", "14, 21", "[1]", "1,000", "1_000", "1e999"),
        *("1e3", "0x10", "1j", "nan", "inf", "-inf", "NaN + 1", "1/0", "1 / (2 - 2)", "+5", "1 +", "* 1", "1 2"),
        *("2(3)", "(2)(3)", "()", "(1", "1)", ")1(", "1.2.3", ".", "1..2"),
        "\u0661 + \u0662",  # Arabic-Indic digits
        "\uff11",  # full-width digit
        "\u00b2",  # superscript two
        "5 \u2212 3",  # minus sign
        "5 \u00d7 3",
        "1\u00a0+ 1",  # no-break space
        *("1 + 1; 2", "1 # one", "$5", "5%", "\x00", "1 + 1 ="),
    ],
)
def test_anything_else_has_no_value(text: str):
    assert grading.equation_value(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "(" * 100_000 + "1" + ")" * 100_000,
        "-" * 100_000 + "1",
        "9" * 1_000_000,
        "1+" * 1_000_000 + "1",
        " " * 10_000_000 + "1",
        "(" * 200 + "1" + ")" * 200,
        "-" * 400 + "1",
        "1" + "*9" * 249 + "*(" * 100,
        "1/3+" * 124 + "1/7/0",
    ],
    ids=lambda text: f"{text[:6]}..{len(text)}",
)
def test_long_and_deep_text_is_refused_at_once(text: str):
    start = time.perf_counter()
    assert grading.equation_value(text) is None
    assert time.perf_counter() - start < 0.1


def test_the_longest_accepted_text_is_cheap():
    text = ("9" * 99 + "/") * 4 + "9" * 100
    assert len(text) == grading.MAX_CHARACTERS
    start = time.perf_counter()
    assert grading.equation_value(text) is not None
    assert time.perf_counter() - start < 0.1
    depth = grading.MAX_DEPTH
    assert grading.equation_value("(" * depth + "1" + ")" * depth) == 1
    assert grading.equation_value("(" * (depth + 1) + "1" + ")" * (depth + 1)) is None


def test_equations_are_the_same_by_value():
    assert grading.same_equation_value("( 84.0 / 2.0 )", "42")
    assert grading.same_equation_value("( 1.0 / 3.0 )", "2 / 6")
    assert not grading.same_equation_value("( 84.0 / 2.0 )", "43")
    # Different values that are equal as floats.
    assert not grading.same_equation_value("0.1 + 0.2", "0.30000000000000004")
    # An expression without a value equals nothing, not even itself.
    assert not grading.same_equation_value("(14, 21)", "(14, 21)")
    assert not grading.same_equation_value("1", "(2 > 1)")


def test_metrics_are_percentages():
    assert grading.accuracy(["a", "b", "c", "d"], ["a", "b", "c", "x"]) == {"accuracy": 75.0}
    assert grading.accuracy(["a"], [" a"]) == {"accuracy": 0.0}
    graded = grading.equation_accuracy(["( 84.0 / 2.0 )", "1", "2", "3"], ["42", "1/0", "2.0", ""])
    assert graded == {"equation_accuracy": 50.0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("42", 42), ("It is -4.50 kg.", Fraction(-9, 2)), ("\u22125", -5), ("about $1,200.50", Fraction(2401, 2))),
        *((".5", Fraction(1, 2)), ("5.", 5), ("2.5e-1", Fraction(1, 4)), ("50 %", 50), ("1,200,300", 1_200_300)),
        *(
            (text, None)
            for text in ("", "none", "3 or 4", "5-3", "1.2.3", "1,2345", "3,5", "2026-11-29", "a1", "1e9999")
        ),
        ("\u0663", None),  # Arabic-Indic digit
        ("1" * 501, None),
    ],
)
def test_a_number_is_the_only_one_of_its_text(text, value):
    assert grading.number_in(text) == value
    assert grading.is_number(text) is (value is not None)


def test_numbers_may_differ_by_their_tolerance():
    assert grading.same_number("42", "It is 42.0.")
    assert not grading.same_number("42", "42.001")
    assert grading.same_number("0.3", "0.6", tolerance=0.3)  # as decimals: the float 0.3 is less
    assert grading.same_number("200", "198", relative_tolerance=0.01)
    assert not grading.same_number("200", "197.9", relative_tolerance=0.01)
    assert grading.same_number("0", "0.1", tolerance=0.1, relative_tolerance=0.5)
    assert not grading.same_number("none", "none")
    graded = grading.numeric_accuracy(["1", "2", "3", "4"], ["1.1", "2.2", "3", "x"], tolerance=0.1)
    assert graded == {"numeric_accuracy": 50.0}


def test_means_are_of_the_scores_of_pairs():
    assert grading.rouge_l(["a b", "c"], ["a b", "d"]) == {"rouge_l": 50.0}
    near = functools.partial(grading.numeric_accuracy, tolerance=1.0)
    score = grading.row_score(near)
    assert score is not None
    assert (score("1", "2"), score("1", "3")) == (True, False)
    assert grading.row_score(near) is score  # so it can be compared
    assert grading.row_score(grading.accuracy) is grading.same_text
    assert grading.row_score(lambda targets, predictions: {}) is None


def test_chrf_is_sacrebleu_s():
    pytest.importorskip("sacrebleu")
    assert grading.chrf(["Half of 84 is 42."] * 2, ["Half of 84 is 42.", "half of 84 is 42"])["chrf"] == pytest.approx(
        (100.0 + 82.02366830) / 2
    )
    assert grading.chrf_of("", "") == 0.0


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"metric chrf needs the package sacrebleu.*sbs-jax\[metrics\]"):
        grading.check_installed([grading.accuracy, grading.chrf])
    grading.check_installed([grading.accuracy, grading.rouge_l])


def test_metrics_refuse_lists_that_do_not_match():
    with pytest.raises(ValueError, match="2 targets and 1 predictions"):
        grading.accuracy(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no predictions to grade"):
        grading.equation_accuracy([], [])


def test_alarm_only_where_no_prediction_is_a_label():
    labels = ("entailment", "neutral", "contradiction")
    message = grading.label_format_alarm(["entail", "x" * 500, ""], labels)
    assert message is not None
    for part in ("none of 3 predictions", "'entail'", "'contradiction', 'entailment', 'neutral'"):
        assert part in message
    assert len(message) < 600
    # A wrong label is still a label: the student is bad, the format is right.
    assert grading.label_format_alarm(["entail", "neutral"], labels) is None
    assert grading.label_format_alarm([], labels) is None


def test_alarm_with_a_predicate_and_with_many_labels():
    def is_equation(text: str) -> bool:
        return grading.equation_value(text) is not None

    assert grading.label_format_alarm(["( 1.0 + 2.0 )"], is_equation) is None
    message = grading.label_format_alarm(["the answer"], is_equation)
    assert message is not None
    assert "is_equation() accepts" in message
    message = grading.label_format_alarm(["?"], [f"label {index}" for index in range(50)])
    assert message is not None
    assert "and 45 more" in message
