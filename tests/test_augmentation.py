"""Records of further training rows, and other collections of word problems as rows of SVAMP."""

import gzip
import json
from pathlib import Path

import pytest
import toy

from sbs_jax.cli import main
from sbs_jax.data import augmentation, records, registry
from tasks import svamp_further

CSV = """Question,Numbers,Equation,Answer,Body,Ques
a,3.0 4.5,+ number0 number1,7.5,"Ann has number0 pens and gets number1 ,",how many has she ?
b,9 3 2,- number0 * number1 2.0,3,Bob has number0 . He loses number1 twice .,how many are left ?
c,9 3,- number0 number1,7,Wrong number0 and number1 .,how many ?
d,9,number0,9,None number0 .,how many ?
e,9 3,+ number0 number7,9,Missing number0 .,how many ?
"""

XML = """<M><ProblemSet>
<Problem><Body>Nine plums and 8 figs, twice.</Body><Question>How many?</Question><Formula>(9+8)*2=34</Formula></Problem>
<Problem><Body>A</Body><Question>B?</Question><Formula>17/10=1 r7</Formula></Problem>
<Problem><Body>A</Body><Question>B?</Question><Formula>3+4=8</Formula></Problem>
<Problem><Body>A</Body><Question>B?</Question><Formula>8=8</Formula></Problem>
<Problem><Body>A</Body><Question>B?</Question><Formula>2**9=512</Formula></Problem>
</ProblemSet></M>"""


def test_prefix_equations_become_labels_of_svamp(tmp_path: Path):
    file = tmp_path / "more.csv.gz"
    file.write_bytes(gzip.compress(CSV.encode()))
    first, second, *others = svamp_further.read(file)
    assert not isinstance(first, str)
    assert not isinstance(second, str)
    assert first.input == "Ann has 3 pens and gets 4.5\nHow many has she?"
    assert first.label == "( 3.0 + 4.5 )"
    assert second.label == "( 9.0 - ( 3.0 * 2.0 ) )"
    assert others == [svamp_further.OTHER_VALUE, svamp_further.NOT_ONE, svamp_further.NOT_ONE]
    file = tmp_path / "other.csv"
    file.write_text("question,answer\na,3\n")
    with pytest.raises(ValueError, match="row 1: the column 'Body' is missing"):
        list(svamp_further.read(file))


def test_formulas_become_labels_of_svamp(tmp_path: Path):
    file = tmp_path / "ASDiv.xml"
    file.write_text(XML)
    first, *others = svamp_further.read(file)
    assert not isinstance(first, str)
    assert (first.input, first.label) == ("Nine plums and 8 figs, twice.\nHow many?", "( ( 9.0 + 8.0 ) * 2.0 )")
    assert others == [svamp_further.NOT_ONE, svamp_further.OTHER_VALUE, svamp_further.NOT_ONE, svamp_further.NOT_ONE]
    file.write_text(XML[:-9])
    with pytest.raises(ValueError, match=r"ASDiv.xml has no whole <Problem .*expected ASDiv.xml as published"):
        list(svamp_further.read(file))


def test_rows_of_the_dataset_and_repeats_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    toy.write_records(tmp_path / "records")
    taken = records.read_records(tmp_path / "records" / "toy" / "test.jsonl")[0].input
    source, output = tmp_path / "given.jsonl", tmp_path / "further.jsonl"
    rows = [
        {"input": f"{taken.upper()} .", "label": "a"},
        {"input": "x y a", "label": "a", "subject": "letters"},
        {"input": "x, y, a", "label": "a"},
        {"input": "x y b", "rationale": "last is b."},
        {"input": "x y c"},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset", "toy", "--records_dir", str(tmp_path / "records")]
    assert main.main(["records", *flags, "--augmentation", str(source), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 written; ")
    assert "1 left out: also in toy; 1 left out: the input of an earlier row" in said
    assert "1 left out: neither label nor rationale" in said
    label, rationale = records.read_records(output)
    assert (label.label, label.rationale) == ("a", None)
    assert (rationale.label, rationale.rationale) == (None, "last is b.")
    assert main.main(["records", *flags, "--augmentation", str(source)]) == 1
    assert "--augmentation and --output go together" in capsys.readouterr().err
    source.write_text('{"input": "x y z", "label": "z"}\n')
    with pytest.raises(ValueError, match=r"given.jsonl:1: the label 'z' is outside the label set"):
        augmentation.write(registry.get("toy"), source, records_dir=tmp_path / "records", output=output)
    with pytest.raises(ValueError, match=r"given.csv is no .jsonl or .json file; toy reads no other form"):
        augmentation.write(registry.get("toy"), tmp_path / "given.csv", records_dir=tmp_path / "records", output=output)
