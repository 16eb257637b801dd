"""scripts/tpu_pod.sh against a recorded gcloud (cloud_stand_in.py), whose workers are real processes."""

import dataclasses
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cloud_stand_in import FLAGS, WIDE, end_processes

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = ("tpu_pod.sh", "tpu_worker.sh")
TRAIN = ("--", "sbs", "train", "--gin_file=gin_configs/runs/train.gin", "--gin.MODEL_DIR=/mnt/sbs/runs/a")
# What is installed on a worker in place of Python: `-m venv` copies it, `-m pip install` writes the stand-in of sbs.
PYTHON = """#!/bin/bash
case "$*" in
  "-m venv --clear"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  "-m pip install"*)
    printf '%s\\0' "$@" >"$HOME/pip"
    [[ -e $STAND_IN/pip_fails/$WORKER ]] && echo "ERROR: no matching distribution" && exit 1
    cp "$STAND_IN/far/stand_in_of_sbs" "${0%/*}/sbs" ;;
esac
"""
# Does what the file `run` says, or what `run.N` says on the N-th creation.
SBS = """#!/bin/bash
printf '%s\\0' "$@" >"$HOME/sbs_arguments"
env -0 >"$HOME/sbs_environment"
pwd >"$HOME/sbs_folder"
echo "step 1"
mode=$(cat "$STAND_IN/run.$(cat "$HOME/creation")" 2>/dev/null || cat "$STAND_IN/run")
case $mode in
  end) exit 0 ;;
  fail) echo "ValueError: no such task" && exit 3 ;;
  fail_later) sleep 0.6; exit 3 ;;
  wait) trap 'echo saved; exit 75' TERM ;;
  stubborn) trap '' TERM ;;
esac
while [[ ! -e $STAND_IN/end ]]; do sleep 0.05; done
"""
GCSFUSE = """#!/bin/bash
printf '%s\\0' "$@" >"$HOME/gcsfuse"
"""


@dataclasses.dataclass
class Cloud:
    """A project of which nothing is real but the workers' processes."""

    root: Path
    environment: dict[str, str]

    def script(self, **answers: Any) -> None:
        (self.root / "script.json").write_text(json.dumps(answers))

    def mode(self, mode: str, creation: int | None = None) -> None:
        (self.root / ("run" if creation is None else f"run.{creation}")).write_text(mode)

    def pod(self, *arguments: str, **changed: Any) -> subprocess.CompletedProcess[str]:
        """One call of tpu_pod.sh; the exit status, what it says and prints."""
        options = {"env": self.environment, "stdin": subprocess.DEVNULL, **changed}
        command = [str(self.root / "checkout/scripts/tpu_pod.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)

    def calls(self) -> list[list[str]]:
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self) -> list[str]:
        """What was called, without looks: `queued-resources create`, `tpu-vm ssh install`, .."""
        found = []
        for call in self.calls():
            verb = " ".join(call[2:4])
            what = re.search(r"tpu_worker\.sh (\w+)", " ".join(call))
            found.append(f"{verb} {what[1]}" if what else verb)
        return [verb for verb in found if not verb.endswith(("describe", "status"))]

    def home(self, worker: int = 0, node: str = "sbs") -> Path:
        return self.root / "nodes" / node / str(worker)

    def words(self, name: str, worker: int = 0, node: str = "sbs") -> list[str]:
        """A file of words that end with NUL, in the home of a worker."""
        return (self.home(worker, node) / name).read_text().split("\0")[:-1]

    def pid(self, worker: int = 0, node: str = "sbs") -> int:
        return int((self.home(worker, node) / "sbs_run/pid").read_text().split()[0])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository with the scripts in it."""
    folder = tmp_path_factory.mktemp("made") / "checkout"
    (folder / "scripts").mkdir(parents=True)
    for name in (*SCRIPTS, "constraints.txt"):
        shutil.copy(REPOSITORY / "scripts" / name, folder / "scripts")
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"]
    for words in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    return folder


@pytest.fixture
def cloud(tmp_path: Path, checkout: Path) -> Iterator[Cloud]:
    root = tmp_path / "a cloud"
    root.mkdir()
    shutil.copytree(checkout, root / "checkout")
    stand_in = REPOSITORY / "tests" / "cloud_stand_in.py"
    write(root / "near/gcloud", f'#!/bin/sh\nexec "{sys.executable}" -S -E "{stand_in}" "$@"\n')
    write(root / "far/python3.13", PYTHON)
    write(root / "far/stand_in_of_sbs", SBS)
    write(root / "far/gcsfuse", GCSFUSE)
    write(root / "far/hostname", '#!/bin/sh\necho "$WORKER"\n')
    write(root / "far/sudo", '#!/bin/sh\nexec "$@"\n')
    write(root / "far/findmnt", '#!/bin/sh\ncat "$STAND_IN/mounted" 2>/dev/null\n')
    environment = {
        "PATH": f"{root / 'near'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "STAND_IN": str(root),
        "SBS_TPU_PROJECT": "p",
        "SBS_TPU_ZONE": "z",
        "SBS_TPU_TYPE": "v5litepod-16",
        "SBS_TPU_POLL": "0.05",
        "SBS_TPU_SETTLE": "0.3",
    }
    made = Cloud(root, environment)
    made.script()
    made.mode("end")
    yield made
    (root / "end").touch()
    end_processes(root)


def until(condition: Callable[[], object]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("did not happen within 20 s")


def ready(cloud: Cloud, mode: str = "wait") -> None:
    """A pod with a run going on."""
    cloud.mode(mode)
    for words in (("create",), ("install",), ("start", *TRAIN)):
        done = cloud.pod(*words)
        assert done.returncode == 0, done.stderr


def test_run_goes_from_nothing_to_the_end_of_the_run(cloud: Cloud) -> None:
    cloud.script(resource=[["CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    done = cloud.pod("run", "--spot", "--env", "A=b c", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [
        *("queued-resources create", "tpu-vm scp", "tpu-vm ssh install", "tpu-vm ssh start"),
    ]
    assert cloud.calls()[0] == [
        *("compute", "tpus", "queued-resources", "create", "sbs", "--project=p", "--zone=z", "--quiet"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=sbs", "--spot"),
    ]
    revision = subprocess.check_output(["git", "-C", cloud.root / "checkout", "rev-parse", "HEAD"], text=True).strip()
    for worker in (0, 1):
        assert cloud.words("sbs_arguments", worker) == ["train", "--multihost", *TRAIN[3:]]
        assert "A=b c" in cloud.words("sbs_environment", worker)
        home = cloud.home(worker)
        assert (home / "sbs_folder").read_text().strip() == str(home / "sbs")
        assert (home / "sbs_venv/revision").read_text().strip() == revision
        far = subprocess.check_output(["git", "-C", home / "sbs", "describe", "--always", "--dirty", "--abbrev=40"])
        assert far.decode().strip() == revision
        pip = cloud.words("pip", worker)
        assert pip[pip.index("-c") :] == ["-c", f"{home}/sbs/scripts/constraints.txt", "-e", f"{home}/sbs[tpu]"]
    said = [line.split(" ", 1)[1] for line in done.stderr.splitlines()]
    assert [line for line in said if line.startswith("sbs is")] == [
        *("sbs is CREATING", "sbs is WAITING_FOR_RESOURCES", "sbs is PROVISIONING", "sbs is ACTIVE"),
    ]
    assert "delete --name sbs --project p --zone z" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--reserved", "--network", "n", "--service_account", "a@b", "--bucket", "b", *TRAIN),
        ("run", "--slices", "2", "--delete_when_done", "--create_flag=--labels=a=b", *TRAIN),
        ("status",),
        ("logs", "--all", "--no_follow"),
        ("stop", "--timeout", "3"),
        ("delete", "--yes"),
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_a_dry_run_prints_the_calls_that_are_made(cloud: Cloud, words: tuple[str, ...]) -> None:
    dry = cloud.pod(*words, "--dry_run") if words[0] != "run" else cloud.pod("run", "--dry_run", *words[1:])
    assert dry.returncode == 0, dry.stderr
    assert cloud.calls() == []
    printed = [shlex.split(line) for line in dry.stdout.splitlines() if not line.startswith("#")]
    assert all(line[0] == "gcloud" for line in printed)
    if words[0] != "run":
        ready(cloud, "end")
        (cloud.root / "calls.jsonl").unlink()
    assert cloud.pod(*words).returncode == 0

    def normal(calls: list[list[str]]) -> list[str]:
        # Nodes are called at the same time; a start has an id of its own.
        return sorted(re.sub(r"start \d+-\d+ ", "start ID ", shlex.join(call)) for call in calls)

    assert normal([line[1:] for line in printed]) == normal(cloud.calls())


def test_values_with_spaces_quotes_and_dollars_arrive_as_they_were(cloud: Cloud) -> None:
    values = ["--gin.A='it\\'s \"x\"'", "--gin.B=[1, 2]", "--gin.C=$HOME `date` \\n !", "--gin.D=", "a\nb", "*", "ä"]
    cloud.pod("create")
    assert cloud.pod("install").returncode == 0
    done = cloud.pod("start", "--env", "E=$HOME 'q'", "--", "sbs", "train", *values)
    assert done.returncode == 0, done.stderr
    assert cloud.words("sbs_arguments") == ["train", "--multihost", *values]
    assert "E=$HOME 'q'" in cloud.words("sbs_environment")


def test_several_slices_are_one_resource_of_several_nodes(cloud: Cloud) -> None:
    done = cloud.pod("run", "--slices", "2", "--name", "pod", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert {"--node-count=2", "--node-prefix=pod"} <= set(cloud.calls()[0])
    for node in ("pod-0", "pod-1"):
        for worker in (0, 1):
            assert cloud.words("sbs_arguments", worker, node)[0] == "train"


@pytest.mark.parametrize(
    "answers",
    [
        {"resource": [["ACTIVE"] * 6 + ["SUSPENDING", "SUSPENDED|SERVICE|"], ["WAITING_FOR_RESOURCES", "ACTIVE"]]},
        {"nodes": {"sbs": ["READY", "REPAIRING", "PREEMPTED"]}},
        {"nodes": {"sbs": ["READY", "TERMINATED"]}},
    ],
    ids=["suspended", "preempted", "terminated"],
)
def test_a_slice_taken_away_is_asked_for_again_and_the_run_started_again(cloud: Cloud, answers: dict[str, Any]) -> None:
    cloud.script(**answers)
    cloud.mode("wait", 0)
    cloud.mode("end", 1)
    done = cloud.pod("run", "--spot", "--backoff", "0", *TRAIN)
    assert done.returncode == 0, done.stderr
    once = ["queued-resources create", "tpu-vm scp", "tpu-vm ssh install", "tpu-vm ssh start"]
    assert cloud.verbs() == [*once, "queued-resources delete", *once]
    assert "--force" in next(call for call in cloud.calls() if call[3] == "delete")
    created = [call for call in cloud.calls() if call[3] == "create"]
    started = [re.sub(r"start \d+-\d+ ", "", call[-1]) for call in cloud.calls() if "tpu_worker.sh start" in call[-1]]
    assert created[0] == created[1]
    assert started[0] == started[1]
    assert cloud.words("sbs_arguments", 1) == ["train", "--multihost", *TRAIN[3:]]


@pytest.mark.parametrize("disk", ["kept", "new"])
def test_a_run_killed_on_nodes_that_are_there_is_started_there(cloud: Cloud, disk: str) -> None:
    ready(cloud)
    command = [str(cloud.root / "checkout/scripts/tpu_pod.sh"), "watch", *TRAIN]
    with subprocess.Popen(command, env=cloud.environment, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stderr is not None
        assert "run running" in watching.stderr.readline()
        for worker in (0, 1) if disk == "new" else (0,):
            os.killpg(os.getpgid(cloud.pid(worker)), signal.SIGKILL)
            if disk == "new":
                shutil.rmtree(cloud.home(worker))
        cloud.mode("end")
        said = watching.stderr.read()
        assert watching.wait(timeout=60) == 0, said
    assert "starting again" in said
    once = ["tpu-vm scp", "tpu-vm ssh install", "tpu-vm ssh start"]
    assert cloud.verbs() == ["queued-resources create", *once, "tpu-vm ssh stop", *once]


def test_a_run_that_fails_by_itself_is_not_repeated(cloud: Cloud) -> None:
    cloud.mode("fail_later")
    done = cloud.pod("run", *TRAIN)
    assert done.returncode == 6
    assert "state: failed (exit status 3)" in done.stderr
    assert cloud.verbs().count("tpu-vm ssh start") == 1
    assert cloud.pod("status").returncode == 6


def test_what_is_installed_again_is_what_was_installed_first(cloud: Cloud) -> None:
    """Whoever goes on working in the checkout does not change a run that is being watched."""
    cloud.script(resource=[["ACTIVE"] * 8 + ["SUSPENDED|SERVICE|"], ["ACTIVE"]])
    cloud.mode("wait", 0)
    command = [str(cloud.root / "checkout/scripts/tpu_pod.sh"), "run", *TRAIN]
    with subprocess.Popen(command, env=cloud.environment, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        assert any("installed" in line for line in iter(running.stderr.readline, ""))
        revision = (cloud.home() / "sbs_venv/revision").read_text()
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"]
        words = [*who, "commit", "--quiet", "--allow-empty", "-m", "later"]
        subprocess.run(["git", "-C", cloud.root / "checkout", *words], check=True)
        said = running.stderr.read()
        assert running.wait(timeout=60) == 0, said
    assert "attempt 1" in said
    assert (cloud.home() / "creation").read_text() == "1"
    assert (cloud.home() / "sbs_venv/revision").read_text() == revision


@pytest.mark.parametrize("answer", ["DELETED", "SUSPENDED|USER|"])
def test_watch_does_not_bring_back_what_somebody_ended(cloud: Cloud, answer: str) -> None:
    cloud.script(resource=[["ACTIVE"] * 4 + [answer]])
    ready(cloud)
    assert cloud.pod("watch", *TRAIN).returncode == 4
    assert cloud.verbs().count("queued-resources create") == 1


def test_watch_bears_a_network_that_is_away_for_a_while(cloud: Cloud) -> None:
    cloud.script(resource=[["ACTIVE"] * 3 + ["UNREACHABLE"] * 3 + ["ACTIVE"]])
    ready(cloud)
    command = [str(cloud.root / "checkout/scripts/tpu_pod.sh"), "watch", *TRAIN]
    with subprocess.Popen(command, env=cloud.environment, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stderr is not None
        assert "run running" in watching.stderr.readline()
        assert "Unable to find the server" in watching.stderr.readline()
        (cloud.root / "end").touch()
        said = watching.stderr.read()
        assert watching.wait(timeout=60) == 0, said
    cloud.script(resource=[["UNREACHABLE"]])
    done = cloud.pod("watch", *TRAIN)
    assert done.returncode == 1
    assert "Unable to find the server" in done.stderr


def test_watch_gives_up_after_so_many_attempts(cloud: Cloud) -> None:
    cloud.script(resource=[["ACTIVE"] * 4 + ["FAILED||no capacity"], ["WAITING_FOR_RESOURCES", "FAILED||no capacity"]])
    cloud.mode("wait")
    begin = time.monotonic()
    done = cloud.pod("run", "--attempts", "3", "--backoff", "1", *TRAIN)
    assert done.returncode == 5, done.stderr
    assert cloud.verbs().count("queued-resources create") == 4
    assert re.findall(r"attempt \d of 3.*", done.stderr) == [
        *("attempt 1 of 3", "attempt 2 of 3 in 1 s", "attempt 3 of 3 in 2 s"),
    ]
    assert time.monotonic() - begin > 3


def test_install_names_the_worker_that_failed_and_start_refuses(cloud: Cloud) -> None:
    cloud.pod("create", "--slices", "2")
    assert cloud.pod("install", "--slices", "2").returncode == 0  # which the next one makes void
    (cloud.root / "pip_fails").mkdir()
    for worker in ("sbs-0-w-0", "sbs-1-w-1"):
        (cloud.root / "pip_fails" / worker).touch()
    done = cloud.pod("install", "--slices", "2")
    assert done.returncode == 1
    assert "install failed: sbs-0 worker 0 (exit 1), sbs-1 worker 1 (exit 1)." in done.stderr
    assert "[sbs-1] [sbs-1-w-1] ERROR: no matching distribution" in done.stdout
    done = cloud.pod("start", "--slices", "2", *TRAIN)
    assert done.returncode == 3
    assert "not installed: sbs-0 worker 0 (exit 11), sbs-1 worker 1 (exit 11)" in done.stderr


def test_order_of_commands_is_asked_for(cloud: Cloud) -> None:
    for words, hint in ((("install",), "run create"), (("start", *TRAIN), "run create"), (("stop",), "run create")):
        done = cloud.pod(*words)
        assert (done.returncode, hint in done.stderr) == (3, True), done.stderr
    cloud.script(resource=[["PROVISIONING"]])
    cloud.pod("create")
    done = cloud.pod("install")
    assert (done.returncode, "PROVISIONING, not ACTIVE" in done.stderr) == (3, True)
    assert cloud.pod("create").returncode == 3
    cloud.script()
    done = cloud.pod("start", *TRAIN)
    assert (done.returncode, "Run install first" in done.stderr) == (3, True)
    done = cloud.pod("watch", *TRAIN)
    assert (done.returncode, "run install, then start" in done.stderr) == (3, True)


def test_a_run_is_not_started_twice(cloud: Cloud) -> None:
    ready(cloud)
    pid = cloud.pid()
    done = cloud.pod("start", *TRAIN)
    assert done.returncode == 3
    assert "already going on: sbs worker 0 (exit 10), worker 1 (exit 10)" in done.stderr
    assert cloud.pod("install").returncode == 3  # nor is its code replaced
    assert cloud.pid() == pid
    os.kill(pid, 0)


def test_a_start_repeated_by_gcloud_is_no_second_start(cloud: Cloud) -> None:
    """gcloud tries a command again when its connection breaks."""
    ready(cloud)
    call = next(call for call in cloud.calls() if "tpu_worker.sh start" in call[-1])
    pid = cloud.pid()
    again = subprocess.run([cloud.root / "near/gcloud", *call], env=cloud.environment, check=False, capture_output=True)
    assert again.returncode == 0
    assert cloud.pid() == pid
    other = [*call[:-1], call[-1].replace(" start ", " start 9")]
    again = subprocess.run(
        [cloud.root / "near/gcloud", *other], env=cloud.environment, check=False, capture_output=True
    )
    assert again.returncode == 10


def test_a_command_that_ends_at_once_is_shown(cloud: Cloud) -> None:
    cloud.mode("fail")
    cloud.pod("create")
    cloud.pod("install")
    done = cloud.pod("start", *TRAIN)
    assert done.returncode == 1
    assert "[sbs] [sbs-w-1] ValueError: no such task" in done.stdout


def test_stop_lets_the_run_save_and_waits_for_it(cloud: Cloud) -> None:
    ready(cloud)
    assert "state: running" in cloud.pod("status").stdout
    done = cloud.pod("stop")
    assert done.returncode == 0, done.stderr
    for worker in (0, 1):
        log = (cloud.home(worker) / "sbs_run/log").read_text()
        assert "saved\n" in log
        assert log.rstrip().endswith("exit status 75")
    assert cloud.pod("status").stdout.count("state: stopped (it has saved)") == 2
    watched = cloud.pod("watch", *TRAIN)
    assert (watched.returncode, "ended with stop" in watched.stderr) == (4, True)
    assert cloud.pod("start", *TRAIN).returncode == 0


def test_a_run_that_its_machine_told_to_end_is_started_again(cloud: Cloud) -> None:
    ready(cloud)
    for worker in (0, 1):
        os.kill(cloud.pid(worker), signal.SIGTERM)
    cloud.mode("end")
    done = cloud.pod("watch", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "starting again" in done.stdout + done.stderr


def test_stop_of_a_run_that_does_not_listen(cloud: Cloud) -> None:
    ready(cloud, "stubborn")
    done = cloud.pod("stop", "--timeout", "1")
    assert (done.returncode, "--kill" in done.stderr) == (5, True)
    assert cloud.pod("stop", "--timeout", "0", "--kill").returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(cloud.pid(), 0)


def test_logs_follow_until_the_run_ends(cloud: Cloud) -> None:
    ready(cloud)
    command = [str(cloud.root / "checkout/scripts/tpu_pod.sh"), "logs"]
    with subprocess.Popen(command, env=cloud.environment, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        assert any("[sbs] [sbs-w-0] step 1" in line for line in iter(following.stdout.readline, ""))
        assert following.poll() is None
        (cloud.root / "end").touch()
        rest = following.stdout.read()
        assert following.wait(timeout=20) == 0
    assert "exit status 0" in rest
    every = cloud.pod("logs", "--all", "--lines", "1").stdout
    assert sorted(re.findall(r"\[sbs-w-(\d)\]", every)) == ["0", "1"]


def test_the_run_outlives_the_connection_and_this_side(cloud: Cloud) -> None:
    ready(cloud)
    assert os.getsid(cloud.pid()) != os.getsid(0)
    assert Path(f"/proc/{cloud.pid()}/fd/0").resolve() == Path("/dev/null")


def test_delete_asks_first(cloud: Cloud) -> None:
    cloud.pod("create")
    done = cloud.pod("delete")
    assert (done.returncode, "--yes" in done.stderr) == (2, True)
    for answer, status in ((b"n\n", 2), (b"y\n", 0)):
        near, far = pty.openpty()
        os.write(near, answer)
        assert cloud.pod("delete", stdin=far).returncode == status
        os.close(near)
        os.close(far)
        assert cloud.verbs().count("queued-resources delete") == (status == 0)
    assert cloud.pod("wait").returncode == 3


def test_a_finished_run_can_delete_its_resource(cloud: Cloud) -> None:
    assert cloud.pod("run", "--delete_when_done", *TRAIN).returncode == 0
    assert cloud.verbs()[-1] == "queued-resources delete"


@pytest.mark.parametrize(
    ("states", "status", "hint"),
    [
        (["WAITING_FOR_RESOURCES", "FAILED||Quota limit exceeded"], 4, "Quota limit exceeded"),
        (["SUSPENDED|SERVICE|"], 4, "SUSPENDED (by SERVICE)"),
        (["WAITING_FOR_RESOURCES"], 5, "still WAITING_FOR_RESOURCES after 1 s"),
        (["UNREACHABLE"], 1, "Unable to find the server"),
    ],
    ids=["failed", "suspended", "timeout", "unreachable"],
)
def test_wait_says_what_became_of_a_resource(cloud: Cloud, states: list[str], status: int, hint: str) -> None:
    cloud.script(resource=[states])
    cloud.pod("create")
    done = cloud.pod("wait", "--timeout", "1" if status == 5 else "60")
    assert (done.returncode, hint in done.stderr) == (status, True), done.stderr


def test_a_bucket_is_mounted_at_the_same_place_on_every_worker(cloud: Cloud) -> None:
    mount = str(cloud.root / "mnt")
    cloud.pod("create")
    assert cloud.pod("install", "--bucket", "gs://b", "--mount", mount).returncode == 0
    for worker in (0, 1):
        assert cloud.words("gcsfuse", worker)[-2:] == ["b", mount]
        assert "--implicit-dirs" in cloud.words("gcsfuse", worker)
        (cloud.home(worker) / "gcsfuse").unlink()
    (cloud.root / "mounted").write_text("b\n")
    assert cloud.pod("install", "--bucket", "b", "--mount", mount).returncode == 0
    assert not (cloud.home() / "gcsfuse").exists()
    done = cloud.pod("install", "--bucket", "c", "--mount", mount)
    assert (done.returncode, "is a mount of b already" in done.stdout) == (1, True)


def test_a_changed_checkout_is_refused_or_taken_along_whole(cloud: Cloud) -> None:
    checkout = cloud.root / "checkout"
    (checkout / "new file").write_text("new")
    (checkout / "scripts/constraints.txt").unlink()
    with (checkout / "scripts/tpu_pod.sh").open("a") as script:
        script.write("# changed\n")
    cloud.pod("create")
    done = cloud.pod("install")
    assert (done.returncode, "new file" in done.stderr, "--allow_dirty" in done.stderr) == (2, True, True)
    assert cloud.pod("install", "--allow_dirty").returncode == 0
    far = cloud.home(1) / "sbs"
    assert (far / "new file").read_text() == "new"
    assert not (far / "scripts/constraints.txt").exists()
    assert (far / "scripts/tpu_pod.sh").read_text().endswith("# changed\n")
    described = subprocess.check_output(["git", "-C", far, "describe", "--always", "--dirty"], text=True)
    assert described.strip().endswith("-dirty")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("create", "--accelerator_type", "v5e:4x4"), "did you mean v5litepod-16?"),
        (("create", "--accelerator_type", "v5p:2x2x2"), "did you mean v5p-16?"),
        (("create", "--accelerator_type=v6e-20"), "did you mean v6e-16?"),
        (("create", "--accelerator_type=h100-8"), "v5litepod-1 4 8 16"),
        (("create", "--accelerator_type=tpu7x-16"), "GKE"),
        (("create", "--acelerator_type", "v6e-16"), "did you mean --accelerator_type"),
        (("create", "--slices", "two"), "whole number of at least 1"),
        (("create", "--spot", "--reserved"), "exclude each other"),
        (("create", "--name", "My_pod"), "small letters"),
        (("create", "--zone"), "needs a value"),
        (("create", "v6e-16"), "unexpected argument"),
        (("strat",), "did you mean start status stop"),
        (("start",), "-- sbs train"),
        (("start", "--", "python", "train.py"), "expected -- sbs train"),
        (("start", "--env", "A", *TRAIN), "NAME=VALUE"),
        (("install", "--bucket", "gs://b/folder"), "name of a bucket"),
        (("install", "--mount", "mnt"), "absolute path"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_are_named_before_anything_is_called(cloud: Cloud, words: tuple[str, ...], hint: str) -> None:
    done = cloud.pod(*words)
    assert (done.returncode, hint in done.stderr) == (2, True), done.stderr
    assert cloud.calls() == []


@pytest.mark.parametrize(("name", "hint"), [("PROJECT", "no project"), ("ZONE", "no zone"), ("TYPE", "no accelerator")])
def test_what_is_missing_is_named(cloud: Cloud, name: str, hint: str) -> None:
    done = cloud.pod("create", env={k: v for k, v in cloud.environment.items() if k != f"SBS_TPU_{name}"})
    assert (done.returncode, hint in done.stderr) == (2, True)


def test_gcloud_and_git_are_asked_for(cloud: Cloud, tmp_path: Path) -> None:
    for name in ("bash", "dirname", "env"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    done = cloud.pod("create", env={**cloud.environment, "PATH": str(tmp_path / "bin")})
    assert (done.returncode, "gcloud is not installed" in done.stderr) == (2, True)
    done = cloud.pod("create", env={**cloud.environment, "PATH": f"{cloud.root / 'near'}:{tmp_path / 'bin'}"})
    assert (done.returncode, "git is not installed" in done.stderr) == (2, True)


def test_help_names_every_command_and_flag(cloud: Cloud) -> None:
    shown = cloud.pod("--help").stdout
    text = (REPOSITORY / "scripts/tpu_pod.sh").read_text()
    flags = re.search(r'^flags_known="(.*?)"', text, flags=re.MULTILINE | re.DOTALL)
    commands = re.search(r'^commands_known="(.*)"', text, flags=re.MULTILINE)
    assert flags is not None
    assert commands is not None
    for word in [*flags[1].replace("\\\n", " ").split(), *commands[1].split()]:
        assert word == "--help" or re.search(rf"(^|\s){re.escape(word)}\b", shown), word
    assert max(map(len, shown.splitlines())) <= 120
    assert set(re.findall(r"SBS_TPU_\w+", text)) == set(re.findall(r"SBS_TPU_\w+", shown))


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    files = sorted(str(path) for path in REPOSITORY.glob("scripts/*.sh"))
    assert len(files) >= 2
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Recorded from xpk 1.16.0's --help: what a command of docs/tpu.md must and may take.
XPK_PLACE = {"cluster", "project", "zone"}
XPK = {
    "cluster create": (
        {"cluster", "tpu-type"},
        {"num-slices", "spot", "on-demand", "reservation", "enable-gcsfuse-csi-driver"},
    ),
    "storage attach": (
        {"type", "cluster", "auto-mount", "mount-point", "readonly", "size"},
        {"bucket", "mount-options", "prefetch-metadata"},
    ),
    "workload create": (
        {"command", "tpu-type", "workload", "cluster"},
        {
            "num-slices",
            "docker-image",
            "max-restarts",
            "restart-on-exit-codes",
            "termination-grace-period-seconds",
            "env",
            "storage",
        },
    ),
    "workload list": ({"cluster"}, set()),
    "workload delete": ({"cluster", "workload"}, {"force"}),
    "cluster delete": ({"cluster"}, {"force"}),
}
RECORDER = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >>"$STAND_IN/called"
[[ $1 == projects ]] && echo 123
exit 0
"""


def test_every_command_of_the_document_can_be_copied(tmp_path: Path, checkout: Path) -> None:
    """All blocks of docs/tpu.md in one shell: our script prints what it would do, everything else is recorded."""
    text = (REPOSITORY / "docs/tpu.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) > 12
    recorded = ("gcloud", "xpk", "docker", "kubectl", "sbs", "git", "ssh-add", "ssh-agent", "python3")
    for name in recorded:
        write(tmp_path / "near" / name, RECORDER)
    write(tmp_path / "xpk_venv/bin/python", RECORDER)
    whole = checkout / "scripts/tpu_pod.sh"
    write(
        tmp_path / "scripts/tpu_pod.sh", f'#!/bin/bash\nPATH=/usr/bin:/bin exec "{whole}" "$1" --dry_run "${{@:2}}"\n'
    )
    environment = {"PATH": f"{tmp_path / 'near'}:/usr/bin:/bin", "HOME": str(tmp_path), "STAND_IN": str(tmp_path)}
    command = ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "called").read_text().split("\n\0")[:-1]
    calls = [line.split("\0")[:-1] for line in lines]
    assert {call[0] for call in calls} >= set(recorded) - {"python3"}
    printed = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("gcloud")]
    for call in [*printed, *calls]:
        if call[1:3] == ["compute", "tpus"]:
            given = {word[2:].partition("=")[0] for word in call if word.startswith("--")}
            assert given <= FLAGS[" ".join(call[3:5])] | WIDE, call
    seen = []
    for _, *words in [call for call in calls if call[0] == "xpk"]:
        verb = " ".join(words[:2])
        must, may = XPK[verb]
        flags = {word[2:] for word in words if word.startswith("--")}
        assert must <= flags <= must | may | XPK_PLACE, words
        seen.append(verb)
    assert seen == list(XPK)
    (workload,) = [call for call in calls if call[1:3] == ["workload", "create"]]
    words = shlex.split(workload[workload.index("--command") + 1])
    assert words[:4] == ["exec", "sbs", "train", "--multihost"]
    for path in re.findall(r"gin_configs/[\w/.]+\.gin|scripts/[\w/.]*\w", text):
        assert (REPOSITORY / path).exists(), path
