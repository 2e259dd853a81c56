import subprocess
import sys
from types import SimpleNamespace

import pytest

from launch import payload, tpu_vm
from launch.gcloud import RUNTIME_VERSIONS
from personalize_jax.runtime.errors import UserError
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
ROOT = payload.ROOT
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


@pytest.fixture
def project(prepare, monkeypatch):
    """This project in place of a small one; that it is packed is tested elsewhere."""
    monkeypatch.setattr(payload, "ROOT", ROOT)
    monkeypatch.setattr(payload, "pack", lambda files, archive: None)


@pytest.mark.parametrize("accelerator", ["v5litepod-16", "v6e-16", "v4-16", "v5p-128", "v3-32"])
def test_on_several_workers_a_command_must_be_one_program(prepare, project, accelerator):
    command = ["python", "-m", "personalize_jax.pretrain", "--workdir=gs://bucket/rex"]
    with pytest.raises(UserError, match=f"A {accelerator} has several workers; add --multihost"):
        prepare(command, type=accelerator)
    prepare([*command, "--multihost"], type=accelerator)
    generation = accelerator.partition("-")[0]
    prepare(command, type=f"{generation}-8")
    alone = ["python", "-m", "experiments.num_images", "--workdir=gs://bucket/rex"]
    with pytest.raises(UserError, match=f"experiments.num_images runs on one worker, .* give --type={generation}-8"):
        prepare(alone, type=accelerator)
    prepare(alone, type=f"{generation}-8")
    prepare(RUN, type=accelerator)  # what it does is not known


def test_models_with_a_licence_need_a_token_which_is_brought_along(prepare, project, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    command = ["python", "-m", "personalize_jax.personalize", "--config=configs/deepfloyd_if.py:M"]
    command += ["--workdir=gs://bucket/rex", "--multihost"]
    with pytest.raises(UserError, match="asks for its licence: accept it .* set HF_TOKEN here"):
        prepare(command)
    prepare([*command, "--config.pretrained=gs://bucket/if"])
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert prepare(command).token == "hf_secret"


def test_a_folder_that_may_be_a_name_on_the_hub_is_pointed_out(prepare, project, capsys):
    prepare(["python", "-m", "personalize_jax.sample", "--pipeline=models/sd15", "--out=gs://bucket/o", "--multihost"])
    assert "models/sd15 is no folder here; it is taken for a name" in capsys.readouterr().err


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
        [sys.executable, "-m", "launch.tpu_vm", *flags, "--", *program, "--workdir=gs://bucket/rex", "--multihost"],
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
