"""The page of a sampling: its numbers, its choice of rows, and how it behaves in a real browser."""

import base64
import hashlib
import json
import random
import re
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
from builders.html_pages import HOSTILE, Reader, check, seen
from builders.teacher_rows import EXEMPLARS, LABELS, row, some_rows, unusable, wrong

from sbs_jax.pages import cards
from sbs_jax.stats.intervals import wilson_interval
from sbs_jax.teacher import examples
from sbs_jax.teacher import page as teacher_page
from sbs_jax.teacher.page import Example, write_page


def written(path: Path, rows: Iterable[Example], **options: Any) -> Reader:
    """Writes the page of these rows and reads it back."""
    write_page(path, **({"title": "A title", "facts": {"model": "m"}, "rows": rows} | options))
    return check(path)


# Numbers


def test_accuracy_is_that_of_the_teacher_s_own_usable_answers(tmp_path: Path) -> None:
    page = written(tmp_path / "page.html", some_rows(120))
    whole = page.table("human label")["all rows"]
    assert whole[0] == "70.0 %"
    low, high = wilson_interval(84 / 120, 120)
    assert whole[1] == f"[{100 * low:.1f}, {100 * high:.1f}]" == "[61.3, 77.5]"
    assert whole[2:] == ["84", "12", "12", "12", "120"]  # right, after a hint, wrong, unusable, rows
    lines = page.table("human label")
    assert [sum(int(lines[label][i]) for label in LABELS) for i in range(2, 7)] == [84, 12, 12, 12, 120]
    assert "The teacher's own label equals the human label on 70.0 % of 120 rows" in page.text
    assert "12 more agree only after a hint" in page.text


def test_an_answer_after_a_hint_is_never_the_teacher_s_own(tmp_path: Path) -> None:
    rows = [row(0), row(0, hinted=True), wrong(0, hinted=True), unusable(0, hinted=True)]
    page = written(tmp_path / "page.html", rows)
    assert page.table("human label")["all labels"][2:] == ["1", "1", "1", "1", "4"]
    assert "answered after a hint3" in page.text.replace("\n", "")


def test_the_page_opens_with_replies_and_shares_and_ends_with_a_command(tmp_path: Path) -> None:
    commands = [("Train a student:", "sbs train --gin_file=a.gin")]
    page = written(tmp_path / "page.html", some_rows(120), next_commands=commands)
    parts = [
        "Three replies",
        "equals the human label on",
        "a label can be read from",
        "Outcomes",
        "Examples",
        "How the teacher was asked",
    ]
    places = [page.text.index(part) for part in [*parts, "sbs train --gin_file=a.gin"]]
    assert places == sorted(places)
    assert page.table("replies") == {
        "replies": ["share", "95 % interval", "rows"],
        "usablea label can be read from the reply": ["90.0 %", "[83.3, 94.2]", "108 of 120"],
        "rightthe teacher's own label is the human label": ["70.0 %", "[61.3, 77.5]", "84 of 120"],
    }
    unlabelled = written(tmp_path / "page.html", [row(i, label=None, right=None) for i in range(5)])
    assert list(unlabelled.table("replies")) == ["replies", "usablea label can be read from the reply"]


def test_the_opening_replies_are_an_even_sample_although_the_browser_s_are_not(tmp_path: Path) -> None:
    rows = [(wrong if number % 20 == 0 else row)(number) for number in range(2000)]
    lowest = [row.input for row in sorted(rows, key=lambda row: cards.rank(row.id))[:3]]
    written(tmp_path / "page.html", rows, examples=10)
    shown = re.findall(r'<p class="said question" dir="auto">(.*?)</p>', (tmp_path / "page.html").read_text("utf-8"))
    assert shown == lowest
    written(tmp_path / "page.html", rows[::-1], examples=1000)
    assert re.findall(r'said question" dir="auto">(.*?)</p>', (tmp_path / "page.html").read_text("utf-8")) == lowest


def test_outcomes_are_counted_and_explained(tmp_path: Path) -> None:
    rows = [*some_rows(100), unusable(100, outcome="length", replies=()), unusable(101, outcome="new <word>")]
    page = written(tmp_path / "page.html", rows)
    (outcomes,) = [table for table in page.tables if table[0][0] == "outcome"]
    assert [(line[0], *line[2:]) for line in outcomes[1:]] == [
        ("okrationale and label can be used", "90", "88.2 %"),
        ("no_answerthere is no answer marker", "10", "9.8 %"),
        ("lengththe reply was truncated, even at four times the token limit", "1", "1.0 %"),
        ("new <word>", "1", "1.0 %"),
    ]


def test_confusion_has_every_judged_row_once(tmp_path: Path) -> None:
    rows = [row(0), row(3), wrong(0), wrong(1), wrong(1), unusable(2), wrong(2, teacher_label="maybe"), row(1)]
    page = written(tmp_path / "page.html", rows)
    (found,) = [table for table in page.tables if table[0][0].startswith("human ↓")]
    assert found[0][1:] == ["entailment", "neutral", "contradiction", "another label", "no label"]
    assert {line[0]: [int(cell.split(" ")[0]) for cell in line[1:]] for line in found[1:]} == {
        "entailment": [2, 1, 0, 0, 0],
        "neutral": [0, 1, 2, 0, 0],
        "contradiction": [0, 0, 0, 1, 1],
    }


def test_open_labels_have_no_confusion_and_only_frequent_ones_their_own_line(tmp_path: Path) -> None:
    rows = [row(i, label=f"l{i}", teacher_label=f"l{i}") for i in range(50)]
    rows += [row(50 + i, label="often", teacher_label="often") for i in range(30)]
    page = written(tmp_path / "page.html", rows)
    assert "51 different labels" in page.text
    assert list(page.table("human label")) == ["human label", "often", "all other labels", "all rows"]
    assert page.table("human label")["all other labels"][-1] == "50"
    assert not [table for table in page.tables if table[0][0].startswith("human ↓")]


def test_more_different_labels_than_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbs_jax.teacher.examples.DISTINCT", 40)
    rows = [row(i, label=f"l{i}", teacher_label=f"l{i}", outcome=f"o{i}") for i in range(100)]
    page = written(tmp_path / "page.html", rows)
    counts = examples.Counts()
    for made in rows:
        counts.add(made)
    assert len(counts.outcomes) == len(counts.teacher_labels) == len(counts.by_label) == 40
    assert "more than 10,000 different labels" in page.text
    assert page.table("human label")["all labels"][-1] == "100"
    assert page.table("outcome")["all other outcomes"] == ["71", "71.0 %"]


def test_agreement_among_samples_and_what_it_is_worth(tmp_path: Path) -> None:
    rows = [row(i, replies=("a", "b", "c", "d"), votes=(4, 4)) for i in range(6)]
    rows += [wrong(i, replies=("a", "b", "c", "d"), votes=(2, 4)) for i in range(6, 9)]
    rows += [wrong(i, replies=("a", "b", "c", "d"), votes=(1, 4)) for i in range(9, 10)]
    rows += [unusable(10, replies=("a", "b", "c", "d"))]
    page = written(tmp_path / "page.html", rows)
    lines = page.table("replies that have the chosen label")
    assert {name: line[:3] for name, line in list(lines.items())[1:]} == {
        "all": ["6", "60.0 %", "100.0 %"],
        "at least half": ["3", "30.0 %", "0.0 %"],
        "fewer than half": ["1", "10.0 %", "0.0 %"],
    }
    assert "asked for on 11 rows" in page.text
    assert "Agreement among samples" not in written(tmp_path / "page.html", some_rows()).text


def test_lengths_are_in_words(tmp_path: Path) -> None:
    rows = [row(i, rationale="w " * (i + 1), replies=("w " * 10, "w")) for i in range(100)]
    page = written(tmp_path / "page.html", rows)
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "100 of them; half have up to 50 words, 90 % up to 90, 99 % up to 99, the longest 100." in text
    assert "200 of them; half have up to 1 words, 90 % up to 10" in text
    plots = re.findall(r"<svg xmlns.*?</svg>", (tmp_path / "page.html").read_text("utf-8"), flags=re.DOTALL)
    of_bars = [re.findall(r"<title>(.*?) words: ([\d,]+)</title>", plot) for plot in plots]
    assert [sum(int(count) for _, count in bars) for bars in of_bars] == [100, 200]
    assert of_bars[0][-1] == ("100 or more", "1")
    assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]{6}", "".join(plots))


@pytest.mark.parametrize(
    ("rows", "headline"),
    [
        ([], "No example was sampled"),
        ([unusable(i) for i in range(5)], "None of 5 rows got a reply that can be used"),
        ([unusable(i, label=None, replies=()) for i in range(5)], "None of 5 rows got a reply that can be used"),
        ([row(i, label=None, right=None) for i in range(5)], "100.0 % of 5 rows got a label from the teacher"),
        ([row(0)], "The teacher's own label equals the human label on 100.0 % of 1 row"),
        ([row(i, rationale=None, replies=("",), prompt="") for i in range(3)], "on 100.0 % of 3 rows"),
    ],
    ids=["no rows", "all unusable", "unusable and unlabelled", "no human labels", "one row", "empty texts"],
)
def test_whatever_came_out_has_a_page(tmp_path: Path, rows: list[Example], headline: str) -> None:
    page = written(tmp_path / "new" / "page.html", rows, facts={})
    assert headline in page.text
    assert len(page.data["rows"]) == len(rows)
    if rows and rows[0].label is None:
        assert "Nobody labelled these rows" in page.text
        assert "Accuracy" not in page.text


def test_the_released_replies_give_the_published_accuracy(tmp_path: Path, real_data_dir: Path) -> None:
    """e-SNLI test under the official rules: 73.0 % of 9,824 (7,171)."""
    from tasks import esnli

    inputs = esnli.read_release(real_data_dir)["test"]
    shards = sorted((real_data_dir / "esnli" / "llm").glob("test_CoT_*.json"), key=lambda p: int(p.stem.split("_")[-1]))
    texts = [text for shard in shards for text in json.loads(shard.read_text("utf-8"))]

    def rows() -> Iterator[Example]:
        for number, (source, text) in enumerate(zip(inputs, texts, strict=True)):
            parsed = esnli.official(text, source)
            yield row(
                number,
                input=source.input,
                label=source.label,
                replies=(text,),
                rationale=parsed.rationale,
                teacher_label=parsed.label,
                outcome=parsed.outcome,
                right=None if parsed.label is None else parsed.label == source.label,
            )

    page = written(tmp_path / "page.html", rows())
    assert page.table("human label")["all rows"][0::2] == ["73.0 %", "7,171", "0"]
    assert "2,000 of 9,824 rows are here: 1,000 of the 2,653 where teacher and human disagree" in page.text


# Which rows


def embedded(page: Reader) -> Counter[str]:
    return Counter(found["verdict"] for found in page.data["rows"])


def test_disagreements_come_first_and_fill_half(tmp_path: Path) -> None:
    few = written(tmp_path / "page.html", some_rows(1000), examples=400)
    assert embedded(few)["wrong"] == 100  # all there are
    assert len(few.data["rows"]) == 400
    assert "400 of 1,000 rows are here: 100 of the 100 where teacher and human disagree" in few.text
    many = written(tmp_path / "page.html", some_rows(1000), examples=100)
    assert (embedded(many)["wrong"], len(many.data["rows"])) == (50, 100)
    nothing_else = written(tmp_path / "page.html", (wrong(i) for i in range(300)), examples=100)
    assert embedded(nothing_else)["wrong"] == 100
    every = written(tmp_path / "page.html", some_rows(90), examples=100)
    assert len(every.data["rows"]) == 90
    assert "All 90 rows are here" in every.text
    assert written(tmp_path / "page.html", some_rows(90), examples=0).data["rows"] == []


def test_the_choice_is_even_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = list(some_rows(4000))
    page = written(tmp_path / "page.html", rows, examples=800)
    numbers = [int(found["id"].split("-")[1]) for found in page.data["rows"]]
    assert numbers == sorted(numbers)
    quarters = Counter(number // 1000 for number in numbers if number % 10 != 3)
    assert all(80 < quarters[i] < 120 for i in range(4)), quarters  # 100 each, within two deviations
    random.Random(0).shuffle(rows)
    again = written(tmp_path / "page.html", rows, examples=800)
    assert {found["id"] for found in again.data["rows"]} == {found["id"] for found in page.data["rows"]}


def test_rows_are_not_kept(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Example] = weakref.WeakSet()
    most = 0

    def watched() -> Iterator[Example]:
        nonlocal most
        for made in some_rows(5000):
            most = max(most, len(alive))
            alive.add(made)
            yield made

    written(tmp_path / "page.html", watched(), examples=100)
    assert most <= 2


def test_shared_lines_of_prompts_are_held_once(tmp_path: Path) -> None:
    rows = [*some_rows(500), row(500, prompt="one line"), row(501, prompt=""), row(502, prompt="\n\na\nb\na\n\n")]
    page = written(tmp_path / "page.html", rows)
    assert (tmp_path / "page.html").read_text("utf-8").count("because 7. yes") == 1
    lines = page.data["lines"]
    for made, found in zip(rows, page.data["rows"], strict=True):
        ranges = found["prompt"]
        text = "".join(line for i in range(0, len(ranges), 2) for line in lines[ranges[i] : ranges[i + 1]])
        assert text == made.prompt


def test_texts_without_end_are_cut_in_the_middle(tmp_path: Path) -> None:
    long = "begin " + "x" * 3_000_000 + " end"
    replies = tuple(f"{i} {long}" for i in range(25))
    page = written(tmp_path / "page.html", [row(0, replies=replies, input=long, rationale=long, label=long)])
    (found,) = page.data["rows"]
    assert (len(found["replies"]), found["left_out"]) == (10, 15)
    assert found["replies"][3].startswith("3 begin xxx")
    assert found["replies"][3].endswith("xxx end")
    assert "\n[.. 2,980,012 characters left out ..]\n" in found["replies"][3]
    assert (tmp_path / "page.html").stat().st_size < 600_000


def test_the_same_rows_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    write_page(tmp_path / "here.html", title="t", facts={"b": "1", "a": "2"}, rows=some_rows(300), examples=100)
    root = Path(teacher_page.__file__).parents[2]
    code = (
        "from builders.teacher_rows import some_rows; from sbs_jax.teacher.page import write_page;"
        f"write_page({str(tmp_path / 'there.html')!r}, title='t', facts={{'b': '1', 'a': '2'}}, rows=some_rows(300),"
        "examples=100)"
    )
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": f"{root}:{root / 'tests'}", "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here.html").read_bytes() == (tmp_path / "there.html").read_bytes()


def test_a_negative_number_of_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="examples is -1"):
        write_page(tmp_path / "page.html", title="t", facts={}, rows=[], examples=-1)
    assert not (tmp_path / "page.html").exists()


def test_only_the_page_s_own_script_may_run(tmp_path: Path) -> None:
    page = written(tmp_path / "page.html", some_rows())
    text = (tmp_path / "page.html").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(page.scripts["script"].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in text


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def opened(tab: chromium.Page, path: Path, rows: Iterable[Example], **options: Any) -> None:
    """Writes a page and opens it."""
    write_page(path, **({"title": "A title", "facts": {"model": "m"}, "rows": rows} | options))
    tab.visit(path)


def listed(tab: chromium.Page) -> list[int]:
    """The numbers of the examples that the list draws, from their inputs."""
    lines = tab.run("[...document.querySelectorAll('.item')].map((e) => [Number(e.ariaPosInSet), e.textContent])")
    return [int(re.findall(r"Does (\d+) follow", text)[0]) for _, text in sorted(lines)]


def detail(tab: chromium.Page) -> dict[str, str]:
    """The chosen example: facts by their names."""
    pairs = "[...document.querySelectorAll('#detail dt')].map((e) => [e.textContent, e.nextSibling.textContent])"
    return dict(tab.run(pairs))


def test_hostile_texts_are_shown_as_text(tab: chromium.Page, tmp_path: Path) -> None:
    rows = [
        wrong(
            number,
            **dict.fromkeys(("id", "input", "rationale", "label", "outcome"), text),
            prompt=f"{text}\n{EXEMPLARS}\n{text}",
            replies=(text, text),
            teacher_label=f"{text}!",
        )
        for number, text in enumerate(HOSTILE)
    ]
    opened(tab, tmp_path / "page.html", rows, title=HOSTILE[0], facts={text: text for text in HOSTILE})
    assert tab.run("document.title") == HOSTILE[0]
    facts = tab.run("[...document.querySelectorAll('.facts dd')].map((e) => e.textContent)")
    names = tab.run("[...document.querySelectorAll('.facts dt')].map((e) => e.textContent)")
    assert facts[: len(HOSTILE)] == names[: len(HOSTILE)] == [seen(text) for text in HOSTILE]
    tab.run("document.getElementById('list').focus()")
    for text in HOSTILE:
        found = detail(tab)
        for name in ("id", "input", "human label", "rationale"):
            assert found[name] == seen(text)
        assert found["teacher's label"] == seen(f"{text}!")
        assert found["raw replies"] == f"reply 1{seen(text)}reply 2{seen(text)}"
        tab.run("document.querySelector('#detail details').open = true")
        tab.run("new Promise((done) => setTimeout(done, 30))")  # details tell of being open a little later
        prompt = tab.run("document.querySelector('#detail details .said').textContent")
        assert prompt == seen(f"{text}\n{EXEMPLARS}\n{text}")
        tab.press("ArrowDown")
    assert sorted(tab.run("[...outcome.options].map((o) => o.textContent)")) == sorted(
        ["all", *(f"{seen(text)} (1)" for text in HOSTILE)]
    )
    table = tab.run("[...document.querySelectorAll('#outcomes tbody th')].map((e) => e.textContent)")
    assert sorted(table) == sorted(seen(text) for text in HOSTILE)
    code = "[...document.querySelectorAll('.cards .said')].map((e) => e.textContent.replace(/^[✓✗\u2013]/, ''))"
    shown = tab.run(code)
    assert len(shown) == 3 * 4
    assert set(shown) <= {seen(f"{text}{end}") for text in HOSTILE for end in ("", "!")}
    for number, text in enumerate(HOSTILE):  # filters take them too
        tab.choose(text=text)
        assert tab.text("told") == "1 of 10 examples" or number in (3, 4)  # a field of one line drops line ends
    assert tab.run("typeof window.pwned") == "undefined"
    assert tab.run("[document.scripts.length, document.querySelectorAll('img, svg[onload]').length]") == [2, 0]
    assert tab.problems == []


def test_every_unseen_character_is_the_same_to_both_languages(tab: chromium.Page, tmp_path: Path) -> None:
    edges = (0x80, 0x2000, 0x2080, 0xD800, 0xE000, 0xFF00, 0x10000)
    codes = [*range(1, 0x100), *(code for edge in edges for code in range(edge - 0x20, edge + 0x80))]
    text = "".join(f"{chr(code)}|" for code in codes)
    opened(tab, tmp_path / "page.html", [row(0, input=text)], facts={"all": text})
    by_python = tab.run("document.querySelector('.facts dd').textContent")
    by_script = detail(tab)["input"]
    assert by_python == by_script == seen(text)


def test_long_replies_are_shown_whole(tab: chromium.Page, tmp_path: Path) -> None:
    text = "xx" + "👩‍🔬 <b>" * 1500
    opened(tab, tmp_path / "page.html", [row(0, replies=(text,)), row(1, replies=("x" * 300_000,))])
    assert detail(tab)["raw reply"] == text
    tab.run("document.getElementById('list').focus()")
    tab.press("ArrowDown")
    assert "280,000 characters left out" in detail(tab)["raw reply"]
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")


def test_filters_narrow_what_is_shown(tab: chromium.Page, tmp_path: Path) -> None:
    opened(tab, tmp_path / "page.html", some_rows(120))
    assert tab.text("told") == "120 examples"
    tab.choose(verdict="wrong")
    assert tab.text("told") == "12 of 120 examples"
    assert listed(tab) == list(range(3, 120, 10))
    tab.choose(text="  DOES 33 follow ")
    assert listed(tab) == [33]
    tab.choose(text="nobody wrote this")
    assert tab.text("told") == "No example has what these filters ask for"
    assert listed(tab) == []
    tab.click("#filters button[type=reset]")
    assert tab.text("told") == "120 examples"
    tab.choose(hinted="yes")
    assert listed(tab) == list(range(7, 120, 10))
    assert tab.run("document.querySelector('#detail h3').textContent").startswith("✓ right, after a hint")
    tab.choose(hinted="no")
    assert tab.text("told") == "108 of 120 examples"
    tab.choose(hinted="")
    tab.choose(verdict="unusable")
    assert len(listed(tab)) == 12
    tab.choose(verdict="")
    assert tab.run("[...outcome.options].map((o) => o.textContent)") == ["all", "ok (108)", "no_answer (12)"]
    tab.choose(outcome="1")
    assert listed(tab) == list(range(5, 120, 10))
    tab.choose(teacher="none")
    tab.choose(label="0")
    assert tab.text("told") == "4 of 120 examples"


def test_tables_lead_to_their_examples(tab: chromium.Page, tmp_path: Path) -> None:
    opened(tab, tmp_path / "page.html", some_rows(120))
    tab.click("button[data-verdict=wrong]")
    assert tab.text("told") == "12 of 120 examples"
    tab.click("button.differ[data-label='0'][data-teacher='1']")
    assert listed(tab) == [number for number in range(3, 120, 10) if number % 3 == 2]  # contradiction
    assert tab.run("[verdict.value, label.value, teacher.value]") == ["", "0", "1"]
    tab.press("End")
    assert detail(tab)["input"] == "Does 113 follow?"
    tab.press("Enter")
    assert tab.run("document.activeElement.id") == "detail"


@pytest.mark.parametrize("kind", ["none", "unusable", "unlabelled", "no examples"])
def test_pages_with_little_to_show(tab: chromium.Page, tmp_path: Path, kind: str) -> None:
    rows = {
        "none": [],
        "unusable": [unusable(i, replies=()) for i in range(3)],
        "unlabelled": [row(i, label=None, right=None) for i in range(3)],
        "no examples": list(some_rows(20)),
    }[kind]
    opened(tab, tmp_path / "page.html", rows, examples=0 if kind == "no examples" else 10)
    if kind == "none":
        assert tab.run("document.getElementById('examples')") is None
    elif kind == "no examples":
        assert tab.text("told") == "No example has what these filters ask for"
    else:
        assert tab.text("told") == "3 examples"
        assert tab.run("[...verdict.options].length") == 2
