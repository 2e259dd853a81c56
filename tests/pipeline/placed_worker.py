"""What lies where once a tuned public model is read on eight devices, in a process of its own."""

import contextlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from configs import deepfloyd_if, stable_diffusion
from personalize_jax.method.personalized import load_personalized, load_placed, places, with_trained
from personalize_jax.models.params import flatten
from personalize_jax.pipeline.cascade import sample_pictures
from personalize_jax.planning import hlo
from personalize_jax.planning.exchanges import collectives
from personalize_jax.planning.loops import count_runs
from personalize_jax.training.checkpoint import Checkpoints
from personalize_jax.training.examples import make_examples
from personalize_jax.training.program import stage_program
from personalize_jax.training.trained import latest_trained

PROMPTS, SEEDS = ["a qz dog", "a dog in the snow", "a teapot"], [3, 1, 4]
LARGE = 500  # elements of a kernel that is to lie in parts


def shares(params):
    """For each network the shares of its large kernels that a device holds."""
    held = {
        name: {
            leaf.addressable_shards[0].data.size / leaf.size
            for path, leaf in flatten(tree).items()
            if large(path, leaf)
        }
        for name, tree in params.items()
    }
    return {name: sorted(of_network) for name, of_network in held.items()}


def large(path, leaf):
    return path.endswith("kernel") and leaf.size >= LARGE


def few_steps(pipeline):
    return pipeline.replace_sampling(base=pipeline.stages[0].sampling._replace(num_steps=2))


def gathered_in_loop(pipeline):
    """Kinds of exchanges in the loop over steps of the program that draws a batch, and bytes gathered before it."""
    stage, programs = pipeline.stages[0], []

    def compiled(stage, sampling, mesh, params, *inputs):
        programs.append(sample_pictures.lower(stage, sampling, mesh, params, *inputs).compile().as_text())
        return sample_pictures(stage, sampling, mesh, params, *inputs)

    sys.modules["personalize_jax.pipeline.cascade"].sample_pictures = compiled
    pictures = pipeline.sample_stage(stage, PROMPTS, SEEDS)
    module = hlo.read(programs[0])
    found = collectives(module, count_runs(module))
    return pictures, {
        "in_loop": sorted({exchange.kind for exchange in found if exchange.runs > 1}),
        "gathered": sum(e.bytes for e in found if e.kind == "all-gather" and e.runs == 1),
        "in_parts": sum(leaf.nbytes for leaf in jax.tree.leaves(pipeline.params[stage.name]) if leaf.ndim > 1),
    }


def held_twice(folder):
    """Frozen parameters of both stages of IF that their trainings, on other meshes, hold beside the pipeline's own."""
    config = deepfloyd_if.get_config("M").unlock()
    config.pretrained = (str(folder / "first"), str(folder / "second"))
    config.training.batch_size, config.super_resolution_training.batch_size = 8, 4
    config.training.prior.form = config.super_resolution_training.prior.form = "frozen_prediction"
    pipeline, copied, meshes = load_placed(config.pretrained, config), [], []
    for stage, training in zip(pipeline.stages, (config.training, config.super_resolution_training), strict=True):
        start = pipeline.networks(stage.name)
        low = None if stage.low_resolution is None else np.zeros((2, *[stage.low_resolution] * 2, 3), np.uint8)
        pictures, captions = np.zeros((2, *stage.shape), np.uint8), np.full((2, 1), "a dog")
        examples = make_examples(pictures, captions, pipeline.family.tokenize, low)
        examples = examples._replace(cond=pipeline.condition(["", "a dog"]))
        groups = {"instance": examples, "prior": examples}
        made = stage_program(stage, pipeline.family, start, groups, training, 0)
        lying = flatten(start)
        for path, leaf in flatten(made.frozen_params).items():
            if (
                leaf.addressable_data(0).unsafe_buffer_pointer()
                != lying[path].addressable_data(0).unsafe_buffer_pointer()
            ):
                copied.append(f"{stage.name}/{path}")
        meshes.append(list(jax.tree.leaves(made.state.params)[-1].sharding.mesh.shape.values()))
    return {"copied": copied, "meshes": meshes}


def tune_from_checkpoint(folder, directory):
    """Assert that adapters of a checkpoint are placed as the run's configuration says, and fit the cascade there."""
    assert jax.device_count() == 8
    config = stable_diffusion.get_config("1.5:lora").unlock()
    config.pretrained, config.training.batch_size = str(folder / "sd"), 8
    pipeline = load_placed(config.pretrained, config)
    stage = pipeline.stages[0]
    examples = make_examples(np.zeros((2, *stage.shape), np.uint8), np.full((2, 1), "a dog"), pipeline.family.tokenize)
    groups = dict.fromkeys(("instance", "prior"), examples._replace(cond=pipeline.condition(["", "a dog"])))
    state = stage_program(stage, pipeline.family, pipeline.networks("base"), groups, config.training, 0).init()
    state = state._replace(step=state.step + 1, params=jax.tree.map(lambda leaf: leaf + 1, state.params))
    with contextlib.closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        checkpoints.save(1, state)
    result = latest_trained(directory, places(config)("base"))
    read = result.read().params
    jax.tree.map(np.testing.assert_array_equal, read, state.params)
    assert jax.tree.map(lambda a: a.sharding, read) == jax.tree.map(lambda a: a.sharding, state.params)
    tuned = with_trained(pipeline, "base", result.read)
    kernel = next(path for path in flatten(read["lora"]["denoiser"]) if path.endswith("/down")).removesuffix("/down")
    before, after = (flatten(cascade.float32_params("base"))[kernel] for cascade in (pipeline, tuned))
    down, up = (np.asarray(flatten(read["lora"]["denoiser"])[f"{kernel}/{side}"]) for side in ("down", "up"))
    np.testing.assert_allclose(after, np.asarray(before) + np.tensordot(down, up, 1), rtol=1e-5, atol=1e-5)


def main(run, folder, directory):
    assert jax.device_count() == 8
    tuned = few_steps(load_personalized(run).pipeline)
    pictures, exchanged = gathered_in_loop(tuned)
    np.save(directory / "pictures.npy", pictures)
    bare = load_placed(folder / "sd")
    found = {
        "tuned": {"shares": shares(tuned.params), "dtype": str(np.dtype(tuned.stages[0].network.dtype))},
        "bare": {"shares": shares(bare.params), "dtype": str(np.dtype(bare.stages[0].network.dtype))},
        "exchanged": exchanged,
        "frozen": held_twice(folder),
    }
    (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
