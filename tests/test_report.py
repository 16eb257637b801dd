"""Reports: numbers, sentences and the page of runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from builders.html_pages import check
from builders.report_runs import EXAMPLES, MEASURED, answers, of, some, write_rationales, write_run

from sbs_jax.pages import plots, report, tables
from sbs_jax.pages.report import Run
from sbs_jax.stats import findings, intervals
from sbs_jax.stats.formats import MINUS
from sbs_jax.stats.results import DISTILLATION, FINE_TUNING, STEP_BY_STEP

KINDS = {"label": FINE_TUNING, "step_by_step": STEP_BY_STEP}


def experiment(root: Path, shares: dict[str, dict[float, float]], *, seeds: int = 3, **options) -> list[Run]:
    """Runs of several kinds: {"label": {0.25: 0.5}} is standard fine-tuning right on about half, at 25 %."""
    runs = []
    for number, (kind, of_fraction) in enumerate(shares.items()):
        for fraction, share in of_fraction.items():
            for seed in range(seeds):
                path = root / f"{kind}-{fraction:g}-{seed}"
                right = answers(share + 0.015 * (seed % 3 - 1), seed=1000 * number + 10 * seed + round(100 * fraction))
                write_run(path, kind=kind, right=right, fraction=fraction, seed=seed, **options)
                runs.append(report.identify(path))
    return runs


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Step-by-step far ahead with a quarter of the data, level with all of it; three seeds of each."""
    shares = {"label": {0.25: 0.4, 1.0: 0.6}, "step_by_step": {0.25: 0.62, 1.0: 0.6}}
    return experiment(tmp_path_factory.mktemp("mixed"), shares)


# Intervals


def test_one_run_has_the_wilson_interval() -> None:
    from scipy import stats

    reference = stats.binomtest(37, 200).proportion_ci(method="wilson")
    interval = intervals.accuracy_interval(np.array([[1.0] * 37 + [0.0] * 163]))
    np.testing.assert_allclose(interval, (18.5, 100 * reference.low, 100 * reference.high), rtol=1e-6)


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_all_right_and_all_wrong_leave_room_on_one_side(seeds: int) -> None:
    accuracy, low, high = intervals.accuracy_interval(np.ones((seeds, 50)))
    assert (accuracy, high) == (100, 100)
    assert 85 < low < 99
    accuracy, low, high = intervals.accuracy_interval(np.zeros((seeds, 50)))
    assert (accuracy, low) == (0, 0)
    assert 1 < high < 15


def test_the_variance_of_a_crossed_table_is_that_of_its_formula() -> None:
    # Seed means 3/4 and 1/4; row means 1/2, 1/2, 1, 0; every interaction is 1/4 or -1/4.
    values = np.array([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    of_seeds, of_rows, shared = (1 / 8) / 2, (1 / 6) / 4, (8 / 16 / 3) / 8
    mean, variance, freedom = intervals.mean_variance(values)
    assert mean == 0.5
    assert variance == pytest.approx(of_seeds + of_rows - shared)
    assert freedom == pytest.approx(variance**2 / (of_seeds**2 / 1 + of_rows**2 / 3))
    # Seeds that agree do not make it less than what the rows alone would give.
    _, variance, _ = intervals.mean_variance(np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]))
    assert variance == pytest.approx((1 / 12) / 3)


def test_seeds_that_disagree_widen_the_interval() -> None:
    agree = np.array([some(60), some(60)], float)
    disagree = np.array([some(40), some(80)], float)
    _, low, high = intervals.accuracy_interval(agree)
    _, wide_low, wide_high = intervals.accuracy_interval(disagree)
    assert wide_high - wide_low > 2 * (high - low)


def test_identical_students_are_not_proved_equal() -> None:
    difference, low, high = intervals.difference_interval(np.zeros((1, 200)))
    assert difference == 0
    assert low == -high
    assert high == pytest.approx(1.96 * 100 / 200, rel=1e-3)


@pytest.mark.parametrize(("seeds", "seed_deviation"), [(2, 0.0), (2, 8.0), (4, 8.0)])
def test_intervals_hold_the_true_difference_as_often_as_they_say(seeds: int, seed_deviation: float) -> None:
    rng, held, repetitions = np.random.default_rng(0), 0, 400
    for _ in range(repetitions):
        of_rows, of_seeds = rng.normal(0, 60, 150), rng.normal(0, seed_deviation, (seeds, 1))
        _, low, high = intervals.difference_interval(5 + of_rows + of_seeds + rng.normal(0, 60, (seeds, 150)))
        held += low <= 5 <= high
    assert 0.89 <= held / repetitions <= 0.995


@pytest.mark.parametrize("kind", ["between", "mostly 1", "mostly 0"])
def test_intervals_of_scores_hold_the_true_mean_as_often_as_they_say(kind: str) -> None:
    """They are narrower than those of right and wrong, which would hold it always."""
    rng, held, repetitions, rows = np.random.default_rng(0), 0, 400, 60
    mean = {"between": 0.6, "mostly 1": 0.6 + 0.4 * 0.5, "mostly 0": 0.3 * 0.5}[kind]
    for _ in range(repetitions):
        scores = rng.beta(3, 2, rows) if kind == "between" else rng.beta(2, 2, rows)
        if kind != "between":
            edge = kind == "mostly 1"
            scores = np.where(rng.random(rows) < (0.6 if edge else 0.7), float(edge), scores)
        found, low, high = intervals.accuracy_interval(scores[None])
        assert 0 <= low <= found <= high <= 100
        held += low <= 100 * mean <= high
    assert 0.92 <= held / repetitions <= 0.985


def test_equal_scores_are_not_proved_to_be_always_equal() -> None:
    _, low, high = intervals.accuracy_interval(np.full((1, 100), 0.5))
    assert 0.1 < high - low < 0.3
    assert intervals.accuracy_interval(np.array([[0.5]]))[1:] == pytest.approx((5.5, 94.5), abs=0.1)


def test_an_interval_needs_rows() -> None:
    with pytest.raises(ValueError, match="Got 1 test row"):
        intervals.accuracy_interval(np.ones((2, 1)))


# Runs and their summary


@pytest.mark.parametrize(
    ("kind", "label_source", "method"),
    [
        ("label", "human", FINE_TUNING),
        ("label", "teacher", DISTILLATION),
        ("step_by_step", "human", STEP_BY_STEP),
        ("step_by_step", "teacher", "step-by-step (teacher labels)"),
        ("rationale_then_label", "human", "single-task rationale"),
        ("cascade", "teacher", "cascade (teacher labels)"),
    ],
)
def test_the_manifest_tells_the_method(tmp_path: Path, kind: str, label_source: str, method: str) -> None:
    path = write_run(tmp_path / "run", kind=kind, label_source=label_source, fraction=0.5, seed=3)
    assert report.identify(path) == Run(path, method, 0.5, 3)


LATER = {
    "step-by-step (mutual information as written)": {"mutual_information": "as_written"},
    "step-by-step (mutual information as released)": {"mutual_information": "as_released"},
    "step-by-step (alpha over time)": {"alpha": {"0": 0.1, "499": 0.9}},
    "step-by-step (soft targets)": {"soft_targets": "runs/soft"},
    "step-by-step (on-policy)": {"teacher": "runs/large"},
    "step-by-step (soft targets, on-policy)": {"soft_targets": "runs/soft", "teacher": "runs/large"},
}


def test_later_methods_have_names_and_are_compared_with_step_by_step_too(tmp_path: Path) -> None:
    """One page with all of them, whose names are too long for one line beside the plot."""
    runs = of(tmp_path, label=some(20, 40), step_by_step=some(30, 40))
    plain = {"alpha": 0.5, "mutual_information": None, "soft_targets": None, "teacher": None}
    for number, (name, changes) in enumerate(LATER.items()):
        path = write_run(tmp_path / str(number), kind="step_by_step", manifest_of={"settings": plain | changes})
        runs.append(report.identify(path))
        assert runs[-1].method == name
    pairs = [(c.method, c.reference) for c in report.summarize(runs).comparisons]
    assert set(pairs) == {
        (STEP_BY_STEP, FINE_TUNING),
        *((name, reference) for name in LATER for reference in (FINE_TUNING, STEP_BY_STEP)),
    }
    assert len(pairs) == len(set(pairs))
    page = tmp_path / "report.html"
    report.write_page(page, runs, title=None, notes=())
    assert "information as written)</text>" in page.read_text()


def test_a_summary_has_the_numbers_of_its_runs(tmp_path: Path) -> None:
    runs = of(tmp_path, label=some(50), cascade=some(70), step_by_step=some(80), rationale_then_label=some(30))
    summary = report.summarize(runs)
    assert (summary.dataset, summary.metric, summary.test_rows) == ("toy", "accuracy", 100)
    assert [(g.method, g.accuracy) for g in summary.groups] == [
        (FINE_TUNING, 50.0),
        (STEP_BY_STEP, 80.0),
        ("single-task rationale", 30.0),
        ("cascade", 70.0),
    ]
    first, last = summary.groups[0], summary.groups[-1]
    assert (first.seeds, first.accuracies) == ((0,), (50.0,))
    assert (first.label_rows, last.label_rows) == (720, 700)
    assert (first.updates, first.label_examples_seen, first.train_seconds) == (200, 3200, 100.0)
    assert [(c.method, c.difference, c.verdict) for c in summary.comparisons] == [
        (STEP_BY_STEP, 30.0, "these two differ"),
        ("single-task rationale", -20.0, "these two differ"),
        ("cascade", 20.0, "these two differ"),
        ("cascade", -10.0, "these two differ"),
    ]
    assert [c.reference for c in summary.comparisons] == [FINE_TUNING] * 3 + [STEP_BY_STEP]
    assert summary.majority_accuracy == 34.0
    assert summary.teacher_accuracy is None


def test_differences_are_paired_by_row(tmp_path: Path) -> None:
    # The same accuracies: in one pair the better student is right wherever the other is, in the other pair not.
    nested = report.summarize(of(tmp_path / "nested", label=some(50), step_by_step=some(60)))
    crossed = report.summarize(of(tmp_path / "crossed", label=some(50), step_by_step=some(60)[::-1]))
    assert nested.comparisons[0].difference == crossed.comparisons[0].difference == pytest.approx(10)
    assert nested.comparisons[0].verdict == "these two differ"
    assert crossed.comparisons[0].verdict == "no difference shown"


def test_differences_use_the_seeds_that_both_have(tmp_path: Path) -> None:
    runs = [
        report.identify(write_run(tmp_path / f"{kind}-{seed}", kind=kind, seed=seed, right=some(50 + seed)))
        for kind, seeds in (("label", (0, 1, 2)), ("step_by_step", (1, 2, 9)))
        for seed in seeds
    ]
    (comparison,) = report.summarize(runs).comparisons
    assert comparison.seeds == (1, 2)
    assert comparison.difference == 0


def test_students_of_the_teacher_s_labels_are_compared_among_themselves(tmp_path: Path) -> None:
    runs = [
        report.identify(write_run(tmp_path / f"{kind}-{source}", kind=kind, label_source=source))
        for kind in ("label", "step_by_step")
        for source in ("human", "teacher")
    ]
    pairs = [(c.method, c.reference) for c in report.summarize(runs).comparisons]
    assert pairs == [(STEP_BY_STEP, FINE_TUNING), ("step-by-step (teacher labels)", DISTILLATION)]


def test_own_names_are_compared_with_the_first(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name) for name in ("a", "b")]
    summary = report.summarize([Run(path, f"alpha {path.name}", 1.0, 0) for path in paths])
    assert [(c.method, c.reference) for c in summary.comparisons] == [("alpha b", "alpha a")]


@pytest.mark.parametrize(("sha256", "expected"), [("bb" * 32, 74.5), ("cc" * 32, None)])
def test_the_teacher_s_accuracy_is_that_of_the_same_test_file(
    tmp_path: Path, sha256: str, expected: float | None
) -> None:
    (tmp_path / "records" / "toy").mkdir(parents=True)
    manifest = {"splits": {"test": {"sha256": sha256, "teacher_accuracy": 74.5}}}
    (tmp_path / "records" / "toy" / "manifest.json").write_text(json.dumps(manifest))
    run = report.identify(write_run(tmp_path / "run", records_dir=str(tmp_path / "records")))
    assert report.summarize([run]).teacher_accuracy == expected
    assert report.summarize([run], teacher_accuracy=12.0).teacher_accuracy == 12.0


def test_open_labels_have_no_majority(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", right=some(10, rows=20))
    assert report.summarize([report.identify(path)]).majority_accuracy is None  # 3 labels, 20 rows


def test_packed_runs_do_not_claim_a_number_of_examples(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / "config.gin").write_text("BATCH_SIZE = @train.rows_per_update()\nEXAMPLES = 16\nPACK = True\n")
    assert report.summarize([report.identify(path)]).groups[0].label_examples_seen is None


def test_unequal_conditions_are_told(tmp_path: Path) -> None:
    runs = [
        report.identify(write_run(tmp_path / "a", updates=200)),
        report.identify(write_run(tmp_path / "b", kind="step_by_step", updates=400)),
    ]
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest | {"parameter_count": 5}))
    cautions = report.summarize(runs).cautions
    assert cautions == (
        "At 100 % of the data the methods differ in updates: standard fine-tuning 200, step-by-step 400.",
        "At 100 % of the data the methods differ in label examples seen in training: standard fine-tuning 3,200, "
        "step-by-step 6,400.",
        "The runs used students of different sizes: 1,234,567, 5.",
    )
    report.write_page(tmp_path / "page.html", runs, title=None, notes=())
    assert "differ in updates" in (tmp_path / "page.html").read_text()


# Words and tables


def test_the_headline_says_who_is_ahead(tmp_path: Path) -> None:
    spread = {"label": {1.0: 0.5}, "step_by_step": {1.0: 0.8}}
    ours = report.summarize(experiment(tmp_path / "ours", spread))
    assert re.match(r"Step-by-step is ahead of standard fine-tuning by \d\d\.\d points \[", report.headline(ours))
    theirs = report.summarize(experiment(tmp_path / "theirs", {"label": {1.0: 0.8}, "step_by_step": {1.0: 0.5}}))
    expected = r"Standard fine-tuning is ahead of step-by-step by \d\d\.\d points \[.*\] with all of the data"
    assert re.fullmatch(expected, report.headline(theirs))
    nobody = report.summarize(of(tmp_path / "nobody", label=some(50), step_by_step=some(51)))
    assert report.headline(nobody).startswith("No difference shown between step-by-step and standard fine-tuning")
    assert "+1.0 points [" in report.headline(nobody)
    alone = report.summarize(of(tmp_path / "alone", step_by_step=some(51)))
    assert report.headline(alone) == "Test accuracy on toy: step-by-step 51.0 % with all of the data"


def test_one_seed_is_a_difference_of_two_students_and_says_little_of_the_methods(tmp_path: Path) -> None:
    """In simulation, an interval of one seed leaves out 0 in 12 to 67 % of cases where methods do not differ."""
    ours = of(tmp_path / "ours", label=some(50), step_by_step=some(80))
    expected = (
        r"These two students differ with all of the data \(one seed\): that of {} has 30\.0 points "
        r"\[2\d\.\d, 3\d\.\d\] more than that of {}, which says little of the methods"
    )
    found = report.headline(report.summarize(ours))
    assert re.fullmatch(expected.format(STEP_BY_STEP, FINE_TUNING), found)
    theirs = report.summarize(of(tmp_path / "theirs", label=some(80), step_by_step=some(50)))
    assert re.fullmatch(expected.format(FINE_TUNING, STEP_BY_STEP), report.headline(theirs))
    assert tables.differences(theirs).rows[0][-1] == "these two differ"

    kinds = ("label", "step_by_step")
    quarter = [
        report.identify(write_run(tmp_path / f"{kind}-25", kind=kind, fraction=0.25, right=right))
        for kind, right in zip(kinds, (some(50), some(51)), strict=True)
    ]
    both = report.summarize([*ours, *quarter])
    assert report.headline(both) == (
        "With one seed, the students of step-by-step and standard fine-tuning differ at 100 % of the data; no "
        "difference shown at 25 %"
    )
    assert any(line.endswith("no less than standard fine-tuning with all of the data (50.0 %) (one seed).")
               for line in report.sentences(both))  # fmt: skip
    others = [
        report.identify(write_run(tmp_path / f"{kind}-other", kind=kind, dataset="other", right=right))
        for kind, right in zip(kinds, (some(50), some(51)), strict=True)
    ]
    assert findings.headline_of_all(report.study([*ours, *others])) == (
        "Step-by-step and standard fine-tuning in 2 comparisons on toy and other: with one seed the two students "
        "differ in 1, which says little of the methods"
    )
    for text in (report.headline(both), *report.sentences(both), *report.sentences(theirs)):
        assert " ahead " not in text


def test_the_headline_of_several_amounts_of_data_leaves_none_out(tmp_path: Path, mixed: list[Run]) -> None:
    number = rf"[+{MINUS}]\d+\.\d"
    each = rf"{number} points \[{number}, {number}\] with "
    pattern = (
        "Step-by-step is ahead of standard fine-tuning at 25 % of the data; no difference shown at 100 %: "
        rf"{each}25 % and {each}100 % "
        r"\(step-by-step minus standard fine-tuning, 95 % intervals, \d seeds\)"
    )
    assert re.fullmatch(pattern, report.headline(report.summarize(mixed)))
    behind = experiment(tmp_path, {"label": {0.5: 0.7, 1.0: 0.8}, "step_by_step": {0.5: 0.3, 1.0: 0.4}})
    text = report.headline(report.summarize(behind))
    differences = r"\+\d\d\.\d points \[\+.* with 50 % and \+\d\d\.\d .*with 100 % \(95 % intervals, \d seeds\)"
    assert re.match(f"Standard fine-tuning is ahead of step-by-step at all 2 amounts of data: {differences}", text)


def test_sentences_tell_each_comparison_and_what_data_is_saved(mixed: list[Run]) -> None:
    summary = report.summarize(mixed, teacher_accuracy=74.0)
    text = "\n".join(report.sentences(summary))
    assert len([line for line in report.sentences(summary) if "points [" in line]) == 2
    assert re.search(r"Step-by-step with 25 % of the data has \d\d\.\d %, no less than standard fine-tuning", text)
    assert re.search(r"The teacher itself has 74\.0 % \[6\d\.\d, 7\d\.\d\] on these test rows", text)


def test_tables_are_aligned_and_complete(mixed: list[Run]) -> None:
    summary = report.summarize(mixed)
    lines = report.table(summary).splitlines()
    rows = [line for line in lines if re.match(r"(standard fine-tuning|step-by-step) +\d", line)]
    assert len(rows) == 4
    assert len({len(row) for row in rows}) == 1
    group = summary.groups[0]
    assert rows[0].split()[2:7] == ["25", "%", "180", f"{group.accuracy:.1f}", f"[{group.low:.1f},"]
    assert report.table(summary).isascii()
    piped = [line for line in report.markdown(summary).splitlines() if line.startswith("|")]
    assert len(piped) == 2 + 4 + 2 + 2
    assert {line.count("|") for line in piped[:6]} == {12}


# The page


def test_the_page_stands_alone_and_escapes_what_students_write(tmp_path: Path, mixed: list[Run]) -> None:
    page = tmp_path / "new" / "page.html"
    study = report.write_page(
        page, mixed, title="A <title>", notes=["A & B."], command="sbs demo --output 'a b'", teacher_accuracy=74.0
    )
    summary = study.summaries[0]
    read = check(page)
    text = read.text + read.scripts["application/json"]
    # Plots, curves of two kinds and costs, each of them for a phone too, but the differences; keys.
    assert "McNemar's test lets only the" in text  # several seeds
    assert page.read_text().count("<svg") == 2 * (1 + 2 * 2 + 1) + 1 + 2 * 3
    for expected in (
        *("A <title>", "A & B.", "sbs demo --output 'a b'", "teacher 74.0", "0123456789abcdef", "0.10.2"),
        *(f"{summary.groups[0].accuracy:.1f}", r"\u003cscript\u003ealert(1)", r"Is \u003cb", str(mixed[0].path)),
    ):
        assert expected in text
    report.write_page(page, [run for run in mixed if run.method == STEP_BY_STEP], title=None, notes=())
    assert r"Is \u003cb" in check(page).scripts["application/json"]
    assert "predict: Is" not in check(page).scripts["application/json"]


def test_the_page_opens_with_questions_and_ends_with_the_next_command(tmp_path: Path) -> None:
    runs = of(tmp_path, label=some(0, rows=40), step_by_step=some(40, rows=40))
    write_rationales(tmp_path / "step_by_step", MEASURED, EXAMPLES)
    following = [("Yours:", "sbs init questions.csv")]
    report.write_page(tmp_path / "page.html", runs, title="The title", notes=["A note."], next_commands=following)
    text = check(tmp_path / "page.html").text
    parts = ["The title", "Test questions", "It is so.", "Step-by-step and standard", "All numbers", "Predictions"]
    parts += [
        "A note.",
        "Cost",
        "How to reproduce",
        "sbs init questions.csv",
        "sbs predict /",
        "sbs serve /",
    ]
    text = text.replace(report.headline(report.summarize(runs)), "Step-by-step and standard", 1)
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert f"sbs predict {tmp_path / 'step_by_step'} --input questions.jsonl --output answers.jsonl --rationale" in text
    assert "McNemar's test all let the test rows vary alone" in text  # one seed
    found = re.findall(r'<p class="said question" dir="auto">(.*?)</p>', (tmp_path / "page.html").read_text())
    assert sorted(found) == [f"Is &lt;b&gt;{i}&lt;/b&gt; &amp; {i}?" for i in range(2)]  # those with a rationale
    first = text[text.index("Is <b>0</b>") + len("Is <b>") :]
    shown = "0</b> & 0?It is so.step-by-step✓entailmentstandard fine-tuning✗<script>alert(1)</script>labelentailment"
    assert first.replace("\n", "").startswith(shown)


def test_without_rationales_three_questions_are_chosen_whatever_their_answers(tmp_path: Path) -> None:
    shown = []
    for name, right in (("all", some(40, rows=40)), ("none", some(0, rows=40))):
        runs = [report.identify(write_run(tmp_path / name, right=right))]
        report.write_page(tmp_path / "page.html", runs, title=None, notes=())
        page = (tmp_path / "page.html").read_text()
        shown.append(re.findall(r'<p class="said question" dir="auto">(.*?)</p>', page))
        assert "Three test questions" in page
        assert "said reason" not in page
    assert shown[0] == shown[1]
    assert len(set(shown[0])) == 3


def test_plots_take_their_colours_from_the_page(tmp_path: Path, mixed: list[Run]) -> None:
    report.write_page(tmp_path / "page.html", mixed, title=None, notes=())
    text = (tmp_path / "page.html").read_text()
    plots_text = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]{6}", plots_text)
    used = set(re.findall(r"var\(--(\w+)\)", text))
    style = text[: text.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for part in (light, dark):
        assert used <= {*re.findall(r"--(\w+):", part), "panel", "row", "share"}


def test_methods_keep_their_colours() -> None:
    assert [plots.colour_number([STEP_BY_STEP, FINE_TUNING], m) for m in (FINE_TUNING, STEP_BY_STEP)] == [0, 2]
    assert plots.colour_number([STEP_BY_STEP], STEP_BY_STEP) == 2
    many = [FINE_TUNING, STEP_BY_STEP, "step-by-step (teacher labels)", "x", "y", "z"]
    assert len({plots.colour_number(many, method) for method in many}) == len(many)


def test_the_same_runs_give_the_same_bytes_in_another_process(tmp_path: Path, mixed: list[Run]) -> None:
    report.write_page(tmp_path / "here.html", mixed, title=None, notes=["note"])
    code = (
        "from sbs_jax.pages import report;"
        f"runs = [report.Run(*row) for row in {[(str(r.path), r.method, r.fraction, r.seed) for r in mixed]!r}];"
        f"report.write_page({str(tmp_path / 'there.html')!r}, runs, title=None, notes=['note'])"
    )
    root = str(Path(report.__file__).parents[2])
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": root, "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here.html").read_bytes() == (tmp_path / "there.html").read_bytes()


def test_importing_the_report_does_not_import_plotting() -> None:
    for path in Path(report.__file__).parent.glob("*.py"):
        at_the_top = re.findall(r"^(?:import|from) (\w+)", path.read_text("utf-8"), flags=re.MULTILINE)
        assert not {"matplotlib", "scipy"} & set(at_the_top), path.name


@pytest.mark.parametrize(
    ("shares", "seeds"),
    [
        ({"label": {1.0: 0.5}}, 1),
        ({"label": {1.0: 0.5}, "step_by_step": {1.0: 0.6}, "rationale_then_label": {1.0: 0.4}}, 2),
        ({"label": {0.5: 0.5}, "step_by_step": {1.0: 0.6}}, 1),
        ({"label": {2.0**-n: 0.5 for n in range(5)}}, 1),
        ({"label": {0.5: -1.0, 1.0: -1.0}, "step_by_step": {0.5: 9.0, 1.0: 9.0}}, 2),
    ],
    ids=["one run", "one fraction", "nothing to compare", "five fractions", "all wrong and all right"],
)
def test_any_set_of_runs_has_a_page(tmp_path: Path, shares: dict[str, dict[float, float]], seeds: int) -> None:
    runs = experiment(tmp_path, shares, seeds=seeds)
    report.write_page(tmp_path / "page.html", runs, title=None, notes=())
    check(tmp_path / "page.html")


def test_main_names_the_runs_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [run.path for run in of(tmp_path, label=some(50), step_by_step=some(80))]
    assert report.main(paths, tmp_path / "page.html") == 0
    assert "step-by-step minus standard fine-tuning" in capsys.readouterr().out
    linked = check(tmp_path / "page.html").linked
    assert "page_files/comparisons.csv" in linked
    assert all((tmp_path / file).is_file() for file in linked)


# Bad input


def test_no_file_of_others_is_replaced(tmp_path: Path, mixed: list[Run]) -> None:
    """Only an earlier report is: its page, and in its folder the files that its index names."""
    page, folder = tmp_path / "page.html", tmp_path / "files"

    def written(path: Path = page, assets: Path = folder) -> None:
        report.write_page(path, assets=assets, runs=mixed, title=None, notes=())

    written()
    first = page.read_bytes()
    written()
    assert page.read_bytes() == first
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "files.txt").write_text("data.csv\n")  # a name of the index, but no report's
    (mine / "data.csv").write_text("mine")
    (tmp_path / "notes.html").write_text("<!DOCTYPE html>mine")
    manifest = Path(mixed[0].path) / "manifest.json"
    before = {path: path.read_bytes() for path in (*mine.iterdir(), tmp_path / "notes.html", manifest)}
    for places in ({"path": tmp_path / "notes.html"}, {"path": manifest}, {"path": tmp_path}, {"assets": mine}):
        with pytest.raises(FileExistsError, match=r"is no page of ours; choose|holds files that no report wrote"):
            written(**places)
    index = folder / "files.txt"
    index.write_text(index.read_text().replace("runs.csv\n", ""))
    (folder / "runs.csv").write_text("mine")
    with pytest.raises(FileExistsError, match=r"runs\.csv was written by no report; move it elsewhere"):
        written()
    assert (folder / "runs.csv").read_text() == "mine"
    assert {path: path.read_bytes() for path in before} == before


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    write_run(tmp_path / "standard-0")
    with pytest.raises(FileNotFoundError, match=r"does not exist.*Did you mean .*standard-0"):
        report.identify(tmp_path / "standrad-0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no manifest\.json; expected a run directory"):
        report.identify(tmp_path / "empty")
    with pytest.raises(ValueError, match="Got no runs"):
        report.summarize([])


def drop_test_line(path: Path) -> None:
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:-1]))


def damage_predictions(path: Path) -> None:
    (file,) = (path / "predictions").iterdir()
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], '{"id": "x"}', *lines[3:]]) + "\n")


def flip_an_answer(path: Path) -> None:
    (file,) = (path / "predictions").iterdir()
    file.write_text(file.read_text().replace('"correct": true', '"correct": false', 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "metrics.jsonl").unlink(), r"run has no metrics: metrics\.jsonl is missing or empty"),
        (lambda p: (p / "metrics.jsonl").write_text(""), r"run has no metrics: metrics\.jsonl is missing or empty"),
        (lambda p: (p / "metrics.jsonl").write_text("{]\n"), r"metrics\.jsonl:1: not valid JSON"),
        (drop_test_line, r"run has no test metrics; its last line is of step 200\. Repeat"),
        (lambda p: [f.unlink() for f in (p / "predictions").iterdir()], r"expected one file predictions/.*found none"),
        (damage_predictions, r"test-100\.jsonl:3: the field 'correct' is missing"),
        (flip_an_answer, r"gives accuracy 50\.00 on test, the predictions of step 100 give 47\.50"),
    ],
)
def test_an_unfinished_or_damaged_run_is_named(tmp_path: Path, damage, message: str) -> None:
    path = write_run(tmp_path / "run")
    damage(path)
    with pytest.raises(ValueError, match=message):
        report.summarize([report.identify(path)])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {}, "are both standard fine-tuning at fraction 1 with seed 0"),
        ({}, {"dataset": "other"}, "about toy and .* about other"),
        ({}, {"seed": 1, "right": some(10, rows=30)}, "on 40 rows and .* on 30, of which 30 are the same"),
        ({}, {"seed": 1, "updates": 400}, r"differ in their number of updates \(200 in .*, 400 in "),
    ],
)
def test_runs_that_do_not_compare_are_refused(tmp_path: Path, first: dict, second: dict, message: str) -> None:
    runs = [report.identify(write_run(tmp_path / name, **of)) for name, of in (("a", first), ("b", second))]
    with pytest.raises(ValueError, match=message):
        report.summarize(runs)
