"""Two processes of two devices each, against one process of four."""

import functools
import json
import re
import shutil
import weakref

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from personalize_jax.pipeline import load_pipeline
from personalize_jax.runtime import hosts, manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.trained import latest_state
from tests import processes
from tests.waiting import PATIENCE

PICTURES = ("class_images", "samples", "class_samples", "evaluation")


def run(folder, module, *arguments, processes_of=(4,)):
    """A command as so many processes as there are numbers of devices; their output."""
    several = len(processes_of) > 1
    shared = ["--multihost", f"--coordinator={processes.free_address()}", f"--num_processes={len(processes_of)}"]
    started, files = [], []
    for i, devices in enumerate(processes_of):
        of_one = [*arguments, *(shared if several else []), *([f"--process_id={i}"] if several else [])]
        files.append((folder / f"output_{i}", folder / f"error_{i}"))
        before = functools.partial(processes.use_devices, devices)
        started.append(processes.start(processes.run_module, module, [str(a) for a in of_one], files[-1], before))
    for process in started:
        process.join(PATIENCE)
        process.kill()
    return [
        processes.Finished(process.exitcode, *(file.read_text() for file in of_one))
        for process, of_one in zip(started, files, strict=True)
    ]


def personalize(folder, pretrained, photos, *arguments, processes_of=(4,)):
    folder.mkdir(exist_ok=True)
    finished = run(
        folder,
        "personalize_jax.personalize",
        f"--config=tests/tiny_world.py:{pretrained}",
        f"--config.subject.registry={folder / 'registry.json'}",
        "--config.training.mesh=(1,-1,-1)",
        "--config.training.batch_size=4",
        "--config.super_resolution_training.batch_size=4",
        "--class_noun=dog",
        f"--images={photos}",
        f"--workdir={folder / 'run'}",
        *arguments,
        processes_of=processes_of,
    )
    assert [of_one.status for of_one in finished] == [0] * len(finished), [of_one.error for of_one in finished]
    return folder / "run"


@pytest.fixture(scope="module")
def runs(pretrained, photos, tmp_path_factory):
    """Run directories of both, tuned and evaluated."""
    found = []
    for name, processes_of in (("together", (2, 2)), ("alone", (4,))):
        folder = tmp_path_factory.mktemp(name)
        workdir = personalize(folder, pretrained, photos, processes_of=processes_of)
        evaluated = run(folder, "personalize_jax.evaluate", f"--workdir={workdir}", processes_of=processes_of)
        assert [of_one.status for of_one in evaluated] == [0] * len(evaluated), [of_one.error for of_one in evaluated]
        found.append(workdir)
    return found


@pytest.mark.slow
def test_every_picture_is_drawn_once_and_is_what_one_process_draws(runs):
    together, alone = runs
    for kind in PICTURES:
        files = [{f.relative_to(run) for f in (run / kind).rglob("*.png")} for run in runs]
        assert files[0] == files[1] and files[0]
    for file in (alone / "class_images").rglob("*.png"):  # by the pretrained cascade
        assert (together / file.relative_to(alone)).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_they_train_what_one_process_trains(runs):
    for stage in ("base", "super_resolution"):
        losses = [
            [json.loads(line)["loss"] for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
            for run in runs
        ]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        params = [flatten_dict(latest_state(run / stage).params, sep="/") for run in runs]
        for path, value in params[0].items():
            np.testing.assert_allclose(value, params[1][path], rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_process_0_alone_reports(runs):
    states = [manifest.read(run) for run in runs]
    assert states[0]["done"] and states[0]["calls"][0]["devices"]["processes"] == 2
    assert len(states[0]["calls"]) == 1  # not one a process
    assert states[0]["phases"].keys() == states[1]["phases"].keys()
    tables = [(run / "evaluation" / "rows.jsonl").read_text().splitlines() for run in runs]
    assert len(tables[0]) == len(tables[1])


@pytest.mark.slow
def test_one_process_goes_on_from_what_two_have_saved(runs, pretrained, photos, tmp_path):
    for f in ("run", "registry.json"):
        source = runs[0].parent / f
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / f)
    flag = "--config.super_resolution_training.num_steps=8"
    workdir = personalize(tmp_path, pretrained, photos, flag, processes_of=(2,))
    log = workdir / "super_resolution" / "metrics.jsonl"
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    assert int(latest_state(workdir / "super_resolution").step) == 8


@pytest.mark.slow
def test_two_processes_sample_what_one_samples(pretrained, tmp_path):
    """An odd number, so that the last batch is filled up."""
    for name, processes_of in (("together", (2, 2)), ("alone", (4,))):
        arguments = [f"--pipeline={pretrained}", "--prompt=a dog", "--prompt=a cat", "--num_images=5", "--batch_size=4"]
        out = f"--out={tmp_path / name}"
        finished = run(tmp_path, "personalize_jax.sample", *arguments, out, processes_of=processes_of)
        assert [of_one.status for of_one in finished] == [0] * len(finished), [of_one.error for of_one in finished]
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("together", "alone")]
    assert files[0] == files[1] and len(files[0]) == 10


@pytest.mark.slow
def test_two_processes_pretrain_what_one_pretrains(tmp_path):
    saved = []
    for name, processes_of in (("together", (2, 2)), ("alone", (4,))):
        folder = tmp_path / name
        folder.mkdir()
        arguments = [
            "--config=tests/tiny_pretraining.py:base",
            f"--workdir={folder}",
            f"--data_dir={tmp_path / 'data'}",
        ]
        finished = run(tmp_path, "personalize_jax.pretrain", *arguments, processes_of=processes_of)
        assert [of_one.status for of_one in finished] == [0] * len(finished), [of_one.error for of_one in finished]
        saved.append(load_pipeline(folder / "pipeline"))
    half = 2.0**-10  # they are saved in two bytes
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=half, atol=1e-5), *(p.params for p in saved))
    np.testing.assert_array_equal(*(p.tokenizer.counts for p in saved))


def test_an_error_of_process_0_ends_both(pretrained, photos, tmp_path):
    flags = [f"--config=tests/tiny_world.py:{pretrained}", f"--images={photos}", f"--workdir={tmp_path / 'run'}"]
    registry = tmp_path / "registry.json"
    registry.write_text("no registry")
    flags += ["--class_noun=dog", f"--config.subject.registry={registry}"]
    for of_one in run(tmp_path, "personalize_jax.personalize", *flags, processes_of=(1, 1)):
        assert of_one.status == 2
        assert re.search("^error: .*not a registry", of_one.error, re.MULTILINE)


@pytest.mark.parametrize(
    ("by", "status", "sentences"),
    [
        ("full disk", 2, ["error: here/picture.png cannot be written (No space left"] * 2),
        ("mistake", 1, ["Process 1 has failed (TypeError: a number was expected)", "TypeError: a number was expected"]),
    ],
)
def test_a_failure_of_one_ends_both(tmp_path, by, status, sentences):
    finished = run(tmp_path, "tests.failing", f"--by={by}", processes_of=(1, 1))
    assert [of_one.status for of_one in finished] == [status] * 2
    for of_one, sentence in zip(finished, sentences, strict=True):
        assert sentence in of_one.error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--process_id=1"], "are for --multihost; give that, too"),
        (["--multihost"], "do not find each other"),
        (["--multihost", "--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "do not find each other"),
    ],
)
def test_flags_that_cannot_be_used(tmp_path, flags, sentence):
    command = "personalize_jax.sample", "--pipeline=world", "--prompt=a dog", f"--out={tmp_path / 'out'}"
    finished = processes.command(tmp_path, *command, *flags)
    assert finished.status == 2 and sentence in finished.error.splitlines()[-1]


def test_one_process_alone_is_all_of_them(tmp_path):
    done = []
    hosts.first_does(lambda: done.append(1))
    assert done == [1] and hosts.is_first() and hosts.true_in_all([True, False]) == [True, False]
    hosts.check_shared(tmp_path / "never_made")
    assert not (tmp_path / "never_made").exists()
    with pytest.raises(UserError, match="a sentence"):
        hosts.first_does(raise_sentence)


def raise_sentence():
    raise UserError("a sentence")


@pytest.mark.parametrize("first", [True, False])
def test_gathered_arrays_are_kept_by_process_0_alone_and_the_others_hold_one_at_a_time(monkeypatch, first):
    class Whole(np.ndarray):
        """Like an array that had its parts on several hosts, and the memory of its own."""

    alive = []

    def whole(array):
        assert first or not any(reference() is not None for reference in alive)
        found = np.array(array).view(Whole)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(hosts, "to_numpy", whole)
    monkeypatch.setattr(hosts, "is_first", lambda: first)
    tree = {"a": np.arange(3.0), "b": {"c": np.ones(2)}}
    gathered = hosts.gather_on_first(tree)
    if first:
        jax.tree.map(np.testing.assert_array_equal, gathered, tree)
    else:
        assert not jax.tree.leaves(gathered) and len(alive) == 2


def test_a_key_is_put_like_any_array():
    keys = jax.random.split(jax.random.key(0), 2)
    everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = hosts.device_put({"keys": keys, "numbers": np.arange(2)}, everywhere)
    assert (jax.random.key_data(placed["keys"]) == jax.random.key_data(keys)).all()
