import subprocess
import sys
from types import SimpleNamespace

import pytest

from launch import payload, tpu_vm
from launch.gcloud import RUNTIME_VERSIONS
from personalize_jax.errors import UserError
from tests.launch.cloud import Cloud

GIVEN = {
    "name": "rex",
    "type": "v5litepod-16",
    "zone": "us-west4-a",
    "project": None,
    "version": None,
    "spot": True,
    "copy": [],
    "keep": False,
    "poll": 0.0,
    "dry_run": True,
}
RUN = ["bash", "program.sh", "--workdir=gs://bucket/rex"]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    cloud = Cloud(tmp_path, monkeypatch)
    (cloud.project / "photos").mkdir()
    (cloud.project / "photos" / "a.png").touch()

    def prepared(command=RUN, **changes):
        return tpu_vm.prepare(SimpleNamespace(**GIVEN | {"logs": str(cloud.logs)} | changes), command)

    return prepared


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "rex; rm -rf ~"}, "--name="),
        ({"name": "-x"}, "--name="),
        ({"name": "../rex"}, "--name="),
        ({"name": "r" * 64}, "--name="),
        ({"name": "rex\n"}, "--name="),
        ({"type": "v5litepod"}, "--type="),
        ({"type": "v9-8"}, "give its runtime version by --version"),
        ({"zone": "us-west4"}, "--zone="),
        ({"project": "p --flag"}, "--project="),
        ({"version": "$(x)"}, "--version="),
        ({"command": []}, "put it after --"),
        ({"command": ["bash", "--workdir=runs/rex"]}, "write to a bucket"),
        ({"command": ["bash", "--images=photos"]}, "add --copy=photos"),
        ({"copy": ["missing"]}, "--copy=missing"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(prepare, changes, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(**changes)
    assert str(error.value).count("\n") == 0


def test_gcloud_is_needed_except_for_a_dry_run(prepare, monkeypatch, tmp_path):
    git = tmp_path / "git_only"
    git.mkdir()
    (git / "git").symlink_to(subprocess.run(["which", "git"], capture_output=True, text=True).stdout.strip())
    monkeypatch.setenv("PATH", str(git))
    prepare()
    with pytest.raises(UserError, match="gcloud was not found"):
        prepare(dry_run=False)


@pytest.mark.parametrize("generation", RUNTIME_VERSIONS)
def test_every_generation_has_an_image(prepare, generation):
    machine = prepare(type=f"{generation}-8").machine
    assert machine.runtime_version == RUNTIME_VERSIONS[generation]
    assert prepare(type=f"{generation}-8", version="another").machine.runtime_version == "another"


def test_the_machines_disk_will_do_if_the_machine_is_kept(prepare, capsys):
    prepare(["bash", "--workdir=runs/rex"], keep=True, spot=False)
    assert capsys.readouterr().err == ""
    prepare(["bash", "--workdir=runs/rex"], keep=True, spot=True)
    assert "a preemption loses it" in capsys.readouterr().err


def test_the_command_in_a_dry_run(tmp_path):
    flags = ["--name=rex", "--type=v5litepod-16", "--zone=us-west4-a", "--spot", "--dry_run", f"--logs={tmp_path}"]
    images = "--images=personalize_jax/assets/world/subject"
    program = ["python", "-m", "personalize_jax.personalize", "--config=configs/world.py", images]
    done = subprocess.run(
        [sys.executable, "-m", "launch.tpu_vm", *flags, "--", *program, "--workdir=gs://bucket/rex"],
        cwd=payload.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert all(line.startswith("gcloud compute tpus ") for line in printed)
    assert "queued-resources create rex" in printed[1] and "queued-resources delete rex" in printed[-1]
    assert any(f"{images} --workdir=/gcs/bucket/rex" in line for line in printed)


def test_the_command_refuses_with_status_2():
    done = subprocess.run(
        [sys.executable, "-m", "launch.tpu_vm", "--name=rex", "--type=v5litepod-16", "--zone=us-west4-a", "--dry_run"],
        cwd=payload.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: No command was given; put it after --")
