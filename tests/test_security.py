"""Outside input is never executed, leads to no other folder and never becomes markup; keys stay secret."""

import ast
import html.parser
import json
import re
import threading
import traceback
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import fuzzing
import jax
import numpy as np
import parity_cases as cases
import pytest
import teacher_server
from builders import html_pages, old_t5x, report_runs, teacher_rows
from flax import serialization

from sbs_jax.cli import main
from sbs_jax.data import records, registry, release
from sbs_jax.data.dataset import Dataset
from sbs_jax.pages import report
from sbs_jax.teacher.page import write_page
from sbs_jax.training import gin_files
from sbs_jax.weights import hugging_face, opening, t5x
from tasks import builtin

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("sbs_jax", "tasks", "scripts") for path in (REPOSITORY / folder).rglob("*.py"))

# ------------------------------------------------------------------- what the code never does

MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "xml", "jsonpickle"),
    "code",
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn", "tempfile.mktemp"),
    *("shutil.unpack_archive", "commands.getoutput", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("os.execl", "os.execv", "os.execve", "os.execvp", "os.spawnl", "os.spawnv", "pickle.loads", "pickle.load"),
}
METHODS = {"extractall", "extract", "unsafe_load", "read_pickle"}


def name_of(node: ast.expr) -> str:
    """ "os.path.join" of such a call."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> Iterator[str]:
    """Lists, by line, the calls in a module that could execute what it reads."""
    for node in ast.walk(ast.parse(source)):
        found = ""
        if isinstance(node, ast.Import):
            found = next((alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES), "")
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = node.module if node.module.partition(".")[0] in MODULES else ""
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            given = {word.arg: word.value for word in node.keywords}
            if name in CALLS or name.rpartition(".")[2] in METHODS:
                found = name
            elif name.endswith("torch.load") and not _is(given.get("weights_only"), True):
                found = "torch.load without weights_only=True"
            elif "allow_pickle" in given and not _is(given["allow_pickle"], False):
                found = f"{name} with allow_pickle"
            elif "shell" in given and not _is(given["shell"], False):
                found = f"{name} with a shell"
        if found:
            yield f"line {getattr(node, 'lineno', 0)}: {found}"


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_runs_what_it_reads_or_unpacks_archives() -> None:
    found = {path.relative_to(REPOSITORY).as_posix(): list(dangers(path.read_text("utf-8"))) for path in SOURCES}
    assert len(found) > 60
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from marshal import loads", "import yaml", "eval(x)", "exec(x)", "os.system(x)"),
        "__import__(x)",
        *("np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=x)", "torch.load(f)"),
        "torch.load(f, weights_only=False)",
        *("subprocess.run(x, shell=True)", "tempfile.mktemp()", "archive.extractall(d)", "tarfile.open(f).extract(m)"),
    ],
)
def test_the_look_at_the_code_sees_what_it_looks_for(line: str) -> None:
    assert list(dangers(line))


def test_keys_are_read_from_the_environment_in_one_place_and_the_environment_is_never_written_down() -> None:
    """Each use of os.environ names one variable, or hands all of them to a process that is started."""
    allowed = {"get", "setdefault", "update"}
    for path in (path for path in SOURCES if path.is_relative_to(REPOSITORY / "sbs_jax")):
        tree = ast.parse(path.read_text("utf-8"))
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and name_of(node) == "os.environ"):
                continue
            parent = parents[node]
            where = f"{path.name}:{node.lineno}"
            if isinstance(parent, ast.Dict):  # {**os.environ, ..} of a process
                keyword = parents[parent]
                assert isinstance(keyword, ast.keyword), where
                assert keyword.arg == "env", where
            else:
                assert isinstance(parent, ast.Subscript) or (
                    isinstance(parent, ast.Attribute) and parent.attr in allowed
                ), where
    holders = {path.name for path in SOURCES if re.search(r"environment_key\(", path.read_text("utf-8"))}
    assert holders == {"connections.py", "openai.py", "gemini.py"}


# -------------------------------------------------------------------------- checkpoints of others


class Canary:
    """A payload that a pickle could run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path(fuzzing.CANARY).write_text, ("was run",))


def test_a_pickle_in_an_npz_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "student.npz"
    np.savez(path, a=np.array([Canary()], dtype=object))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        opening.arrays_of(path, wanted={"a": (1,)})
    assert not fuzzing.CANARY.exists()


def test_a_bomb_in_an_npz_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    """Two kinds: a header that claims what is not there, and 200 MB of zeros in 200 kB."""
    path = tmp_path / "student.npz"
    claims = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(claims).to_bytes(2, "little") + claims + b"\x00" * 64)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        opening.arrays_of(path, wanted={"a": (16,)})
    bomb = b"{'descr': '<f4', 'fortran_order': False, 'shape': (50000000,), }"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w", force_zip64=True) as file,
    ):
        file.write(b"\x93NUMPY\x01\x00" + len(bomb).to_bytes(2, "little") + bomb)
        for _ in range(200):
            file.write(bytes(1_000_000))
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a: checkpoint \(50000000,\), model \(16,\)"):
        opening.arrays_of(path, wanted={"a": (16,)})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match=r"a: checkpoint \(50000000,\), model \(16,\)"):
        opening.load_parameters(path, like={"a": jax.ShapeDtypeStruct((16,), np.float32, sharding=place)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("descr", "more"), [("|S1000000000", b""), ("|V8", b""), ("<U4", b""), ("<f4", b"more"), ("<f8", b""), ("<c8", b"")]
)
def test_a_member_of_an_npz_that_is_no_array_of_these_numbers_is_refused(
    tmp_path: Path, descr: str, more: bytes
) -> None:
    path = tmp_path / "student.npz"
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (16,), }}".encode()
    with zipfile.ZipFile(path, "w") as archive:
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64) + more
        archive.writestr("a.npy", data)
    with pytest.raises(ValueError, match=r"a\.npy claims to be"):
        opening.arrays_of(path, wanted={"a": (16,)})


def test_a_pytorch_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (the extra `parity`)")
    hugging_face.write(tmp_path / "out", cases.opened(cases.config("v1_0")), dtype="float32")
    (tmp_path / "out" / hugging_face.WEIGHTS).unlink()
    torch.save({"shared.weight": Canary()}, tmp_path / "out" / hugging_face.TORCH_WEIGHTS)
    with pytest.raises(ValueError, match=r"It was not loaded; take a revision of the model that has safetensors"):
        hugging_face.open_directory(tmp_path / "out")
    assert not fuzzing.CANARY.exists()


@pytest.mark.parametrize("named", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..", "", 7])
def test_an_index_of_hugging_face_leads_to_no_other_folder(tmp_path: Path, named: object) -> None:
    hugging_face.write(tmp_path / "out", cases.opened(cases.config("v1_0")), dtype="float32")
    whole = tmp_path / "out" / hugging_face.WEIGHTS
    whole.rename(tmp_path / "secret.safetensors")  # what it would find there is a model
    index = {"weight_map": {"shared.weight": named}}
    (tmp_path / "out" / hugging_face.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json: 'shared\.weight' is in"):
        hugging_face.open_directory(tmp_path / "out")


@pytest.mark.parametrize("named", ["../elsewhere", "/etc", "a/../../b", "..", ""])
def test_a_file_of_t5x_leads_to_no_other_folder(tmp_path: Path, named: str) -> None:
    for leaf in (
        f"PLACEHOLDER://{named}",
        {"driver": "zarr", "kvstore": {"driver": "gfile", "path": named}, "path": named},
    ):
        tree = {"version": 3, "optimizer": {"target": {"token_embedder": {"embedding": leaf}}}}
        (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
        if named == "/etc":  # T5X wrote paths with a slash before them; they mean the folder beside
            with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
                t5x.open_checkpoint(tmp_path)
        else:
            with pytest.raises(ValueError, match="expected a folder beside the file"):
                t5x.open_checkpoint(tmp_path)


def test_a_header_s_claims_are_not_followed(tmp_path: Path) -> None:
    """A billion layers, or a table of 2**60 numbers, are refused before anything is computed of their size."""
    hugging_face.write(tmp_path / "out", cases.opened(cases.config("v1_0")), dtype="float32")
    settings = json.loads((tmp_path / "out" / hugging_face.CONFIG).read_text())
    for claim in ({"num_layers": 10**9}, {"num_decoder_layers": 10**9}, {"vocab_size": 2**60}, {"d_ff": 2**60}):
        (tmp_path / "out" / hugging_face.CONFIG).write_text(json.dumps(settings | claim))
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            hugging_face.open_directory(tmp_path / "out")
    older = tmp_path / "older"
    older.mkdir()
    old_t5x.old_form(older, cases.config("v1_0"), scanned=False)
    (metadata,) = older.glob("*token_embedder*/.zarray")
    array = json.loads(metadata.read_text())
    for claim in ({"shape": [2**60, 24]}, {"chunks": [2**40, 24]}):
        metadata.write_text(json.dumps(array | claim))
        with pytest.raises(ValueError, match=r"has (the shape|chunks of) [\s\S]*damaged"):
            t5x.open_checkpoint(older)
    tree = {"encoder": {"layers_999999999": {"mlp": {"wo": {"kernel": np.zeros((2, 2), np.float32)}}}}}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize({"target": tree}))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        t5x.open_checkpoint(tmp_path)


# -------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "reference",
    [
        *("@evaluate.atomic.os.getcwd()", "@evaluate.Path.cwd()", "@evaluate.json.dumps"),
        *("[@evaluate.atomic.os.getcwd(), 1]", "{'a': @evaluate.json.loads()}"),
    ],
)
def test_a_binding_cannot_call_python_s_own_functions(reference: str) -> None:
    with pytest.raises(gin_files.UsageError, match="It was not run"):
        gin_files.configure(
            "evaluate.EvaluateConfig",
            gin_files=["gin_configs/runs/evaluate.gin"],
            bindings=["CHECKPOINT_PATH=/x", f"SPLIT={reference}"],
        )


def test_a_gin_file_cannot_run_a_program(tmp_path: Path) -> None:
    file = tmp_path / "mine.gin"
    canary = tmp_path / "canary"
    file.write_text(
        "from __gin__ import dynamic_registration\nimport os\ninclude 'gin_configs/runs/evaluate.gin'\n"
        f"SPLIT = @os.system()\nos.system.command = 'touch {canary}'\n"
    )
    with pytest.raises(gin_files.UsageError, match=r"os\.system, which is posix\.system of Python's standard library"):
        gin_files.configure("evaluate.EvaluateConfig", gin_files=[str(file)], bindings=["CHECKPOINT_PATH=/x"])
    assert not canary.exists()


def test_a_binding_is_one_statement() -> None:
    files = ["gin_configs/runs/evaluate.gin"]
    for binding in ("SPLIT=[1]\nBATCH_SIZE = 1", "SPLIT\nBATCH_SIZE=1", "SPLIT=@evaluate.evaluate\r\nimport os", "=1"):
        with pytest.raises(gin_files.UsageError, match=r"expected a value of one line|is not a name of"):
            gin_files.configure("evaluate.EvaluateConfig", gin_files=files, bindings=[binding])


# ------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize("name", ["../svamp", "a/b", "/etc", "", "A", ".."])
def test_names_of_datasets_and_splits_are_no_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="Unknown dataset"):
        registry.get(name)
    with pytest.raises(ValueError, match="Dataset name"):
        registry.add(Dataset(**{**vars(builtin.DATASET), "name": name}))
    folder = tmp_path / "builtin"
    builtin.write_release(tmp_path / "release", rows={"train": 4, "test": 4}, seed=1)
    release.import_release(builtin.DATASET, release_dir=tmp_path / "release", records_dir=tmp_path, parser="strict")
    manifest = json.loads((folder / records.MANIFEST).read_text())
    manifest["splits"][name] = manifest["splits"].pop("test")
    (folder / records.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=re.escape("expected some of ['train', 'validation', 'test']")):
        records.read_manifest(folder)


# ----------------------------------------------------------------------------------- credentials

KEY = "sk-canary-0123456789abcdef"
PASSWORD = "hunter2-canary"


def taught(tmp_path: Path, base_url: str, *more: str, provider: str = "openai") -> list[str]:
    return [
        *("teach", "--dataset", "builtin", "--inputs_dir", str(tmp_path / "inputs"), "--provider", provider),
        *("--model", "some-model", "--base_url", base_url, "--store", str(tmp_path / "store.sqlite"), "--limit", "3"),
        *("--records_dir", str(tmp_path / "records"), "--page", str(tmp_path / "page.html"), "--retries", "0", *more),
    ]


@pytest.mark.parametrize("provider", ["openai", "gemini"])
@pytest.mark.parametrize("fault", [None, 401, 403, 500, "html", "echo", "reply", "password", "bad_port", "no_server"])
def test_a_key_stands_in_no_output_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], provider: str, fault: object
) -> None:
    """Runs the command with --traceback against every reply of the server, one that repeats the key included."""
    pytest.importorskip(
        "openai" if provider == "openai" else "google.genai", reason="the extra `teacher` is not installed"
    )
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    (tmp_path / "inputs").mkdir()
    builtin.write_release(tmp_path / "inputs", rows={"train": 3, "test": 3}, seed=1)
    faults: list[Any] = []
    if fault == "echo":
        faults = [teacher_server.Fault(401, message=f"The key {KEY} (Bearer {KEY}) is wrong")] * 20
    elif isinstance(fault, int) or fault == "html":
        faults = [fault] * 20
    text = f"Authorization: Bearer {KEY}. So the answer is no." if fault == "reply" else teacher_server.REPLY
    with teacher_server.served(answer=lambda prompt: text, faults=faults) as server:
        url = server.openai if provider == "openai" else server.gemini
        if fault == "password":
            url = url.replace("://", f"://user:{PASSWORD}@")
        elif fault == "bad_port":
            url = f"http://user:{PASSWORD}@127.0.0.1:99999/v1"
        elif fault == "no_server":
            url = f"http://user:{PASSWORD}@127.0.0.1:9/v1"
        said = ""
        try:
            status = main.main([*taught(tmp_path, url, provider=provider), "--traceback"])
        except BaseException as error:
            status = 1
            said = "".join(traceback.format_exception(error))  # as Python prints it
            if not isinstance(error, Exception):
                raise
        assert threading.active_count() < 100
    if fault in (None, "reply"):
        assert status == 0
    captured = capfd.readouterr()
    for secret in (KEY, PASSWORD):
        assert secret not in captured.out + captured.err + said
        for file in tmp_path.rglob("*"):
            assert file.is_dir() or secret.encode() not in file.read_bytes(), file


# ----------------------------------------------------------------------------------------- pages

HOSTILE = [text for text in html_pages.HOSTILE if not any(0xD800 <= ord(c) <= 0xDFFF for c in text)]
MARKUP = (
    "</script></style></title><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>\"'&\u2028<!--"
)


class Elements(html.parser.HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.values: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.values += [value or "" for name, value in attrs if name in ("href", "src", "style", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def check_harmless(page: Path, *, scripts: int) -> Elements:
    elements = Elements(page.read_text("utf-8"))
    assert elements.tags.count("script") == scripts
    assert not {"img", "iframe", "object", "embed", "link", "base"} & set(elements.tags)
    assert not [name for name in elements.attributes if name.startswith("on")]
    assert not [value for value in elements.values if "javascript:" in value.lower() or "expression(" in value]
    return elements


def hostile_run(path: Path, *, kind: str, right: list[bool]) -> Path:
    """A run directory with markup in every text that a report could show."""
    report_runs.write_run(path, kind=kind, right=right)
    manifest = json.loads((path / "manifest.json").read_text())
    name = f"x{MARKUP}"
    manifest |= {"git_revision": MARKUP, "devices": [MARKUP], "versions": {MARKUP: MARKUP}}
    manifest["data"]["dataset"] = name
    manifest["run"]["mixture_or_task_name"] = f"{name}_{kind}"
    manifest["data"]["options"] |= {"records_dir": MARKUP, "label_prefix": MARKUP}
    for split in manifest["data"]["splits"].values():
        split["sha256"] = MARKUP
    manifest["data"]["splits"][MARKUP] = {"sha256": MARKUP}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (predictions,) = (path / "predictions").iterdir()
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    for number, row in enumerate(rows):
        text = HOSTILE[number % len(HOSTILE)]
        row |= {
            "id": f"{number} {text}",
            "input": f"{MARKUP} {text}",
            "target": MARKUP,
            "prediction": f"{text} {MARKUP}",
        }
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_report_shows_markup_as_text(tmp_path: Path) -> None:
    home = tmp_path / "<img src=x onerror=alert(1)>&'"
    right = [i % 3 != 0 for i in range(40)]
    runs = [report.identify(hostile_run(home / kind, kind=kind, right=right)) for kind in ("label", "step_by_step")]
    page = tmp_path / "page.html"
    report.write_page(page, runs, title=None, notes=[MARKUP], command=MARKUP)
    elements = check_harmless(page, scripts=2)
    assert elements.text.count("window.pwned") > 20
    report.write_page(page, runs, title=MARKUP, notes=[], command=None, assets=tmp_path / "files")
    check_harmless(page, scripts=2)
    with chromium.browser(tmp_path / "profile") as tab:
        tab.open(page)
        assert tab.run("typeof window.pwned") == "undefined"
        assert tab.run("document.scripts.length + document.images.length") == 2
        assert tab.run("document.getElementById('detail').textContent").count("window.pwned") > 2
        assert tab.problems == []


def test_the_page_of_a_teacher_shows_markup_as_text(tmp_path: Path) -> None:
    rows = [
        teacher_rows.wrong(
            number,
            **dict.fromkeys(("id", "input", "rationale", "label", "outcome", "prompt"), f"{text} {MARKUP}"),
            replies=(text, MARKUP),
            teacher_label=f"{text}! {MARKUP}",
        )
        for number, text in enumerate(HOSTILE)
    ]
    page = tmp_path / "page.html"
    write_page(page, title=MARKUP, facts={MARKUP: MARKUP}, rows=rows)
    check_harmless(page, scripts=2)  # the data, and the page's own
