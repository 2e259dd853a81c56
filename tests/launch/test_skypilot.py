import re
import subprocess
from pathlib import Path

import pytest
import yaml

from launch import lifecycle, payload, worker
from launch.gcloud import RUNTIME_VERSIONS

TASK = yaml.safe_load(Path(lifecycle.__file__).with_name("skypilot.yaml").read_text())

# https://docs.skypilot.co/en/latest/reference/yaml-spec.html
TASK_KEYS = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run"}
RESOURCES_KEYS = {
    *("infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size"),
    *("disk_tier", "network_tier", "image_id", "ports", "labels", "autostop", "any_of", "ordered", "job_recovery"),
}
RECOVERY_KEYS = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
STORAGE_KEYS = {"name", "source", "store", "persistent", "mode", "config"}


def test_its_keys_are_skypilots():
    assert set(TASK) <= TASK_KEYS
    assert set(TASK["resources"]) <= RESOURCES_KEYS
    assert set(TASK["resources"]["job_recovery"]) <= RECOVERY_KEYS
    assert all(set(mount) <= STORAGE_KEYS for mount in TASK["file_mounts"].values())
    assert all(value is None or isinstance(value, str) for value in TASK["envs"].values())


def test_it_begins_again_by_the_status_that_asks_for_it():
    assert TASK["resources"]["job_recovery"]["recover_on_exit_codes"] == [lifecycle.RESTART]


def test_an_access_token_is_a_secret_that_may_be_left_out():
    assert TASK["secrets"] == {"HF_TOKEN": ""}
    assert not any("HF_TOKEN" in part for part in (TASK["envs"], TASK["setup"], TASK["run"]))


def test_the_image_is_the_accelerators():
    generation = re.match(r"tpu-(\w+)-\d+:1$", TASK["resources"]["accelerators"]).group(1)
    assert TASK["resources"]["accelerator_args"] == {"runtime_version": RUNTIME_VERSIONS[generation]}


@pytest.mark.parametrize("part", ["setup", "run"])
def test_its_scripts_are_bash_and_their_variables_given(part):
    subprocess.run(["bash", "-n", "-c", TASK[part]], check=True)
    assert set(re.findall(r"\$\{?([A-Z_]+)", TASK[part])) <= {*TASK["envs"], "HOME", "PATH"}


def test_it_installs_what_the_launcher_installs():
    pinned = re.compile(r"astral\.sh/uv/[\d.]+/install\.sh|--python [\d.]+")
    assert pinned.findall(TASK["setup"]) == pinned.findall(worker.install(payload.jax_version()))
    find = re.search(r"\$\((sed .*)\)", TASK["setup"]).group(1)
    found = subprocess.run(["bash", "-c", find], cwd=payload.ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == payload.jax_version()


def test_the_command_writes_to_the_bucket():
    program = payload.read_command(TASK["run"].replace('"', "").split())
    assert program.workdir.startswith(tuple(TASK["file_mounts"]))
    assert program.local_outputs == []
