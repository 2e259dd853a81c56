"""The train step: the gradient of the loss, and the update of the parameters and of their average."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from personalize_jax.models.params import Params
from personalize_jax.training import parameterizations
from personalize_jax.training.examples import count_tokens
from personalize_jax.training.parameterizations.base import Networks

Metrics = dict[str, Array]
Loss = Callable[[Networks, Params, Any, Array], tuple[Array, Metrics]]


class TrainState(NamedTuple):
    """All that a training changes, and the source of its randomness: everything that a checkpoint holds.

    Attributes:
        step: number of updates done, int32.
        params: the trained parameters alone, as `parameterizations.init` gives them.
        ema: their exponential moving average, or None when it is off.
        opt_state: state of the optimiser.
        token_counts: int32 [V], how often each token went through the text encoder in training it; None when the text
            encoder is frozen.
        key: uint32 [2], the data of the random key from which the keys of all steps are folded; None only in a state
            that was read from a checkpoint of an earlier version.
        token_ids: int32 [n], the tokens whose rows are trained; None where no rows are.
    """

    step: Array
    params: Params
    ema: Params | None
    opt_state: optax.OptState
    token_counts: Array | None
    key: Array | None = None
    token_ids: Array | None = None


TrainStep = Callable[[TrainState, Params, Any, Array], tuple[TrainState, Metrics]]


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Array,
    ema: bool = False,
    vocabulary_size: int | None = None,
    token_ids: Array | None = None,
) -> TrainState:
    """The state before the first step; traceable.

    Args:
        params: the parameters to train.
        optimizer: optax chain.
        key: random key of the training, used here alone.
        ema: whether to keep a moving average.
        vocabulary_size: number of tokens to count, or None to count none.
        token_ids: see `TrainState`.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        opt_state=optimizer.init(params),
        token_counts=None if vocabulary_size is None else jnp.zeros((vocabulary_size,), jnp.int32),
        key=jax.random.key_data(key),
        token_ids=token_ids,
    )


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
    microbatches: int = 1,
    gather: Callable[[Params], Params] = lambda params: params,
) -> TrainStep:
    """Build `train_step(state, frozen_params, batch, rng) -> (state, metrics)`.

    `frozen_params` is a pytree of its own: never differentiated, never donated. The networks run with `state.params`
    wherever a parameter is trained, and with `frozen_params` elsewhere. The step closes over a run's constants, but not
    over its data: `jax.vmap` of it trains several subjects at once.

    Args:
        loss: (networks, frozen_params, batch, rng) -> (loss, metrics).
        optimizer: optax chain.
        ema_decay: decay of the moving average, used when the state has one.
        microbatches: parts of the batch that go through the networks one after another, see `accumulated`.
        gather: gathers sharded parameters before a network uses them, see `sharding.gathered`.
    """

    def train_step(state: TrainState, frozen_params: Params, batch: Any, rng: Array) -> tuple[TrainState, Metrics]:
        def loss_of(params: Params, batch: Any, rng: Array) -> tuple[Array, Metrics]:
            networks = parameterizations.apply(params, frozen_params, state.token_ids)
            return loss(gather(networks), gather(frozen_params), batch, rng)

        gradient_of = accumulated(jax.value_and_grad(loss_of, has_aux=True), microbatches)
        (value, metrics), gradient = gradient_of(state.params, batch, rng)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params, ema = optax.apply_updates(state.params, updates), state.ema
        if ema is not None:
            # Early on the average follows more closely, so that the first values do not weigh in it for long.
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update(params, ema, 1 - decay)
        counts = None if state.token_counts is None else count_tokens(state.token_counts, batch)
        state = TrainState(state.step + 1, params, ema, opt_state, counts, state.key, state.token_ids)
        return state, metrics | {"loss": value, "gradient_norm": optax.global_norm(gradient)}

    return train_step


def accumulated(gradient_of: Callable, count: int) -> Callable:
    """Accumulate the gradient over parts of a batch, so that a large batch takes little memory.

    Each part has its own key. Whatever the loss stratifies over its batch, such as times, is stratified over each part.
    The parts run in a loop, whose convolution gradients are slow on CPU, see `make_train_steps`.

    Args:
        gradient_of: (params, batch, rng) -> ((loss, metrics), gradient), means over the batch.
        count: number of parts, a divisor of the batch size; with 1 there is no loop.

    Returns:
        The same function for a whole batch.
    """
    if count == 1:
        return gradient_of

    def split(a: Array) -> Array:
        # Part i has rows i, i + count, ...: a sharded batch stays in place, and every part is spread over the devices.
        return jnp.moveaxis(a.reshape(-1, count, *a.shape[1:]), 1, 0)

    def means(params: Params, batch: Any, rng: Array) -> tuple:
        def add_part(total: Params, part: tuple[Any, Array]) -> tuple[Params, tuple[Array, Metrics]]:
            metrics, gradient = gradient_of(params, *part)
            return jax.tree.map(jnp.add, total, gradient), metrics

        parts = jax.tree.map(split, batch), jax.random.split(rng, count)
        total, metrics = jax.lax.scan(add_part, jax.tree.map(jnp.zeros_like, params), parts)
        return jax.tree.map(jnp.mean, metrics), jax.tree.map(lambda g: g / count, total)

    return means


def make_train_steps(
    train_step: TrainStep, sample_batch: Callable[[Any, Array], Any], count: int = 1
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Metrics]]:
    """Chain `count` steps into one program; each samples its own batch on the device.

    The keys of a step are folded from the state's key and the step's number, so that a resumed run samples the batches
    of the uninterrupted run.

    Args:
        train_step: from `make_train_step`.
        sample_batch: (examples, key) -> batch.
        count: steps in one dispatch. XLA's CPU backend runs the gradients of convolutions in a loop's body an order of
            magnitude slower than outside (jax issue 12868): use 1 there.

    Returns:
        (state, frozen_params, examples) -> (state, metrics), metrics averaged over the steps.
    """

    def step(state: TrainState, frozen_params: Params, examples: Any) -> tuple[TrainState, Metrics]:
        assert state.key is not None, "states of earlier versions are given one, see `Program.checkpoint_defaults`"
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        batch_key, step_key = jax.random.split(key)
        return train_step(state, frozen_params, sample_batch(examples, batch_key), step_key)

    def steps(state: TrainState, frozen_params: Params, examples: Any) -> tuple[TrainState, Metrics]:
        state, metrics = jax.lax.scan(lambda state, _: step(state, frozen_params, examples), state, length=count)
        return state, jax.tree.map(jnp.mean, metrics)

    return step if count == 1 else steps
