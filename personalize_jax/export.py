"""Write a run's model in the layout that it came in: for public models the folders that diffusers reads.

    python -m personalize_jax.export --workdir=runs/rex --out=exported/rex

Takes each stage from its latest checkpoint, whether or not the run has come to its end. Where low-rank adapters were
trained, they lie in `lora/` beside the whole model, for `load_lora_weights`.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from personalize_jax.method.configuration import stage_trainings
from personalize_jax.method.personalization import load_pretrained, save_tuned, tuned_networks, with_tuned_sampling
from personalize_jax.pipeline import Pipeline
from personalize_jax.runtime import command, manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.loop import latest


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "Run directory of a personalisation.")
    flags.DEFINE_string("out", None, "Folder for the model.")


def main(_: list[str]) -> None:
    """Read the checkpoints, write the folders."""
    workdir, out = Path(flags.FLAGS.workdir), Path(flags.FLAGS.out)
    config = manifest.read_config(workdir)
    for name, step in export(load_pretrained(config), config, workdir, out).items():
        print(f"{name}: step {step}")
    print(f"Model: {out}")


def export(pipeline: Pipeline, config: ConfigDict, workdir: Path, out: Path) -> dict[str, int]:
    """Write the cascade as a run's latest checkpoints have it; stages that it has not begun with stay as they were.

    Args:
        pipeline: the pretrained cascade.
        config: of the run.
        workdir: run directory.
        out: folder to write to.

    Returns:
        The steps done by stage.

    Raises:
        UserError: the run has no checkpoint yet, or none that can be read.
    """
    tuned, adapters, steps = pipeline, {}, {}
    for name in config.tune:
        if (state := latest(workdir / name)) is None:
            continue
        networks, lora = tuned_networks(tuned, tuned.stage(name), state, stage_trainings(config)[name])
        tuned, steps[name] = tuned.replace_params(**networks), int(state.step)
        if lora is not None:
            adapters[name] = lora
    if not steps:
        raise UserError(f"{workdir} holds no checkpoint yet; let the run reach its first one.")
    save_tuned(with_tuned_sampling(tuned, config, list(steps)), adapters, out)
    return steps


if __name__ == "__main__":
    command.run(main, define_flags, required=("workdir", "out"))
