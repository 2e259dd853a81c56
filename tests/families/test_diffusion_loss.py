"""The loss of groups of examples, with networks whose answers are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.diffusion.augmentation import upsample
from personalize_jax.diffusion.process import discrete, squaredcos_betas
from personalize_jax.diffusion.variational import variational_bound
from personalize_jax.families.batch import Batch
from personalize_jax.families.diffusion_loss import DiffusionFamily, diffuse, interleave, separate
from personalize_jax.families.objective import Group, Objective
from personalize_jax.families.targets import Target, picture
from personalize_jax.families.text import Text
from personalize_jax.families.world import read_stage
from tests import tiny

B, SIDE, LENGTH, WIDTH = 8, 8, 5, 4


class Network:
    """Answers by a function of its inputs, and remembers them."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    def apply(self, variables, *inputs):
        self.calls.append(inputs)
        return self.answer(variables["params"], *inputs)


class Family(DiffusionFamily):
    """Embeds every caption as one number, its text encoder's parameter."""

    def condition(self, params, tokens):
        return params["text_encoder"]["w"] * jnp.ones((*tokens.shape, WIDTH)), tokens > 0


def constant(value):
    return lambda params, z, *_: jnp.full_like(z, value)


def stage(answer, prediction="x0", spec=tiny.BASE):
    return dataclasses.replace(read_stage({**spec, "prediction": prediction}), network=Network(answer))


def batch(value, embedding=0.0, side=SIDE, **fields):
    text = Text(jnp.full((B, LENGTH, WIDTH), embedding), jnp.ones((B, LENGTH), bool))
    x = jnp.full((B, side, side, 3), value)
    return Batch(x, jnp.ones((B, LENGTH), jnp.int32), text, None, None)._replace(**fields)


def loss_of(network_stage, objective, batches, params=None, frozen=None, seed=0):
    params = params or {"denoiser": {}}
    return Family().loss(network_stage, objective, params, frozen or params, batches, jax.random.key(seed))


@pytest.mark.parametrize("prior_weight", [0.7, 2.0])
def test_loss_is_the_instance_term_plus_lambda_times_the_prior_term(prior_weight):
    objective = tiny.objective("none", prior_weight, "sampled")
    loss, terms = loss_of(stage(constant(0.25)), objective, {"instance": batch(0.5), "prior": batch(-1.0)})
    assert terms["instance_loss"] == pytest.approx(0.25**2)
    assert terms["prior_loss"] == pytest.approx(1.25**2)
    assert loss == pytest.approx(0.25**2 + prior_weight * 1.25**2)


def test_without_lambda_the_class_images_are_not_even_computed():
    network = stage(constant(0.25))
    with_prior = {"instance": batch(0.5), "prior": batch(-1.0)}
    loss, terms = loss_of(network, tiny.objective("none", 0.0, "sampled"), with_prior)
    alone, _ = loss_of(network, tiny.objective("none", 0.0, "sampled"), {"instance": batch(0.5)})
    assert set(terms) == {"instance_loss"}
    assert loss == alone == pytest.approx(0.25**2)
    assert [call[0].shape[0] for call in network.network.calls] == [B, B]


def test_any_number_of_groups_is_summed_by_their_weights_in_one_call():
    """Two subjects in one model, and a class that both are of."""
    weights, values = {"first": 1.0, "second": 0.5, "dogs": 0.25}, {"first": 0.5, "second": -0.25, "dogs": 1.0}
    network = stage(constant(0.25))
    objective = Objective(tuple(Group(name, weight) for name, weight in weights.items()), "none")
    loss, terms = loss_of(network, objective, {name: batch(value) for name, value in values.items()})
    errors = {name: (0.25 - value) ** 2 for name, value in values.items()}
    assert terms == {f"{name}_loss": pytest.approx(error) for name, error in errors.items()}
    assert loss == pytest.approx(sum(weights[name] * error for name, error in errors.items()))
    assert [call[0].shape[0] for call in network.network.calls] == [3 * B]
    for times in separate(network.network.calls[0][1], 3):
        np.testing.assert_array_equal(np.floor(np.asarray(times) * B), np.arange(B))


@pytest.mark.parametrize(
    ("prediction", "kind"),
    [
        ("eps", "cosine"),
        ("v", "cosine"),
        ("velocity", "cosine"),
        ("v", "rectified_flow"),
        ("velocity", "rectified_flow"),
    ],
)
def test_the_target_is_in_the_space_of_the_prediction(prediction, kind):
    """Clean pictures of 0: the noise is z / sigma and so is the velocity, and v is alpha times it."""
    spec = {**tiny.BASE, "schedule": {"kind": kind}}
    process = read_stage(spec).process

    def off_by_half(params, z, t, *_):
        scale = (process.alpha(t) if prediction == "v" else 1.0) / process.sigma(t)
        return scale[:, None, None, None] * z + 0.5

    objective = tiny.objective("none", 1.0, "sampled")
    batches = {"instance": batch(0.0), "prior": batch(0.0)}
    _, terms = loss_of(stage(off_by_half, prediction, spec), objective, batches)
    np.testing.assert_allclose([terms["instance_loss"], terms["prior_loss"]], 0.25, rtol=1e-5)


def test_groups_have_their_own_times_and_noise_each_over_all_noise_levels():
    network = stage(constant(0.0))
    objective = tiny.objective("none", 1.0, "sampled")
    loss_of(network, objective, {"instance": batch(0.0), "prior": batch(0.0)})
    (z, t, *_), *others = network.network.calls
    assert not others, "all groups go through the network in one call"
    eps = z / network.process.sigma(t)[:, None, None, None]
    times, noises = separate(t, 2), separate(eps, 2)
    for of_group in times:
        np.testing.assert_array_equal(np.floor(np.asarray(of_group) * B), np.arange(B))
    assert abs(np.corrcoef(np.ravel(noises[0]), np.ravel(noises[1]))[0, 1]) < 0.1
    assert np.std(noises[0]) == pytest.approx(1, abs=0.1)
    # One common offset would put all differences of the groups' times at 0.
    assert np.all(times[0] != times[1])


def test_each_group_meets_its_own_caption():
    network = stage(lambda params, z, t, text, mask: jnp.broadcast_to(text.mean((1, 2))[:, None, None, None], z.shape))
    batches = {"instance": batch(0.3, embedding=0.3), "prior": batch(-0.6, embedding=-0.6)}
    loss, _ = loss_of(network, tiny.objective("none", 1.0, "sampled"), batches)
    assert loss == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
def test_min_snr_weighs_both_groups(prediction):
    """An error of 1 everywhere costs the mean of min(snr, 5) in x0 space (Hang et al. 2023), here by quadrature."""
    t = (np.arange(100_000) + 0.5) / 100_000
    snr = 1 / np.tan(np.pi * t / 2) ** 2
    expected = np.mean(np.minimum(snr, 5) / {"x0": 1, "eps": snr, "v": snr + 1}[prediction])
    process = read_stage(tiny.BASE).process

    def off_by_one(params, z, t, *_):
        alpha, sigma = (f(t)[:, None, None, None] for f in (process.alpha, process.sigma))
        return {"x0": 0 * z, "eps": z / sigma, "v": z * alpha / sigma}[prediction] + 1.0

    network = stage(off_by_one, prediction)
    objective = tiny.objective("min_snr", 1.0, "sampled")
    batches = {"instance": batch(0.0), "prior": batch(0.0)}
    terms = [loss_of(network, objective, batches, seed=seed)[1] for seed in range(12)]
    for name in ("instance_loss", "prior_loss"):
        assert np.mean([float(term[name]) for term in terms]) == pytest.approx(expected, rel=0.05)


def test_each_picture_is_weighed_at_its_own_time():
    """Answers of t to pictures of 0, so that what they cost depends on the time, too."""
    network = stage(lambda params, z, t, *_: t[:, None, None, None] * jnp.ones_like(z))
    objective = tiny.objective("min_snr", 1.0, "sampled")
    _, terms = loss_of(network, objective, {"instance": batch(0.0), "prior": batch(0.0)})
    for name, t in zip(("instance_loss", "prior_loss"), separate(network.network.calls[0][1], 2), strict=True):
        snr = 1 / np.tan(np.pi * np.asarray(t) / 2) ** 2
        assert terms[name] == pytest.approx(np.mean(np.minimum(snr, 5) * np.square(t)), rel=1e-2)


@pytest.mark.parametrize("prior_weight", [None, 2.0])
def test_pixel_weights_multiply_the_error_of_their_group(prior_weight):
    weight = jnp.ones((B, SIDE, SIDE, 1)).at[:, :, : SIDE // 2].set(5.0)
    of_prior = None if prior_weight is None else jnp.full_like(weight, prior_weight)
    objective = tiny.objective("none", 1.0, "sampled")
    batches = {"instance": batch(1.0, pixel_weight=weight), "prior": batch(1.0, pixel_weight=of_prior)}
    _, terms = loss_of(stage(constant(0.0)), objective, batches)
    assert terms["instance_loss"] == pytest.approx(3.0)
    assert terms["prior_loss"] == pytest.approx(prior_weight or 1.0)


def scaled_text(params, z, t, text, mask):
    """A network that both parameters and caption change."""
    return params["scale"] * z + text.mean((1, 2))[:, None, None, None]


FROZEN = {"denoiser": {"scale": jnp.array(0.4)}, "text_encoder": {"w": jnp.array(0.2)}}


def test_frozen_prediction_costs_and_teaches_nothing_before_the_first_update():
    network = stage(scaled_text)
    objective = tiny.objective("min_snr", 0.7, "frozen_prediction")
    batches = {"instance": batch(0.5, cond=None), "prior": batch(-1.0, cond=None)}

    def loss(params, frozen, objective, batches):
        return Family().loss(network, objective, params, frozen, batches, jax.random.key(3))

    (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(FROZEN, FROZEN, objective, batches)
    assert terms["prior_loss"] == 0
    assert value == terms["instance_loss"] > 0
    alone = tiny.objective("min_snr", 0.0)
    expected = jax.grad(loss, has_aux=True)(FROZEN, FROZEN, alone, {"instance": batches["instance"]})[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-5), gradient, expected))
    assert jax.tree.all(jax.tree.map(lambda g: jnp.abs(g) > 1e-3, gradient))


def test_frozen_prediction_is_the_distance_to_the_frozen_network_and_never_moves_it():
    network = stage(scaled_text)
    tuned = {"denoiser": {"scale": jnp.array(0.9)}, "text_encoder": {"w": jnp.array(0.2)}}
    objective = tiny.objective("none", 1.0, "frozen_prediction")
    batches = {"instance": batch(0.5, cond=None), "prior": batch(-1.0, cond=None)}

    def loss(params, frozen):
        return Family().loss(network, objective, params, frozen, batches, jax.random.key(3))

    _, terms = loss(tuned, FROZEN)
    z_prior = separate(network.network.calls[-2][0], 2)[1]
    np.testing.assert_allclose(network.network.calls[-1][0], z_prior)  # the same noisy class pictures
    assert terms["prior_loss"] == pytest.approx(float(jnp.mean((0.5 * z_prior) ** 2)), rel=1e-5)
    # What the class pictures show does not matter, beyond the noisy input that they make.
    gradient = jax.grad(loss, argnums=1, has_aux=True)(tuned, FROZEN)[0]
    assert jax.tree.all(jax.tree.map(lambda g: g == 0, gradient))


def test_frozen_prediction_reads_its_caption_with_the_frozen_text_encoder():
    network = stage(scaled_text)
    tuned = {"denoiser": FROZEN["denoiser"], "text_encoder": {"w": jnp.array(0.5)}}
    objective = tiny.objective("none", 1.0, "frozen_prediction")
    batches = {"instance": batch(0.5, cond=None), "prior": batch(-1.0, cond=None)}
    _, terms = loss_of(network, objective, batches, tuned, FROZEN)
    assert terms["prior_loss"] == pytest.approx(0.3**2, rel=1e-4)


def test_a_target_may_be_made_of_both():
    """Half way between the pictures, of 1, and what a frozen network answers, .5."""

    def half_way(stage, batch, noisy, frozen_prediction):
        return (picture(stage, batch, noisy, frozen_prediction) + frozen_prediction()) / 2

    network = stage(lambda params, z, *_: jnp.full_like(z, params["answer"]))
    objective = Objective((Group("prior", target=Target(half_way, needs_frozen=True)),), "none")
    tuned, frozen = ({"denoiser": {"answer": answer}} for answer in (0.0, 0.5))
    _, terms = loss_of(network, objective, {"prior": batch(1.0)}, tuned, frozen)
    assert terms["prior_loss"] == pytest.approx(0.75**2)


def super_resolution_call(levels, low):
    """What the network is given for clean pictures of 0, both groups' rows after another."""
    network = stage(constant(0.0), spec={**tiny.SUPER_RESOLUTION, "residual_std": None})
    objective = tiny.objective("none", 1.0, "sampled", augmentation_levels=levels)
    batches = dict.fromkeys(("instance", "prior"), batch(0.0, side=16, low_res=low))
    loss_of(network, objective, batches)
    z, t, _, _, low_res, level = network.network.calls[0]
    return network, [jnp.concatenate(separate(a, 2)) for a in (z, t, low_res, level)]


def test_super_resolution_is_conditioned_on_the_enlarged_low_resolution_picture():
    low = jax.random.uniform(jax.random.key(5), (B, 8, 8, 3), minval=-1)
    _, (z, _, low_res, level) = super_resolution_call((0.0, 0.0), low)
    np.testing.assert_array_equal(level, 0)
    np.testing.assert_allclose(low_res, jnp.tile(upsample(low, 16), (2, 1, 1, 1)), atol=0.01)
    assert np.abs(np.asarray(low_res - z)).mean() > 0.3  # and not on z_t twice


def test_the_low_resolution_picture_has_noise_of_its_own_level_which_the_network_is_told():
    network, (z, t, low_res, level) = super_resolution_call((0.2, 0.6), jnp.full((B, 8, 8, 3), 0.5))
    assert np.all((level >= 0.2) & (level <= 0.6)) and len(np.unique(level)) == 2 * B
    assert abs(np.corrcoef(level, t)[0, 1]) < 0.8  # t runs over [0, 1] in order, levels do not
    alpha, sigma = (f(level)[:, None, None, None] for f in (network.augmentation.alpha, network.augmentation.sigma))
    noise = (low_res - 0.5 * alpha) / sigma
    np.testing.assert_allclose(np.std(noise, axis=(1, 2, 3)), 1, atol=0.12)
    eps = z / network.process.sigma(t)[:, None, None, None]
    assert abs(np.corrcoef(np.ravel(noise), np.ravel(eps))[0, 1]) < 0.05


def test_a_residual_is_noised_about_the_noised_low_resolution_picture():
    """Of pictures of 0.4; the network that answers their residual has no loss."""

    def answer(params, z, t, text, mask, low_res, level):
        return (0.4 - low_res) / 0.2

    network = stage(answer, spec={**tiny.SUPER_RESOLUTION, "residual_std": 0.2})
    low = jax.random.uniform(jax.random.key(5), (B, 8, 8, 3), minval=-1)
    objective = tiny.objective("none", 1.0, "sampled", augmentation_levels=(0.2, 0.6))
    loss, _ = loss_of(network, objective, dict.fromkeys(("instance", "prior"), batch(0.4, side=16, low_res=low)))
    assert loss == pytest.approx(0, abs=1e-9)
    z, t, _, _, low_res, _ = network.network.calls[0]
    alpha, sigma = (f(t)[:, None, None, None] for f in (network.process.alpha, network.process.sigma))
    eps = (z - alpha * (0.4 - low_res) / 0.2) / sigma
    np.testing.assert_allclose(np.std(eps, axis=(1, 2, 3)), 1, atol=0.12)


def test_separate_undoes_interleave():
    first, second = jnp.arange(12.0).reshape(4, 3), -jnp.arange(12.0).reshape(4, 3)
    (joined,) = interleave((first,), (second,))
    np.testing.assert_array_equal(joined[:2], [first[0], second[0]])  # alternating: shards hold both groups
    for part, expected in zip(separate(joined, 2), (first, second), strict=True):
        np.testing.assert_array_equal(part, expected)


def discrete_stage(answer, learned_variance=False, n=1000):
    process = discrete(squaredcos_betas(n))
    return dataclasses.replace(
        stage(answer, "eps"), process=process, augmentation=process, learned_variance=learned_variance
    )


@pytest.mark.parametrize("n", [B, 4 * B])
def test_times_of_a_discrete_process_are_its_own_each_alike_and_never_clean(n):
    """Of as many indices as pictures each is met once; of more, each picture meets those of its share of them."""
    network, objective = discrete_stage(constant(0.0), n=n), tiny.objective("none", 0.0, "sampled")
    times = [diffuse(network, batch(0.5), None, jax.random.key(seed), objective).t for seed in range(30)]
    index = np.asarray(times) * n
    np.testing.assert_allclose(index, np.round(index), atol=1e-4)
    for i, met in enumerate(np.round(index).T):
        assert set(met) == set(range(i * n // B + 1, (i + 1) * n // B + 1))


def test_offset_noise_shifts_each_channel_of_whole_pictures_by_its_deviation():
    network, many = discrete_stage(constant(0.0)), 400
    x = jnp.zeros((many, SIDE, SIDE, 3))
    objective = tiny.objective("none", 0.0, "sampled", offset_noise=0.5)
    eps = diffuse(network, batch(0.0)._replace(x=x), None, jax.random.key(0), objective).eps
    means = np.asarray(eps).mean((1, 2))  # one for each picture and channel
    np.testing.assert_allclose(np.cov(means.T), (0.5**2 + 1 / SIDE**2) * np.eye(3), atol=0.05)
    assert np.asarray(eps - means[:, None, None]).var() == pytest.approx(1 - 1 / SIDE**2, rel=0.05)


@pytest.mark.parametrize("vlb_weight", [0.0, 1.0])
def test_the_bound_moves_the_variance_alone(vlb_weight):
    def answer(params, z, *_):
        mean, v = params["mean"] * jnp.ones_like(z), params["v"] * jnp.ones_like(z)
        return jnp.concatenate([mean, v], axis=-1)

    params = {"denoiser": {"mean": jnp.float32(0.1), "v": jnp.float32(0.2)}}

    def gradient(weight):
        objective = tiny.objective("none", 0.7, "sampled", vlb_weight=weight)
        batches = {"instance": batch(0.5), "prior": batch(-0.5)}
        network = discrete_stage(answer, learned_variance=True)
        return jax.grad(lambda p: loss_of(network, objective, batches, p, params)[0])(params)["denoiser"]

    without, with_bound = ({k: float(g) for k, g in gradient(w).items()} for w in (0.0, vlb_weight))
    assert without["v"] == 0 and without["mean"] != 0
    assert with_bound["mean"] == pytest.approx(without["mean"], rel=1e-6)
    assert (with_bound["v"] != 0) == (vlb_weight > 0)


def test_the_bound_is_that_of_each_groups_own_pictures_kept_in_range():
    def answer(params, z, *_):
        return jnp.concatenate([jnp.full_like(z, 0.1), jnp.full_like(z, 0.2)], axis=-1)

    network, values = discrete_stage(answer, learned_variance=True), {"instance": 0.5, "prior": -0.25}
    objective = tiny.objective("none", 0.7, "sampled", vlb_weight=0.5)
    loss, terms = loss_of(network, objective, {name: batch(value) for name, value in values.items()})
    given = (separate(a, 2) for a in network.network.calls[0][:2])
    for (name, value), z, n in zip(values.items(), *given, strict=True):
        t = (n + 1) / 1000
        alpha, sigma = (f(t)[:, None, None, None] for f in (network.process.alpha, network.process.sigma))
        x0_hat = jnp.clip((z - 0.1 * sigma) / alpha, -1, 1)
        x0, v = jnp.full_like(z, value), jnp.full_like(z, 0.2)
        expected = variational_bound(network.process, x0, z, x0_hat, v, t).mean()
        assert terms[f"{name}_bound"] == pytest.approx(float(expected), rel=1e-3)
    whole = {name: terms[f"{name}_loss"] + 0.5 * terms[f"{name}_bound"] for name in values}
    assert loss == pytest.approx(float(whole["instance"] + 0.7 * whole["prior"]), rel=1e-5)
