"""Plays gcloud and a TPU VM of two workers: takes what the real one takes, and does on this computer what is asked.

$STUB_GCLOUD is a folder with `scene.json`, which says what is to happen:

    refusal    create fails with this text
    refused    which calls of create do, counted from 1; all by default
    unheard    create fails, once it has been done
    waiting    states that the queued resource goes through before it is active, or that end it
    drops      which calls of ssh to worker 0 drop their connection, counted from 1
    preempted  after which calls of ssh to worker 0 the machine is preempted
    ready      files in this folder without which such calls are not counted

and, made here, `state.json`; `calls`, every command; `worker_0` and `worker_1`, the workers' home directories; `gcs`.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["STUB_GCLOUD"])
HOMES = [FOLDER / "worker_0", FOLDER / "worker_1"]
UV = """#!/bin/bash
if [ "$1" = venv ]; then mkdir -p .venv/bin && touch .venv/bin/activate
else [ -e requirements.txt ] && echo "$@" > installed; fi
"""


NOTHING = {"resource": None, "node": None, "polls": 0, "creations": 0}


def parse():
    class Parser(argparse.ArgumentParser):
        def __init__(self, **settings):
            super().__init__(allow_abbrev=False, **settings)

    common = Parser(add_help=False)
    common.add_argument("--zone", required=True)
    common.add_argument("--project")
    common.add_argument("--quiet", action="store_true", required=True)  # nobody is there to answer
    root = Parser(prog="gcloud")
    kinds = root.add_subparsers(dest="kind", required=True)
    resources = kinds.add_parser("queued-resources").add_subparsers(dest="verb", required=True)
    nodes = kinds.add_parser("tpu-vm").add_subparsers(dest="verb", required=True)
    create = resources.add_parser("create", parents=[common])
    for flag in ("--node-id", "--accelerator-type", "--runtime-version"):
        create.add_argument(flag, required=True)
    create.add_argument("--spot", action="store_true")
    delete = resources.add_parser("delete", parents=[common])
    delete.add_argument("--force", action="store_true", required=True)  # there is a VM in it
    described = [group.add_parser("describe", parents=[common]) for group in (resources, nodes)]
    for verb in described:
        verb.add_argument("--format", choices=["json"], required=True)
    ssh = nodes.add_parser("ssh", parents=[common])
    ssh.add_argument("--command", required=True)
    ssh.add_argument("--ssh-flag", action="append")
    scp = nodes.add_parser("scp", parents=[common])
    scp.add_argument("--scp-flag", action="append")
    for verb in (ssh, scp):
        verb.add_argument("--worker", choices=["all", "0", "1"], default="0")
    for verb in (create, delete, *described, ssh):
        verb.add_argument("name")
    scp.add_argument("source")
    scp.add_argument("target")
    assert sys.argv[1:3] == ["compute", "tpus"], sys.argv
    return root.parse_args(sys.argv[3:])


def main():
    with (FOLDER / "calls").open("a") as calls:
        calls.write(shlex.join(sys.argv[1:]) + "\n")
    arguments = parse()
    scene = json.loads((FOLDER / "scene.json").read_text())
    file = FOLDER / "state.json"
    state = json.loads(file.read_text()) if file.exists() else dict(NOTHING)
    try:
        globals()[arguments.verb](arguments, scene, state)
    finally:
        temporary = file.with_suffix(".new")  # as whoever launches may be interrupted, and this with it
        temporary.write_text(json.dumps(state))
        temporary.replace(file)


def create(arguments, scene, state):
    state["creations"] += 1
    if "refusal" in scene and state["creations"] in scene.get("refused", [state["creations"]]):
        fail(1, scene["refusal"])
    if state["resource"] is not None:
        fail(1, f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: {arguments.name}")
    if arguments.node_id != arguments.name:
        fail(1, "this stub knows nodes by the names of their resources")
    state["resource"] = [*scene.get("waiting", []), "ACTIVE"]
    if "unheard" in scene:
        fail(1, "ERROR: gcloud crashed (ConnectionError): timed out")


def describe(arguments, scene, state):
    if arguments.kind == "tpu-vm":
        if state["node"] is None:
            fail(1, "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource was not found")
        print(json.dumps({"state": state["node"], "networkEndpoints": [{"ipAddress": "10.0.0.1"}] * len(HOMES)}))
        return
    if state["resource"] is None:
        fail(1, "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    now, *later = state["resource"]
    if now == "ACTIVE" and state["node"] is None:
        state["node"] = "READY"
        for home in HOMES:
            (home / ".local" / "bin").mkdir(parents=True)
            (home / ".local" / "bin" / "uv").write_text(UV)
            (home / ".local" / "bin" / "uv").chmod(0o755)
    detail = {"failedData": {"error": {"message": "the zone has none"}}} if now == "FAILED" else {}
    print(json.dumps({"name": arguments.name, "state": {"state": now, **detail}}))
    if later and now != "FAILED":
        state["resource"] = later


def delete(arguments, scene, state):
    if state["resource"] is None:
        fail(1, "ERROR: (gcloud.compute.tpus.queued-resources.delete) NOT_FOUND: Resource was not found")
    vanish(state)
    state["resource"] = state["node"] = None


def ssh(arguments, scene, state):
    need_node(state)
    counts = arguments.worker == "0" and all((FOLDER / file).exists() for file in scene.get("ready", []))
    for home in workers(arguments.worker):
        run(home, arguments.command)
        if arguments.worker == "all" and "setsid" in arguments.command:
            run(home, arguments.command)  # as the real one does where a connection drops
    if counts:
        state["polls"] += 1
        if state["polls"] in scene.get("preempted", []):
            vanish(state)
            state["resource"], state["node"] = scene.get("left", ["SUSPENDED"]), "PREEMPTED"
        if state["polls"] in scene.get("drops", []):
            fail(255, "ssh: connect to host 10.0.0.1 port 22: Connection timed out")


def scp(arguments, scene, state):
    need_node(state)
    for home in workers(arguments.worker):
        source, target = (
            str(home / path.partition(":")[2]) if ":" in path else path for path in (arguments.source, arguments.target)
        )
        shutil.copy(source, target)


def workers(named):
    return HOMES if named == "all" else [HOMES[int(named)]]


def run(home, script):
    """The worker's root folder is FOLDER as far as /gcs goes, and it has commands that need no rights."""
    here = {"HOME": str(home), "PATH": f"{FOLDER / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script.replace("/gcs/", f"{FOLDER}/gcs/")], cwd=home, env=os.environ | here)
    if done.returncode:
        sys.exit(done.returncode)


def need_node(state):
    if state["node"] != "READY":
        fail(1, f"ERROR: (gcloud.compute.tpus.tpu-vm.ssh) This TPU has terminal state {state['node']}")


def vanish(state):
    for home in HOMES:
        if (home / "launch" / "pid").exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((home / "launch" / "pid").read_text()), signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def fail(status, text):
    print(text, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
