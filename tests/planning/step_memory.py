"""Memory of a training step on this machine's CPU, as planned and as the process then takes it; prints both in bytes.

python -m tests.planning.step_memory
"""

import ctypes
import json
import re
from pathlib import Path

import jax

from personalize_jax.families.world import read_stage
from personalize_jax.planning.programs import program_usage
from personalize_jax.training.program import stage_program
from tests import tiny

# Little to compile, and much to hold: the scores of an attention over 1,024 places.
NETWORK = {"channels": (64,), "patch": 2, "down_blocks": (1,), "up_blocks": (0,), "attention": (True,)}
STAGE = read_stage({**tiny.BASE, "resolution": 64, "network": NETWORK})


def resident(kind):
    """Bytes of this process's memory: VmRSS now, VmHWM at the most since the last `forget_peak`."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main():
    config = tiny.training(batch_size=16, prior__weight=1.0, num_steps=2)
    pretrained = {"denoiser": tiny.stage_params(STAGE), "text_encoder": tiny.text_params()}
    examples = {group: tiny.examples(seed=i, resolution=64) for i, group in enumerate(("instance", "prior"))}
    program = stage_program(STAGE, tiny.family(), pretrained, examples, config, 0)
    lowered = program.lower()
    plan = program_usage(lowered, {}, (), jax.devices())

    state = jax.block_until_ready(program.init())
    run = lowered.compile()
    arguments = sum(leaf.nbytes for leaf in jax.tree.leaves((state, program.frozen_params, program.examples)))
    forget_peak()
    before = resident("VmRSS")
    for _ in range(2):
        state, _ = jax.block_until_ready(run(state, program.frozen_params, program.examples))
    print(json.dumps({"planned": plan.total, "measured": arguments + resident("VmHWM") - before}))


if __name__ == "__main__":
    main()
