"""Evaluate by the metrics of the registry: the paper's, and on the rendered world exact ones.

    python -m personalize_jax.evaluate --workdir=runs/rex
    python -m personalize_jax.evaluate --config=configs/stable_diffusion.py:1.5 --images=pictures/ \
        --prompts=prompts.csv --photos=photos/ --out=scores/

The first command samples and scores the pictures that the run's configuration asks for (`config.evaluation`; give
`--config` to use other keys); several `--workdir` are several subjects of one table. The second scores existing
pictures, whatever made them. `prompts.csv` has the columns file and prompt, and where there are several subjects the
column subject, which names a folder of photos below `--photos`. "[V]" stands for the identifier: a prompt with it asks
for the subject, one without it for its class.

Every picture gets a line in `rows.jsonl`; `table.md` and `table.csv` have the means over subjects, with intervals and
the worst subjects. A metric whose encoder the configuration does not name is left out.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from personalize_jax.benchmark.prompts import read_prompts
from personalize_jax.evaluation import metric_registry
from personalize_jax.evaluation.protocol import ROWS, evaluate, read_pictures
from personalize_jax.evaluation.scoring import find_encoders, load_encoders, score, summary, write_rows
from personalize_jax.method.configuration_keys import EVALUATION, EVALUATION_DEFAULTS, check_keys
from personalize_jax.method.personalization import load_pretrained
from personalize_jax.method.personalized import load_personalized
from personalize_jax.metrics.metric import MetricEncoders
from personalize_jax.metrics.table import Row, comma_separated, entries, transposed
from personalize_jax.pipeline import Pipeline
from personalize_jax.runtime import command, hosts, manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text

logger = logging.getLogger(__name__)


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Configuration of the evaluation; by default the run's own.")
    flags.DEFINE_multi_string("workdir", None, "Run directory of a personalised cascade; repeat for several.")
    flags.DEFINE_string("images", None, "A folder of pictures, in place of --workdir.")
    flags.DEFINE_string("prompts", None, "CSV file with the columns file and prompt, and perhaps subject.")
    flags.DEFINE_string("photos", None, "Real photos of the subject, or a folder of them for each subject.")
    flags.DEFINE_string("out", None, "Folder for the results; by default that of the only run.")
    command.define_multihost()


def main(_: list[str]) -> None:
    """Score, then print the table."""
    arguments = flags.FLAGS
    if (arguments.workdir is None) == (arguments.images is None):
        raise UserError("Give either --workdir (personalised runs) or --images (a folder of pictures).")
    further = arguments.prompts, arguments.photos, arguments.config, arguments.out
    if arguments.images is not None and None in further:
        raise UserError("Pictures of a folder need --images, --prompts, --photos, --config and --out, all five.")
    if arguments.workdir is not None and len(arguments.workdir) > 1 and arguments.out is None:
        raise UserError("Several runs make one table: say by --out where it goes.")
    if len({Path(workdir).name for workdir in arguments.workdir or ()}) < len(arguments.workdir or ()):
        raise UserError("Two runs have the same name, which is their subject's in the table; rename one.")
    if arguments.config is not None:
        check_evaluation(arguments.config)
    runs = {Path(workdir): manifest.read_config(Path(workdir)) for workdir in arguments.workdir or ()}
    out = Path(arguments.out or next(iter(runs)) / "evaluation")
    hosts.check_shared(out)
    with manifest.record(out, seeds={}, data={}):  # the evaluation.json of each run has them
        if runs:
            rows = score_runs(runs, arguments.config)
        else:
            images, prompts, photos = Path(arguments.images), Path(arguments.prompts), Path(arguments.photos)
            rows = score_pictures(images, prompts, photos, arguments.config)
            hosts.first_does(lambda: write_rows(rows, out / ROWS))
        table = {"mean over subjects": entries(summary(rows), metric_registry.better)}
        text = transposed(table)
        if hosts.is_first():
            write_text(out / "table.md", text)
            write_text(out / "table.csv", comma_separated(table))
    print(f"{text}\nRows and tables: {out}")


def check_evaluation(config: ConfigDict) -> None:
    """Refuse a configuration whose `evaluation` keys are missing or invalid; its other keys do not matter.

    Raises:
        UserError: they are.
    """
    if not isinstance(config.get("evaluation"), ConfigDict):
        raise UserError("The configuration of --config has no `evaluation` keys; configs/world.py has them all.")
    check_keys(config.evaluation, EVALUATION, "evaluation.")


def score_runs(runs: Mapping[Path, ConfigDict], config: ConfigDict | None) -> list[Row]:
    """Evaluate personalised runs.

    Args:
        runs: the configuration of each run by its directory.
        config: configuration whose `evaluation` keys all runs get; None for the runs' own.
    """
    settings_of = {run: config.evaluation if config else own_settings(run, ran) for run, ran in runs.items()}
    loaders = {run: find_encoders(settings) for run, settings in settings_of.items()}
    rows: list[Row] = []
    encoders: dict[str, MetricEncoders] = {}  # by settings, so that consecutive runs share them
    pretrained: dict[str, Pipeline] = {}
    for workdir, ran in runs.items():
        tuned = load_personalized(workdir)
        settings = settings_of[workdir]
        prompts = read_prompts(settings.prompts, tuned.subject.class_noun.noun)
        count = len(prompts) * settings.images_per_prompt + 2 * settings.class_samples
        if (encoders_key := settings.to_json()) not in encoders:
            encoders = {encoders_key: load_encoders(loaders[workdir])}
        if (model_key := str((ran.pretrained, ran.get("compute")))) not in pretrained:
            pretrained = {model_key: load_pretrained(ran)}
        before, metric_encoders, folder = pretrained[model_key], encoders[encoders_key], workdir / "evaluation"
        with tqdm(total=count, desc=f"evaluating {workdir.name}", unit="img") as bar:
            rows += evaluate(
                tuned, before, workdir.name, prompts, metric_encoders, settings, folder, progress=bar.update
            )
    return rows


def own_settings(workdir: Path, config: ConfigDict) -> ConfigDict:
    """The `evaluation` keys that a run began with.

    A key that was introduced later takes its default, and one that was removed is dropped; the log says so.

    Args:
        workdir: the run directory.
        config: the run's configuration.

    Raises:
        UserError: the keys are missing, or a value is invalid.
    """
    if not isinstance(config.get("evaluation"), ConfigDict):
        raise UserError(f"{workdir} was begun without `evaluation` keys in its configuration; give --config.")
    own = config.evaluation.to_dict()
    if missing := [key for key in EVALUATION if key not in own]:
        defaults = ", ".join(f"{key}={EVALUATION_DEFAULTS[key]!r}" for key in missing)
        logger.warning("%s was begun before config.evaluation had %s; give --config for others.", workdir, defaults)
    if removed := [key for key in own if key not in EVALUATION]:
        logger.warning("%s has config.evaluation.%s, which nothing reads any more.", workdir, ", ".join(removed))
    settings = ConfigDict({key: own.get(key, default) for key, default in EVALUATION_DEFAULTS.items()})
    check_keys(settings, EVALUATION, "evaluation.")
    return settings


def score_pictures(images: Path, prompts: Path, photos: Path, config: ConfigDict) -> list[Row]:
    """Score existing pictures; see `read_pictures` for the first three arguments."""
    by_subject = read_pictures(images, prompts, photos)
    encoders = load_encoders(find_encoders(config.evaluation))
    rows = []
    for subject, pictures in tqdm(by_subject.items(), desc="subjects"):
        rows += score(encoders, subject, pictures)
    return rows


if __name__ == "__main__":
    command.run(main, define_flags, required=())
