import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from personalize_jax.runtime import manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.interruption import Stopped

ROOT = Path(__file__).parents[2]


def config(**changes):
    made = ConfigDict({"seed": 0, "training": {"num_steps": 10, "mesh": (1, 1), "prior": {"weight": 1.0}}})
    made.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return made.lock()


# The configuration.


def test_the_same_configuration_goes_on(tmp_path):
    manifest.record_config(config(), tmp_path / "run")
    manifest.record_config(config(), tmp_path / "run")
    assert manifest.read_config(tmp_path / "run").training.num_steps == 10
    assert manifest.recorded(tmp_path / "run", "training.num_steps", 3) == 10
    for key, folder in (("training.num_steps", "another"), ("training.nothing", "run"), ("seed.nothing", "run")):
        assert manifest.recorded(tmp_path / folder, key, 3) == 3


def test_another_configuration_is_refused_by_the_names_of_its_keys(tmp_path):
    manifest.record_config(config(), tmp_path)
    kept = manifest.read(tmp_path)
    with pytest.raises(UserError, match=r"different: seed, training\.prior\.weight\)"):
        manifest.record_config(config(training__prior__weight=0.5, seed=1), tmp_path)
    assert manifest.read(tmp_path) == kept


def test_keys_that_may_change_are_recorded_anew_and_the_run_is_no_longer_done(tmp_path):
    may_change = ("training.num_steps",)
    manifest.record_config(config(), tmp_path, may_change)
    with manifest.record(tmp_path, {}, {}):
        pass
    manifest.record_config(config(), tmp_path, may_change)
    assert manifest.read(tmp_path)["done"]
    manifest.record_config(config(training__num_steps=20), tmp_path, may_change)
    assert not manifest.read(tmp_path)["done"]
    assert manifest.read_config(tmp_path).training.num_steps == 20
    with pytest.raises(UserError, match="different: seed"):
        manifest.record_config(config(training__num_steps=30, seed=1), tmp_path, may_change)


def test_keys_that_came_or_went_are_named(tmp_path):
    manifest.record_config(config(), tmp_path)
    more = config().unlock()
    more.training.prior.form = "sampled"
    with pytest.raises(UserError, match=r"training\.prior\.form"):
        manifest.record_config(more, tmp_path)


def test_a_folder_without_a_configuration_is_no_run(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        manifest.read_config(tmp_path)
    (tmp_path / "manifest.json").write_text('{"conf')
    with pytest.raises(UserError, match=r"manifest.json is damaged.*delete it"):
        manifest.read_config(tmp_path)


# Calls and phases.


def test_a_call_says_what_ran_where_and_how_it_ended(tmp_path):
    with manifest.record(tmp_path / "run", {"training": 3}, {"photos": ["12ab"]}):
        with manifest.phase(tmp_path / "run", "tuning"):
            during = manifest.read(tmp_path / "run")
        with manifest.phase(tmp_path / "run", "samples"):
            pass
    after = manifest.read(tmp_path / "run")
    assert not during["done"] and during["calls"][0]["status"] == "running" and during["calls"][0]["phase"] == "tuning"
    assert during["phases"]["tuning"]["done"] is False and manifest.phase_times(tmp_path / "run").keys() == {
        "tuning",
        "samples",
    }
    assert after["done"] and after["seeds"] == {"training": 3} and after["data"] == {"photos": ["12ab"]}
    (call,) = after["calls"]
    assert call["status"] == "done" and call["seconds"] >= 0
    assert 1 <= call["devices"].pop("cores") <= os.cpu_count()
    assert call["devices"] == {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1}
    assert call["versions"].keys() >= {"python", "jax", "jaxlib", "numpy", "orbax-checkpoint"}


@pytest.mark.parametrize(("error", "status"), [(Stopped, "stopped"), (UserError, "failed")])
def test_a_call_that_does_not_end_well_leaves_the_run_unfinished(tmp_path, error, status):
    with pytest.raises(error), manifest.record(tmp_path, {}, {}), manifest.phase(tmp_path, "tuning"):
        raise error
    found = manifest.read(tmp_path)
    assert not found["done"] and not found["phases"]["tuning"]["done"] and found["calls"][0]["status"] == status


def test_a_call_that_was_killed_is_known_to_the_next_one(tmp_path):
    with manifest.record(tmp_path, {}, {}):
        killed = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(killed.replace('"done": true', '"done": false'))
    calls = json.loads(killed)["calls"]
    (tmp_path / "manifest.json").write_text(json.dumps({"calls": [call | {"status": "running"} for call in calls]}))
    with manifest.record(tmp_path, {}, {}):
        pass
    assert [call["status"] for call in manifest.read(tmp_path)["calls"]] == ["killed", "done"]


def test_seconds_of_a_resumed_phase_add_up(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(manifest.time, "monotonic", lambda: now)
    for seconds in (2.0, 3.0):
        with manifest.phase(tmp_path, "tuning"):
            now += seconds
    assert manifest.phase_times(tmp_path) == {"tuning": 5.0}


def test_a_full_disk_hides_no_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="the reason"), manifest.record(tmp_path, {}, {}):
        monkeypatch.setattr(manifest, "write_text", full)
        raise UserError("the reason")


def test_versions_are_those_of_what_the_project_imports():
    section = re.search(r"# What the project imports\.\n(.*?)\n\n", (ROOT / "requirements.txt").read_text(), re.S)
    assert set(re.findall(r"^([\w-]+)==", section[1], re.M)) == set(manifest.PACKAGES) - {"libtpu"}


def test_the_revision_is_that_of_the_checkout_and_says_whether_it_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    copied = tmp_path / "package" / "manifest.py"
    copied.parent.mkdir()
    shutil.copy(manifest.__file__, copied)
    monkeypatch.setattr(manifest, "__file__", str(copied))
    assert manifest._git() is None  # no checkout
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project's")
    assert manifest._git() is None  # within a checkout, but no part of it
    git("add", ".")
    git("commit", "-q", "-m", "all")
    assert manifest._git() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    copied.write_text(copied.read_text() + "\n")
    assert manifest._git() == {"revision": git("rev-parse", "HEAD"), "dirty": True}
