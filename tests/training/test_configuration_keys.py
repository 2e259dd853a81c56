"""What each key of a training's configuration does: every one is changed by itself, and changes what it should."""

import dataclasses
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from configs import common
from personalize_jax.diffusion.process import discrete, squaredcos_betas
from personalize_jax.families.diffusion_loss import DiffusionFamily
from personalize_jax.families.world import read_stage
from personalize_jax.method import personalization
from personalize_jax.models.params import flatten
from personalize_jax.training import loop, program
from personalize_jax.training.parameterizations.base import Identifier
from tests import tiny

B, EMPTY = 4, tiny.tokenizer()([""])[0]
IDENTIFIER = Identifier(np.array([3], np.int32), np.array([[3]], np.int32))


class Network:
    """Super-resolution with learned variances, linear in everything; remembers what it is given."""

    def __init__(self):
        self.calls = []

    def apply(self, variables, z, t, text, mask, low_res, level):
        self.calls.append((z, low_res, level))
        params = variables["params"]
        of_text = nn.Dense(3, use_bias=False).apply(variables, text.mean(1))
        mean = params["scale"] * z + low_res / 2 + of_text[:, None, None, :]
        return jnp.concatenate([mean, jnp.broadcast_to(params["variance"], mean.shape)], axis=-1)


def parameters():
    rng = np.random.default_rng(0)
    shapes = {"scale": (3,), "variance": (3,), "kernel": (4, 3)}
    denoiser = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return {"denoiser": denoiser, "text_encoder": tiny.linear_params()["text_encoder"]}


def dispatched(run=lambda step, *inputs: step(*inputs), **changes):
    """What is seen of one dispatch of a training, which `run` calls."""
    network, process = Network(), discrete(squaredcos_betas(100))
    stage = dataclasses.replace(
        read_stage(tiny.SUPER_RESOLUTION),
        **{"network": network, "prediction": "eps", "learned_variance": True},
        **{"process": process, "augmentation": process},
    )
    config = tiny.training(**{"batch_size": B, "prior__weight": 0.5, "prior__caption_dropout": 0.0, **changes})
    groups = {name: tiny.examples(16, 8, seed=i) for i, name in enumerate(("instance", "prior"))}
    mask = np.zeros((6, 16, 16), np.uint8)
    mask[:, :8] = 255
    groups = jax.tree.map(jnp.asarray, {name: group._replace(object_mask=mask) for name, group in groups.items()})
    batches = []

    def spy(family, stage, objective, params, frozen_params, batch, rng):
        batches.append(batch)
        return real(family, stage, objective, params, frozen_params, batch, rng)

    real = DiffusionFamily.loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionFamily, "loss", spy)
        made = program.stage_program(stage, tiny.LinearFamily(), parameters(), groups, config, 0, IDENTIFIER)
        before = made.init()
        state, metrics = run(made.advance.__wrapped__, before, made.frozen_params, made.examples)
    return SimpleNamespace(
        batch=batches[0],
        calls=network.calls,
        metrics=metrics,
        before=before,
        state=state,
        lying=made.state,
        mesh=made.mesh,
    )


@pytest.fixture(scope="module")
def usual():
    return dispatched()


def update(seen, name="scale"):
    return np.asarray(seen.state.params["denoiser"][name] - seen.before.params["denoiser"][name])


def moment(seen, name):
    return flatten(optax.tree_utils.tree_get(seen.state.opt_state, name))["denoiser/scale"]


def empty(seen, group):
    return np.all(np.asarray(seen.batch[group].tokens) == EMPTY, axis=1).tolist()


def losses(seen):
    return np.array([seen.metrics["instance_loss"], seen.metrics["prior_loss"]])


def close(a, b, rtol=1e-4):
    return np.allclose(a, b, rtol=rtol, atol=1e-7)


def rows_of(seen):
    return seen.batch["instance"].x.shape[0], seen.calls[0][0].shape[0]


# By key: another value, and whether (what is seen with it, what is seen without it) are as they should.
EFFECTS = {
    "batch_size": (2, lambda new, old: rows_of(new) == (2, 4) and rows_of(old) == (B, 2 * B)),
    "microbatches": (2, lambda new, old: rows_of(new) == (B // 2, B)),
    "caption_dropout": (1.0, lambda new, old: all(empty(new, "instance")) and not any(empty(new, "prior"))),
    "prior.caption_dropout": (1.0, lambda new, old: all(empty(new, "prior")) and not any(empty(new, "instance"))),
    "object_weight": (
        3.0,
        lambda new, old: (
            close(new.batch["instance"].pixel_weight[:, [0, -1], 0, 0], [[4, 1]] * B)
            and close(old.batch["instance"].pixel_weight, 1)
        ),
    ),
    "augmentation_levels": (
        (0.5, 0.6),  # of a hundred: the network is told the index
        lambda new, old: np.all((new.calls[0][2] >= 49) & (new.calls[0][2] <= 60)) and np.all(old.calls[0][2] == 0),
    ),
    "weighting": ("min_snr", lambda new, old: np.all(losses(new) < losses(old))),
    "offset_noise": (
        0.5,
        lambda new, old: not close(new.calls[0][0], old.calls[0][0]) and np.all(losses(new) != losses(old)),
    ),
    "vlb_weight": (
        1.0,
        lambda new, old: (
            {"instance_bound", "prior_bound"} == set(new.metrics) - set(old.metrics)
            and np.all(update(new, "variance") != 0)
            and np.all(update(old, "variance") == 0)
        ),
    ),
    "prior.weight": (
        2.0,
        lambda new, old: (
            close(new.metrics["loss"], losses(new) @ [1, 2]) and close(old.metrics["loss"], losses(old) @ [1, 0.5])
        ),
    ),
    "prior.form": (
        "frozen_prediction",
        lambda new, old: losses(new)[1] < 1e-12 < losses(old)[1] and close(losses(new)[0], losses(old)[0]),
    ),
    "trainable": (
        (("denoiser/scale", True), ("text_encoder/table", "identifier"), (".*", False)),
        lambda new, old: (
            set(flatten(new.state.params)) == {"denoiser/scale", "rows/text_encoder/table"}
            and set(flatten(old.state.params)) == {f"denoiser/{name}" for name in ("scale", "variance", "kernel")}
        ),
    ),
    "lora.rank": (
        2,
        lambda new, old: new.state.params["lora"]["denoiser"]["kernel"]["down"].shape == (4, 2),
    ),
    "lora.targets": (
        (("denoiser/kernel", 1),),
        lambda new, old: set(new.state.params["lora"]["denoiser"]) == {"kernel"},
    ),
    "ema_decay": (
        0.05,  # less than an average has at first
        lambda new, old: (
            old.state.ema is None
            and close(
                new.state.ema["denoiser"]["scale"],
                0.05 * new.before.params["denoiser"]["scale"] + 0.95 * new.state.params["denoiser"]["scale"],
            )
        ),
    ),
    "optimizer.learning_rate": (2e-4, lambda new, old: close(update(new), 2 * update(old), 1e-2)),
    "optimizer.warmup_steps": (2, lambda new, old: np.all(update(new) == 0) and np.all(update(old) != 0)),
    "optimizer.decay_steps": (12, lambda new, old: np.all(np.abs(update(new)) < 0.6 * np.abs(update(old)))),
    "optimizer.b1": (0.5, lambda new, old: close(moment(new, "mu"), 5 * moment(old, "mu"))),
    "optimizer.b2": (0.9, lambda new, old: close(moment(new, "nu"), 10 * moment(old, "nu"))),
    "optimizer.weight_decay": (
        100.0,
        lambda new, old: close(update(new) - update(old), -1e-2 * old.before.params["denoiser"]["scale"], 1e-2),
    ),
    "optimizer.clip_norm": (
        1e-3,
        lambda new, old: close(moment(new, "mu") / moment(old, "mu"), 1e-3 / min(1, old.metrics["gradient_norm"])),
    ),
    "optimizer.moment_dtype": ("bfloat16", lambda new, old: moment(new, "mu").dtype == jnp.bfloat16),
    "sharding": (
        (("", ("fsdp",)),),
        lambda new, old: (
            new.lying.params["denoiser"]["kernel"].sharding.spec == P(None, "fsdp")
            and old.lying.params["denoiser"]["kernel"].sharding.spec == P("fsdp", "tensor")
        ),
    ),
}
# What a key needs beside it to be seen; of numbers of rows, the shapes are enough.
BESIDE = {
    "batch_size": {"run": jax.eval_shape},
    "microbatches": {"run": jax.eval_shape},
    "lora.rank": {"trainable": ((".*", False),), "lora__targets": (("denoiser/kernel", 1),)},
    "lora.targets": {"trainable": ((".*", False),), "lora__rank": 2},
}


@pytest.mark.parametrize("key", EFFECTS)
def test_a_key_changes_what_it_should(usual, key):
    value, as_it_should = EFFECTS[key]
    assert as_it_should(dispatched(**{key.replace(".", "__"): value}, **BESIDE.get(key, {})), usual)


def test_the_mesh_is_the_configured_one():
    devices = [f"device {i}" for i in range(8)]
    assert program.mesh_of(tiny.training(mesh=(1, -1, 2)), devices).shape == {"data": 1, "fsdp": 4, "tensor": 2}


def test_the_loop_goes_on_logs_and_saves_as_often_as_configured(tmp_path):
    stage = dataclasses.replace(read_stage(tiny.BASE), network=tiny.LinearNetwork())
    config = tiny.training(num_steps=10, log_every=4, checkpoint_every=6, steps_per_dispatch=2)
    examples, done = {"instance": tiny.examples()}, []
    made = program.stage_program(stage, tiny.LinearFamily(), tiny.linear_params(), examples, config, 0)
    loop.train(made, tmp_path, lambda step, _: done.append(step))
    assert done == [0, 2, 4, 6, 8, 10]
    assert [line.split(",")[0] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        f'{{"step": {step}' for step in (4, 8, 10)
    ]
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == [6, 10]


def test_rows_start_as_configured(monkeypatch, tmp_path):
    pipeline, told = tiny.pipeline(), []
    subject = SimpleNamespace(
        identifier=SimpleNamespace(token_ids=[5, 9]),
        class_noun=SimpleNamespace(noun="dog"),
        images_NHWC=np.zeros((1, 16, 16, 3), np.uint8),
        labels=["a dog"],
    )
    monkeypatch.setattr(personalization, "stage_program", lambda *arguments: told.append(arguments[6]))
    monkeypatch.setattr(personalization, "train", lambda *arguments: None)
    for name in ("trained_of", "save_trained", "with_trained"):
        monkeypatch.setattr(personalization, name, lambda *arguments: None)
    for start in ("pretrained", "class_noun"):
        config = tiny.training(identifier_init=start)
        personalization.tune(pipeline, pipeline.stages[0], subject, {}, config, 0, tmp_path)
    noun = pipeline.tokenizer.encode("dog")
    for identifier, start_ids in zip(told, ([[5], [9]], [noun, noun]), strict=True):
        assert identifier.token_ids.tolist() == [5, 9] and identifier.start_ids.tolist() == start_ids


def test_no_key_is_forgotten_here():
    elsewhere = {"mesh", "num_steps", "steps_per_dispatch", "log_every", "checkpoint_every", "identifier_init"}
    assert EFFECTS.keys() | elsewhere == {path.replace("/", ".") for path in flatten(common.training().to_dict())}
