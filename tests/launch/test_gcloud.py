import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import worker
from launch.gcloud import GcloudError, Machine
from tests.launch.cloud import STUB


@pytest.fixture
def every_command(capsys):
    machine = Machine("rex", "v5litepod-16", "us-west4-a", "my-project", "v2-alpha-tpuv5-lite", True, dry_run=True)
    machine.create()
    machine.state()
    machine.num_workers()
    for script in (worker.install("1.2.3"), worker.mount("bucket"), worker.start(["echo", "it's"]), worker.stop()):
        machine.ssh(script)
    for script in (worker.status(), worker.new_log(3), worker.manifest("run")):
        machine.ssh(script, "0")
    machine.copy_to(Path("a file"), "file")
    machine.copy_from("file", 0, Path("file"))
    machine.delete()
    return list(dict.fromkeys(capsys.readouterr().out.splitlines()))


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="the Google Cloud CLI is not installed")
def test_gcloud_itself_accepts_every_command(every_command, tmp_path):
    file = tmp_path / "commands.json"
    wrong = every_command[0].replace("--node-id", "--node")
    file.write_text(json.dumps([{"command_string": line} for line in (*every_command, wrong)]))
    alone = {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true"}
    linted = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        env=os.environ | alone,
        capture_output=True,
        text=True,
        check=True,
    )
    assert [each["success"] for each in json.loads(linted.stdout)] == [True] * len(every_command) + [False]


def test_the_stub_accepts_every_command_and_no_other(every_command, tmp_path):
    (tmp_path / "scene.json").write_text("{}")

    def status(line):
        stub = [sys.executable, "-I", "-S", str(STUB), *shlex.split(line)[1:]]
        return subprocess.run(stub, env={"STUB_GCLOUD": str(tmp_path)}, capture_output=True).returncode

    assert {status(line) for line in every_command} <= {0, 1}  # 2 is what arguments are refused by
    assert status(every_command[0].replace("--node-id", "--node")) == 2
    assert status(every_command[0].replace(" --zone=us-west4-a", "")) == 2
    assert status(every_command[-1].replace(" --force", "")) == 2


def test_an_error_is_told_by_the_line_that_says_it():
    stderr = "Updating.\nERROR: (gcloud.x) PERMISSION_DENIED: no\n- '@type': detail\n  reason: detail\n"
    assert GcloudError(1, stderr).summary == "ERROR: (gcloud.x) PERMISSION_DENIED: no"
    assert GcloudError(255, "one\ntwo\n").summary == "two"
    assert "255" in GcloudError(255, "").summary
