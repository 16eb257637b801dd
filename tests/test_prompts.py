"""The prompts: what is sent, whether the exemplars are right, and whether the parser reads their form."""

import dataclasses
import importlib
import json
import os
import pkgutil
import re
from collections import Counter
from pathlib import Path
from string import ascii_lowercase

import pytest

import tasks
from sbs_jax.data import registry
from sbs_jax.data.dataset import Row
from sbs_jax.data.grading import equation_value
from sbs_jax.data.parsing import Parsed
from sbs_jax.storage.json_files import typed
from sbs_jax.teacher import prompts
from sbs_jax.teacher.prompts import Exemplar, Message, Template
from tasks import builtin, cqa, nli

NAMES = ("anli1", "builtin", "cqa", "esnli", "svamp")
GOLDENS = Path(__file__).parent / "goldens" / "prompts"
# An input per dataset, and its label; no row of any of them.
INPUTS = {
    "esnli": ("A juggler drops a ring.</s>A ring falls.", "entailment"),
    "anli1": ("The mill at Orrin burned down twice.</s>The mill at Orrin never burned.", "contradiction"),
    "cqa": ("What holds a door open?\nAnswer Choices:\n(a) soup\n(b) wedge\n(c) fog\n(d) song\n(e) hat", "wedge"),
    "svamp": ("Each of 6 shelves holds 9 jars\nHow many jars are there?", "( 6.0 * 9.0 )"),
    "builtin": ("A tiny red iron lamp, found in the garden in March by the baker. Will it float?", "no"),
}
SMALL = {
    "version": 1,
    "instruction": "Add.",
    "question": "Q: {input}\nA:",
    "answer": "{rationale} The answer is {label}.",
    "hint": "(It is {label}.)",
    "stops": ["\nQ:"],
    "exemplars": [
        {"input": "1 and 2?", "rationale": "1 + 2 = 3.", "label": "3"},
        {"input": "2 and 2?", "rationale": "2 + 2 = 4.", "label": "4"},
    ],
}


def template_of(value: object) -> Template:
    return typed(value, Template)


def row_of(name: str, exemplar: Exemplar) -> Row:
    choices = tuple(re.findall(r"^\([a-e]\) (.*)$", exemplar.input, flags=re.MULTILINE)) if name == "cqa" else ()
    return Row(input=exemplar.input, label=None, choices=choices)


def label_of(name: str, exemplar: Exemplar) -> str:
    """Returns the label as a record has it."""
    return exemplar.label[4:] if name == "cqa" else exemplar.label


# ---------------------------------------------------------------------------------- exemplars


def test_every_dataset_of_the_project_has_a_prompt() -> None:
    assert prompts.names() == NAMES
    modules = (importlib.import_module(f"tasks.{found.name}") for found in pkgutil.iter_modules(tasks.__path__))
    read = {module.DATASET.name for module in modules if hasattr(module, "DATASET") and module.DATASET.parsers}
    assert read == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_about_ten_exemplars_of_short_plain_text(name: str) -> None:
    exemplars = prompts.read(name).exemplars
    assert 8 <= len(exemplars) <= 12
    assert len({exemplar.input for exemplar in exemplars}) == len(exemplars)
    for exemplar in exemplars:
        assert all(text.isascii() and text == text.strip() for text in vars(exemplar).values())
        sentences = re.split(r"(?<=[a-z0-9]{2})\. ", exemplar.rationale)
        assert 1 <= len(sentences) <= 3
        assert exemplar.rationale.endswith(".")
        assert "\n" not in exemplar.rationale
        assert len(exemplar.rationale.split()) <= 45


@pytest.mark.parametrize("name", NAMES)
def test_parsers_read_the_answers_back_and_stop_strings_end_them(name: str) -> None:
    template, parsers = prompts.read(name), registry.get(name).parsers
    for exemplar in template.exemplars:
        answer, row = template.answered(exemplar), row_of(name, exemplar)
        run_on = f"{answer}\n\n{template.asked(exemplar.input)} {answer}"
        expected = Parsed(rationale=exemplar.rationale, label=label_of(name, exemplar), outcome="ok")
        for text in (answer, f" {answer}\n", run_on):
            assert parsers["strict"](text, row) == expected
        for text in (answer, run_on):
            assert parsers["official"](text, row) == expected
        assert re.split("|".join(map(re.escape, template.stops)), run_on)[0].rstrip() == answer


@pytest.mark.parametrize("name", ["esnli", "anli1"])
def test_inference_exemplars_have_the_form_of_rows_and_all_labels(name: str) -> None:
    exemplars = prompts.read(name).exemplars
    for exemplar in exemplars:
        premise, hypothesis = exemplar.input.split("</s>")
        assert nli.input_text(premise, hypothesis) == exemplar.input
    counts = Counter(exemplar.label for exemplar in exemplars)
    assert set(counts) == set(nli.LABELS)
    assert set(counts.values()) <= {3, 4}


def test_choice_exemplars_have_the_form_of_rows_and_all_letters() -> None:
    exemplars = prompts.read("cqa").exemplars
    letters = Counter()
    for exemplar in exemplars:
        choices = row_of("cqa", exemplar).choices
        assert len(set(choices)) == 5
        assert cqa.input_text(exemplar.input.split("\n")[0], choices) == exemplar.input
        letter = exemplar.label[1]
        assert exemplar.label == f"({letter}) {choices[ascii_lowercase.index(letter)]}"
        letters[letter] += 1
    assert letters == dict.fromkeys("abcde", 2)


def test_equations_have_the_value_that_the_rationale_ends_with() -> None:
    operators = Counter()
    for exemplar in prompts.read("svamp").exemplars:
        value = equation_value(exemplar.label)
        steps = re.findall(r"(\d+ [-+*/] \d+) = (\d+)", exemplar.rationale)
        assert steps
        assert all(equation_value(step) == int(result) for step, result in steps)
        assert value == int(steps[-1][1])
        assert exemplar.label.startswith("( ")
        assert exemplar.label.endswith(" )")
        numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", exemplar.input)}
        used = re.findall(r"\d+\.\d+", exemplar.label)
        assert {float(number) for number in used} <= numbers
        assert re.sub(r"\d+\.0|[-+*/() ]", "", exemplar.label) == ""  # as the released labels are written
        operators.update(re.findall(r"[-+*/]", exemplar.label))
        assert re.fullmatch(r"[^\n]+\n[A-Z][^\n]+\?", exemplar.input)
    assert all(operators[operator] >= 2 for operator in "+-*/")


def test_built_in_exemplars_are_what_its_perfect_teacher_says() -> None:
    questions = {question.text: question for question in builtin.ASKED}
    exemplars, asked = prompts.read("builtin").exemplars, set()
    for exemplar in exemplars:
        text = re.match(r"(.*\.) (.*\?)$", exemplar.input)
        assert text is not None
        question = questions[text[2]]
        (value,) = {word for word in re.findall(r"\w+", text[1]) if word in builtin.PROPERTIES[question.about]}
        assert exemplar.rationale == question.fact(value)
        assert exemplar.label == question.label(value)
        asked.add(question)
    assert asked == set(builtin.ASKED)
    assert Counter(exemplar.label for exemplar in exemplars) == {"yes": 5, "no": 5}


def test_exemplars_share_no_five_words_with_the_released_data(real_data_dir: Path) -> None:
    """Exemplars overlap with no input and no teacher's reply, whose invented continuations repeat published prompts."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}

    ours = {
        gram: f"{name}: {part!r}"
        for name in NAMES
        for exemplar in prompts.read(name).exemplars
        for part in (*exemplar.input.split("</s>"), exemplar.rationale)
        for gram in grams(part)
    }
    found = set()
    for path in sorted(real_data_dir.rglob("*.json")):
        if path.parent.name == "llm":
            texts = json.loads(path.read_text("utf-8"))
        elif path.name == "SVAMP.json":
            continue  # the same problems as those of the splits
        else:
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            texts = [line.get(key, "") for line in lines for key in ("input", "premise", "hypothesis", "question")]
        found |= {
            f"{ours[gram]} in {path.name}: {' '.join(gram)}" for text in texts for gram in grams(text) & ours.keys()
        }
    assert not found


# ---------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    template, (text, label) = prompts.read(name), INPUTS[name]
    hinted = prompts.render(template, text, hint=label).messages[-1].content
    got = f"{prompts.render(template, text).text}\n\n==== hinted ====\n{hinted}\n\n==== hash ====\n{template.hash}\n"
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("WRITE_GOLDENS"):
        path.write_text(got, "utf-8")
    assert got == path.read_text("utf-8"), (
        f"The prompt of {name} has changed, so replies to the old one are not used any more. Where that is meant, "
        "raise its version and write the new text: WRITE_GOLDENS=1 pytest tests/test_prompts.py"
    )


@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_chat_and_text_say_the_same(name: str, hint: bool) -> None:
    template, (text, label) = prompts.read(name), INPUTS[name]
    prompt = prompts.render(template, text, hint=label if hint else None)
    roles = [message.role for message in prompt.messages]
    assert roles == ["system", *("user", "assistant") * len(template.exemplars), "user"]
    joined = prompt.messages[0].content + "\n\n"
    for message in prompt.messages[1:]:
        joined += f" {message.content}\n\n" if message.role == "assistant" else message.content
    assert prompt.text == joined
    assert prompt.text == prompt.text.rstrip()  # a trailing space would be a token of its own
    assert (prompt.stops, prompt.template) == (template.stops, template.hash)


@pytest.mark.parametrize("name", NAMES)
def test_hint_is_a_line_of_the_last_question_only(name: str) -> None:
    template, (text, label) = prompts.read(name), INPUTS[name]
    plain, hinted = prompts.render(template, text), prompts.render(template, text, hint=label)
    assert hinted.messages[:-1] == plain.messages[:-1]
    lines = hinted.messages[-1].content.split("\n")
    (line,) = [line for line in lines if line.startswith("(The correct")]
    assert label in line
    lines.remove(line)
    assert "\n".join(lines) == plain.messages[-1].content
    assert lines[-1].endswith(":")  # the cue stays last
    assert not any(marker in line for marker in ("So the answer is", "The answer is", "Answer:"))


def test_inference_question_names_premise_and_hypothesis() -> None:
    asked = prompts.read("esnli").asked("A dog runs.</s>It moves.")
    assert asked == "Premise: A dog runs.\nHypothesis: It moves.\nReason:"


@pytest.mark.parametrize("text", ["A dog runs.", "A</s>B</s>C"])
def test_input_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"parts between '</s>'"):
        prompts.render(prompts.read("esnli"), text)


def test_braces_of_an_input_stay() -> None:
    template = template_of(SMALL)
    strange = "{label} {input} {0} {} {{x}} \\1 \\g<0>"
    prompt = prompts.render(template, strange, hint="{input} \\2")
    assert prompt.text.endswith(f"\n\nQ: {strange}\n(It is {{input}} \\2.)\nA:")
    assert prompt.text.count("{input}") == 2


def test_a_prompt_without_a_hint_asks_the_same_and_says_so_if_one_is_asked_for(tmp_path: Path) -> None:
    value = json.loads((prompts.FOLDER / "svamp.json").read_text("utf-8"))
    del value["hint"]
    (tmp_path / "mine.json").write_text(json.dumps(value))
    mine, whole = prompts.read(tmp_path / "mine.json"), prompts.read("svamp")
    assert prompts.render(mine, "1 + 2?").messages == prompts.render(whole, "1 + 2?").messages
    with pytest.raises(ValueError, match=r"no 'hint'; add one with \{label\}, or leave out --hint"):
        prompts.render(mine, "1 + 2?", hint="3")


def test_hint_comes_after_the_line_that_the_input_is_in() -> None:
    template = template_of(SMALL | {"question": 'Is "{input}" a sum?'})
    assert template.asked("1 + 2", hint="3") == 'Is "1 + 2" a sum?\n(It is 3.)'
    template = template_of(SMALL | {"question": "{1} of {0}, or not?\nSay.\nA:", "split": "|", "exemplars": []})
    assert template.asked("a|b", hint="3") == "b of a, or not?\n(It is 3.)\nSay.\nA:"


def test_answer_follows_a_question_that_ends_its_line_without_a_space() -> None:
    prompt = prompts.render(template_of(SMALL | {"question": "{input}\n"}), "1 and 1?")
    assert prompt.text.startswith("Add.\n\n1 and 2?\n1 + 2 = 3. The answer is 3.\n\n2 and 2?\n")


def test_instruction_and_exemplars_can_be_left_out() -> None:
    prompt = prompts.render(template_of(SMALL | {"instruction": "", "exemplars": []}), "1 and 1?")
    assert prompt.messages == (Message("user", "Q: 1 and 1?\nA:"),)
    assert prompt.text == "Q: 1 and 1?\nA:"


# --------------------------------------------------------------------------------------- hash


def test_hash_tells_the_content_not_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(SMALL), "utf-8")
    first = prompts.read(path).hash
    assert re.fullmatch(r"[0-9a-f]{12}", first)
    backwards = {name: SMALL[name] for name in reversed(SMALL)}
    backwards["exemplars"] = [dict(reversed(exemplar.items())) for exemplar in SMALL["exemplars"]]
    path.write_text("\n" + json.dumps(backwards, indent=7), "utf-8")
    assert prompts.read(str(path)).hash == first
    assert template_of(SMALL | {"split": None}).hash == first


def test_hash_changes_with_every_field() -> None:
    template = template_of(SMALL)
    first, second = template.exemplars
    changes = {
        "version": 2,
        "instruction": "Add!",
        "question": "Q:  {input}\nA:",
        "answer": "{rationale} Thus the answer is {label}.",
        "hint": "(It's {label}.)",
        "stops": ("\nQ:", "\n\n"),
        "exemplars": (second, first),
    }
    changed = [dataclasses.replace(template, **{name: value}) for name, value in changes.items()]
    changed.append(dataclasses.replace(template, split="|", question="{0} {1}", exemplars=()))
    changed.append(dataclasses.replace(template, split="/", question="{0} {1}", exemplars=()))
    for name in ("input", "rationale", "label"):
        other = dataclasses.replace(first, **{name: "x"})
        changed.append(dataclasses.replace(template, exemplars=(other, second)))
    assert {field.name for field in dataclasses.fields(Template)} == {*changes, "split"}
    assert len({template.hash, *(other.hash for other in changed)}) == 1 + len(changed)


# ------------------------------------------------------------------------------------ reading


def test_file_of_a_user_is_read_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(SMALL), "utf-8")
    monkeypatch.chdir(tmp_path)
    expected = template_of(SMALL)
    for name in (path, str(path), "mine.json", "./mine.json"):
        assert prompts.read(name) == expected


def test_packaged_prompt_is_read_by_its_name() -> None:
    assert prompts.read("svamp") == prompts.read(prompts.FOLDER / "svamp.json")
    assert Path(tasks.__file__).parent / "prompts" == prompts.FOLDER


def test_dataset_s_module_can_hold_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_added", {})
    template = template_of(SMALL)
    prompts.add("sums", template)
    prompts.add("sums", template_of(SMALL))  # a module that is imported again
    assert prompts.read("sums") is template
    assert "sums" in prompts.names()
    with pytest.raises(ValueError, match="Another prompt is already registered for 'sums'"):
        prompts.add("sums", dataclasses.replace(template, version=2))


def test_unknown_name_is_told_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"no prompt for 'snli'.*Did you mean 'esnli'.*tasks/prompts/snli\.json"):
        prompts.read("snli")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no prompt file .*none\.json"):
        prompts.read(tmp_path / "none.json")


WRONG = [
    ([], "an object"),
    ({"exemplar": []}, r"'exemplar'.*Did you mean 'exemplars'"),
    ({"version": 0}, "version is 0"),
    ({"version": True}, "'version' is true"),
    ({"question": "Q:"}, r"'question' is 'Q:'; expected \{input\}"),
    ({"question": "{input} {input}"}, "'question' is .* once each"),
    ({"question": "Q: {inptu}"}, r"'question' has \{inptu\}; expected \{input\}. Did you mean 'input'"),
    ({"split": ""}, "'split' is empty"),
    ({"split": "|"}, r"'question' is .*; with 'split', expected \{0\}, \{1\} and so on"),
    ({"split": "|", "question": "{0} {2}"}, r"with 'split', expected \{0\}, \{1\}"),
    ({"split": "|", "question": "{0} {1}"}, r"exemplars\[0\]: the input '1 and 2\?' has 1 parts"),
    ({"answer": "{label}"}, r"'answer' is .*; expected \{rationale\} and \{label\}"),
    ({"hint": "Think."}, r"'hint' is .*; expected \{label\}"),
    ({"stops": [""]}, "'stops' is .*; expected no empty text"),
    ({"stops": ["The"]}, r"exemplars\[0\]: the stop string 'The' is inside the answer"),
    ({"exemplars": [{"input": "x", "label": "y"}]}, r"exemplars\[0\]\.rationale"),
    ({"exemplars": [{"input": "x", "rationale": " ", "label": "y"}]}, r"exemplars\[0\].*'rationale' is blank"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_file_is_named_with_the_field(change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(SMALL | change if isinstance(change, dict) else change), "utf-8")
    with pytest.raises(ValueError, match=rf"mine\.json: .*{message}"):
        prompts.read(path)


def test_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"version": 1,', "utf-8")
    with pytest.raises(ValueError, match=r"mine\.json: not valid JSON"):
        prompts.read(path)
