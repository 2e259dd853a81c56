"""One of two processes that hold the halves of a state, save it twice, damage the last one, and restore it."""

import contextlib

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from personalize_jax.runtime import hosts
from personalize_jax.training.checkpoint import Checkpoints


def alter(checkpoint, count):
    """Change so many bytes amid the numbers of a checkpoint."""
    file = max((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    content[len(content) // 2 :][:count] ^= 4
    file.write_bytes(content.tobytes())


def restore_altered(process, coordinator, folder):
    """Say which of the states that were saved is restored."""
    jax.distributed.initialize(coordinator, num_processes=2, process_id=process)
    halves = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
    states = {
        step: {"kernel": hosts.device_put(np.random.default_rng(step).normal(size=(100, 100)).astype("f4"), halves)}
        for step in (3, 6)
    }
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    hosts.first_does(lambda: alter(folder / "checkpoints" / "6", 1))
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=halves), states[3])
        restored = checkpoints.restore(shapes)
    found = [step for step, state in states.items() if (hosts.to_numpy(state["kernel"] == restored["kernel"])).all()]
    (folder / f"restored_{process}").write_text(str(found))
    jax.distributed.shutdown()
