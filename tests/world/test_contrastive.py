import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.world.contrastive import info_nce, nt_xent

B, D = 6, 16


@pytest.fixture(scope="module")
def pairs():
    """Embeddings of unit length, and others near them."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(B, D))
    b = a + 0.3 * rng.normal(size=(B, D))
    return tuple(jnp.array(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32) for x in (a, b))


@pytest.mark.parametrize(("loss", "alternatives"), [(info_nce, B), (nt_xent, 2 * B - 1)])
def test_equal_embeddings_leave_all_alternatives_open(loss, alternatives):
    equal = jnp.broadcast_to(jnp.eye(D)[0], (B, D))
    np.testing.assert_allclose(loss(equal, equal, 7.0), np.log(alternatives), rtol=1e-5)


@pytest.mark.parametrize(("loss", "negatives"), [(info_nce, B - 1), (nt_xent, 2 * B - 2)])
def test_orthogonal_pairs_have_the_closed_form(loss, negatives):
    apart, scale = jnp.eye(D)[:B], 3.0
    np.testing.assert_allclose(loss(apart, apart, scale), np.log(1 + negatives * np.exp(-scale)), rtol=1e-5)


@pytest.mark.parametrize("loss", [info_nce, nt_xent])
def test_order_of_pairs_and_of_their_sides_does_not_matter(loss, pairs):
    a, b = pairs
    order = np.random.default_rng(1).permutation(B)
    np.testing.assert_allclose(loss(a[order], b[order], 5.0), loss(a, b, 5.0), rtol=1e-5)
    np.testing.assert_allclose(loss(b, a, 5.0), loss(a, b, 5.0), rtol=1e-5)


@pytest.mark.parametrize("loss", [info_nce, nt_xent])
def test_wrong_partners_cost_more(loss, pairs):
    a, b = pairs
    assert loss(a, jnp.roll(b, 1, axis=0), 10.0) > loss(a, b, 10.0) + 1


def test_views_of_other_things_repel_whichever_side_they_are_on(pairs):
    """In `nt_xent` a view's negatives are first views too: the gradient moves a picture away from one on its side."""
    a, b = pairs
    a = a.at[1].set(a[0])
    gradient = jax.grad(lambda first: nt_xent(a.at[0].set(first), b, 10.0))(a[0])
    assert gradient @ a[1] > 0
