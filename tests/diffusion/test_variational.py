import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from personalize_jax.diffusion.prediction import add_noise
from personalize_jax.diffusion.process import cosine, discrete, linear_betas, squaredcos_betas
from personalize_jax.diffusion.variational import discretized_log_likelihood, variational_bound

BETAS = squaredcos_betas(100)
ALPHA2 = np.append(1, np.cumprod(1 - BETAS))  # of clean pictures and indices 0..99
POSTERIOR_VARIANCE = BETAS * (1 - ALPHA2[:-1]) / (1 - ALPHA2[1:])  # Ho et al. 2020, eq. 7
PROCESS = discrete(BETAS)
LEVELS = np.arange(256, dtype=np.float32) / 127.5 - 1
bound = jax.jit(variational_bound, static_argnums=0)
likelihood = jax.jit(discretized_log_likelihood)


@pytest.fixture
def batch():
    """Pictures at indices 1, 50 and 99, and a network's answers."""
    rng, n = np.random.default_rng(0), np.array([1, 50, 99])
    x0 = rng.choice(LEVELS, (3, 4, 4, 2))
    eps, x0_hat, v = rng.normal(size=(3, *x0.shape)).astype(np.float32)
    alpha2 = ALPHA2[n + 1].astype(np.float32)[:, None, None, None]
    return x0, np.sqrt(alpha2) * x0 + np.sqrt(1 - alpha2) * eps, x0_hat, np.tanh(v), (n + 1) / np.float32(100)


def test_the_true_posterior_costs_nothing(batch):
    x0, z_t, _, v, t_B = batch
    np.testing.assert_allclose(bound(PROCESS, x0, z_t, x0, np.full_like(v, -1), t_B), 0, atol=1e-6)


def posterior_mean(n, z_t, x0):
    """Ho et al. 2020, eq. 7."""
    of_x0, of_z_t = np.sqrt(ALPHA2[n]) * BETAS[n], np.sqrt(1 - BETAS[n]) * (1 - ALPHA2[n])
    return (of_x0 * x0 + of_z_t * z_t) / (1 - ALPHA2[n + 1])


def test_terms_are_divergences_of_normals(batch):
    torch = pytest.importorskip("torch")
    x0, z_t, x0_hat, v, _ = batch
    terms = bound(PROCESS, *batch)
    for i, n in enumerate([1, 50, 99]):
        learned_std = POSTERIOR_VARIANCE[n] ** ((1 - v[i]) / 4) * BETAS[n] ** ((1 + v[i]) / 4)
        q, p = (
            torch.distributions.Normal(torch.tensor(mean), torch.tensor(std))
            for mean, std in (
                (posterior_mean(n, z_t[i], x0[i]), np.sqrt(POSTERIOR_VARIANCE[n])),
                (posterior_mean(n, z_t[i], x0_hat[i]), learned_std),
            )
        )
        expected = torch.distributions.kl_divergence(q, p).mean() / np.log(2)
        assert terms[i] == pytest.approx(float(expected), rel=1e-3)


def test_a_term_agrees_with_numeric_integration():
    x0, x0_hat, z_t = (np.full((1, 1), value, np.float32) for value in (0.2, 0.5, 0.3))
    mean, std = posterior_mean(39, 0.3, 0.2), np.sqrt(POSTERIOR_VARIANCE[39])
    x = np.linspace(mean - 8 * std, mean + 8 * std, 10_001)
    log_q, log_p = norm.logpdf(x, mean, std), norm.logpdf(x, posterior_mean(39, 0.3, 0.5), std)
    nats = np.trapezoid(np.exp(log_q) * (log_q - log_p), x)
    term = bound(PROCESS, x0, z_t, x0_hat, np.full((1, 1), -1.0, np.float32), np.array([0.4], np.float32))
    np.testing.assert_allclose(term, nats / np.log(2), rtol=1e-3)


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("mean", [-1.2, -0.4, 0.0, 0.999])
def test_likelihoods_of_all_levels_sum_to_one(mean, std):
    log_p = np.asarray(likelihood(LEVELS, mean, std))
    assert np.exp(log_p).sum() == pytest.approx(1, rel=1e-4)
    assert np.all(log_p <= 0) and np.all(np.isfinite(log_p))


def test_likelihood_is_the_density_integrated_over_the_bin():
    fine = LEVELS[1:-1, None] + np.linspace(-1, 1, 201) / 255
    expected = np.log(np.trapezoid(norm.pdf(fine, 0.1, 0.2), fine, axis=1))
    np.testing.assert_allclose(likelihood(LEVELS, 0.1, 0.2)[1:-1], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("v", "variance"),
    [(1.0, BETAS[0]), (-1.0, POSTERIOR_VARIANCE[1])],  # the posterior has none at index 0 and borrows the next
)
def test_the_first_term_is_the_pictures_likelihood(v, variance):
    x0 = LEVELS[None, ::51]
    term = bound(PROCESS, x0, x0 + 0.01, x0 + 0.02, np.full_like(x0, v), np.array([0.01], np.float32))
    expected = -likelihood(LEVELS, LEVELS + 0.02, np.sqrt(variance))[::51].mean() / np.log(2)
    np.testing.assert_allclose(term, expected, rtol=1e-4)


@pytest.mark.parametrize("process", [discrete(linear_betas()), discrete(squaredcos_betas())])
def test_gradients_are_finite_at_all_times_and_however_wrong_the_network_is(process):
    t_B = jnp.array([1, 2, 500, 1000]) / 1000
    x0 = jnp.tile(LEVELS[[0, 1, 128, 255]], (4, 1))
    z_t = add_noise(x0, jnp.ones_like(x0), process.alpha(t_B), process.sigma(t_B))

    def total(x0_hat, v):
        return variational_bound(process, x0, z_t, x0_hat, v, t_B).sum()

    for x0_hat in (x0, -x0, 2 * x0):
        for gradient in jax.jit(jax.grad(total, (0, 1)))(x0_hat, jnp.full_like(x0, -1.0)):
            assert np.all(np.isfinite(gradient))


def test_continuous_time_is_refused(batch):
    with pytest.raises(ValueError, match="discrete"):
        variational_bound(cosine(), *batch)
