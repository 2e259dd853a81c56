"""The whole command on the tiny cascade: what it prints and writes, and what it advises where memory is short."""

import json

import pytest

from personalize_jax import plan
from personalize_jax.method.changes import changed
from personalize_jax.planning import slices
from personalize_jax.planning.programs import Usage
from personalize_jax.runtime.chips import CHIPS, GIB
from tests import processes, tiny_world

pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")

SLICE = "v5e:2x2"


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_all_numbers(pretrained, tmp_path):
    flags = [f"--config=tests/tiny_world.py:{pretrained}", f"--topology={SLICE}", f"--out={tmp_path / 'plan.json'}"]
    flags += [f"--config.{part}.batch_size=4" for part in ("training", "super_resolution_training")]
    finished = processes.command(tmp_path, "personalize_jax.plan", *flags)
    assert finished.status == 0, finished.error
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    assert found["topology"] == SLICE and found["chips"] == 4
    stages = ("base", "super_resolution")
    programs = [f"{what} {stage}" for what in ("tuning", "sampling") for stage in stages]
    assert [program["program"] for program in found["programs"]] == programs
    for program in found["programs"]:
        assert program["fits"] and program["flops"] > 0 and program["seconds"] > 0
        assert all(size >= 0 for size in program["memory"].values())
        assert f"| {SLICE} | {program['program']} | yes |" in finished.output
        # Nothing is computed again, and what else a step does is little beside networks as small as these.
        assert ("model_flops" in program) == program["program"].startswith("tuning")
        assert program["flops"] == pytest.approx(program.get("model_flops", program["flops"]), rel=0.3)
    assert found["programs"][0]["received"]["all-reduce"] > 0  # gradients, over the data axis
    assert f"{SLICE}: a personalisation takes at least" in finished.output


def test_changes_are_tried_until_tuning_fits(pretrained, monkeypatch):
    def tuning_usage(pipeline, config, name, topology):
        """Each change takes something off: the mesh parameters, the dtype moments, microbatches activations."""
        training = config.training
        whole = {
            "parameters": 8 * GIB / (4 if training.mesh[1] == -1 else 1),
            "optimizer": 2 * GIB / (2 if training.optimizer.moment_dtype == "bfloat16" else 1),
            "activations": 24 * GIB / training.microbatches,
        }
        return Usage(whole, 1e12, 1e9, [], 2, True, 0.0)

    monkeypatch.setattr(plan, "tuning_usage", tuning_usage)
    config = changed(tiny_world.get_config(pretrained), training__batch_size=8, super_resolution_training__batch_size=4)
    pipeline, topology = plan.abstract_pipeline(config), slices.parse(SLICE)
    found = plan.plan(pipeline, config, topology, sampling=False)
    assert not found["programs"][0]["fits"]
    # Of 16 GiB: 2 for parameters, 1 for moments, and 12 for activations.
    changes = ["training.mesh=(1, -1, -1)", "training.optimizer.moment_dtype=bfloat16", "training.microbatches=2"]
    assert found["programs"][0]["changes"] == changes
    assert f"fits with {', '.join(changes)}" in plan.table([found])
    assert "how often 2 loops run cannot be told" in plan.table([found])
    monkeypatch.setitem(CHIPS, "v5e", CHIPS["v5e"]._replace(hbm_bytes=20 * GIB))  # moments may stay as they are
    assert plan.changes_that_fit(pipeline, config, "base", topology) == [changes[0], changes[2]]
    meshed = changed(config, training__mesh=(1, -1, -1))
    assert plan.changes_that_fit(pipeline, meshed, "base", topology) == changes[2:]
    monkeypatch.setitem(CHIPS, "v5e", CHIPS["v5e"]._replace(hbm_bytes=2 * GIB))
    assert plan.changes_that_fit(pipeline, config, "base", topology) is None
