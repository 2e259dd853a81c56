"""The train step: both loss terms, their gradient, the update of params and EMA."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from personalize_jax.models.params import Params
from personalize_jax.training.examples import Batch, Examples
from personalize_jax.training.trainable import merge

Loss = Callable[[Params, Params, dict[str, Batch], Array], tuple[Array, dict[str, Array]]]


class TrainState(NamedTuple):
    """What training changes; everything a checkpoint holds.

    Attributes:
        step: number of updates done, int32.
        params: the trained parameters, and no others; under "lora" adapters, if there are any.
        ema: their exponential moving average, or None when it is off.
        opt_state: of the optimiser.
        token_counts: int32 [V], how often each token went through the text encoder in training it; or None when the
            text encoder is frozen.
    """

    step: Array
    params: Params
    ema: Params | None
    opt_state: optax.OptState
    token_counts: Array | None


def init_state(
    params: Params, optimizer: optax.GradientTransformation, ema: bool, vocabulary_size: int | None
) -> TrainState:
    """The state before the first step.

    Args:
        params: the parameters to train.
        optimizer: optax chain.
        ema: whether to keep a moving average.
        vocabulary_size: to count tokens, or None not to.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        opt_state=optimizer.init(params),
        token_counts=None if vocabulary_size is None else jnp.zeros((vocabulary_size,), jnp.int32),
    )


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, ema_decay: float, microbatches: int = 1
) -> Callable[[TrainState, Params, dict[str, Batch], Array], tuple[TrainState, dict[str, Array]]]:
    """Build `train_step(state, frozen_params, batch, rng) -> (state, metrics)`.

    `frozen_params` is a pytree of its own: never differentiated, never donated. The networks run with `state.params`
    wherever a parameter is trained, and with `frozen_params` elsewhere.

    Args:
        loss: (merged params, frozen params, batch, rng) -> (loss, metrics).
        optimizer: optax chain.
        ema_decay: of the moving average, used when the state has one.
        microbatches: parts of the batch that go through the networks one after another, see `accumulated`.
    """

    def train_step(
        state: TrainState, frozen_params: Params, batch: dict[str, Batch], rng: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        def differentiated(batch: dict[str, Batch], rng: Array) -> tuple[Params, dict[str, Array]]:
            def objective(params: Params) -> tuple[Array, dict[str, Array]]:
                return loss(merge(params, frozen_params), frozen_params, batch, rng)

            (value, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
            return gradient, metrics | {"loss": value}

        gradient, metrics = accumulated(differentiated, microbatches)(batch, rng)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # Early on the average follows more closely, so that it forgets the random start.
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update(params, ema, 1 - decay)
        counts = state.token_counts
        if counts is not None:
            tokens = jnp.concatenate([of_group.tokens.ravel() for of_group in batch.values()])
            counts = counts.at[tokens].add(1)
        metrics |= {"gradient_norm": optax.global_norm(gradient)}
        return TrainState(state.step + 1, params, ema, opt_state, counts), metrics

    return train_step


Differentiated = Callable[[dict[str, Batch], Array], tuple[Params, dict[str, Array]]]


def accumulated(differentiated: Differentiated, count: int) -> Differentiated:
    """Go through a batch in parts, for a large batch in little memory: (batch, rng) -> (gradient, metrics), averaged.

    Each part has a key of its own. What the loss stratifies over its batch, such as times, is stratified over each
    part. The parts run in a loop, whose convolution gradients are slow on CPU, see `make_train_steps`.

    Args:
        differentiated: (batch, rng) -> (gradient, metrics), both means over the batch.
        count: number of parts, a divisor of the batch size; with 1 there is no loop.
    """
    if count == 1:
        return differentiated

    def split(a: Array) -> Array:
        # Part i has rows i, i + count, ...: a sharded batch stays in place, and every part is spread over the devices.
        return jnp.moveaxis(a.reshape(-1, count, *a.shape[1:]), 1, 0)

    def means(batch: dict[str, Batch], rng: Array) -> tuple[Params, dict[str, Array]]:
        def add_part(total: Params, part: tuple[dict[str, Batch], Array]) -> tuple[Params, dict[str, Array]]:
            gradient, metrics = differentiated(*part)
            return jax.tree.map(jnp.add, total, gradient), metrics

        parts = jax.tree.map(split, batch), jax.random.split(rng, count)
        first = jax.tree.map(lambda a: a[0], parts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(differentiated, *first)[0])
        total, metrics = jax.lax.scan(add_part, zeros, parts)
        return jax.tree.map(lambda g: g / count, total), jax.tree.map(jnp.mean, metrics)

    return means


def make_train_steps(
    train_step: Callable,
    sample_batch: Callable[[dict[str, Examples], Array], dict[str, Batch]],
    root_key: Array,
    count: int,
) -> Callable[[TrainState, Params, dict[str, Examples]], tuple[TrainState, dict[str, Array]]]:
    """Chain `count` steps into one program, each with a batch of its own sampled on the device.

    The keys of a step are folded from the training's root key and the step's number: a resumed run samples what the
    uninterrupted run would have sampled.

    Args:
        train_step: from `make_train_step`.
        sample_batch: (examples, key) -> batch.
        root_key: of the training; used here alone.
        count: steps in one dispatch. XLA's CPU backend runs the gradients of convolutions in a loop's body an order of
            magnitude slower than outside (jax issue 12868): use 1 there.

    Returns:
        (state, frozen_params, examples) -> (state, metrics), metrics averaged over the steps.
    """

    def steps(
        state: TrainState, frozen_params: Params, examples: dict[str, Examples]
    ) -> tuple[TrainState, dict[str, Array]]:
        def one_step(state: TrainState, _: None) -> tuple[TrainState, dict[str, Array]]:
            batch_key, step_key = jax.random.split(jax.random.fold_in(root_key, state.step))
            return train_step(state, frozen_params, sample_batch(examples, batch_key), step_key)

        if count == 1:
            return one_step(state, None)
        state, metrics = jax.lax.scan(one_step, state, length=count)
        return state, jax.tree.map(jnp.mean, metrics)

    return steps
