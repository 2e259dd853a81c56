import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from personalize_jax.errors import UserError
from personalize_jax.training.checkpoint import Checkpoints
from personalize_jax.training.step import init_state


def state_at(step, ema=True):
    params = {"denoiser": {"kernel": jnp.full((4, 3), float(step)), "bias": jnp.arange(3.0)}}
    state = init_state(params, optax.adam(0.1), ema=ema, vocabulary_size=5 if ema else None)
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


def test_after_a_fall_back_the_damaged_step_can_be_saved_again(tmp_path):
    save(tmp_path, 3, 6)
    damage(tmp_path, 6)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.restore(abstract(state_at(0)))
    for step in (5, 6):
        checkpoints.save(step, state_at(step))
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["5", "6"]
    assert restore(tmp_path).step == 6


def test_when_nothing_can_be_read_the_user_is_told_and_nothing_is_deleted(tmp_path):
    save(tmp_path, 3, 6)
    damage(tmp_path, 3)
    damage(tmp_path, 6)
    with pytest.raises(UserError, match=r"None of the checkpoints \[6, 3\].*delete that folder"):
        restore(tmp_path)
    assert (tmp_path / "3").exists() and (tmp_path / "6").exists()
