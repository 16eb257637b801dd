"""Weights and vocabularies by their name on the Hugging Face Hub, against a hub over loopback."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import parity_cases as cases
import pytest
import toy
from builders import hub as hubs

from sbs_jax.data import registry, vocabularies
from sbs_jax.run import directory
from sbs_jax.storage import hub
from sbs_jax.weights import hugging_face, identity
from sbs_jax.weights.arrays import LazyArray, Opened
from tasks import builtin

pytest.importorskip("huggingface_hub")
NAME = "owner/tiny"


def write_model(folder: Path, *, seed: int = 0, rows: int) -> Path:
    """Writes a published model: weights of the toy's shape, a vocabulary, and files that nobody reads."""
    config = dataclasses.replace(toy.MODEL, vocab_size=rows)
    arrays = {name: LazyArray.of(each + np.float32(seed)) for name, each in cases.parameters(config).items()}
    hugging_face.write(folder, Opened(config, arrays, vocabulary=builtin.vocabulary_path()), dtype="float32")
    for unread in ("pytorch_model.bin", "tf_model.h5", "README.md"):
        (folder / unread).write_bytes(b"unread")
    return folder


@pytest.fixture(scope="module")
def rows() -> int:
    return registry.vocabulary(builtin.vocabulary_path()).vocab_size


def test_a_run_starts_from_the_hub_and_resumes_from_the_same_commit(tmp_path, starter, rows):
    folder = toy.write_command(tmp_path, TRAIN_STEPS=2, EVAL_PERIOD=2, VOCABULARY="byte")
    with hubs.served({NAME: write_model(tmp_path / "model", rows=rows)}) as published:
        environment = published.environment(tmp_path / "home")
        commit = published.commit(NAME)
        flags = toy.train_flags(
            folder,
            tmp_path / "run",
            f"INITIAL_CHECKPOINT_PATH={NAME}",
            "VOCABULARY=%INITIAL_CHECKPOINT_PATH",
            f"t5.T5Config.vocab_size={rows}",
            "EVALUATE_TEST=False",
        )
        done = starter.run(tmp_path, flags, path=[folder], environment=environment)
        assert done.returncode == 0, done.stderr
        manifest = directory.read_manifest(tmp_path / "run")
        assert manifest["settings"]["initial_checkpoint_path"] == f"{NAME}@{commit}"
        assert manifest["data"]["options"]["vocabulary"] == f"{NAME}@{commit}"
        assert published.downloaded() == [
            *("config.json", "generation_config.json", "model.safetensors", "spiece.model", "tokenizer_config.json")
        ]
        # The model changes on the hub; the run goes on with the commit it began with, now from the cache.
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        shutil.rmtree(tmp_path / "model")
        write_model(tmp_path / "model", seed=1, rows=rows)
        assert published.commit(NAME) != commit
        (tmp_path / "run" / directory.MANIFEST).write_text(json.dumps({**manifest, "checkpointed": False}))
        (tmp_path / "run" / "metrics.jsonl").unlink()
        published.asked.clear()
        again = starter.run(tmp_path, flags, path=[folder], environment=environment)
        assert again.returncode == 0, again.stderr
        assert published.asked == []
        before, after = (json.loads(each.stdout)["train"] for each in (done, again))
        assert after["loss"] == before["loss"]


MISTAKES = """
import sys
from sbs_jax.data import tokens
from sbs_jax.export import convert
for name in sys.argv[1:]:
    try:
        print(convert.convert(name, "never", convert.Options(to_form="t5x")))
    except OSError as error:
        print(f"{type(error).__name__}: {error}")
    try:
        print(tokens.check_vocabulary(name))
    except OSError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_each_mistake_is_a_sentence(tmp_path, starter, rows):
    model = write_model(tmp_path / "model", rows=rows)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("nothing")
    with hubs.served({NAME: model, "owner/gated": model, "owner/bare": tmp_path / "bare"}) as published:
        published.gated.add("owner/gated")
        environment = published.environment(tmp_path / "home")

        def said(*names: str, **changes: str) -> list[str]:
            done = starter.run(
                *(tmp_path, names), command=["-c", MISTAKES], environment={**environment, **changes}, cwd=tmp_path
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        lines = said("owner/none", "owner/gated", "owner/bare", f"{NAME}@v9")
        unknown, gated, bare, revision = (lines[at : at + 2] for at in range(0, 8, 2))
        for line in unknown:
            assert line.startswith("FileNotFoundError: There is no owner/none here, and no such model on the Hugging")
            assert "HTTP 404" in line
        for line in gated:
            assert line.startswith("PermissionError: owner/gated is gated: accept its terms on https://huggingface.co/")
        assert bare[0] == (
            "FileNotFoundError: owner/bare has no config.json and weights that are read in the Hugging Face Hub; it "
            "has README.md. Give another model or revision."
        )
        assert "has no vocabulary (spiece.model or tokenizer.json" in bare[1]
        assert all("owner/tiny has no revision 'v9'" in line for line in revision)
        published.status = 503
        (failed, _) = said(NAME)
        assert "the Hugging Face Hub cannot be asked (HTTP 503)" in failed
        for line in said(NAME, HF_ENDPOINT="http://127.0.0.1:9"):
            assert line.startswith(
                f"ConnectionError: There is no {NAME} here, and the Hugging Face Hub cannot be asked"
            )
            assert line.endswith("--local-dir tiny")
        assert not (tmp_path / "never").exists()


LOCATED = """
import sys
from sbs_jax.cli import main
from sbs_jax.data import vocabularies
from sbs_jax.weights import opening
main._log_to_stderr()
print(opening.located(sys.argv[1]))
print(vocabularies.located(sys.argv[1]))
"""


def test_the_cache_serves_without_a_network(tmp_path, starter, rows):
    with hubs.served({NAME: write_model(tmp_path / "model", rows=rows)}) as published:
        environment = published.environment(tmp_path / "home")
        commit = published.commit(NAME)
        pinned = f"{NAME}@{commit}"
        convert = ["convert", "--to", "hf", pinned, str(tmp_path / "out")]
        done = starter.run(tmp_path, convert, environment=environment)
        assert done.returncode == 0, done.stderr
        published.asked.clear()
        expected = None
        for changes in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
            done = starter.run(tmp_path, [NAME], command=["-c", LOCATED], environment={**environment, **changes})
            assert done.returncode == 0, done.stderr
            assert f"{NAME}: the hub was not asked" in done.stderr
            assert f"using commit {commit} of the cache" in done.stderr
            expected = expected or done.stdout
            assert done.stdout == expected
        done = starter.run(tmp_path, [pinned], command=["-c", LOCATED], environment=environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")
        assert published.asked == []
    weights = (tmp_path / "model" / hugging_face.WEIGHTS).read_bytes()
    assert (tmp_path / "out" / hugging_face.WEIGHTS).read_bytes() == weights
    assert (tmp_path / "out" / "spiece.model").read_bytes() == Path(builtin.vocabulary_path()).read_bytes()


def test_without_the_package_the_error_has_the_line_that_downloads(tmp_path, starter, rows, monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(hub.importlib, "import_module", missing)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub") as error:
        hub.folder("owner/tiny@main", hugging_face.needed, needed="weights")
    monkeypatch.undo()
    line = str(error.value).partition("give its folder: ")[2]
    with hubs.served({NAME: write_model(tmp_path / "model", rows=rows)}) as published:
        arguments = [each.strip("'") for each in line.split()]
        assert arguments[:2] == ["hf", "download"]
        program = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
        done = starter.run(
            *(tmp_path, arguments[1:]),
            command=["-c", program],
            environment={**published.environment(tmp_path / "home"), "PYTHONWARNINGS": "ignore"},
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
    assert hugging_face.needed([each.name for each in (tmp_path / "tiny").iterdir()])
    assert not (tmp_path / "tiny" / "pytorch_model.bin").exists()


def test_what_is_a_name_and_what_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    for text in ("google/t5-v1_1-base", "google/t5-v1_1-base@main", f"google/t5@{commit}"):
        assert str(hub.parse(text)) == text
    for text in (
        "t5-base",
        "./a/b",
        "/a/b",
        "a/b/c",
        "gs://a/b",
        "a/spiece.model",
        "a/b.npz",
        "~/b",
        "../b",
        "a/b@",
        "",
    ):
        assert hub.parse(text) is None
    (tmp_path / "google" / "t5-v1_1-base").mkdir(parents=True)
    assert hub.parse("google/t5-v1_1-base") is None  # a folder of this name comes first
    assert hub.parse("google/t5-v1_1-bsae") is None  # a typing error in a path
    assert hub.parse(f"google/t5@{commit}") is not None  # of a run, whatever stands here now
    assert hub.pinned(f"a/b@{commit}") == f"a/b@{commit}" == hub.pinned("a/b", known=f"a/b@{commit}")
    assert identity.absolute(f"a/b@{commit}") == f"a/b@{commit}"


def test_a_folder_is_a_vocabulary_too(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without a vocabulary; expected spiece\.model, tokenizer"):
        registry.vocabulary(str(tmp_path))
    shutil.copy(builtin.vocabulary_path(), tmp_path / "spiece.model")
    assert vocabularies.located(str(tmp_path)) == str(tmp_path / "spiece.model")
    (tmp_path / "tokenizer.json").write_text("{}")  # T5's is no BPE, so its SentencePiece model comes first
    assert registry.vocabulary(str(tmp_path)).encode("a") == registry.vocabulary(builtin.vocabulary_path()).encode("a")


@pytest.mark.parametrize("names", ["model.safetensors", "pytorch_model.bin"])
def test_shards_count_only_if_all_are_there(names):
    stem, ending = names.rsplit(".", 1)
    shards = [f"{stem}-{number:05d}-of-00002.{ending}" for number in (1, 2)]
    index = f"{names}.index.json"
    assert hugging_face.needed(["config.json", index, *shards]) == ["config.json", index, *shards]
    assert hugging_face.needed(["config.json", index, shards[0]]) == []
    assert hugging_face.needed(["config.json", *shards]) == []
    assert hugging_face.needed([names]) == []
