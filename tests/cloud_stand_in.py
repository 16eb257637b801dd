"""A stand-in for gcloud, run as a command: it records every call, plays a script of states, and has real workers.

Its folder (environment STAND_IN) holds:
    calls.jsonl                 the arguments of every call, in order
    script.json                 {"resource": [[state of each look, ..] of each creation, ..], "nodes": {node: [..]},
                                 "workers": 2}; the last state of a list stays
    nodes/<node>/<worker>/      the home of a worker; ssh runs its command there with bash, scp copies there
    far/                        the commands of the workers

Flags are those of gcloud 528.0.0 (`gcloud meta lint-gcloud-commands` accepts the calls); others are refused. Words of
failures are gcloud's, too. A creation numbers from 0; what it made is gone, processes included, when it is deleted.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(os.environ.get("STAND_IN", "."))
WIDE = {"project", "zone", "quiet", "format"}
SSH = {
    "worker",
    "internal-ip",
    "dry-run",
    "plain",
    "force-key-file-overwrite",
    "ssh-key-file",
    "strict-host-key-checking",
}
FLAGS = {
    "queued-resources create": {
        *(
            "accelerator-type",
            "runtime-version",
            "node-id",
            "node-count",
            "node-prefix",
            "spot",
            "reserved",
            "guaranteed",
        ),
        *("network", "subnetwork", "service-account", "scopes", "internal-ips", "labels", "metadata", "tags", "async"),
        *("valid-until-duration", "valid-after-duration", "data-disk", "description", "range", "shielded-secure-boot"),
    },
    "queued-resources describe": set(),
    "queued-resources delete": {"force", "async"},
    "queued-resources list": set(),
    "tpu-vm describe": set(),
    "tpu-vm list": set(),
    "tpu-vm accelerator-types": set(),
    "tpu-vm ssh": SSH | {"command", "output-directory", "ssh-flag"},
    "tpu-vm scp": SSH | {"recurse", "compress", "scp-flag"},
}


def remembered() -> dict[str, Any]:
    file = ROOT / "state.json"
    return json.loads(file.read_text()) if file.exists() else {"created": 0, "exists": False, "looks": 0, "nodes": {}}


def remember(state: dict[str, Any]) -> None:
    (ROOT / "state.json").write_text(json.dumps(state))


def step(states: list[Any], look: int) -> Any:
    return states[min(look, len(states) - 1)]


def error(verb: str, text: str, status: int = 1) -> int:
    print(f"ERROR: (gcloud.compute.tpus.{verb.replace(' ', '.')}) {text}", file=sys.stderr)
    return status


def end_processes(root: pathlib.Path) -> None:
    """Everything that runs on the workers, as when their machines are taken away."""
    for file in root.glob("nodes/*/*/sbs_run/pid"):
        with contextlib.suppress(ProcessLookupError):
            group = os.getpgid(int(file.read_text().split()[0]))
            if group != os.getpgid(0):  # a run that was not detached would take the tests along
                os.killpg(group, signal.SIGKILL)


def on_workers(node: str, flags: dict[str, str], arguments: list[list[str]]) -> int:
    """One process a worker, at the same time; the words and the exit status of gcloud."""
    workers = range(len(arguments)) if flags.get("worker") == "all" else [int(flags.get("worker", "0"))]
    running = []
    for worker in workers:
        home = ROOT / "nodes" / node / str(worker)
        home.mkdir(parents=True, exist_ok=True)
        (home / "creation").write_text(str(remembered()["created"] - 1))
        path = f"{ROOT / 'far'}:/usr/bin:/bin"
        environment = {"HOME": str(home), "PATH": path, "STAND_IN": str(ROOT), "WORKER": f"{node}-w-{worker}"}
        process = subprocess.Popen(arguments[worker], cwd=home, env=environment, stdin=subprocess.DEVNULL)
        running.append((worker, process))
    statuses = [(worker, process.wait()) for worker, process in running]
    failures = [(worker, status) for worker, status in statuses if status]
    for worker, status in failures if len(statuses) > 1 else []:
        print(
            f"##### Command execution on worker {worker} failed with exit status {status}. Continuing.", file=sys.stderr
        )
    return failures[0][1] if failures else 0


def main(words: list[str]) -> int:
    if words[:2] == ["config", "get-value"]:
        print("(unset)", file=sys.stderr)
        return 0
    if words[:2] != ["compute", "tpus"]:
        return error("?", f"Invalid choice: {words}", 2)
    verb, rest = " ".join(words[2:4]), words[4:]
    flags = {word[2:].partition("=")[0]: word.partition("=")[2] for word in rest if word.startswith("--")}
    places = [word for word in rest if not word.startswith("--")]
    unknown = flags.keys() - FLAGS.get(verb, set()) - WIDE
    if verb not in FLAGS or unknown:
        return error(verb, f"unrecognized arguments: {sorted(unknown)}", 2)
    script = {"resource": [["ACTIVE"]], "nodes": {}, "workers": 2, **json.loads((ROOT / "script.json").read_text())}
    state = remembered()
    name = places[-1].removesuffix(":")
    if verb == "queued-resources create":
        if state["exists"]:
            return error(verb, f"ALREADY_EXISTS: Resource '{name}' already exists")
        remember({"created": state["created"] + 1, "exists": True, "looks": 0, "nodes": {}})
        return 0
    if not state["exists"]:
        return error(verb, f"NOT_FOUND: Resource 'projects/p/locations/z/{name}' was not found")
    if verb == "queued-resources describe":
        answer = step(step(script["resource"], state["created"] - 1), state["looks"])
        remember({**state, "looks": state["looks"] + 1})
        if answer == "DELETED":
            remember({**state, "exists": False})
            return error(verb, "NOT_FOUND: it was not found")
        if answer == "UNREACHABLE":
            return error(verb, "There was a problem refreshing your current auth tokens: Unable to find the server")
        print(answer if "|" in answer else f"{answer}||")
        return 0
    if verb == "queued-resources delete":
        end_processes(ROOT)
        shutil.rmtree(ROOT / "nodes", ignore_errors=True)
        remember({**state, "exists": False})
        return 0
    if verb == "tpu-vm describe":
        states = script["nodes"].get(name, ["READY"]) if state["created"] == 1 else ["READY"]
        print(step(states, state["nodes"].get(name, 0)))
        remember({**state, "nodes": {**state["nodes"], name: state["nodes"].get(name, 0) + 1}})
        return 0
    if verb == "tpu-vm scp":
        return on_workers(name, flags, [["cp", str(pathlib.Path(places[0]).absolute()), "."]] * script["workers"])
    return on_workers(name, flags, [["bash", "-c", flags["command"]]] * script["workers"])


if __name__ == "__main__":
    with (ROOT / "calls.jsonl").open("a") as calls:
        fcntl.flock(calls, fcntl.LOCK_EX)
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    sys.exit(main(sys.argv[1:]))
