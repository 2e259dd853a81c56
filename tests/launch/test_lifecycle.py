import contextlib
import hashlib
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from launch import lifecycle, payload
from personalize_jax.runtime.errors import UserError
from tests.launch.cloud import Cloud
from tests.waiting import until

# What a program does the first time that it is run, and what afterwards; runs are counted in the bucket, by worker. The
# workers wait for each other, as processes of one program do.
IN_TURN = """
mkdir -p "$1" && mine="$1/$(basename "$HOME")" && echo begun >> "$mine"
until [ -e "$1/worker_0" ] && [ -e "$1/worker_1" ]; do sleep 0.02; done
if [ "$(wc -l < "$mine")" = 1 ]; then {first}; else {later}; fi
"""
# Until it is killed, for which it says that it is ready.
FOREVER = 'touch "$1/ready_$(basename "$HOME")"; sleep 1000000'
READY = [f"gcs/bucket/rex/ready_worker_{i}" for i in range(2)]
# Until the launch has asked worker 0 so many times: calls are written down before they are answered.
ASKED = 'until [ "$(grep -c -- --worker=0 "$STUB_GCLOUD/calls")" -ge {0} ]; do sleep 0.02; done'


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    made = Cloud(tmp_path, monkeypatch)
    yield made
    for pid in made.folder.glob("worker_*/launch/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def times_begun(cloud, run="rex"):
    return {
        file.name: len(file.read_text().split()) for file in (cloud.folder / "gcs" / "bucket" / run).glob("worker_?")
    }


def test_a_smooth_run(cloud, capfd):
    cloud.scene(waiting=["WAITING_FOR_RESOURCES", "PROVISIONING"])
    cloud.script('pwd; cat installed; echo "with $1"; sleep 0.1; echo the end')
    assert cloud.launch("bash", "program.sh", '--workdir=gs://bucket/it\'s "r" $HOME; exit 3') == 0
    captured = capfd.readouterr()
    assert "the end\n" in captured.out and "with --workdir=" in captured.out
    assert '/gcs/bucket/it\'s "r" $HOME; exit 3\n' in captured.out  # nothing that the user wrote is the shell's
    assert "-r requirements.txt jax[tpu]==4.5.6" in captured.out
    assert "WAITING_FOR_RESOURCES" in captured.err and "PROVISIONING" in captured.err
    assert [file.read_text() for file in sorted(cloud.logs.glob("1/*.log"))] == [
        captured.out,
        captured.out.replace("worker_0", "worker_1"),
    ]
    assert not cloud.exists
    assert len(cloud.calls("queued-resources", "create", "--spot")) == 1


def test_a_failing_program_ends_all_with_its_status(cloud, capfd):
    cloud.script('case "$HOME" in *1) echo boom >&2; exit 7;; esac; sleep 1000000')
    assert cloud.launch() == 7
    assert "failed, with status 7" in capfd.readouterr().err
    assert (cloud.logs / "1" / "worker_1.log").read_text() == "boom\n"
    assert not cloud.exists
    assert len(cloud.calls("create")) == 1


def test_a_kept_machine_is_named_with_what_deletes_it_and_runs_again(cloud, capfd):
    cloud.script("exit 7")
    assert cloud.launch(keep=True) == 7
    assert "gcloud compute tpus queued-resources delete rex --force --zone=us-west4-a" in capfd.readouterr().err
    assert cloud.exists
    cloud.script("exit 0")  # what was wrong has been put right
    assert cloud.launch() == 0
    assert len(cloud.calls("create")) == 1
    assert not cloud.exists


def test_a_preempted_run_is_done_again_until_its_manifest_says_done(cloud, capfd):
    done = 'echo "{\\"done\\": true}" > "$1/manifest.json"'
    unfinished = 'echo "{\\"done\\": false}" > "$1/manifest.json"'
    cloud.script(IN_TURN.format(first=f"{unfinished}; echo first; {FOREVER}", later=f"echo later; {done}"))
    cloud.scene(preempted=[1], ready=READY)
    assert cloud.launch("bash", "program.sh", "gs://bucket/rex", "--workdir=gs://bucket/rex") == 0
    captured = capfd.readouterr()
    assert captured.out == "first\nlater\n"
    assert "the machine is gone: SUSPENDED" in captured.err
    assert times_begun(cloud) == {"worker_0": 2, "worker_1": 2}
    assert len(cloud.calls("queued-resources", "create")) == 2
    assert (cloud.logs / "1" / "worker_0.log").read_text() == "first\n"
    assert (cloud.logs / "2" / "worker_0.log").read_text() == "later\n"
    assert not cloud.exists


def test_a_preemption_that_the_queued_resource_has_not_noticed(cloud):
    cloud.script(IN_TURN.format(first=FOREVER, later="true"))
    cloud.scene(preempted=[2], left=["ACTIVE"], ready=READY)
    assert cloud.launch("bash", "program.sh", "gs://bucket/rex") == 0
    assert times_begun(cloud) == {"worker_0": 2, "worker_1": 2}
    assert not cloud.exists


def test_exit_status_0_with_an_unfinished_manifest_is_not_the_end(cloud):
    write = 'echo "{{\\"done\\": {0}}}" > "$1/manifest.json"'
    cloud.script(IN_TURN.format(first=write.format("false"), later=write.format("true")))
    assert cloud.launch("bash", "program.sh", "gs://bucket/rex", "--workdir=gs://bucket/rex") == 0
    assert times_begun(cloud) == {"worker_0": 2, "worker_1": 2}
    assert len(cloud.calls("queued-resources", "create")) == 1


def test_a_program_that_saved_and_stopped_is_begun_again_where_it_is(cloud):
    cloud.script(IN_TURN.format(first='case "$HOME" in *0) exit 75;; esac; sleep 1000000', later="true"))
    assert cloud.launch("bash", "program.sh", "gs://bucket/rex") == 0
    assert times_begun(cloud) == {"worker_0": 2, "worker_1": 2}
    assert len(cloud.calls("queued-resources", "create")) == 1
    assert not cloud.exists


def test_restarts_are_bounded(cloud, capfd):
    cloud.script(IN_TURN.format(first="exit 75", later="exit 75"))
    assert cloud.launch("bash", "program.sh", "gs://bucket/rex", max_restarts=1) == 75
    assert "begun 2 times and is not done" in capfd.readouterr().err
    assert times_begun(cloud) == {"worker_0": 2, "worker_1": 2}
    assert not cloud.exists


def test_a_dropped_connection_neither_stops_nor_repeats_the_program(cloud, capfd):
    waiting = ASKED.format(6)
    cloud.script(IN_TURN.format(first=f"for i in 1 2 3; do echo $i; done; {waiting}; echo 4; echo 5", later="exit 9"))
    cloud.scene(drops=[1, 2, 4])
    assert cloud.launch("bash", "program.sh", "gs://bucket/rex") == 0
    captured = capfd.readouterr()
    assert captured.out == "1\n2\n3\n4\n5\n"
    assert captured.err.count("the connection dropped") == 3
    assert times_begun(cloud) == {"worker_0": 1, "worker_1": 1}


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        ({"refusal": "x\nERROR: (gcloud.create) RESOURCE_EXHAUSTED: Quota limit exceeded"}, "Quota limit exceeded"),
        ({"waiting": ["WAITING_FOR_RESOURCES", "FAILED"]}, "rex was not given: the zone has none"),
    ],
    ids=["at once", "later"],
)
def test_a_machine_that_is_refused_is_the_users_error_and_leaves_nothing(cloud, scene, message):
    cloud.script("true")
    cloud.scene(**scene)
    with pytest.raises(UserError, match=message):
        cloud.launch()
    assert not cloud.exists
    assert not cloud.calls("ssh")


def test_a_machine_that_is_refused_after_a_preemption_is_asked_for_again(cloud, capfd):
    cloud.script(IN_TURN.format(first=FOREVER, later="true"))
    cloud.scene(preempted=[1], ready=READY, refusal="ERROR: (gcloud.create) RESOURCE_EXHAUSTED: none left", refused=[2])
    assert cloud.launch("bash", "program.sh", "gs://bucket/rex", max_restarts=2) == 0
    assert "rex was not given: ERROR: (gcloud.create) RESOURCE_EXHAUSTED: none left" in capfd.readouterr().err
    assert len(cloud.calls("queued-resources", "create")) == 3
    assert not cloud.exists


def test_restarts_are_counted_whether_the_machine_came_or_not(cloud):
    cloud.script(IN_TURN.format(first=FOREVER, later="true"))
    cloud.scene(preempted=[1], ready=READY, refusal="ERROR: none left", refused=[2, 3])
    assert cloud.launch("bash", "program.sh", "gs://bucket/rex", max_restarts=2) == 75
    assert len(cloud.calls("queued-resources", "create")) == 3


@pytest.mark.parametrize("waiting", [[], ["WAITING_FOR_RESOURCES", "PROVISIONING"]])
def test_a_machine_that_was_granted_unheard_is_used_and_deleted(cloud, waiting):
    cloud.script("true")
    cloud.scene(unheard=True, waiting=waiting)
    assert cloud.launch() == 0
    assert len(cloud.calls("create")) == 1
    assert not cloud.exists


def test_an_error_of_the_first_look_is_the_users(cloud):
    cloud.script("true")
    (cloud.folder / "scene.json").write_text("broken")
    with pytest.raises(UserError, match="gcloud cannot be asked about rex"):
        cloud.launch()
    assert len(cloud.calls("describe")) == 1


def test_a_failure_that_a_preemption_brought_is_none(cloud, monkeypatch):
    cloud.script(IN_TURN.format(first="exit 134", later="true"))
    watch = lifecycle.Launch._watch

    def preempted(launch, log):
        status = watch(launch, log)
        if status == 134:
            file = cloud.folder / "state.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"resource": ["SUSPENDED"], "node": "PREEMPTED"}))
        return status

    monkeypatch.setattr(lifecycle.Launch, "_watch", preempted)
    assert cloud.launch("bash", "program.sh", "gs://bucket/rex") == 0
    assert len(cloud.calls("queued-resources", "create")) == 2


def test_an_install_that_fails_deletes_the_machine(cloud, capfd, monkeypatch):
    cloud.script("true")
    (cloud.project / "requirements.txt").rename(cloud.project / "elsewhere.txt")
    monkeypatch.setattr(payload, "jax_version", lambda: "4.5.6")
    assert cloud.launch() == 1
    assert "giving up" in capfd.readouterr().err
    assert not cloud.exists


def test_interrupted_it_says_how_to_go_on_and_the_same_command_does(cloud, capfd):
    cloud.script(
        IN_TURN.format(first='echo first; until [ -e "$1/go" ]; do sleep 0.02; done; echo end', later="exit 9")
    )
    program = ("bash", "program.sh", "gs://bucket/rex")
    log = cloud.logs / "1" / "worker_0.log"

    def interrupt():
        until(lambda: log.exists() and log.read_text())
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert cloud.launch(*program) == 130
    thread.join()
    said = capfd.readouterr().err
    assert "python -m launch.tpu_vm" in said
    assert "gcloud compute tpus queued-resources delete rex --force" in said
    assert cloud.exists
    with pytest.raises(UserError, match="running another command"):
        cloud.launch("bash", "program.sh", "gs://bucket/other")
    assert cloud.exists
    (cloud.folder / "gcs" / "bucket" / "rex" / "go").touch()
    assert cloud.launch(*program) == 0
    assert capfd.readouterr().out == "first\nend\n"
    assert times_begun(cloud) == {"worker_0": 1, "worker_1": 1}
    assert not cloud.exists


@pytest.mark.parametrize("keep", [False, True])
def test_an_access_token_is_brought_by_a_file_and_stands_on_no_command_line(cloud, capfd, keep):
    cloud.script("cd ~/.cache/huggingface && stat -c %a token && sha256sum token")
    assert cloud.launch(token="hf_secret", keep=keep) == 0
    assert f"600\n{hashlib.sha256(b'hf_secret').hexdigest()}" in capfd.readouterr().out
    assert len(cloud.calls("scp", "hf_token")) == 1
    assert not list(cloud.folder.glob("worker_*/.cache/huggingface/token"))
    everything = [file for folder in (cloud.folder, cloud.logs) for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in everything if b"hf_secret" in file.read_bytes()]
    assert cloud.launch("bash", "program.sh", token="hf_secret", dry_run=True) == 0
    printed = capfd.readouterr().out
    assert "scp hf_token rex:hf_token" in printed and "hf_secret" not in printed


def test_a_program_that_was_killed_is_begun_again(cloud):
    cloud.script(IN_TURN.format(first='kill -9 -- "-$(cat ../launch/pid)"', later="true"))
    assert cloud.launch("bash", "program.sh", "gs://bucket/rex") == 0
    assert times_begun(cloud)["worker_0"] == 2


def test_a_dry_run_runs_nothing_and_prints_what_a_smooth_run_calls(cloud, capfd):
    cloud.script("true")
    assert cloud.launch("bash", "program.sh", "--workdir=gs://bucket/rex", dry_run=True) == 0
    printed = capfd.readouterr().out.splitlines()
    assert not (cloud.folder / "calls").exists()
    assert not (cloud.logs / "1").exists()
    (cloud.logs / "1").mkdir()
    # Pasted into a shell, line by line, they take the program from nothing to its end.
    for line in printed:
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=Path(cloud.logs))
        assert done.returncode == 0 or "NOT_FOUND" in done.stderr, line
        if "setsid" in line:
            until(lambda: all((home / "launch" / "status").exists() for home in homes(cloud)))
    called = [line.removeprefix("gcloud ") for line in printed]
    assert cloud.calls("compute") == called
    assert not cloud.exists
    assert (cloud.logs / "1" / "worker_0.log").exists()


def homes(cloud):
    return [cloud.folder / "worker_0", cloud.folder / "worker_1"]


def test_statuses_of_workers():
    assert lifecycle.exit_status(["running", "running"]) is None
    assert lifecycle.exit_status(["3", "lost"]) == 75
    assert lifecycle.exit_status(["absent"]) == 75
    assert lifecycle.exit_status(["0", "2", "running"]) == 2
    assert lifecycle.exit_status(["3", "2"]) == lifecycle.exit_status(["2", "3"]) == 2
    assert lifecycle.exit_status(["0", "0", "running"]) is None
    assert lifecycle.exit_status([]) is None
