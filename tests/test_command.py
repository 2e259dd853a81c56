import json

import pytest
from ml_collections import ConfigDict

from personalize_jax import command
from personalize_jax.errors import UserError


def config(**changes):
    made = ConfigDict({"seed": 0, "training": {"num_steps": 10, "mesh": (1, 1), "prior": {"weight": 1.0}}})
    made.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return made.lock()


def test_the_same_configuration_goes_on(tmp_path):
    command.record_config(config(), tmp_path / "run")
    command.record_config(config(), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["num_steps"] == 10


def test_another_configuration_is_refused_by_the_names_of_its_keys(tmp_path):
    command.record_config(config(), tmp_path)
    kept = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"different: seed, training\.prior\.weight\)"):
        command.record_config(config(training__prior__weight=0.5, seed=1), tmp_path)
    assert (tmp_path / "config.json").read_text() == kept


def test_keys_that_may_change_are_recorded_anew_and_outdate_files(tmp_path):
    command.record_config(config(), tmp_path)
    report = tmp_path / "report.html"
    report.write_text("")
    allowed = {"may_change": ("training.num_steps",), "outdates": (report,)}
    command.record_config(config(), tmp_path, **allowed)
    assert report.exists()
    command.record_config(config(training__num_steps=20), tmp_path, **allowed)
    assert not report.exists()
    assert json.loads((tmp_path / "config.json").read_text())["training"]["num_steps"] == 20
    with pytest.raises(UserError, match="different: seed"):
        command.record_config(config(training__num_steps=30, seed=1), tmp_path, **allowed)


def test_keys_that_came_or_went_are_named(tmp_path):
    command.record_config(config(), tmp_path)
    more = config().unlock()
    more.training.prior.form = "sampled"
    with pytest.raises(UserError, match=r"training\.prior\.form"):
        command.record_config(more, tmp_path)


def test_progress_after_a_resume_counts_from_where_it_went_on(capsys):
    with command.steps_bar("training", 10) as progress:
        progress(7, {"loss": 0.25})
        progress(10, {"loss": 0.125})
    written = capsys.readouterr().err
    assert "10/10" in written and "loss=0.1250" in written
