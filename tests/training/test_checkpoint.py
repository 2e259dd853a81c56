import collections
import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from personalize_jax.runtime.errors import UserError
from personalize_jax.training.checkpoint import Checkpoints, checksum, checksum_of_parts
from personalize_jax.training.step import init_state
from tests import processes
from tests.training.saving_together import alter, restore_altered
from tests.waiting import PATIENCE


def state_at(step, ema=True):
    params = {"denoiser": {"kernel": jnp.full((4, 3), float(step)), "bias": jnp.arange(3.0)}}
    state = init_state(params, optax.adam(0.1), jax.random.key(step), ema, vocabulary_size=5 if ema else None)
    return state._replace(step=jnp.asarray(step, jnp.int32))


def abstract(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state)


def save(directory, *steps):
    checkpoints = Checkpoints(directory)
    for step in steps:
        checkpoints.save(step, state_at(step))
    checkpoints.close()


def restore(directory):
    checkpoints = Checkpoints(directory)
    state = checkpoints.restore(abstract(state_at(0)))
    checkpoints.close()
    return state


def damage(directory, step):
    """Cut every file of a checkpoint in half."""
    for file in (directory / str(step)).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_an_empty_directory_has_no_state(tmp_path):
    assert restore(tmp_path) is None


@pytest.mark.parametrize("ema", [True, False])
def test_a_state_comes_back_bit_for_bit(tmp_path, ema):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state_at(3, ema))
    checkpoints.close()
    state = Checkpoints(tmp_path).restore(abstract(state_at(0, ema)))
    assert jax.tree.structure(state) == jax.tree.structure(state_at(3, ema))
    jax.tree.map(np.testing.assert_array_equal, state, state_at(3, ema))


def test_the_two_latest_are_kept(tmp_path):
    save(tmp_path, 2, 4, 6)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "6"]
    assert restore(tmp_path).step == 6


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, caplog):
    save(tmp_path, 3, 6)
    damage(tmp_path, 6)
    with caplog.at_level(logging.WARNING):
        assert restore(tmp_path).step == 3
    assert "Checkpoint 6" in caplog.text and "trying the one before" in caplog.text


@pytest.mark.parametrize("count", [1, 100])
def test_altered_numbers_are_not_taken_for_the_saved_ones(tmp_path, caplog, count):
    states = {step: {"kernel": jax.random.normal(jax.random.key(step), (100, 100))} for step in (3, 6)}
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    alter(tmp_path / "6", count)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints, caplog.at_level(logging.WARNING):
        found = checkpoints.restore(abstract(states[3]))
    np.testing.assert_array_equal(found["kernel"], states[3]["kernel"])
    assert "Checkpoint 6" in caplog.text


def test_two_processes_that_hold_the_halves_of_a_state_notice_altered_numbers_of_one(tmp_path):
    address = processes.free_address()
    together = [processes.start(restore_altered, i, address, tmp_path) for i in range(2)]
    for process in together:
        process.join(PATIENCE)
        process.kill()
    assert [process.exitcode for process in together] == [0, 0]
    assert [(tmp_path / f"restored_{i}").read_text() for i in range(2)] == ["[3]", "[3]"]
    assert (tmp_path / "checkpoints" / "damaged-6").is_dir()


def test_a_checksum_of_parts_tells_every_bit_and_which_parts_they_are():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.int32(1)}
    place, crc = checksum_of_parts(tree)
    assert checksum_of_parts(jax.tree.map(jnp.array, tree)) == (place, crc)
    other = tree | {"a": tree["a"].at[1, 2].set(np.nextafter(np.float32(5), np.float32(6)))}
    assert checksum_of_parts(other)[0] == place and checksum_of_parts(other)[1] != crc
    assert checksum_of_parts({"c": tree["a"], "b": tree["b"]})[0] != place


@pytest.mark.parametrize(("old", "new"), [("init_timestamp", "init_timestomp"), ("}", ""), ("checksum", "chucksum")])
def test_damaged_metadata_cost_nothing(tmp_path, old, new):
    save(tmp_path, 3, 6)
    file = tmp_path / "6" / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace(old, new))
    before = sorted(tmp_path.rglob("*"))
    assert restore(tmp_path).step == 6
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that were under way
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "default/manifest.ocdbt", "default/d"])
def test_a_file_that_cannot_be_read_for_now_costs_nothing(tmp_path, name):
    """A link to itself, which the system refuses to open."""
    save(tmp_path, 3, 6)
    file = tmp_path / "6" / name
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(file)
    before = sorted(tmp_path.rglob("*"))
    for read_only in (False, True):
        with (
            contextlib.closing(Checkpoints(tmp_path, read_only=read_only)) as checkpoints,
            pytest.raises(OSError, match="Too many levels of symbolic links"),
        ):
            checkpoints.restore(abstract(state_at(0)))
    assert sorted(tmp_path.rglob("*")) == before
    file.unlink()
    (tmp_path / "elsewhere").rename(file)
    assert restore(tmp_path).step == 6


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("UNAVAILABLE: Error reading gs://bucket/6: try again"), "6 .*UNAVAILABLE"),
        (MemoryError("not enough"), "not enough"),
    ],
)
def test_what_is_no_damage_is_raised_and_nothing_set_aside(tmp_path, monkeypatch, error, raised):
    save(tmp_path, 3, 6)

    def refuse(*_, **__):
        raise Exception("wrapped") from error  # as orbax does

    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", refuse)
        with pytest.raises(Exception, match="wrapped|/6") as found:
            checkpoints.restore(abstract(state_at(0)))
    assert isinstance(found.value, OSError) == isinstance(error, ValueError)
    assert restore(tmp_path).step == 6


def test_who_only_reads_leaves_everything_to_the_run_that_may_still_be_going(tmp_path):
    save(tmp_path, 3, 6)
    damage(tmp_path, 6)
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.restore(abstract(state_at(0))).step == 3
    reader.close()
    assert sorted(tmp_path.rglob("*")) == before
    save(tmp_path, 12)
    assert not (tmp_path / "9.orbax-checkpoint-tmp").exists()


def test_a_checksum_tells_every_bit_and_every_place_whatever_holds_the_arrays():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"0": jnp.int32(1), "1": jnp.bfloat16(2)}}
    same = collections.namedtuple("Tree", "a b")(tree["a"], (tree["b"]["0"], tree["b"]["1"]))
    assert checksum(tree) == checksum(same) == checksum(jax.tree.map(np.asarray, tree))
    others = [tree | {"a": tree["a"].at[1, 2].set(np.nextafter(np.float32(5), np.float32(6)))}]
    others += [tree | {"a": tree["a"][:, ::-1]}, tree | {"b": {"0": jnp.int32(2), "1": jnp.bfloat16(2)}}]
    others += [{"a": tree["a"], "c": tree["b"]}, tree | {"b": {"1": tree["b"]["0"], "0": tree["b"]["1"]}}]
    assert len({checksum(other) for other in [tree, *others]}) == 6


def test_after_a_fall_back_the_damaged_step_can_be_saved_again_and_one_is_set_aside(tmp_path):
    save(tmp_path, 3)
    for last in (6, 7):
        save(tmp_path, last)
        damage(tmp_path, last)
        damaged = contents(tmp_path / str(last))
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.restore(abstract(state_at(0))).step == {6: 3, 7: 6}[last]
        assert [p.name for p in tmp_path.glob("damaged*")] == [f"damaged-{last}"]  # no more than the latest
        assert contents(tmp_path / f"damaged-{last}") == damaged
        for step in (5, 6) if last == 6 else (7,):
            checkpoints.save(step, state_at(step))
        checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["6", "7", "damaged-7"]
    assert restore(tmp_path).step == 7


def test_when_nothing_can_be_read_the_user_is_told_and_nothing_is_deleted(tmp_path):
    save(tmp_path, 3, 6)
    damage(tmp_path, 3)
    damage(tmp_path, 6)
    with pytest.raises(UserError, match=r"None of the checkpoints \[6, 3\].*delete that folder"):
        restore(tmp_path)
    assert (tmp_path / "3").exists() and (tmp_path / "6").exists()
