"""Trainings of small public models that tests start on several devices, in a process of their own."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import common
from personalize_jax.models import attention
from personalize_jax.models.params import flatten
from personalize_jax.pipeline import load_pipeline
from personalize_jax.runtime import sharding
from personalize_jax.training import loop, program
from personalize_jax.training.examples import make_examples
from tests.training.worker import MESHES

# What is read of a folder for each model, and how its last stage is trained.
MODELS = {
    "stable_diffusion": (["sd"], {"trainable": ((".*", True),)}),
    "if_base": (["first"], {"prior__form": "frozen_prediction"}),
    "if_super_resolution": (["first", "second"], {"augmentation_levels": (0.0, 0.2), "vlb_weight": 1.0}),
}
STEPS, LARGE = 4, 1000  # elements of a kernel that is to lie in parts


def training(mesh, **changes):
    config = common.public_training()
    config.update(mesh=mesh, num_steps=STEPS, steps_per_dispatch=1, batch_size=8, log_every=1, checkpoint_every=STEPS)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config.lock()


def load(folder, model, config):
    """The pipeline, read into the shards of training."""

    def place(shapes):
        return sharding.shardings(shapes, config.sharding, program.mesh_of(config))

    return load_pipeline([folder / name for name in MODELS[model][0]], place)


def examples(pipeline, stage, seed, captions):
    rng = np.random.default_rng(seed)

    def pictures(side):
        return rng.integers(0, 256, (len(captions), side, side, 3), np.uint8)

    low = None if stage.low_resolution is None else pictures(stage.low_resolution)
    made = make_examples(pictures(stage.resolution), np.array(captions)[:, None], pipeline.family.tokenize, low)
    latents = tuple(rng.uniform(0, 1, (len(captions), *stage.shape)).astype(np.float32) for _ in range(2))
    return made if "codec" not in pipeline.params else made._replace(latent=latents)


def train_by_sgd(folder, model, mesh, directory):
    """A few steps whose updates are proportional to the clipped gradient; see `worker.train_by_sgd`."""
    program.make_optimizer = lambda config, num_steps: optax.chain(
        optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9)
    )
    config = training(mesh, **MODELS[model][1])
    pipeline = load(folder, model, config)
    stage = pipeline.stages[-1]
    start = pipeline.networks(stage.name)
    groups = {
        "instance": examples(pipeline, stage, 1, ["a qz dog", "a photo of a qz dog"]),
        "prior": examples(pipeline, stage, 2, ["a dog"] * 3),
    }
    made = program.stage_program(stage, pipeline.family, start, groups, config, 5)
    return pipeline, loop.train(made, directory)


def losses(directory):
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def parts(params):
    """For each large kernel the share of it that a device holds, and that share of all bytes but vectors'."""
    flat = {path: a for path, a in flatten(params).items() if a.ndim > 1}
    shares = {path: a.addressable_shards[0].data.size / a.size for path, a in flat.items()}
    held = sum(shares[path] * a.nbytes for path, a in flat.items()) / sum(a.nbytes for a in flat.values())
    large = [path for path, a in flat.items() if path.endswith("kernel") and a.size >= LARGE]
    return {"large": {path: shares[path] for path in large}, "held": held}


def queries(seed=0):
    """Queries, keys and values."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(8, length, 4, 8)), jnp.float32) for length in (20, 24, 24))


def attended(implementation, mesh, *inputs):
    """What the queries attend to, and the gradients of a function of it."""

    def function(q, k, v):
        with attention.over(mesh):
            out = attention.attend(q, k, v, implementation)
        return jnp.sum(jnp.sin(out)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


def attend_in_parts(directory):
    """The flash kernel split over a mesh, with JAX's own definition of it in place of the kernel, which needs TPUs."""

    def definition(mask, block_sizes, residual_checkpoint_name):
        return attention.splash.make_masked_mha_reference(np.stack([head[:, :] for head in mask.masks]))

    attention.splash.make_splash_mha_single_device = definition
    for name, sizes in MESHES.items():
        mesh = sharding.make_mesh(sizes)
        inputs = jax.device_put(queries(), jax.NamedSharding(mesh, sharding.BATCH))
        np.savez(directory / f"attended_{name}.npz", *attended("flash", mesh, *inputs))


def use_eight_devices(folder, directory, cases):
    """Train each model on each mesh; keep losses, parameters, and how they lie."""
    for model, name in (case.split("/") for case in cases):
        pipeline, state = train_by_sgd(folder, model, MESHES[name], directory / model / name)
        np.savez(directory / model / name / "params.npz", **jax.device_get(flatten(state.params)))
        lying = {"read": parts(pipeline.params), "trained": parts(state.params)}
        (directory / model / name / "lying.json").write_text(json.dumps(lying))
    attend_in_parts(directory)


if __name__ == "__main__":
    use_eight_devices(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
