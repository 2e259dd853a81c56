import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.models.causal_transformer import CausalTransformer
from tests import tiny

LEVELS, V, N, L, D = (3, 2), 6, 6, 3, 4


@pytest.fixture(scope="module")
def made():
    """A network, its parameters, ids, text and mask."""
    network = CausalTransformer(LEVELS, 2, 3, 16, 2, 2)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (2, N)).astype(np.int32)
    text = rng.normal(size=(2, L, D)).astype(np.float32)
    mask = np.array([[True, True, True], [True, False, False]])
    params = tiny.random_params(network.init, ids, text, mask)
    return network, params, ids, text, mask


def test_a_token_changes_no_earlier_logit(made):
    network, params, ids, text, mask = made
    apply = jax.jit(network.apply)
    logits = apply(params, ids, text, mask)
    assert logits.shape == (2, N, V)
    for i in range(N):
        changed = ids.copy()
        changed[:, i] = (ids[:, i] + 1) % V
        others = apply(params, changed, text, mask)
        np.testing.assert_array_equal(others[:, : i + 1], logits[:, : i + 1])
        if i + 1 < N:
            assert np.abs(others[:, i + 1 :] - logits[:, i + 1 :]).max((0, 2)).min() > 1e-3, (
                "all later ones depend on it"
            )


def test_padding_of_the_text_changes_nothing_and_its_tokens_do(made):
    network, params, ids, text, mask = made
    logits = network.apply(params, ids, text, mask)
    for position, matters in ((0, True), (1, False)):
        changed = text.copy()
        changed[1, position] += 1.0
        moved = np.abs(network.apply(params, ids, changed, mask) - logits).max((1, 2))
        assert moved[0] == 0 and (moved[1] > 1e-3) == matters


def test_step_by_step_the_logits_are_those_of_all_at_once(made):
    network, params, ids, text, mask = made
    context = network.apply(params, text, mask, method="read")
    step = jax.jit(lambda *inputs: network.apply(params, *inputs, method="step"))
    cache, logits = network.empty_cache(2), []
    for i in range(N):
        known = np.where(np.arange(N) < i, ids, 0)  # whatever is there
        of_token, cache = step(known, jnp.array(i), context, cache)
        logits.append(of_token)
    np.testing.assert_allclose(np.stack(logits, 1), network.apply(params, ids, text, mask), rtol=1e-4, atol=1e-5)
