"""Write a run's model in the layout that it came in: for public models the folders that diffusers reads.

    python -m personalize_jax.export --workdir=runs/rex --out=exported/rex

Takes each stage from its latest checkpoint, whether or not the run has come to its end. Where low-rank adapters were
trained, they lie in `lora/` beside the whole model, for `load_lora_weights`.
"""

from pathlib import Path

from absl import flags

from personalize_jax import command, manifest
from personalize_jax.personalization import export, load_pretrained


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


if __name__ == "__main__":
    command.run(main, define_flags, required=("workdir", "out"))
