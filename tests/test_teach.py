"""`sbs teach` as a whole: real SDK, real server over loopback, real files and processes."""

import collections
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import threading
import time
import types
from pathlib import Path

import processes
import pytest
import teacher_server

from sbs_jax.cli import main
from sbs_jax.data import catalogue, records, registry, release
from sbs_jax.teacher import command, jobs, pacing, prompts, sampler
from sbs_jax.teacher.clients import Parameters
from sbs_jax.teacher.store import Store
from tasks import builtin

pytest.importorskip("openai", reason="the extra `teacher` is not installed")
KEY = "sk-secret-of-the-test"
ROWS = {"train": 40, "test": 20}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """The built-in dataset in the release's layout."""
    folder = tmp_path_factory.mktemp("inputs")
    builtin.write_release(folder, rows=ROWS, seed=1)
    return folder


@pytest.fixture(scope="module")
def answer(inputs):
    """The scripted teacher's own replies, by the question that the prompt ends with."""
    replies = {}
    for split in ROWS:
        rows = release.read_unanswered(builtin.DATASET, inputs_dir=inputs, inputs="release")[split].rows
        texts = [text for shard in release.read_replies(inputs, "builtin", split).values() for text in shard]
        replies |= {row.input: text for row, text in zip(rows, texts, strict=True)}
    template = prompts.read("builtin")
    by_question = {template.asked(text): reply for text, reply in replies.items()}
    return lambda prompt: by_question[prompt[-1]["content"]]


def flags(server, inputs, tmp_path, *more) -> list[str]:
    words = f"teach --dataset builtin --inputs_dir {inputs} --provider openai --model some-model"
    words += f" --base_url {server.openai} --store {tmp_path}/store.sqlite --records_dir {tmp_path}/records"
    return [*words.split(), *more]


def settings(**changes) -> sampler.Settings:
    plain = {"model": "m", "form": "chat", "parameters": Parameters(temperature=0.0, max_tokens=200), "unusable": 1.0}
    return sampler.Settings(**{**plain, **changes})


def options(dataset, server, inputs_dir, tmp_path, **changes) -> command.Options:
    plain = {
        "dataset": dataset,
        "inputs_dir": str(inputs_dir),
        "provider": "openai",
        "base_url": server.openai,
        "store": str(tmp_path / "store.sqlite"),
        "records_dir": str(tmp_path / "records"),
        "settings": settings(),
    }
    plain |= {} if "template" in changes else {"template": prompts.read(dataset)}
    return command.Options(**{**plain, **changes})


@pytest.fixture
def sbs(starter, tmp_path_factory):
    """Runs the command in a process of its own, whose output is outside of the test's folder."""

    def run(arguments, *, key: str | None = KEY):
        return starter.run(tmp_path_factory.mktemp("said"), arguments, environment={"OPENAI_API_KEY": key})

    return run


def test_from_questions_to_records_that_are_those_of_the_import(sbs, inputs, answer, tmp_path):
    with teacher_server.served(answer=answer, key=KEY) as server:
        page = tmp_path / "page.html"
        done = sbs(flags(server, inputs, tmp_path, "--page", str(page)))
        assert done.returncode == 0, done.stderr
        assert server.asked == sum(ROWS.values())
        manifest = json.loads(done.stdout[done.stdout.index("{\n") :])
        # Again: nothing is asked, and every byte is the same.
        before = {file: file.read_bytes() for file in (tmp_path / "records").rglob("*") if file.is_file()}
        again = sbs(flags(server, inputs, tmp_path))
        assert again.returncode == 0, again.stderr
        assert server.asked == sum(ROWS.values())
        assert {file: file.read_bytes() for file in before} == before
    imported = release.import_release(
        builtin.DATASET, release_dir=inputs, records_dir=tmp_path / "imported", parser="strict"
    )
    template = prompts.read("builtin")
    for split in ROWS:
        asked = records.read_records(tmp_path / "records" / "builtin" / f"{split}.jsonl")
        known = {row.id: row for row in records.read_records(tmp_path / "imported" / "builtin" / f"{split}.jsonl")}
        for row in asked:
            assert (row.rationale, row.teacher_label) == (known[row.id].rationale, known[row.id].teacher_label)
            assert row.prompt == template.hash
        assert manifest["splits"][split]["teacher_accuracy"] == imported["splits"][split]["teacher_accuracy"]
    usable, right, following = done.stderr.rstrip("\n").splitlines()[-3:]
    counts = manifest["splits"].values()
    assert usable.startswith(
        f"usable: {sum(split['teacher_labels'] for split in counts)} of {sum(ROWS.values())} rows ("
    )
    assert right.startswith(f"right: {sum(split['teacher_right'] for split in counts)} of {sum(ROWS.values())} rows (")
    assert following.startswith("next: sbs train --gin_file=gin_configs/experiments/builtin/demo.gin --gin_file=")
    assert f"--gin.RECORDS_DIR={tmp_path}/records" in following
    assert following.removeprefix("next: ") in page.read_text("utf-8")
    assert manifest["teacher"]["model"] == "some-model"
    assert manifest["teacher"]["prompt"] == template.hash
    assert "<html" in page.read_text("utf-8")
    # The key is in no file.
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()
    assert KEY not in done.stdout + done.stderr


def test_a_dry_run_shows_prompt_tokens_price_and_time_and_asks_nothing(sbs, inputs, tmp_path):
    with teacher_server.served() as server:
        done = sbs(flags(server, inputs, tmp_path, "--dry_run", "--price", "1,2"), key=None)
        assert done.returncode == 0, done.stderr
        assert server.asked == 0
    assert "[user]" in done.stdout
    for told in ("requests: 60 at most", "tokens (estimated)", "cost (estimated): $", "time (estimated)"):
        assert told in done.stdout
    assert not (tmp_path / "store.sqlite").exists()


def test_a_hint_that_the_prompt_lacks_is_refused_before_anything_is_asked(inputs, tmp_path):
    server = types.SimpleNamespace(openai="http://127.0.0.1:9/v1")  # there is none
    template = dataclasses.replace(prompts.read("builtin"), hint=None)
    asked_so = options("builtin", server, inputs, tmp_path, settings=settings(hint=True), template=template)
    with pytest.raises(ValueError, match="no field 'hint', which --hint needs"):
        command.teach(asked_so)
    assert not (tmp_path / "store.sqlite").exists()


def test_no_input_and_no_file_of_others_is_written_over(inputs, tmp_path):
    """Refused before anything is asked: there is no server."""
    server = types.SimpleNamespace(openai="http://127.0.0.1:9/v1")
    mine, store = tmp_path / "mine.html", tmp_path / "store.html"
    mine.write_text("<html>mine</html>")
    shutil.copytree(inputs, tmp_path / "inputs")
    (tmp_path / "linked").symlink_to(tmp_path / "inputs")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for changes, message in (
        ({"page": str(mine)}, r"mine\.html exists and is no page of ours"),
        ({"page": str(tmp_path / "inputs" / "builtin" / "builtin_train.json")}, "is no page of ours"),
        ({"store": str(store), "page": str(store)}, "would be written over the store"),
        ({"page": str(tmp_path / "." / "store.sqlite-wal")}, "would be written over the store"),
        ({"store": "/dev/zero"}, "/dev/zero is a device"),
        ({"records_dir": str(tmp_path / "linked"), "overwrite": True}, "is the folder of the inputs"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=message):
            command.teach(options("builtin", server, tmp_path / "inputs", tmp_path, **changes))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("models", "key", "message"),
    [(None, "sk-wrong-one", "refuses the credentials"), (["another-model"], KEY, "some-model")],
)
def test_a_wrong_key_or_model_ends_it_at_once(sbs, inputs, tmp_path, models, key, message):
    with teacher_server.served(key=KEY, models=models) as server:
        done = sbs(flags(server, inputs, tmp_path, "--concurrency", "4"), key=key)
        assert done.returncode == 1
        assert server.asked <= 4
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert key not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--provider", "opnai"], "openai"),
        (["--dataset", "buildin"], "builtin"),
        (["--split", "dev"], "has no split 'dev'"),
        (["--model", "no-such", "--max_cost", "1"], "--price IN,OUT"),
        (["--base_url", ""], "OPENAI_API_KEY"),  # a server of one's own may need no key; OpenAI does
    ],
)
def test_wrong_words_get_a_hint(sbs, inputs, tmp_path, more, message):
    with teacher_server.served() as server:
        done = sbs(flags(server, inputs, tmp_path, *more), key=None if "--base_url" in more else KEY)
        assert (done.returncode, server.asked) == (1, 0)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interruption_ends_it_softly_and_the_next_run_goes_on(starter, sbs, inputs, answer, tmp_path):
    with teacher_server.served(answer=answer, latency=0.2) as server:
        arguments = flags(server, inputs, tmp_path, "--concurrency", "4")
        with starter.alone(tmp_path, arguments, environment={"OPENAI_API_KEY": KEY}) as process:
            processes.until(lambda: server.asked >= 12, [process])
            process.send(signal.SIGINT)
            assert process.wait(60) == 3
            assert "interrupted" in process.complained()
        asked = server.asked
        assert asked < 40
        with Store(tmp_path / "store.sqlite") as store:
            assert store.counts()["replies"] == asked
        assert not (tmp_path / "records").exists()
        done = sbs(flags(server, inputs, tmp_path))
        assert done.returncode == 0, done.stderr
        assert server.asked == sum(ROWS.values())


def test_unreadable_replies_end_in_status_3_with_the_summary(inputs, tmp_path, monkeypatch, capsys):
    """Before the last row after 50 replies; with fewer rows, when the records are written."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with teacher_server.served(answer=lambda prompt: "So the answer is perhaps.") as server:
        arguments = flags(server, inputs, tmp_path, "--concurrency", "8")
        assert main.main(arguments) == 3
        ended = capsys.readouterr()
        assert "No label can be read from 50 of 50 replies (limit 30%, --unusable)" in ended.err
        assert not (tmp_path / "records").exists()
        assert main.main([*arguments, "--limit", "4"]) == 3
        written = capsys.readouterr()
        assert "builtin test: 4 of 4 asked rows (100.0 %) have no usable label" in written.err
        assert records.read_manifest(tmp_path / "records" / "builtin")["splits"]["test"]["teacher_accuracy"] is None
        for told in (ended, written):
            assert "label_not_in_set, 3 of" in told.err
            assert "The parser 'official' reads" in told.err
        assert main.main([*arguments, "--limit", "4", "--unusable", "1"]) == 0
        assert "label_not_in_set, 3 of 4:" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(2))
def test_a_server_that_misbehaves_in_every_way(inputs, answer, tmp_path, monkeypatch, seed):
    """Each row has one accepted reply or a recorded reason, and nothing that was answered is asked again."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(pacing, "FIRST_DELAY", 0.01)
    chance = random.Random(seed)
    fault = teacher_server.Fault
    kinds = [
        *(429, fault(429, retry_after="0.05"), 500, 502, 503, "reset", "close", "malformed", "html", "nothing"),
        *("empty", "null", "filter", "length", "too_long", "hang"),
    ]
    faults = [chance.choice(kinds) if chance.random() < 0.5 else None for _ in range(600)]
    with teacher_server.served(answer=answer, faults=faults) as server:
        parameters = Parameters(temperature=0.0, max_tokens=100)
        asked_so = settings(parameters=parameters, concurrency=16, retries=30)
        chosen = options("builtin", server, inputs, tmp_path, settings=asked_so, timeout=0.5)
        made = command.teach(chosen)
        assert made is not None
        outcomes = collections.Counter()
        for split in made["splits"].values():
            outcomes.update(split["outcomes"])
        assert sum(outcomes.values()) == 60
        assert "not_asked" not in outcomes
        assert outcomes["ok"] > 20
        with Store(tmp_path / "store.sqlite") as store:
            # Replies withheld by the content filter have a text too, which the server counts.
            assert server.replied == store.counts()["replies"] + outcomes["content_filter"]
        # A second run has nothing left to do.
        asked = server.asked
        assert command.teach(chosen) == made
        assert server.asked == asked


def test_requests_that_are_given_up_are_told_with_their_reason_and_the_run_is_not_done(
    inputs, answer, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level("INFO", logger="sbs_jax")
    faults = [*["empty"] * 3, 502, *[None] * 56]
    with teacher_server.served(answer=answer, faults=faults) as server:
        chosen = options("builtin", server, inputs, tmp_path, settings=settings(retries=0))
        assert command.teach(chosen) is None
        assert "4 requests were given up, 3 of them because: The reply has no choices" in caplog.text
        assert not (tmp_path / "records").exists()
        assert command.teach(chosen) is not None
        assert server.asked == 64
    # Nobody listens there any more.
    gone = options("builtin", server, inputs, tmp_path / "2", settings=settings(retries=0))
    assert command.teach(gone) is None
    assert "because: The connection failed: ConnectError" in caplog.text
    assert "10 requests one after the other were given up" in caplog.text


def test_sigterm_ends_a_wait_that_the_provider_asks_for(inputs, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(sampler, "QUIET", 0.1)
    fault = teacher_server.Fault(429, retry_after="1000000000", message="The day's requests are used.")
    with teacher_server.served(faults=lambda number, body: fault) as server:

        def terminate():
            end = time.monotonic() + 60
            while "0 requests at the teacher, 60 waiting" not in caplog.text and time.monotonic() < end:
                time.sleep(0.01)
            signalled.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

        signalled: list[float] = []
        thread = threading.Thread(target=terminate)
        thread.start()
        assert command.teach(options("builtin", server, inputs, tmp_path)) is None
        assert time.monotonic() - signalled[0] < 10
        thread.join()
    assert "0 requests at the teacher, 60 waiting" in caplog.text
    assert "The day's requests are used.). Asking again in 600 s." in caplog.text
    assert "interrupted" in caplog.text


DRIVER = """
import asyncio, json, sys
from sbs_jax.teacher import clients, providers, sampler
from sbs_jax.teacher.prompts import Message, Prompt
from sbs_jax.teacher.store import Store

class Row:
    def __init__(self, number): self.id, self.label = f"row {number}", None
    def prompt(self, *, hint): return Prompt(messages=(Message("user", self.id),), text=self.id, stops=(), template="t")
    def read(self, text): return text, text
    def agrees(self, label): return True

settings = sampler.Settings(
    model="m", form="chat", parameters=clients.Parameters(temperature=0.0, max_tokens=50), concurrency=8
)

async def run(url, path, count):
    client = providers.make("openai", base_url=url, timeout=10, connections=8)
    with Store(path) as store:
        made = sampler.Sampler(settings=settings, client=client, store=store, price=None)
        await made.run(map(Row, range(count)))
    await client.close()

if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.mark.slow
def test_kill_9_at_20_random_points_pays_for_nothing_twice_but_what_was_in_flight(starter, tmp_path):
    chance = random.Random(7)
    count, kills = 1500, 0  # more than 20 starts of 0.125 s can ask for, 8 at a time
    with teacher_server.served(latency=0.02) as server:
        arguments = [server.openai, str(tmp_path / "s.sqlite"), str(count)]
        options = {"command": ["-c", DRIVER], "environment": {"OPENAI_API_KEY": KEY}}
        while kills < 20:
            begin = server.asked
            with starter.alone(tmp_path, arguments, **options) as process:
                while server.asked == begin and process.running():
                    time.sleep(0.005)
                time.sleep(chance.uniform(0, 0.25))
                process.send(signal.SIGKILL)
                kills += 1
                process.wait(60)
        done = starter.run(tmp_path, arguments, **options)
        assert done.returncode == 0, done.stderr
        with Store(tmp_path / "s.sqlite") as store:
            assert store.counts()["replies"] == count
        assert count < server.replied <= count + kills * 8
        asked = collections.Counter(body["messages"][-1]["content"] for body in server.bodies)
        assert len(asked) == count


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_was_stored(starter, tmp_path):
    """The operating system's own limit on the size of a file, in a process of its own."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    count, key = 300, {"OPENAI_API_KEY": KEY}
    with teacher_server.served(keep=False) as server:
        arguments = [server.openai, str(tmp_path / "s.sqlite"), str(count)]
        full = starter.run(tmp_path, arguments, command=["-c", limit + DRIVER], environment=key)
        assert full.returncode == 1
        assert "could not be stored" in full.stderr
        paid = server.replied
        assert paid < count
        with Store(tmp_path / "s.sqlite") as store:
            assert paid - 16 <= store.counts()["replies"] < paid
        done = starter.run(tmp_path, arguments, command=["-c", DRIVER], environment=key)
        assert done.returncode == 0, done.stderr
        assert server.replied <= count + 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "official", "strict"),
    [
        ("svamp", 74.0, 77.5),
        # Thousands of requests; test_release.py has these figures.
        pytest.param("cqa", 77.23, 78.79, marks=pytest.mark.faults),
        pytest.param("anli1", 65.6, None, marks=pytest.mark.faults),
        pytest.param("esnli", 73.0, None, marks=pytest.mark.faults),
    ],
)
def test_the_real_teacher_s_replies_give_its_accuracy(dataset, official, strict, real_data_dir, tmp_path, monkeypatch):
    """The raw texts of the 540B PaLM, played back as a model without stop strings would have written them."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    known = registry.get(dataset)
    rows = release.read_unanswered(known, inputs_dir=real_data_dir, inputs="release")["test"].rows
    texts = [text for shard in release.read_replies(real_data_dir, dataset, "test").values() for text in shard]
    template = prompts.Template(
        version=1,
        instruction="",
        question="{input}\nA:",
        answer="{rationale} {label}",
        hint="{label}",
        stops=(),
        exemplars=(),
    )
    replies = {f"{row.input}\nA:": text for row, text in zip(rows, texts, strict=True)}
    assert len(replies) == len(rows)
    parameters = Parameters(temperature=0.0, max_tokens=4096)
    asked_so = settings(model="540b", form="completion", parameters=parameters, concurrency=32)
    changes = {"template": template, "settings": asked_so, "splits": ("test",), "overwrite": True}
    expected = {"official": official} | ({} if strict is None else {"strict": strict})
    with teacher_server.served(answer=lambda prompt: replies[prompt], keep=False) as server:
        for parser, accuracy in expected.items():
            made = command.teach(options(dataset, server, real_data_dir, tmp_path, parser=parser, **changes))
            assert made is not None
            assert made["splits"]["test"]["teacher_accuracy"] == pytest.approx(accuracy, abs=0.006)
            assert server.asked == len(rows)


def test_a_dataset_of_one_s_own_needs_one_module(tmp_path, monkeypatch):
    """Registers a dataset and its prompt as a file in `tasks/` would. Rows are JSON lines."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(catalogue, "_DATASETS", dict(catalogue._DATASETS))
    monkeypatch.setattr(prompts, "_added", {})
    mine = dataclasses.replace(builtin.DATASET, name="small_numbers", read_release=None)
    registry.add(mine)
    template = prompts.Template(
        version=1,
        instruction="Say whether a number is small.",
        question="Q: {input}\nA:",
        answer="{rationale} So the answer is {label}.",
        hint="(It is {label}.)",
        stops=("\nQ:",),
        exemplars=(prompts.Exemplar(input="Is 2 small?", rationale="2 is below 5.", label="yes"),),
    )
    prompts.add("small_numbers", template)
    folder = tmp_path / "mine" / "small_numbers"
    folder.mkdir(parents=True)
    lines = [{"id": f"q{n}", "input": f"Is {n} small?", "label": "yes" if n < 5 else "no"} for n in range(10)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with teacher_server.served(answer=lambda prompt: "It is. So the answer is yes.") as server:
        asked_so = settings(model="540b", form="completion")
        made = command.teach(
            options("small_numbers", server, tmp_path / "mine", tmp_path, inputs="records", settings=asked_so)
        )
    assert made is not None
    assert made["splits"]["train"]["teacher_accuracy"] == 50.0
    written = records.read_records(tmp_path / "records" / "small_numbers" / "train.jsonl")
    assert [row.rationale for row in written] == ["It is."] * 10


@pytest.fixture
def batches(inputs, tmp_path, monkeypatch):
    """Returns the options of batch mode for a server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(jobs, "POLL", 0.05)
    return lambda server, **more: options("builtin", server, inputs, tmp_path, batch=True, batch_size=25, **more)


def teach_until(chosen, *, submissions: int) -> list[int]:
    """Ends the run after so many jobs; returns their sizes."""
    submit, sizes = jobs._submit, []

    async def submit_and_die(requests, this):
        await submit(requests, this)
        sizes.append(len(requests))
        if len(sizes) == submissions:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "_submit", submit_and_die)
        with pytest.raises(KeyboardInterrupt):
            command.teach(chosen)
    return sizes


def test_batch_jobs_answer_everything_and_a_killed_run_finds_them_again(answer, batches):
    with teacher_server.served(answer=answer, batch_polls=2) as server:
        assert teach_until(batches(server), submissions=2) == [25, 25]
        made = command.teach(batches(server))
        assert made is not None
        assert sum(split["rows"] for split in made["splits"].values()) == 60
        assert "not_asked" not in str(made)
        # 60 lines in all: what the killed run had submitted was collected, not submitted again.
        assert server.lines == 60
        assert server.asked == 0


def test_a_job_in_upper_case_is_done_and_one_in_an_unknown_state_ends_the_run(
    answer, batches, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="sbs_jax")
    monkeypatch.setattr(jobs, "_PATIENCE", 0.2)
    with teacher_server.served(answer=answer, batch_polls=0, batch_case=str.upper) as server:
        assert command.teach(batches(server)) is not None
        assert server.lines == 60
    unknown = pytest.raises(ValueError, match=r"'resting', which is no state known here.*--cancel_batches")
    with teacher_server.served(answer=answer, batch_case=lambda word: "resting") as server, unknown:
        command.teach(batches(server, store=str(tmp_path / "2.sqlite")))
    assert re.search(r"Waiting for the job batch_\d+: resting, 0 of 25 requests done; looking every", caplog.text)


@pytest.mark.parametrize("refusal", [400, 422, 403])
def test_a_job_of_refusals_is_at_fault_and_single_refusals_are_the_rows(answer, batches, tmp_path, refusal):
    with teacher_server.served(answer=answer, batch_polls=0, line_faults=lambda number, body: refusal) as server:
        with pytest.raises(ValueError, match=f"{refusal}: made up.*has 25 refusals and no reply"):
            command.teach(batches(server))
        assert server.lines <= 75
        with Store(tmp_path / "store.sqlite") as store:
            assert store.counts()["failures"] == 0
        server.line_faults = lambda number, body: refusal if number % 25 < 3 else None
        while not isinstance(made := taught(batches(server)), dict):
            assert "refusals and no reply" in str(made)  # the other jobs of the first run
        assert made["splits"]["train"]["outcomes"]["refused"] == 6
        assert made["splits"]["test"]["outcomes"]["refused"] == 3


def taught(chosen):
    try:
        return command.teach(chosen)
    except ValueError as error:
        return error


def test_the_limit_of_cost_counts_all_rounds_of_jobs(answer, batches, caplog):
    """Replies that are cut short are asked again in further rounds; thinking costs more than was estimated."""
    caplog.set_level("INFO", logger="sbs_jax")
    limited = settings(max_cost=0.2)
    with teacher_server.served(
        answer=answer, batch_polls=0, thinking=200, line_faults=lambda number, body: "length"
    ) as server:
        assert command.teach(batches(server, settings=limited, price="2.5,10")) is None
        cost = (2.5 * server.billed[0] + 10 * server.billed[1]) / 1e6 / 2
        assert cost <= 0.2
        assert f"${cost:.4f}" in caplog.text
        assert server.lines == 60
        assert "after $0." in caplog.text


def test_batch_jobs_are_cancelled_and_what_they_answered_is_kept(answer, batches, tmp_path):
    with teacher_server.served(answer=answer, batch_polls=10**6) as server:
        teach_until(batches(server), submissions=1)
        assert command.teach(batches(server, cancel_batches=True)) is None
        assert [batch["status"] for batch in server.batches.values()] == ["cancelled"]
        with Store(tmp_path / "store.sqlite") as store:
            assert len(list(store.jobs("cancelled"))) == 1
            assert not list(store.jobs("new", "running"))
            assert store.counts()["replies"] == 13


def test_a_job_that_fails_as_a_whole_says_why_and_is_not_submitted_again(batches):
    with teacher_server.served(batch_polls=10**6) as server:

        def refuse():
            while len(server.batches) < 3:
                time.sleep(0.01)
            error = {"code": "model_not_found", "message": "There is no model 540b.", "line": 1}
            for batch in server.batches.values():
                batch.update(status="failed", errors={"object": "list", "data": [error]})

        refusing = threading.Thread(target=refuse)
        refusing.start()
        with pytest.raises(ValueError, match="There is no model 540b"):
            command.teach(batches(server))
        refusing.join()
        assert len(server.batches) == 3
