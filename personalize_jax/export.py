"""Write a run's whole model in the layout that it came in: for public models the folders that diffusers reads.

    python -m personalize_jax.export --workdir=runs/rex --out=exported/rex

A run itself keeps only what it has trained. Each stage is written from its latest result or checkpoint, whether or not
the run is finished. Low-rank adapters are written to `lora/` as well, for `load_lora_weights`.
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags

from personalize_jax.method.personalized import load_tuned, stored_results
from personalize_jax.pipeline import save_pipeline
from personalize_jax.runtime import command, hosts, manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.parameterizations import LORA


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "Run directory of a personalisation.")
    flags.DEFINE_string("out", None, "Folder for the model.")


def main(_: list[str]) -> None:
    """Write the folders."""
    workdir, out = Path(flags.FLAGS.workdir), Path(flags.FLAGS.out)
    for name, step in export(workdir, out).items():
        print(f"{name}: step {step}")
    print(f"Model: {out}")


def export(workdir: Path, out: Path) -> dict[str, int]:
    """Write the cascade with what a run has trained; stages that it has not begun with stay as they were.

    Args:
        workdir: run directory.
        out: folder to write to.

    Returns:
        The steps done by stage.

    Raises:
        UserError: the run has no checkpoint yet, or none that can be read; its pretrained cascade is missing or another
            one; or `out` would replace it or the run.
    """
    config = manifest.read_config(workdir)
    sources = [config.pretrained] if isinstance(config.pretrained, str) else config.pretrained
    if out.resolve() in {Path(source).resolve() for source in (workdir, *sources)}:
        raise UserError(f"--out is {out}, which the model is read from; give another folder.")
    results = stored_results(workdir, config)
    if not results:
        raise UserError(f"{workdir} holds no checkpoint yet; let the run reach its first one.")
    pipeline = load_tuned(workdir, config, results)
    save_pipeline(pipeline, out, np.float32)
    trained = {name: read().params for name, (_, read) in results.items()}
    adapters = {name: params[LORA.name] for name, params in trained.items() if LORA.name in params}
    adapters = jax.tree.map(hosts.to_numpy, adapters)
    hosts.first_does(lambda: pipeline.family.write_adapters(adapters, out))
    return {name: step for name, (step, _) in results.items()}


if __name__ == "__main__":
    command.run(main, define_flags, required=("workdir", "out"))
