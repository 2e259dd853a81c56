"""Personalise a cascade with a few images of one subject.

    python -m personalize_jax.personalize --config=configs/world.py --images=photos/ --class_noun=dog --workdir=runs/rex

The run directory ends up with the subject and its identifier, the trained parameters, checkpoints, metrics, samples,
`gallery.png` and `report.html`; `manifest.json` records their origin. The same command continues a run that was
stopped, or says that all is done. After SIGTERM or Ctrl-C the command saves its work and ends with exit status 75.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from personalize_jax.method import finished
from personalize_jax.method.changes import changed
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
    """Personalise, then sample and report, unless that is done."""
    arguments = flags.FLAGS
    config, workdir = arguments.config, Path(arguments.workdir)
    tracked = tracking.from_flags().tracking(workdir)
    images = arguments.images[0] if len(arguments.images) == 1 else arguments.images
    if finished.is_finished(images, arguments.class_noun, config, workdir) or not personalize(
        images, arguments.class_noun, config, workdir, tracked
    ):
        print("All is done; nothing is left to do.")
    use = finished.usage(read_dataset(workdir / "subject"), workdir, config.report.contexts[0])
    print(f'The subject is "{use["name"]}". Its identifier is {use["identifier"]}, as in\n  {use["to sample it"]}')
    print(f"Pictures: {workdir / 'gallery.png'}\nReport:   {workdir / 'report.html'}")


def personalize(
    images: str | Sequence[str], class_noun: str | None, config: ConfigDict, workdir: Path, tracked: tracking.Tracking
) -> bool:
    """Begin a run or go on with it, to its end; whether anything was left to do.

    Args:
        images: a folder, or files.
        class_noun: what the subject is, if the user gave it.
        config: the run's configuration.
        workdir: run directory.
        tracked: additional destinations of metrics.

    Raises:
        UserError: see `personalize_subject`.
    """
    # These import the networks, which takes seconds: a command whose work is done has answered before.
    from personalize_jax.evaluation import showcase
    from personalize_jax.method import configuration
    from personalize_jax.method import personalization as method

    configuration.check_values(config)  # before weights are read
    pipeline = method.load_pretrained(config)
    photos = method.load_subject(images, class_noun, pipeline.stages[-1].resolution)
    showcase.check(pipeline, config)
    method.claim_run_directory(pipeline, photos, config, workdir)
    if finished.is_complete(workdir):
        return False
    with (
        manifest.record(workdir, showcase.seeds(config), method.made_from(pipeline, photos, config)),
        tracked.running(config),
    ):
        personalized = method.tune_cascade(pipeline, photos, config, workdir, tracked)
        compared = None
        base = pipeline.stages[0].name
        if config.report.without_prior and base in config.tune and config.training.prior.weight > 0:
            without = changed(config, training__prior__weight=0.0)
            folder = workdir / f"{base}_without_prior"
            compared = method.retune_stage(pipeline, personalized, base, without, workdir, folder, tracked).pipeline
        showcase.make_report(pipeline, personalized, compared, config, workdir, tracked)
    return True


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "images", "workdir"))
