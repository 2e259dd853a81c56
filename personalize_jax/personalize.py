"""Personalise a cascade with a few images of one subject.

    python -m personalize_jax.personalize --config=configs/world.py --images=photos/ --class_noun=dog --workdir=runs/rex

The run directory ends up with the subject and its identifier, the trained parameters, checkpoints, metrics, samples,
`gallery.png` and `report.html`; `manifest.json` records their origin. The same command continues a run that was
stopped, or says that all is done. After SIGTERM or Ctrl-C the command saves its work and ends with exit status 75.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from personalize_jax.evaluation import showcase
from personalize_jax.method import configuration
from personalize_jax.method.personalization import (
    claim_run_directory,
    load_pretrained,
    load_subject,
    made_from,
    retune_stage,
    tune_cascade,
)
from personalize_jax.runtime import command, manifest
from personalize_jax.subject.dataset import read_dataset
from personalize_jax.training import tracking


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/world.py.")
    flags.DEFINE_multi_string("images", None, "A folder, or image files (repeat the flag).")
    flags.DEFINE_string("class_noun", None, "What the subject is, such as dog; found by a classifier if absent.")
    flags.DEFINE_string("workdir", None, "Run directory.")
    command.define_multihost()
    tracking.define_flags()


def main(_: list[str]) -> None:
    """Personalise, then sample and report."""
    arguments = flags.FLAGS
    config, workdir = arguments.config, Path(arguments.workdir)
    configuration.check_values(config)  # before weights are read
    tracked = tracking.from_flags().tracking(workdir)
    pipeline = load_pretrained(config)
    images = arguments.images[0] if len(arguments.images) == 1 else arguments.images
    photos = load_subject(images, arguments.class_noun, pipeline.stages[-1].resolution)
    showcase.check(pipeline, config)
    claim_run_directory(pipeline, photos, config, workdir)
    if manifest.read(workdir).get("done") and (workdir / "report.html").exists():
        print("All is done; nothing is left to do.")
    else:
        with (
            manifest.record(workdir, showcase.seeds(config), made_from(pipeline, photos, config)),
            tracked.running(config),
        ):
            personalized = tune_cascade(pipeline, photos, config, workdir, tracked)
            compared = None
            base = pipeline.stages[0].name
            if config.report.without_prior and base in config.tune and config.training.prior.weight > 0:
                without = configuration.changed(config, training__prior__weight=0.0)
                directory = workdir / f"{base}_without_prior"
                compared = retune_stage(pipeline, personalized, base, without, workdir, directory, tracked).pipeline
            showcase.make_report(pipeline, personalized, compared, config, workdir, tracked)
    use = showcase.usage(read_dataset(workdir / "subject"), workdir, config.report.contexts[0])
    print(f'The subject is "{use["name"]}". Its identifier is {use["identifier"]}, as in\n  {use["to sample it"]}')
    print(f"Pictures: {workdir / 'gallery.png'}\nReport:   {workdir / 'report.html'}")


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "images", "workdir"))
