"""A stand-in for gcloud, run as a command: records calls, plays a script of states, and starts real worker processes.

Its folder (environment STAND_IN) holds:
    calls.jsonl                 arguments of every call, in order
    script.json                 {"resource": [[state of each look, ..] of each creation, ..], "nodes": {node: [..]}};
                                the last state of a list stays
    nodes/<node>/<worker>/      home of a worker, where ssh runs its command with bash
    far/                        commands of the workers

Flags are those of gcloud 528.0.0; others are refused. Error texts are gcloud's, too. Deleting ends the processes.
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
WORKERS = 2
WIDE = {"project", "zone", "quiet", "format"}
FLAGS = {
    "queued-resources create": {
        *("accelerator-type", "runtime-version", "node-id", "node-count", "node-prefix", "spot", "reserved", "network"),
        *("subnetwork", "service-account", "internal-ips", "labels", "metadata", "tags", "valid-until-duration"),
    },
    "queued-resources describe": set(),
    "queued-resources delete": {"force", "async"},
    "queued-resources list": set(),
    "tpu-vm describe": set(),
    "tpu-vm list": set(),
    "tpu-vm accelerator-types": set(),
    "tpu-vm ssh": {"worker", "internal-ip", "command", "ssh-flag"},
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
    """Kills all processes of the workers, as when their machines are taken away."""
    for file in root.glob("nodes/*/*/container/pid"):
        with contextlib.suppress(ProcessLookupError):
            group = os.getpgid(int(file.read_text()))
            if group != os.getpgid(0):  # a run that is not detached would kill the tests too
                os.killpg(group, signal.SIGKILL)


def ssh(node: str, flags: dict[str, str]) -> int:
    running = []
    for worker in range(WORKERS) if flags["worker"] == "all" else [int(flags["worker"])]:
        home = ROOT / "nodes" / node / str(worker)
        home.mkdir(parents=True, exist_ok=True)
        (home / "creation").write_text(str(remembered()["created"] - 1))
        environment = {
            "HOME": str(home),
            "PATH": f"{ROOT / 'far'}:/usr/bin:/bin",
            "STAND_IN": str(ROOT),
            "WORKER": f"{node}-w-{worker}",
            "MEGASCALE_NUM_SLICES": "3",  # as after a preemption
        }
        running.append(subprocess.Popen(["bash", "-c", flags["command"]], cwd=home, env=environment))
    return max(process.wait() for process in running)


def main(words: list[str]) -> int:
    if words[:2] != ["compute", "tpus"]:
        return error("?", f"Invalid choice: {words}", 2)
    verb, name, rest = " ".join(words[2:4]), words[4], words[5:]
    flags = {word[2:].partition("=")[0]: word.partition("=")[2] for word in rest}
    if verb not in FLAGS or flags.keys() - FLAGS[verb] - WIDE:
        return error(verb, f"unrecognized arguments: {rest}", 2)
    script = {"resource": [["ACTIVE"]], "nodes": {}, **json.loads((ROOT / "script.json").read_text())}
    state = remembered()
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
    return ssh(name, flags)


if __name__ == "__main__":
    with (ROOT / "calls.jsonl").open("a") as calls:
        fcntl.flock(calls, fcntl.LOCK_EX)
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    sys.exit(main(sys.argv[1:]))
