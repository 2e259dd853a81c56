"""A training that tests start in processes of their own, to be killed or on several devices."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from personalize_jax.families.diffusion_loss import interleave, separate
from personalize_jax.families.world import read_stage
from personalize_jax.runtime import sharding
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.sharding import AXES, BATCH
from personalize_jax.training import loop, program
from tests import tiny

# One level of a U-Net with residual blocks and attention: what takes longest is to compile it.
NETWORK = {"channels": (64,), "patch": 2, "down_blocks": (1,), "up_blocks": (0,), "attention": (True,)}
STAGE = read_stage({**tiny.BASE, "network": NETWORK})
MESHES = {"data": (8, 1, 1), "fsdp": (2, 4, 1), "tensor": (2, 2, 2)}
EVERY_KERNEL = (  # of the network, as targets of adapters
    ("denoiser/.*attention/(query|key|value)/kernel", 1),
    ("denoiser/.*attention/out/kernel", 2),
    ("denoiser/.*(conv_in|conv_out|stem|head|noisy_weights|low_res_weights)/kernel", 3),
    ("denoiser/.*/kernel", 1),
)


def start():
    """The pretrained parameters."""
    return {"denoiser": tiny.stage_params(STAGE), "text_encoder": tiny.text_params()}


def train(directory, progress=lambda step, metrics: None, identifier=None, **changes):
    """Tune a small base model and the text encoder with the prior term and an average."""
    config = tiny.training(
        **{
            "prior__weight": 0.7,
            "weighting": "min_snr",
            "ema_decay": 0.9,
            "caption_dropout": 0.2,
            "trainable": ((".*", True),),
            "optimizer__learning_rate": 1e-3,
            **changes,
        }
    )
    return loop.train(tuning(config, identifier), directory, progress)


def tuning(config, identifier=None):
    """The program of a training with six instance images, and eight class images, which eight devices share out."""
    examples = {"instance": tiny.examples(seed=1), "prior": tiny.examples(seed=2, captions=["a dog"], count=8)}
    return program.stage_program(STAGE, tiny.family(), start(), examples, config, 5, identifier)


def train_by_sgd(directory, **changes):
    """Ten steps whose updates are proportional to the gradient.

    Adam divides by the gradient's size: where it vanishes but for rounding, as that of an attention's key biases does,
    devices that add in another order would get steps of another sign.
    """
    program.make_optimizer = lambda config, num_steps: optax.sgd(0.05, momentum=0.9)
    return train(directory, num_steps=10, checkpoint_every=10, batch_size=8, ema_decay=0.0, **changes)


def train_adapters(directory, mesh):
    """Ten steps of adapters beside every kernel of the network."""
    adapters = {"lora__rank": 4, "lora__targets": EVERY_KERNEL, "trainable": ((".*", False),)}
    return train_by_sgd(directory, mesh=mesh, **adapters)


def train_adapters_on_eight_devices(directory):
    """Keep what they become where batches, stored parameters and features are split."""
    state = train_adapters(directory / "eight", MESHES["tensor"])
    np.savez(directory / "params.npz", **jax.device_get(flatten_dict(state.params, sep="/")))


def be_killed(directory):
    """Die without warning in the fifth step, once the third's checkpoint is on disk."""

    def progress(step, metrics):
        if step == 5:
            while not (directory / "checkpoints" / "3").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    train(directory, progress)


def use_eight_devices(directory, *meshes):
    """Train on some meshes, the last of which splits features; keep the parameters, and what one device cannot show."""
    for name in meshes:
        state = train_by_sgd(directory / name, mesh=MESHES[name])
        np.savez(directory / f"{name}.npz", **jax.device_get(flatten_dict(state.params, sep="/")))
    kernel = state.params["denoiser"]["down_0_transformer"]["mlp_in"]["kernel"]
    try:
        train(directory / "refused", mesh=(8, 1, 1), batch_size=4)
    except UserError as error:
        refusal = str(error)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8, 1, 1), AXES)
    group = jax.ShapeDtypeStruct((16, 4), np.float32, sharding=jax.sharding.NamedSharding(mesh, BATCH))
    joined = jax.jit(lambda a, b: separate(2 * interleave((a,), (b,))[0], 2)).lower(group, group).compile()
    # What is stored in parts: the gradient of what is gathered of it, and a batch.
    in_parts, rules = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 8, 1), AXES), [("", (None, "fsdp"))]
    params = sharding.placed({"kernel": np.ones((16, 4), np.float32)}, rules, in_parts)
    gradient = jax.jit(jax.grad(lambda p: sharding.gathered(p, rules, in_parts)["kernel"].sum()))(params)["kernel"]
    whole = jax.jit(lambda p: sharding.gathered(p, rules, in_parts))(params)["kernel"]
    batch = jax.jit(lambda: sharding.shard_batch(jax.numpy.ones((16, 4)), in_parts))()
    arrays = {"stored": params["kernel"], "gathered": whole, "gradient": gradient, "batch": batch}
    examples = tuning(tiny.training(mesh=MESHES["fsdp"], batch_size=8)).examples
    seen = {
        "pictures": {name: group.image.addressable_shards[0].data.shape[0] for name, group in examples.items()},
        "shards": {name: a.addressable_shards[0].data.shape for name, a in arrays.items()},
        "refusal": refusal,
        "refused_wrote": (directory / "refused").exists(),
        "kernel_shape": kernel.shape,
        "kernel_shard": kernel.addressable_shards[0].data.shape,
        "interleave": joined.as_text(),
    }
    (directory / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    commands = be_killed, use_eight_devices, train_adapters_on_eight_devices
    {command.__name__: command for command in commands}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
