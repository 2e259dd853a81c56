"""Training the rows of an identifier, as Textual Inversion and Custom Diffusion do."""

import jax
import numpy as np
import pytest

from personalize_jax.models.params import flatten
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.parameterizations import ROWS
from personalize_jax.training.parameterizations.base import Identifier
from personalize_jax.training.trained import trained_of, trained_params
from tests import tiny
from tests.training import worker

TABLE = "text_encoder/tokens/embedding"
DOG = tiny.tokenizer().encode("dog")
IDENTIFIER = Identifier(np.array(DOG), np.full((len(DOG), 1), 7))  # the tokens that the training's captions do hold
ROWS_ONLY = {"trainable": ((TABLE, "identifier"), (".*", False)), "prior__weight": 0.0, "ema_decay": 0.0}


def test_only_the_rows_move_and_the_state_holds_no_more(tmp_path):
    length = {"num_steps": 40, "checkpoint_every": 40, "batch_size": 8, "optimizer__learning_rate": 0.1}
    state = worker.train(tmp_path, identifier=IDENTIFIER, **length, **ROWS_ONLY)
    assert {path: row.shape for path, row in flatten(state.params).items()} == {
        f"{ROWS.name}/{TABLE}": (len(DOG), tiny.TEXT["width"])
    }
    moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(moments) == 2 * len(DOG) * tiny.TEXT["width"]
    start, tuned = (flatten(p) for p in (worker.start(), trained_params(trained_of(state), worker.start())))
    assert {path for path in start if not np.array_equal(tuned[path], start[path])} == {TABLE}
    moved = np.flatnonzero(np.any(np.asarray(tuned[TABLE] != start[TABLE]), axis=1))
    assert moved.tolist() == sorted(DOG)


@pytest.mark.slow
def test_interrupted_and_resumed_rows_are_those_of_the_uninterrupted_run(tmp_path):
    changes = ROWS_ONLY | {"trainable": ((TABLE, "identifier"), ("denoiser/.*attention/", True), (".*", False))}
    changes |= {"prior__weight": 0.7, "prior__form": "frozen_prediction", "ema_decay": 0.9}
    expected = worker.train(tmp_path / "uninterrupted", identifier=IDENTIFIER, **changes)

    def interrupt(step, metrics):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.train(tmp_path / "resumed", interrupt, IDENTIFIER, **changes)
    state = worker.train(tmp_path / "resumed", identifier=IDENTIFIER, **changes)
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_training_without_identifier_has_no_rows(tmp_path):
    with pytest.raises(UserError, match="but there is no subject here"):
        worker.train(tmp_path, **ROWS_ONLY)
