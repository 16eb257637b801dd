"""scripts/tpu_pod.sh against a recorded gcloud (cloud_stand_in.py) with real processes; the commands of its pages."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cloud_stand_in import FLAGS, WIDE, end_processes

from sbs_jax.cli import main
from sbs_jax.training import gin_files

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = str(REPOSITORY / "scripts/tpu_pod.sh")
TRAIN = ("--", "sbs", "train", "--gin_file=gin_configs/runs/train.gin", "--gin.MODEL_DIR=gs://b/runs/a")
# Docker on a worker: one container, whose process is real. Like docker, it passes on no variables of the host.
DOCKER = """#!/bin/bash
cd "$HOME" && c=container
case $1 in
  login) cat >login ;;
  pull) [[ ! -e $STAND_IN/pull_fails/$WORKER ]] || { echo "manifest unknown" && exit 1; } ;;
  inspect)
    [[ -e $c ]] || exit 1
    if [[ ! -e $c/log ]]; then echo "created 0 $(<$c/labels)"
    elif [[ -e $c/code ]]; then echo "exited $(<$c/code) $(<$c/labels)"; else echo "running 0 $(<$c/labels)"; fi ;;
  run)
    mkdir $c || exit 125
    printf '%s\\0' "$@" >arguments
    variables=(HOME="$HOME" PATH="$PATH" STAND_IN="$STAND_IN")
    while shift && [[ $1 == --* ]]; do
      case $1 in
        --label=*) printf '%s ' "${1##*=}" >>$c/labels ;;
        --env=*) variables+=("${1#*=}") ;;
      esac
    done
    [[ ! -e $STAND_IN/run_fails ]] || exit 125
    setsid bash -c '"$@" & echo $! >container/pid; wait $!; echo $? >container/code' \\
      keeper env -i "${variables[@]}" "$STAND_IN/far/image" "${@:2}" </dev/null >$c/log 2>&1 &
    echo $! >$c/keeper
    until [[ -s $c/pid ]]; do sleep 0.02; done ;;
  logs)
    if [[ $* == *--follow* ]]; then tail -n +1 -F -s 0.1 --pid="$(<$c/keeper)" $c/log; else cat $c/log; fi ;;
  kill | stop) if [[ $* == *TERM* ]]; then kill "$(<$c/pid)"; else kill -KILL "$(<$c/pid)"; fi && sleep 0.2 ;;
  wait) until [[ -e $c/code ]]; do sleep 0.05; done && cat $c/code ;;
  rm) rm -r $c ;;
esac
"""
# Does what the file `run` says, or what `run.N` says on the N-th creation.
IMAGE = """#!/bin/bash
printf '%s\\0' "$@" >"$HOME/command"
env -0 >"$HOME/environment"
echo "step 1"
case $(cat "$STAND_IN/run.$(<"$HOME/creation")" 2>/dev/null || cat "$STAND_IN/run") in
  end) exit 0 ;;
  fail) echo "ValueError: no such task" && exit 3 ;;
  wait) trap 'echo saved; exit 75' TERM ;;
  stubborn) trap '' TERM ;;
esac
while [[ ! -e $STAND_IN/end ]]; do sleep 0.05; done
echo "step 2"
"""


@dataclasses.dataclass
class Cloud:
    """A project in which only the workers' processes are real."""

    root: Path
    environment: dict[str, str]

    def script(self, **answers: Any) -> None:
        (self.root / "script.json").write_text(json.dumps(answers))

    def mode(self, mode: str, creation: int | None = None) -> None:
        (self.root / ("run" if creation is None else f"run.{creation}")).write_text(mode)

    def pod(self, *words: str, **changed: Any) -> subprocess.CompletedProcess[str]:
        options = {"env": self.environment, "stdin": subprocess.DEVNULL, "timeout": 60, **changed}
        return subprocess.run([SCRIPT, *words], capture_output=True, text=True, check=False, **options)

    def calls(self) -> list[list[str]]:
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self) -> list[str]:
        """The calls that change something: create, delete, prepare, launch, clear, stop."""
        words = [
            shlex.split(call[-1].removeprefix("--command="))[4] if call[3] == "ssh" else call[3]
            for call in self.calls()
        ]
        return [word for word in words if word not in ("describe", "status")]

    def home(self, worker: int = 0, node: str = "sbs") -> Path:
        return self.root / "nodes" / node / str(worker)

    def words(self, name: str, worker: int = 0, node: str = "sbs") -> list[str]:
        return (self.home(worker, node) / name).read_text().split("\0")[:-1]

    def command(self, worker: int = 0, node: str = "sbs") -> tuple[list[str], str]:
        """The command of a run, and the launch that it was started with."""
        *command, launch = self.words("command", worker, node)
        assert launch.startswith("--launch_id=")
        return command, launch

    def pid(self, worker: int = 0) -> int:
        return int((self.home(worker) / "container/pid").read_text())


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    root = tmp_path / "a cloud"
    stand_in = REPOSITORY / "tests" / "cloud_stand_in.py"
    write(root / "near/gcloud", f'#!/bin/sh\nexec "{sys.executable}" -S -E "{stand_in}" "$@"\n')
    write(root / "far/docker", DOCKER)
    write(root / "far/image", IMAGE)
    write(root / "far/gcloud", "#!/bin/sh\necho token\n")
    write(root / "far/hostname", '#!/bin/sh\necho "$WORKER"\n')
    write(root / "far/sudo", '#!/bin/sh\nexec "$@"\n')
    settings = {"TPU_PROJECT": "p", "TPU_ZONE": "z", "TPU_TYPE": "v5litepod-16", "TPU_POLL": "0.05"}
    settings |= {"IMAGE": "r-docker.pkg.dev/p/sbs/sbs:1"}
    environment = {"PATH": f"{root / 'near'}:/usr/bin:/bin", "HOME": str(tmp_path), "STAND_IN": str(root)}
    made = Cloud(root, environment | {f"SBS_{name}": value for name, value in settings.items()})
    made.script()
    made.mode("end")
    yield made
    (root / "end").touch()
    end_processes(root)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def ready(cloud: Cloud, mode: str = "wait") -> None:
    """Returns a slice with a run in progress."""
    cloud.mode(mode)
    for words in (("create",), ("start", *TRAIN)):
        done = cloud.pod(*words)
        assert done.returncode == 0, done.stderr


ONCE = ["create", "prepare", "launch"]


def test_run_goes_from_nothing_to_the_end_of_the_run(cloud: Cloud) -> None:
    cloud.script(resource=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    done = cloud.pod("run", "--spot", "--create_flag=--network=n", "--env", "A=b c", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ONCE
    assert cloud.calls()[0] == [
        *("compute", "tpus", "queued-resources", "create", "sbs", "--project=p", "--zone=z", "--quiet"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=sbs", "--spot"),
        "--network=n",
    ]
    assert cloud.command(0) == cloud.command(1)
    for worker in (0, 1):
        assert cloud.command(worker)[0] == ["sbs", "train", "--multihost", *TRAIN[3:]]
        environment = cloud.words("environment", worker)
        assert {"A=b c", "JAX_COORDINATOR_PORT=8476"} <= set(environment)
        assert not any(word.startswith("MEGASCALE") for word in environment)
        assert {"--privileged", "--network=host"} <= set(cloud.words("arguments", worker))
    said = [line.split(" ", 1)[1] for line in done.stderr.splitlines()]
    assert [line for line in said if line.startswith("sbs is")] == [
        "sbs is WAITING_FOR_RESOURCES",
        "sbs is PROVISIONING",
    ]
    assert "delete --name=sbs --project=p --zone=z" in said[-1]


def test_values_with_spaces_quotes_and_dollars_arrive_as_they_were(cloud: Cloud) -> None:
    values = ["--gin.A='it\\'s \"x\"'", "--gin.B=[1, 2]", "--gin.C=$HOME `date` \\n !", "--gin.D=", "a\nb", "*", "ä"]
    done = cloud.pod("run", "--env", "E=$HOME 'q'", *TRAIN, *values)
    assert done.returncode == 0, done.stderr
    assert cloud.command()[0] == ["sbs", "train", "--multihost", *TRAIN[3:], *values]
    assert "E=$HOME 'q'" in cloud.words("environment")


def test_several_slices_are_one_resource_of_several_nodes(cloud: Cloud) -> None:
    done = cloud.pod("run", "--slices", "2", "--name", "pod", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert {"--node-count=2", "--node-prefix=pod"} <= set(cloud.calls()[0])
    for node in ("pod-0", "pod-1"):
        for worker in (0, 1):
            assert cloud.words("command", worker, node)[:2] == ["sbs", "train"]


@pytest.mark.parametrize(
    "answers",
    [
        {"resource": [["ACTIVE"] * 6 + ["SUSPENDING", "SUSPENDED|SERVICE|"], ["WAITING_FOR_RESOURCES", "ACTIVE"]]},
        {"nodes": {"sbs": ["READY", "REPAIRING", "PREEMPTED"]}},
        {"nodes": {"sbs": ["READY", "TERMINATED"]}},
    ],
    ids=["suspended", "preempted", "terminated"],
)
def test_a_preempted_slice_is_requested_again_and_the_run_restarted(cloud: Cloud, answers: dict[str, Any]) -> None:
    cloud.script(**answers)
    cloud.mode("wait", 0)
    cloud.mode("end", 1)
    done = cloud.pod("run", "--spot", "--backoff", "0", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*ONCE, "delete", *ONCE]
    created = [call for call in cloud.calls() if call[3] == "create"]
    assert created[0] == created[1]
    assert cloud.command(1)[0] == ["sbs", "train", "--multihost", *TRAIN[3:]]


@pytest.mark.parametrize("what", ["rebooted", "replaced"])
def test_a_run_lost_on_nodes_that_are_there_is_restarted_there(cloud: Cloud, what: str) -> None:
    ready(cloud)
    first = cloud.command()
    if what == "rebooted":
        labels = cloud.home(1) / "container/labels"
        labels.write_text(labels.read_text().split()[0] + " another-boot-id")
    end_processes(cloud.root)
    for worker in (0, 1):
        (cloud.home(worker) / "container/code").write_text("1" if worker == 0 else "137")
    if what == "replaced":
        shutil.rmtree(cloud.home(1))
    cloud.mode("end")
    done = cloud.pod("watch", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == [*ONCE, "clear", "prepare", "launch"]
    assert (cloud.home() / "sbs.log").read_text() == "step 1\n"
    assert cloud.command() == cloud.command(1) != first


def test_a_run_that_its_machine_told_to_end_is_started_again(cloud: Cloud) -> None:
    ready(cloud)
    for worker in (0, 1):
        os.kill(cloud.pid(worker), signal.SIGTERM)
    cloud.mode("end")
    done = cloud.pod("watch", *TRAIN)
    assert (done.returncode, "restart 1 of 10" in done.stderr) == (0, True), done.stderr


def test_a_run_that_fails_by_itself_is_not_repeated(cloud: Cloud) -> None:
    cloud.mode("fail")
    done = cloud.pod("run", *TRAIN)
    assert done.returncode == 6
    assert "[sbs] [sbs-w-0] state: failed (exit status 3)" in done.stderr
    assert "[sbs] [sbs-w-0] ValueError: no such task" in done.stderr
    assert cloud.verbs() == ONCE
    assert cloud.pod("status").returncode == 6


@pytest.mark.parametrize("answer", ["DELETED", "SUSPENDED|USER|"])
def test_watch_does_not_bring_back_what_somebody_ended(cloud: Cloud, answer: str) -> None:
    cloud.script(resource=[["ACTIVE"] * 2 + [answer]])
    ready(cloud)
    assert cloud.pod("watch", *TRAIN).returncode == 4
    assert cloud.verbs() == ONCE


@pytest.mark.parametrize(
    ("looks", "status"), [(["PROVISIONING", *["UNREACHABLE"] * 3, "ACTIVE"], 0), (["UNREACHABLE"], 1)]
)
def test_watch_outlasts_a_network_that_is_away_for_a_while(cloud: Cloud, looks: list[str], status: int) -> None:
    cloud.script(resource=[looks])
    done = cloud.pod("run", *TRAIN)
    assert (done.returncode, "Unable to find the server" in done.stderr) == (status, True), done.stderr


def test_watch_gives_up_after_so_many_restarts(cloud: Cloud) -> None:
    cloud.script(resource=[["ACTIVE"] * 3 + ["SUSPENDED|SERVICE|"], ["WAITING_FOR_RESOURCES", "FAILED||no capacity"]])
    cloud.mode("wait")
    done = cloud.pod("run", "--attempts", "3", "--backoff", "1", *TRAIN)
    assert done.returncode == 5, done.stderr
    assert cloud.verbs().count("create") == 4
    assert re.findall(r"restart \d of 3.*", done.stderr) == [
        *("restart 1 of 3", "restart 2 of 3 in 1 s", "restart 3 of 3 in 2 s"),
    ]
    assert "costs money" in done.stderr


def test_a_first_start_that_fails_names_the_node_and_is_not_repeated(cloud: Cloud) -> None:
    (cloud.root / "pull_fails").mkdir()
    (cloud.root / "pull_fails/sbs-1-w-1").touch()
    done = cloud.pod("run", "--slices", "2", *TRAIN)
    assert (done.returncode, "prepare failed: sbs-1 (exit status 1)" in done.stderr) == (1, True)
    assert "[sbs-1] [sbs-1-w-1] manifest unknown" in done.stdout
    assert cloud.verbs() == [*ONCE[:2], "prepare"]


def test_a_container_that_was_made_and_never_ran_has_not_finished(cloud: Cloud) -> None:
    (cloud.root / "run_fails").touch()
    done = cloud.pod("run", "--delete_when_done", *TRAIN)
    assert (done.returncode, "launch failed: sbs (exit status 125)" in done.stderr) == (1, True), done.stderr
    assert cloud.pod("watch", "--delete_when_done", *TRAIN).returncode == 6
    (cloud.root / "run_fails").unlink()
    assert cloud.pod("start", *TRAIN).returncode == 0


def test_a_run_is_not_started_twice(cloud: Cloud) -> None:
    ready(cloud)
    pid = cloud.pid()
    assert cloud.pod("create").returncode == 3
    done = cloud.pod("start", *TRAIN)
    assert (done.returncode, "a run is going on: sbs" in done.stderr) == (3, True)
    # gcloud repeats a command when its connection breaks.
    call = next(call for call in cloud.calls() if " sbs launch " in call[-1])
    for changed, status in ((call, 0), ([*call[:-1], call[-1].replace(" sbs launch ", " sbs launch 9")], 10)):
        again = subprocess.run([cloud.root / "near/gcloud", *changed], env=cloud.environment, check=False)
        assert again.returncode == status
    assert cloud.pid() == pid
    os.kill(pid, 0)


def test_stop_lets_the_run_save_and_waits_for_it(cloud: Cloud) -> None:
    ready(cloud)
    assert cloud.pod("status").stdout.count("state: running") == 2
    done = cloud.pod("stop")
    assert (done.returncode, "costs money" in done.stderr) == (0, True), done.stderr
    assert all("saved\n" in (cloud.home(worker) / "container/log").read_text() for worker in (0, 1))
    assert cloud.pod("status").stdout.count("state: stopped (exit status 75)") == 2
    watched = cloud.pod("watch", *TRAIN)
    assert (watched.returncode, "ended by stop" in watched.stderr) == (4, True)
    assert cloud.pod("start", *TRAIN).returncode == 0


def test_stop_of_a_run_that_does_not_listen(cloud: Cloud) -> None:
    ready(cloud, "stubborn")
    done = cloud.pod("stop", "--timeout", "1")
    assert (done.returncode, "--kill" in done.stderr) == (5, True)
    assert cloud.pod("stop", "--timeout", "1", "--kill").returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(cloud.pid(), 0)


def test_logs_follow_until_the_run_ends(cloud: Cloud) -> None:
    ready(cloud)
    with subprocess.Popen([SCRIPT, "logs"], env=cloud.environment, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        assert "[sbs] [sbs-w-0] step 1" in following.stdout.readline()
        (cloud.root / "end").touch()
        assert "step 2" in following.stdout.read()
        assert following.wait(timeout=20) == 0
    assert set(re.findall(r"\[sbs-w-(\d)\]", cloud.pod("logs", "--all").stdout)) == {"0", "1"}


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
        assert cloud.verbs().count("delete") == (status == 0)
    assert cloud.pod("delete", "--yes").returncode == 0  # what is not there is deleted


def test_a_finished_run_can_delete_its_resource(cloud: Cloud) -> None:
    done = cloud.pod("run", "--delete_when_done", *TRAIN)
    assert (done.returncode, cloud.verbs()) == (0, [*ONCE, "delete"])
    assert "costs money" not in done.stderr


def test_a_request_that_fails_is_not_repeated(cloud: Cloud) -> None:
    cloud.script(resource=[["WAITING_FOR_RESOURCES", "FAILED||Quota limit exceeded"]])
    done = cloud.pod("run", *TRAIN)
    assert (done.returncode, "FAILED: Quota limit exceeded" in done.stderr, cloud.verbs()) == (4, True, ["create"])


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("create", "--accelerator_type", "v5e:4x4"), "expected v5litepod-N"),
        (("create", "--accelerator_type=tpu7x-16"), "GKE"),
        (("create", "--acelerator_type", "v6e-16"), "unknown flag --acelerator_type"),
        (("create", "--spot=1"), "unknown flag --spot=1"),
        (("create", "--slices", "two"), "--slices is two"),
        (("stop", "--timeout=0"), "--timeout is 0"),
        (("create", "--name", "My_pod"), "--name is My_pod"),
        (("create", "--zone"), "needs a value"),
        (("create", "--zone="), "no project or zone"),
        (("create", "v6e-16"), "unexpected argument"),
        (("strat",), "unknown command strat"),
        (("start",), "expected -- sbs train"),
        (("start", "--", "python", "train.py"), "expected -- sbs train"),
        (("start", "--", "sbs", "train"), "needs --gin.MODEL_DIR"),
        (("start", "--", "sbs", "train", "--gin.MODEL_DIR=/mnt/runs"), "--gin.MODEL_DIR=/mnt/runs is not in a bucket"),
        (("start", "--env", "A", *TRAIN), "NAME=VALUE"),
        (("start", "--bucket", "b", *TRAIN), "unknown flag --bucket"),
        (("start", "--image", "r/sbs:latest", *TRAIN), "tag that never moves"),
        (("start", "--image", "localhost:5000/sbs", *TRAIN), "tag that never moves"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_are_named_before_anything_is_called(cloud: Cloud, words: tuple[str, ...], hint: str) -> None:
    done = cloud.pod(*words)
    assert (done.returncode, hint in done.stderr) == (2, True), done.stderr
    assert cloud.calls() == []


def test_help_names_every_command_and_flag(cloud: Cloud) -> None:
    shown = cloud.pod("--help").stdout
    text = Path(SCRIPT).read_text()
    words = " ".join(re.findall(r'^(?:options|switches)=" (.*) "', text, flags=re.MULTILINE)).split()
    assert len(words) > 15
    for word in [*words, "env", "create_flag"]:
        assert f"--{word}" in shown
    assert set(re.findall(r"SBS_\w+", text)) - {"SBS_TPU_POLL"} == set(re.findall(r"SBS_\w+", shown))
    assert all((REPOSITORY / name).exists() for name in re.findall(r"gin_configs/\S+\.gin|docs/\w+\.md", shown))


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Recorded from xpk 1.16.0's --help: flags that a command of docs/tpu.md must have and may have.
XPK = {
    "cluster create": ("cluster tpu-type", "num-slices spot on-demand reservation"),
    "workload create": (
        "command tpu-type workload cluster",
        "num-slices docker-image max-restarts restart-on-exit-codes termination-grace-period-seconds env storage",
    ),
    "workload list": ("cluster", ""),
    "workload delete": ("cluster workload", "force"),
    "cluster delete": ("cluster", "force"),
}
# Recorded from gcloud 528.0.0's --help, of the flags that docs/howto/vertex.md may use.
CUSTOM_JOBS = {
    "create": {"region", "display-name", "config", "service-account", "labels", "network"},
    "list": {"region", "filter", "sort-by", "limit"},
    "stream-logs": {"region", "task-name", "polling-interval"},
    "cancel": {"region"},
}
RECORDER = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n\\0'; } >>"$STAND_IN/called"
[[ $1 == projects ]] && echo 123
exit 0
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Every command that runs when all blocks of both pages are pasted into one shell; each one is only recorded."""
    folder = tmp_path_factory.mktemp("copied")
    for name in ["gcloud", "xpk", "docker", "kubectl", "sbs", "git", "ssh-add", "ssh-agent", "python3", "pip", "hf"]:
        write(folder / "near" / name, RECORDER)
    write(folder / "xpk_venv/bin/python", RECORDER)
    write(folder / "scripts/tpu_pod.sh", RECORDER)
    shutil.copy(REPOSITORY / "scripts/vertex_job.yaml", folder / "scripts")
    text = "\n".join((REPOSITORY / name).read_text() for name in ("docs/tpu.md", "docs/howto/vertex.md"))
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    environment = {"PATH": f"{folder / 'near'}:/usr/bin:/bin", "HOME": str(folder), "STAND_IN": str(folder)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", blocks],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split("\0")[:-1] for line in (folder / "called").read_text().split("\n\0")[:-1]]


def test_calls_of_gcloud_and_xpk_in_the_document_have_known_flags(copied: list[list[str]]) -> None:
    seen, jobs = [], []
    for name, *words in copied:
        flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        if words[:2] == ["compute", "tpus"]:
            assert flags <= FLAGS[" ".join(words[2:4])] | WIDE, words
        if words[:2] == ["ai", "custom-jobs"]:
            assert flags <= CUSTOM_JOBS[words[2]] | WIDE - {"zone"}, words
            jobs.append(words[2])
        if name == "xpk":
            must, may = (set(each.split()) for each in XPK[" ".join(words[:2])])
            assert must <= flags <= must | may | {"project", "zone"}, words
            seen.append(" ".join(words[:2]))
    assert seen == list(XPK)
    assert jobs == ["create", "list", "stream-logs", "create", "cancel"]


def test_calls_of_the_script_in_the_document_have_no_bad_flag(copied: list[list[str]], cloud: Cloud) -> None:
    calls = [words for name, *words in copied if name == "tpu_pod.sh"]
    assert {call[0] for call in calls} == {"run", "watch", "status", "logs", "stop", "delete"}
    write(cloud.root / "near/gcloud", "#!/bin/sh\nexit 1\n")
    assert [call for call in calls if cloud.pod(*call).returncode == 2] == []


def test_every_sbs_command_of_the_document_can_start(copied: list[list[str]]) -> None:
    """Through the real parser, and gin files with their bindings to a configuration."""
    commands = [words for words in copied if words[0] == "sbs"]
    commands += [call[call.index("--") + 1 :] for call in copied if call[0] == "tpu_pod.sh" and "--" in call]
    (workload,) = [call for call in copied if call[:3] == ["xpk", "workload", "create"]]
    command = shlex.split(workload[workload.index("--command") + 1])
    assert command[:4] == ["exec", "sbs", "train", "--multihost"]
    commands.append(command[1:])
    assert [words[1] for words in commands].count("train") == 4
    for _, name, *words in commands:
        arguments, rest = main._parser()[0].parse_known_args([name, *words])
        if name not in ("train", "plan"):
            assert rest == []
            continue
        bindings = [word.removeprefix("--gin.") for word in rest]
        assert all(word.startswith("--gin.") for word in rest)
        unread = ("MODEL_DIR", "RECORDS_DIR", "INITIAL_CHECKPOINT_PATH") if name == "plan" else ()
        config, _ = gin_files.configured("train.TrainConfig", arguments, bindings, unread=unread)
        if name == "train":
            for path in (
                config.model_dir,
                config.data.records_dir,
                config.data.vocabulary,
                config.initial_checkpoint_path,
            ):
                assert path.startswith("gs://my-project-sbs/")
