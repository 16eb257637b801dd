"""Reports over several datasets and sizes: tests between methods, the paper, cost, teacher, rationales and files."""

import csv
import json
import math
import shutil
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from builders.html_pages import check
from builders.report_runs import EXAMPLES, MEASURED, answers, of, some, write_rationales, write_run

from sbs_jax.pages import report, tables
from sbs_jax.stats import costs, folders, formats, intervals, quality
from sbs_jax.stats.results import FINE_TUNING, SINGLE_TASK, STEP_BY_STEP, load

BASE = {
    "emb_dim": 768,
    "mlp_dim": 2048,
    "num_heads": 12,
    "head_dim": 64,
    "num_encoder_layers": 12,
    "num_decoder_layers": 12,
    "vocab_size": 32128,
    "mlp_activations": ["gelu", "linear"],
    "logits_via_embedding": False,
    "dropout_rate": 0.1,
}
SIZES = {247_577_856: BASE, 783_150_080: BASE | {"emb_dim": 1024, "mlp_dim": 2816}}


def write_records(root: Path, dataset: str, **test: object) -> Path:
    split = {"rows": 200, "labelled": 200, "teacher_labels": 190, "teacher_right": 148, "rationales": 180}
    split |= {"sha256": "bb" * 32, "sources": {"llm/test_CoT_0.json": "cc"}, "teacher_accuracy": 74.0}
    split |= {"outcomes": {"ok": 180, "no_answer": 20}}
    manifest = {"inputs": "release", "parser": "strict", "splits": {"test": split | test, "train": {"sha256": "other"}}}
    (root / dataset).mkdir(parents=True)
    (root / dataset / "manifest.json").write_text(json.dumps(manifest))
    return root


def paper_run(path: Path, *, kind: str = "label", parameters: int = 247_577_856, **options) -> Path:
    """A run as the paper's on SVAMP: 800 rows, 200 test rows, T5 v1.1 base from a checkpoint."""
    settings = {"batch_size": 64, "tuning": None, "initial_checkpoint_path": "t5_1_1_base"}
    right = options.pop("right", answers(0.6, rows=200, seed=len(path.name)))
    write_run(path, kind=kind, right=right, dataset="svamp", parameters=parameters, **options)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= {"model": SIZES[parameters], "settings": settings}
    manifest["run"]["task_feature_lengths"] = {"inputs": 256, "targets": 128}
    manifest["data"]["splits"]["train"]["counts"]["rows"] = 800
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: SVAMP in two sizes and three methods with all of the data, another dataset with less."""
    root = tmp_path_factory.mktemp("sweep")
    records_dir = str(write_records(root / "records", "svamp"))
    for size in SIZES:
        for kind in ("label", "step_by_step", "rationale_then_label"):
            for seed in range(2):
                name = f"{size}-{kind}-{seed}"
                paper_run(root / "svamp" / name, kind=kind, parameters=size, seed=seed, records_dir=records_dir)
    for kind in ("label", "step_by_step"):
        write_run(root / "toy" / kind, kind=kind, right=some(50 if kind == "label" else 80), fraction=0.5)
    write_rationales(root / "toy" / "step_by_step")
    unfinished = write_run(root / "toy" / "unfinished", kind="step_by_step", seed=1)
    lines = (unfinished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_text("".join(lines[:-1]))
    (root / "sweep.log").write_text("beside the runs\n")
    return root


# Folds


def folded(root: Path, *, kind: str, seed: int, rights: list[list[bool]], updates: int = 200) -> None:
    """Writes a run per fold, whose test rows are its own."""
    start = 0
    for fold, right in enumerate(rights):
        path = write_run(root / f"{kind}-{seed}-fold{fold}", kind=kind, seed=seed, right=right, updates=updates)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["data"]["options"] |= {"folds": len(rights), "fold": fold}
        manifest["settings"] = {"data": {"folds": len(rights), "fold": fold}}
        (path / "manifest.json").write_text(json.dumps(manifest))
        (file,) = (path / "predictions").iterdir()
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["id"] = f"toy-{start + number}"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        start += len(right)


def test_the_folds_of_a_seed_are_one_result_on_all_rows(tmp_path: Path) -> None:
    for seed in (0, 1):
        folded(tmp_path, kind="label", seed=seed, rights=[some(10, 50), some(20, 50), some(5, 20)])
        folded(tmp_path, kind="step_by_step", seed=seed, rights=[some(30, 50), some(30, 50), some(15, 20)])
    runs = folders.find([tmp_path]).runs
    study = report.study(runs)
    (summary,) = study.summaries
    assert (summary.test_rows, summary.folds, len(study.results), len(study.runs)) == (120, 3, 4, 12)
    assert summary.methods == (FINE_TUNING, STEP_BY_STEP)
    label, _ = summary.groups
    assert label.accuracies == (pytest.approx(100 * 35 / 120),) * 2
    # The same numbers as of runs that test all rows at once.
    correct = np.array([[*some(10, 50), *some(20, 50), *some(5, 20)]] * 2, float)
    assert (label.accuracy, label.low, label.high) == pytest.approx(intervals.accuracy_interval(correct))
    assert summary.comparisons[0].difference == pytest.approx(100 * 40 / 120)
    assert label.label_rows == 720
    text = report.table(summary)
    assert "on 120 test rows in 3 folds" in text
    assert "2 x 3 folds" in text
    assert tables.runs(study).rows[1][3] == "0, fold 1"


def test_a_seed_without_all_its_folds_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    for seed in (0, 1):
        folded(tmp_path, kind="label", seed=seed, rights=[some(10, 50), some(20, 50), some(5, 20)])
    shutil.rmtree(tmp_path / "label-1-fold1")
    study = report.study(folders.find([tmp_path]).runs)
    assert study.summaries[0].groups[0].seeds == (0,)
    assert study.left_out == (
        "standard fine-tuning at fraction 1 with seed 1 lacks fold 1 of 3, so its other folds are not counted.",
    )
    shutil.rmtree(tmp_path / "label-0-fold0")
    with pytest.raises(ValueError, match="lacks fold 0 of 3"):
        report.study(folders.find([tmp_path]).runs)
    folded(tmp_path / "more", kind="label", seed=2, rights=[some(10, 50), some(20, 50)])
    folded(tmp_path / "short", kind="label", seed=2, rights=[some(10, 50), some(20, 50)], updates=100)
    shutil.rmtree(tmp_path / "more" / "label-2-fold0")
    shutil.rmtree(tmp_path / "short" / "label-2-fold1")
    with pytest.raises(ValueError, match=r"folds differ in their number of updates \(100 in .*200 in"):
        report.study(folders.find([tmp_path / "more", tmp_path / "short"]).runs)


# Tests between methods


def test_mcnemar_is_that_of_an_independent_count() -> None:
    ours, theirs = np.array([1, 1, 1, 1, 1, 0, 0, 1]), np.array([0, 0, 0, 0, 0, 0, 1, 1])
    only_ours, only_theirs, p = intervals.mcnemar(100.0 * (ours - theirs)[None, :])
    assert (only_ours, only_theirs) == (5, 1)
    # Two-sided binomial of 6 coins: as far out as 5 or farther.
    assert p == pytest.approx(2 * sum(math.comb(6, k) for k in (5, 6)) / 2**6)
    assert intervals.mcnemar(np.zeros((2, 9))) == (0, 0, 1.0)
    # With several seeds, a row counts for the method that has it right more often, and for neither in a tie.
    seeds = np.array([[1.0, 1.0, 0.0, -1.0], [1.0, -1.0, 0.0, -1.0], [-1.0, 0.0, 0.0, 0.0]])
    assert intervals.mcnemar(seeds)[:2] == (1, 1)


def test_mcnemar_keeps_its_level() -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(300):
        found += intervals.mcnemar((rng.random((3, 80)) < 0.5) * 1.0 - (rng.random((3, 80)) < 0.5))[2] < 0.05
    assert 0.005 < found / 300 < 0.07


def test_p_is_below_a_twentieth_where_the_interval_leaves_out_zero() -> None:
    rng = np.random.default_rng(1)
    crossed = 0
    for seeds in (1, 2, 4):
        for shift in np.linspace(-20, 20, 21):
            values = shift + rng.normal(0, 80, (seeds, 60))
            _, low, high = intervals.difference_interval(values)
            assert (intervals.difference_p(values) < 0.05) == (low > 0 or high < 0)
            crossed += low > 0 or high < 0
    assert 5 < crossed < 58


def test_holm_is_over_all_comparisons_of_a_page(sweep: Path) -> None:
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0]
    study = report.study(folders.find([sweep]).runs)
    found = [c for summary in study.summaries for c in summary.comparisons]
    assert study.comparisons == len(found) == 5
    assert [c.p_holm for c in found] == pytest.approx(intervals.holm([c.p for c in found]))
    assert [c.mcnemar_holm for c in found] == pytest.approx(intervals.holm([c.mcnemar_p for c in found]))
    toy = study.of("toy")[0].comparisons[0]
    assert (toy.ours, toy.theirs) == (30, 0)
    assert toy.mcnemar_holm == pytest.approx(5 * 2 / 2**30)


def test_what_holm_takes_back_is_said(tmp_path: Path) -> None:
    runs = of(tmp_path, label=some(50), step_by_step=some(56))
    alone = report.summarize(runs)
    assert 0.01 < alone.comparisons[0].p < 0.05
    assert tables.differences(alone).rows[0][-1] == "these two differ"
    assert "Holm" not in report.sentences(alone)[0]
    among_others = report.study(runs + _many(tmp_path / "more", 8)).summaries[0]
    assert among_others.comparisons[0].p == alone.comparisons[0].p
    assert tables.differences(among_others).rows[0][-1] == "these two differ, not by Holm"
    assert "(not by Holm's correction: p = 0." in report.sentences(among_others)[0]


def _many(root: Path, count: int) -> list[report.Run]:
    """Makes comparisons without a difference, each on its own dataset."""
    kinds = ("label", "step_by_step")
    return [
        report.identify(write_run(root / f"{n}-{kind}", kind=kind, dataset=f"other{n}", right=some(20, rows=40)))
        for n in range(count)
        for kind in kinds
    ]


# Datasets and sizes


def test_runs_are_sorted_into_datasets_and_sizes(sweep: Path) -> None:
    study = report.study(folders.find([sweep]).runs)
    assert study.datasets == ("svamp", "toy")
    assert [(s.dataset, s.parameters) for s in study.summaries] == [
        ("svamp", 247_577_856),
        ("svamp", 783_150_080),
        ("toy", 1_234_567),
    ]
    assert all(s.cautions == () for s in study.summaries)
    header, rows, *_ = tables.overview(study)
    assert header == ["method", "parameters", "svamp", "toy"]
    small = study.summaries[0].groups[0]
    assert rows[0] == [FINE_TUNING, "1.23M", "", "50.0 [40.4, 59.6] (50 %)"]
    assert rows[1] == [FINE_TUNING, "248M", f"{small.accuracy:.1f} [{small.low:.1f}, {small.high:.1f}]", ""]
    assert rows[-1] == ["teacher", "", "74.0", ""]


def test_one_dataset_has_one_test_set_in_every_size(tmp_path: Path) -> None:
    runs = [
        report.identify(paper_run(tmp_path / f"{size}", parameters=size, right=some(3, rows=rows)))
        for size, rows in zip(SIZES, (20, 30), strict=True)
    ]
    with pytest.raises(ValueError, match=r"on 20 rows and .* on 30, of which 20 are the same"):
        report.study(runs)
    with pytest.raises(ValueError, match="one teacher_accuracy and 2 datasets"):
        report.study([runs[0], report.identify(write_run(tmp_path / "toy"))], teacher_accuracy=50.0)


def test_runs_that_differ_in_a_setting_are_told_apart_by_it(tmp_path: Path) -> None:
    runs = []
    for kind in ("label", "step_by_step"):
        for alpha in (0.3, 0.5):
            for seed in range(2):
                settings = {"alpha": alpha, "seed": seed, "model_dir": f"{kind}{alpha}", "data": {"seed": seed}}
                path = tmp_path / f"{kind}-{alpha}-{seed}"
                write_run(path, kind=kind, seed=seed, manifest_of={"settings": settings})
                runs.append(report.identify(path))
    summary = report.study(runs).summaries[0]
    assert summary.methods == tuple(f"{m} (alpha {a})" for m in (FINE_TUNING, STEP_BY_STEP) for a in (0.3, 0.5))
    assert all(group.seeds == (0, 1) for group in summary.groups)
    pairs = [(c.method, c.reference) for c in summary.comparisons]
    ours = [(f"{STEP_BY_STEP} (alpha {a})", f"{FINE_TUNING} (alpha {a})") for a in (0.3, 0.5)]
    assert pairs == [(f"{FINE_TUNING} (alpha 0.5)", f"{FINE_TUNING} (alpha 0.3)"), *ours]
    one_standard = [run for run in runs if run.method == STEP_BY_STEP or "0.5" in str(run.path)]
    pairs = [(c.method, c.reference) for c in report.study(one_standard).summaries[0].comparisons]
    assert pairs == [(f"{STEP_BY_STEP} (alpha {a})", FINE_TUNING) for a in (0.3, 0.5)]
    with pytest.raises(ValueError, match=r"are both standard fine-tuning at fraction 1 with seed 0"):
        report.study([*runs[2:3], *runs[2:3]])


def test_folders_are_searched_and_what_is_not_finished_is_left_out(sweep: Path, tmp_path: Path) -> None:
    found = folders.find([sweep])
    assert len(found.runs) == 14
    assert found.left_out == (f"{sweep}/toy/unfinished: it has no test result yet.",)
    again = folders.find([*sorted(sweep.glob("*/*")), sweep / "sweep.log", sweep][1:])
    with pytest.raises(ValueError, match=r"unfinished has no test metrics"):
        report.study(again.runs)  # a run given by name must be finished
    assert {str(run.path) for run in again.runs} > {str(run.path) for run in found.runs}
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        folders.find([tmp_path])
    write_run(tmp_path / "whole")
    write_run(tmp_path / "whole" / "checkpoints" / "copy")  # a folder inside a run is not a run
    assert [run.path for run in folders.find([tmp_path]).runs] == [tmp_path / "whole"]
    shutil.rmtree(tmp_path / "whole")
    write_run(tmp_path / "odd")
    manifest = json.loads((tmp_path / "odd" / "manifest.json").read_text())
    manifest["run"]["mixture_or_task_name"] = "toy_rationale"
    (tmp_path / "odd" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"Found no finished run in .*\n.*not a known method"):
        folders.find([tmp_path])


# The paper, cost and the teacher


def test_a_run_like_the_paper_s_is_held_against_it(sweep: Path) -> None:
    study = report.study(folders.find([sweep]).runs)
    rows = tables.paper(study).rows
    assert [(row[0], row[1], row[4]) for row in rows] == [
        (FINE_TUNING, "svamp", "62.63"),
        (STEP_BY_STEP, "svamp", "65.50"),
        (SINGLE_TASK, "svamp", "63.00"),
    ]
    group = study.summaries[0].groups[0]
    assert rows[0][5] == f"{group.accuracy - 62.63:+.1f}".replace("-", formats.MINUS)


@pytest.mark.parametrize(
    "change",
    [
        {"model": BASE | {"mlp_dim": 3072}},
        {"settings": {"initial_checkpoint_path": None}},
        {"data.options.label_source": "teacher"},
        {"data.options.train_split": "validation"},
        {"data.options.fraction": 0.5},
        {"data.splits.train.counts": {"rows": 700, "label": 600}},
        {"data.dataset": "toy", "run.mixture_or_task_name": "toy_step_by_step"},
        {"data.options.records_dir": "no/records"},  # nobody knows whose rationales
    ],
    ids=str,
)
def test_what_is_not_the_paper_s_is_held_against_nothing(tmp_path: Path, change: dict) -> None:
    records_dir = str(write_records(tmp_path / "records", "svamp"))
    path = paper_run(tmp_path / "run", kind="step_by_step", records_dir=records_dir)
    assert len(tables.paper(report.study([report.identify(path)])).rows) == 1
    manifest = json.loads((path / "manifest.json").read_text())
    for place, value in change.items():
        *parents, name = place.split(".")
        holder = manifest
        for parent in parents:
            holder = holder[parent]
        holder[name] = value
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert tables.paper(report.study([report.identify(path)])).rows == []


def test_the_cost_of_a_run_is_that_of_its_manifest(tmp_path: Path) -> None:
    from sbs_jax.student import families, flops

    records_dir = str(write_records(tmp_path / "records", "svamp"))
    path = paper_run(tmp_path / "run", records_dir=records_dir)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["devices"] = [f"TPU_{i}(process=0,(0,0,0,{i}))" for i in range(4)]
    (path / "manifest.json").write_text(json.dumps(manifest))
    study = report.study([report.identify(path)])
    cost = costs.cost(study.summaries[0].groups[0])
    assert cost.devices == "4 x TPU"
    assert cost.device_hours == pytest.approx(4 * 200 * 0.5 / 3600)
    one = flops.training_flops(families.config_of(manifest["model"]), rows=64, inputs=256, targets=128)
    assert cost.training_flops == 200 * one
    row = tables.costs(study).rows[0]
    assert row[4] == "2,181 x"  # 540e9 / 247,577,856
    assert (cost.goodput, cost.utilisation, cost.tokens) == (None, None, None)  # a run of an older version
    for settings in (manifest["settings"] | {"tuning": {"callable": "lora"}}, {}, None):
        (path / "manifest.json").write_text(json.dumps(manifest | {"settings": settings}))
        assert costs.cost(report.study([report.identify(path)]).summaries[0].groups[0]).training_flops is None


def test_the_teacher_s_replies_are_counted_from_the_records(sweep: Path, tmp_path: Path) -> None:
    header, rows, *_ = tables.teachers(report.study(folders.find([sweep]).runs))
    assert rows == [
        ["svamp", "test", "PaLM 540B", "200", "74.0 %", "[67.5, 79.6]", "190", "22.1 %", "180", "no_answer 20"]
    ]
    assert len(header) == len(rows[0])
    damaged = write_records(tmp_path / "records", "toy", teacher_accuracy="high")
    runs = [report.identify(write_run(tmp_path / "run", records_dir=str(damaged)))]
    assert tables.teachers(report.study(runs)).rows == []
    unlabelled = write_records(tmp_path / "unlabelled", "toy", labelled=0, teacher_accuracy=None)
    runs = [report.identify(write_run(tmp_path / "run2", records_dir=str(unlabelled)))]
    assert tables.teachers(report.study(runs)).rows[0][2:8] == ["not known", "200", "-", "-", "190", "-"]


# Rationales


def test_rationales_that_were_measured_are_shown(tmp_path: Path) -> None:
    path = write_rationales(write_run(tmp_path / "run", kind="step_by_step"))
    found = load(report.identify(path)).quality
    assert found is not None
    assert found.examples["toy-0"] == quality.Said(
        rationale="It is so.", implied_label="neutral", consistent=False, teacher_rationale="The teacher's words."
    )
    rows = tables.rationales(report.study([report.identify(path)])).rows
    assert rows == [
        [STEP_BY_STEP, "toy", "1.23M", "100 %", "1", "2", "2", "50.0 %", "-", "-", "0.25", "-", "12.5", "20.0"],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "'version' is 2"),
        ({"rows": -1}, "rows is -1"),
        ({"split": "train"}, "'split' is \"train\""),
        ({"consistency": None}, "'consistency' is null"),
        ({"consistency": {"by_parser": 1.5}}, r"consistency\.by_parser is 1\.5; expected a number from 0 to 1"),
        ({"length": {"student_words": "many"}}, r"'length\.student_words' is \"many\""),
        ({"examples_file": "../secret"}, "examples_file is '../secret'"),
        ({"examples_file": "none.jsonl"}, r"none\.jsonl is missing"),
    ],
)
def test_damaged_rationales_are_named(tmp_path: Path, change: dict, message: str) -> None:
    path = write_rationales(write_run(tmp_path / "run"), MEASURED | change)
    with pytest.raises(ValueError, match=message):
        report.study([report.identify(path)])


def test_a_damaged_line_of_rationales_is_named(tmp_path: Path) -> None:
    path = write_rationales(write_run(tmp_path / "run"), examples=[*EXAMPLES, {"id": "toy-2", "rationale": None}])
    with pytest.raises(ValueError, match=r"rationales\.jsonl:3: the field 'rationale' is null"):
        report.study([report.identify(path)])


# Files


@pytest.fixture(scope="module")
def written(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main([sweep], page) == 0
    return page


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_plot_and_number_has_its_file(written: Path, sweep: Path) -> None:
    folder = written.with_name("report_files")
    linked = set(check(written).linked)
    assert linked == {f"report_files/{path.name}" for path in folder.iterdir()} - {"report_files/files.txt"}
    rows = lines_of(folder / "accuracy.csv")
    study = report.study(folders.find([sweep]).runs)
    groups = [group for _, group in study.groups()]
    assert [float(row["accuracy"]) for row in rows] == [group.accuracy for group in groups]
    assert [row["paper"] for row in rows][:3] == ["62.63", "65.5", "63.0"]
    rows = lines_of(folder / "comparisons.csv")
    assert [float(row["mcnemar_p_holm"]) for row in rows] == [
        c.mcnemar_holm for summary in study.summaries for c in summary.comparisons
    ]
    assert len(lines_of(folder / "runs.csv")) == 14
    curves = lines_of(folder / "curves.csv")
    assert {row["name"] for row in curves} == {"accuracy", "loss/label", "loss/rationale"}


def test_plots_stand_alone_as_svg(written: Path) -> None:
    plots = sorted(written.with_name("report_files").glob("*.svg"))
    assert {path.stem.split("-")[0] for path in plots} >= {"accuracy", "size", "cost", "validation", "train"}
    for path in plots:
        text = path.read_text("utf-8")
        root = xml.etree.ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert {"width", "height", "viewBox", "font-family"} <= root.attrib.keys()
        assert "var(" not in text  # programs beside browsers know none
        assert "#1b1f24" in text or "#5d6671" in text


def test_the_folder_of_files_holds_those_of_this_report_alone(tmp_path: Path, mixed_once: list[report.Run]) -> None:
    folder = tmp_path / "files"
    report.write_page(tmp_path / "page.html", mixed_once, title=None, notes=(), assets=folder)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    report.write_page(tmp_path / "page.html", mixed_once[:1], title=None, notes=(), assets=folder)
    assert {path.name for path in folder.iterdir()} < first.keys()
    report.write_page(tmp_path / "page.html", mixed_once, title=None, notes=(), assets=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.csv").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files that no report wrote"):
        report.write_page(tmp_path / "page.html", mixed_once, title=None, notes=(), assets=tmp_path / "mine")


@pytest.fixture(scope="module")
def mixed_once(tmp_path_factory: pytest.TempPathFactory) -> list[report.Run]:
    return of(tmp_path_factory.mktemp("once"), label=some(50), step_by_step=some(60))


def test_a_spreadsheet_computes_nothing_from_a_name(tmp_path: Path) -> None:
    runs = [report.Run(write_run(tmp_path / "run"), '=HYPERLINK("x")', 1.0, 0)]
    report.write_page(tmp_path / "page.html", runs, title=None, notes=(), assets=tmp_path / "files")
    (row,) = lines_of(tmp_path / "files" / "accuracy.csv")
    assert row["method"] == '\'=HYPERLINK("x")'


def test_a_page_of_several_datasets_says_where_to_go(written: Path) -> None:
    text = written.read_text("utf-8")
    for place in ("dataset-svamp", "dataset-toy", "cost", "predictions", "reading"):
        assert f'href="#{place}"' in text
        assert text.count(f'id="{place}"') == 1
    assert "unfinished: it has no test result yet." in text
    assert "Always answering" in text


def test_the_cost_of_a_run_tells_where_its_time_went(tmp_path: Path) -> None:
    path = paper_run(tmp_path / "run", records_dir=str(write_records(tmp_path / "records", "svamp")))
    metrics = path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) > 2
    for number, line in enumerate(train):
        spent = {"steps": 60.0 + number, "compiling": 30.0, "evaluation": 9.5, "data": 0.5}
        line |= {f"seconds/{part}": seconds for part, seconds in spent.items()}
        line |= {"utilisation": 0.1 if number == 0 else 0.4, "tokens_per_second_per_device": 1_000.0 + number}
    train[-1]["seconds/steps"] = 60.0
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = report.study([report.identify(path)])
    cost = costs.cost(study.summaries[0].groups[0])
    assert (cost.goodput, cost.utilisation) == (0.6, 0.4)  # the first line has compiling in it
    assert cost.rest == pytest.approx(
        {"compiling": 0.3, "data": 0.005, "evaluation": 0.095} | dict.fromkeys(("start", "saving", "lost"), 0)
    )
    table = tables.costs(study)
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["MFU"], row["goodput"], row["rest of the time"]) == (
        "40.0 %",
        "60 %",
        "compiling 30 %, evaluation 10 %",
    )
