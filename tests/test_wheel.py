"""README's "Your own data" in an environment that holds the wheel alone, in an empty folder (`make test-wheel`).

The commands are README's own lines, then what they print as the next one; names, the teacher's address and the number
of updates differ.
"""

import contextlib
import csv
import json
import os
import random
import re
import shlex
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import teacher_server
from conftest import REPOSITORY

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1800)]

SMALL = ["--gin.TRAIN_STEPS=20", "--gin.WARMUP_STEPS=2", "--gin.EVAL_PERIOD=20", "--gin.EXAMPLES=8"]
HAZARDS = {
    "storm": ("gusts of 31 m/s", "The wind is above 25 m/s."),
    "flood": ("90 mm of rain in six hours", "So much rain fills the rivers."),
    "frost": ("minus 4 degrees at dawn", "It is below zero."),
    "none": ("a light breeze and 18 degrees", "Nothing is unusual."),
}
MOTIFS = ("a harbour", "two horses", "an old mill", "a woman at a window", "a table with pears", "a frozen lake")
YEARS = range(1650, 1900)


def weather() -> list[dict[str, str]]:
    """Observations and the hazard to warn of: a closed set of labels."""
    choose = random.Random(0)
    places = [f"{name} {number}" for name in ("Station", "Buoy", "Airfield") for number in range(20)]
    hazards = [name for name in HAZARDS for _ in range(15)]
    pairs = zip(places, choose.sample(hazards, len(hazards)), strict=True)
    return [{"observation": f"{place} has {HAZARDS[name][0]}.", "hazard": name} for place, name in pairs]


def museum() -> list[dict[str, str]]:
    """Entries of a catalogue and the title of the card: free text."""
    choose = random.Random(0)
    found = []
    for year in choose.sample(YEARS, 60):
        motif = choose.choice(MOTIFS)
        found.append({"entry": f"Oil on canvas, {motif}, dated {year}.", "card": f"{motif}, {year}"})
    return found


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_parquet(path: Path, rows: Sequence[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


WRITERS = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}


def reply(prompt: list[dict[str, str]]) -> str:
    """Answers as a teacher that knows both datasets."""
    asked = prompt[-1]["content"]
    for name, (words, reason) in HAZARDS.items():
        if words in asked:
            return f"{reason} So the answer is {name}."
    motif, year = next(each for each in MOTIFS if each in asked), re.findall(r"dated (\d+)", asked)[-1]
    return f"It shows {motif} and says {year}. So the answer is {motif}, {year}."


def commands() -> list[list[str]]:
    """Returns the `sbs` commands of README's "Your own data"."""
    section = (REPOSITORY / "README.md").read_text("utf-8").partition("\n## Your own data\n")[2]
    block = section.partition("```\n")[2].partition("```")[0]
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("sbs ")]


class User:
    """Somebody with an empty folder and the environment of the wheel; prints how long each command takes."""

    def __init__(self, bin_folder: Path, folder: Path) -> None:
        self.bin, self.folder = bin_folder, folder
        self.complained = ""  # standard error of the last command
        self.environment = {
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "OPENAI_API_KEY": "sk-of-the-test",
        }

    def run(self, words: Sequence[str]) -> str:
        began = time.monotonic()
        command = [str(self.bin / words[0]), *words[1:]]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900, check=False
        )
        print(f"{time.monotonic() - began:6.1f} s  {shlex.join(words)[:100]}")
        self.complained = done.stderr
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def serving(self, words: Sequence[str]) -> Iterator[str]:
        """Starts the server and gives its address, once it answers."""
        began = time.monotonic()
        command = [str(self.bin / words[0]), *words[1:], "--port", "0"]
        log = self.folder / "serve.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=output, stderr=output)
        try:
            while (ready := re.search(r"ready: (http://\S+)", log.read_text("utf-8"))) is None:
                assert process.poll() is None, log.read_text("utf-8")
                assert time.monotonic() - began < 600, log.read_text("utf-8")
                time.sleep(0.2)
            print(f"{time.monotonic() - began:6.1f} s  {shlex.join(words)}, until it answers")
            yield ready[1]
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.fixture
def user(tmp_path: Path) -> User:
    place = os.environ.get("SBS_WHEEL")
    if place is None:
        pytest.skip("SBS_WHEEL names no environment with the wheel; run `make test-wheel`")
    user = User(Path(place).absolute() / "bin", tmp_path)
    where = "import pathlib, sbs_jax; print(pathlib.Path(sbs_jax.__file__).parents[1].name)"
    assert user.run(["python", "-c", where]).strip() == "site-packages"
    return user


@pytest.mark.parametrize(("make", "form"), [(weather, "csv"), (museum, "jsonl"), (weather, "parquet")])
def test_a_table_becomes_a_served_student(make, form, user):
    rows, name = make(), make.__name__
    file, (question, answer) = f"{name}.{form}", rows[0]
    WRITERS[form](user.folder / file, rows)
    renamed = {"tickets.csv": file, "text": question, "team": answer}
    lines = [[renamed.get(word, word.replace("tickets", name)) for word in line] for line in commands()]
    assert [line[1] for line in lines] == ["init", "teach", "train", "report", "serve"]
    init, teach, train, report, serve = lines
    said = user.run(init)
    assert ("answers: one of 4 labels" if make is weather else "answers: free text") in said
    with teacher_server.served(answer=reply) as server:
        user.run([*teach, "--base_url", server.openai])
        assert server.asked == len(rows)
    following = shlex.split(user.complained.rpartition("next: ")[2])
    assert set(train) <= set(following)  # and the lengths of what the teacher wrote
    result = json.loads(user.run([*following, *SMALL]))
    assert {"train", "validation", "test"} <= result.keys()
    user.run(report)
    assert name in (user.folder / "report.html").read_text("utf-8")
    metrics = json.loads(user.run(["sbs", "evaluate", f"runs/{name}", "--split", "validation"]))
    assert metrics["rows"] == 6 if make is museum else metrics["rows"] == 8
    write_jsonl(user.folder / "in.jsonl", [{"id": "1", "input": rows[0][question]}])
    user.run(["sbs", "predict", f"runs/{name}", "--input", "in.jsonl", "--output", "out.csv", "--rationale"])
    with (user.folder / "out.csv").open(encoding="utf-8") as table:
        (row,) = csv.DictReader(table)
    with user.serving(serve) as address:
        body = json.dumps({"inputs": [{"input": rows[0][question]}]}).encode()
        asked = urllib.request.Request(f"{address}/predict", body, {"Content-Type": "application/json"})
        (served,) = json.load(urllib.request.urlopen(asked, timeout=60))["answers"]
    assert served["prediction"] == row["prediction"]


def test_rationales_of_the_table_need_no_teacher(user):
    """And a sweep of the folder compares the methods."""
    rows = [{**row, "explanation": HAZARDS[row["hazard"]][1]} for row in weather()]
    write_csv(user.folder / "weather.csv", rows)
    said = user.run(["sbs", "init", "weather.csv", "--input", "observation", "--label", "hazard"])
    assert "so no teacher is needed" in said
    user.run(["sbs", "rationales", "--dataset", "weather"])
    bindings = {flag.removeprefix("--gin.").partition("=")[0]: int(flag.partition("=")[2]) for flag in SMALL}
    sweep = ["sbs", "sweep", "--gin_file=gin_configs/experiments/own/methods.gin", "--dataset", "weather"]
    user.run([*sweep, "--gin.SWEEP_DIR=runs/methods", "--gin.SEEDS=(0,)", f"--gin.BINDINGS={bindings}"])
    assert (user.folder / "runs" / "methods" / "index.html").is_file()
