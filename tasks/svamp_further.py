"""Word problems of other collections as rows of SVAMP: MAWPS and ASDiv-A of SVAMP's repository, and ASDiv.

    number0 plums and number1 figs .. | 3.0 4.0 | + number0 number1     a line of the .csv, with prefix equations
    <Problem><Body>..</Body><Question>..</Question><Formula>9+8=17</Formula></Problem>                of the .xml

Both give the label "( 3.0 + 4.0 )" as SVAMP has it: decimals, and parentheses around each operation.
"""

from __future__ import annotations

import ast
import csv
import html
import io
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

from sbs_jax.data.dataset import Row
from sbs_jax.data.grading import MAX_CHARACTERS, equation_value
from sbs_jax.storage import json_files, user_files

NOT_ONE = "the formula is not one calculation with numbers"
OTHER_VALUE = "the equation has another value than the answer"
_LARGEST = 2**25  # bytes of a file, unpacked; each of the published ones has about 1 MB
_SLOT = re.compile(r"number([0-9]+)", re.ASCII)
_FORMULA = re.compile(r"([-+*/(). 0-9]+)=([-. 0-9]+)", re.ASCII)
# Read without a parser of XML, whose entities could unpack to any size.
_FIELD = re.compile(r"<(Body|Question|Formula)>([^<]*)</")
_OPERATORS: Mapping[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def read(path: Path) -> Iterator[Row | str]:
    """Yields the rows of a file, .csv or .xml, in its order, or the reason why a problem is none."""
    suffix = Path(path.name.removesuffix(".gz")).suffix
    readers = {".csv": _mawps, ".xml": _asdiv}
    if suffix not in readers:
        raise ValueError(f"{path} is neither .csv (SVAMP's repository) nor .xml (ASDiv) nor .jsonl; convert it to one.")
    yield from readers[suffix](path, json_files.decoded(user_files.whole(path, most=_LARGEST), str(path)))


def _mawps(path: Path, text: str) -> Iterator[Row | str]:
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), start=1):
        missing = [
            name for name in ("Body", "Ques", "Numbers", "Equation", "Answer") if not isinstance(row.get(name), str)
        ]
        if missing:
            raise ValueError(f"{path}, row {number}: the column {missing[0]!r} is missing; expected SVAMP's columns.")
        numbers = row["Numbers"].split()
        try:
            body, question = (
                _SLOT.sub(lambda match, numbers=numbers: f"{float(numbers[int(match[1])]):g}", _joined(row[name]))
                for name in ("Body", "Ques")
            )
            label = _infix_of_prefix(row["Equation"].split(), numbers)
            answer = Fraction(row["Answer"])
        except (ValueError, IndexError):
            label = None
        yield NOT_ONE if label is None else _row(body, question, label, answer)


def _joined(text: str) -> str:
    """Takes back the quotes and the spaces before punctuation of tokenized text."""
    return re.sub(r" (?=[,.?!;:'%])", "", " ".join(text.replace("``", '"').replace("''", '"').split()))


def _infix_of_prefix(tokens: list[str], numbers: list[str]) -> str | None:
    """Turns ["+", "number0", "7.0"] into "( 3.0 + 7.0 )"; None for anything else than one calculation."""
    stack: list[str] = []
    for token in reversed(tokens):
        if token in _OPERATORS.values():
            if len(stack) < 2:
                return None
            stack.append(f"( {stack.pop()} {token} {stack.pop()} )")
        else:
            slot = _SLOT.fullmatch(token)
            stack.append(_decimal(numbers[int(slot[1])] if slot else token))
    return stack[0] if len(stack) == 1 and stack[0].startswith("(") else None


def _asdiv(path: Path, text: str) -> Iterator[Row | str]:
    _, *problems = re.split(r"<Problem\b", text)
    if not problems or not text.rstrip().endswith(">") or text.count("</Problem>") != len(problems):
        raise ValueError(f"{path} has no whole <Problem ..>..</Problem>; expected ASDiv.xml as published.")
    for problem in problems:
        fields = {name: html.unescape(value).strip() for name, value in _FIELD.findall(problem)}
        body, question, formula = (fields.get(name, "") for name in ("Body", "Question", "Formula"))
        parts = _FORMULA.fullmatch(formula)
        label = _infix(parts[1].strip()) if parts and len(formula) <= MAX_CHARACTERS else None
        try:
            answer = Fraction(parts[2].strip()) if parts else Fraction(0)
        except ValueError:
            label = None
        yield NOT_ONE if label is None else _row(body, question, label, answer)


def _infix(text: str) -> str | None:
    """Writes an expression as SVAMP's labels: "9+8*2" is "( 9.0 + ( 8.0 * 2.0 ) )"; None if it has no operation."""

    def written(node: ast.AST) -> str:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return f"( {written(node.left)} {_OPERATORS[type(node.op)]} {written(node.right)} )"
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return _decimal(node.value)
        raise SyntaxError

    try:
        found = written(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        return None
    return found if found.startswith("(") else None


def _decimal(number: str | float) -> str:
    return str(float(number))


def _row(body: str, question: str, label: str, answer: Fraction) -> Row | str:
    value = equation_value(label)
    if value is None or abs(value - answer) > Fraction(1, 100) * max(1, abs(answer)):  # answers are rounded
        return OTHER_VALUE
    return Row(input=f"{body.removesuffix(',')}\n{question[:1].upper()}{question[1:]}", label=label)
