"""Evaluate by the metrics of the registry: the paper's, and on the rendered world exact ones.

    python -m personalize_jax.evaluate --workdir=runs/rex
    python -m personalize_jax.evaluate --config=configs/stable_diffusion.py:1.5 --images=pictures/ \
        --prompts=prompts.csv --photos=photos/ --out=scores/

The first draws the pictures that the configuration of the run asks for (`config.evaluation`; give `--config` to ask for
others) and scores them; several `--workdir` are several subjects of one table. The second scores pictures that are
there already, whatever made them. `prompts.csv` has the columns file and prompt, and where there are several subjects
the column subject, which names a folder of photos below `--photos`. "[V]" stands for the identifier: a prompt with it
asks for the subject, one without it for its class.

Every picture gets a line in `rows.jsonl`; `table.md` and `table.csv` have the means over subjects, with intervals. A
metric whose encoder the configuration does not name is left out.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from personalize_jax.benchmark.prompts import read_prompts
from personalize_jax.evaluation.protocol import evaluate, read_pictures
from personalize_jax.evaluation.scoring import find_encoders, load_encoders, score, summary, write_rows
from personalize_jax.method.configuration_keys import EVALUATION, EVALUATION_DEFAULTS, check_keys
from personalize_jax.method.personalization import load_pretrained
from personalize_jax.method.personalized import load_personalized
from personalize_jax.metrics.metric import MetricEncoders
from personalize_jax.metrics.table import Row, comma_separated, estimates, transposed
from personalize_jax.pipeline import Pipeline
from personalize_jax.runtime import command, hosts, manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text

logger = logging.getLogger(__name__)


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Whose `evaluation` keys to use; by default the run's own.")
    flags.DEFINE_multi_string("workdir", None, "Run directory of a personalised cascade; repeat for several.")
    flags.DEFINE_string("images", None, "Instead: a folder of pictures.")
    flags.DEFINE_string("prompts", None, "CSV file with the columns file and prompt, and perhaps subject.")
    flags.DEFINE_string("photos", None, "Real photos of the subject, or a folder of them for each subject.")
    flags.DEFINE_string("out", None, "Folder for the results; by default that of the only run.")
    command.define_multihost()


def main(_: list[str]) -> None:
    """Score, then print the table."""
    arguments = flags.FLAGS
    of_folder = (arguments.images, arguments.prompts, arguments.photos, arguments.config, arguments.out)
    if (arguments.workdir is None) == (arguments.images is None):
        raise UserError("Give either --workdir (personalised runs) or --images (a folder of pictures).")
    if arguments.images is not None and None in of_folder:
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
    with manifest.record(out, seeds={}, data={}):  # which evaluation.json has, run by run
        if runs:
            rows = of_runs(runs, arguments.config)
        else:
            rows = of_pictures(*map(Path, of_folder[:3]), arguments.config)
            hosts.first_does(lambda: write_rows(rows, out / "rows.jsonl"))
        table = {"mean over subjects": estimates(summary(rows))}
        text = transposed(table)
        if hosts.is_first():
            write_text(out / "table.md", text)
            write_text(out / "table.csv", comma_separated(table))
    print(f"{text}\nRows and tables: {out}")


def check_evaluation(config: ConfigDict) -> None:
    """Refuse `evaluation` keys that make no sense; no others are looked at.

    Raises:
        UserError: such a key, or there are none.
    """
    if not isinstance(config.get("evaluation"), ConfigDict):
        raise UserError("The configuration of --config has no `evaluation` keys; configs/world.py has them all.")
    check_keys(config.evaluation, EVALUATION, "evaluation.")


def of_runs(runs: Mapping[Path, ConfigDict], config: ConfigDict | None) -> list[Row]:
    """Rows of personalised runs.

    Args:
        runs: by run directory, the configuration of each.
        config: whose `evaluation` keys to use; None for the run's own.
    """
    settings_of = {
        workdir: config.evaluation if config else own_settings(workdir, ran) for workdir, ran in runs.items()
    }
    found = {workdir: find_encoders(settings) for workdir, settings in settings_of.items()}
    rows: list[Row] = []
    encoders: dict[str, MetricEncoders] = {}  # by what they are loaded from, so that the runs share them
    pretrained: dict[str, Pipeline] = {}
    for workdir, ran in runs.items():
        tuned = load_personalized(workdir)
        settings = settings_of[workdir]
        prompts = read_prompts(settings.prompts, tuned.subject.class_noun.noun)
        count = len(prompts) * settings.images_per_prompt + 2 * settings.class_samples
        if (reads := settings.to_json()) not in encoders:
            encoders = {reads: load_encoders(found[workdir])}
        if (origin := str((ran.pretrained, ran.get("compute")))) not in pretrained:
            pretrained = {origin: load_pretrained(ran)}
        with tqdm(total=count, desc=f"evaluating {workdir.name}", unit="img") as bar:
            folder = workdir / "evaluation"
            known = pretrained[origin], workdir.name, prompts, encoders[reads]
            rows += evaluate(tuned, *known, settings, folder, progress=bar.update)
    return rows


def own_settings(workdir: Path, config: ConfigDict) -> ConfigDict:
    """The `evaluation` keys that a run was begun with.

    A key that has come since takes its default, and one that is gone is dropped; the log says so.

    Args:
        workdir: the run directory.
        config: the run's configuration.

    Raises:
        UserError: there are no such keys, or a value that makes no sense.
    """
    if not isinstance(config.get("evaluation"), ConfigDict):
        raise UserError(f"{workdir} was begun without `evaluation` keys in its configuration; give --config.")
    own = config.evaluation.to_dict()
    if missing := [key for key in EVALUATION if key not in own]:
        taken = ", ".join(f"{key}={EVALUATION_DEFAULTS[key]!r}" for key in missing)
        logger.warning("%s was begun before config.evaluation had %s; give --config for others.", workdir, taken)
    if gone := [key for key in own if key not in EVALUATION]:
        logger.warning("%s has config.evaluation.%s, which nothing reads any more.", workdir, ", ".join(gone))
    settings = ConfigDict({key: own.get(key, default) for key, default in EVALUATION_DEFAULTS.items()})
    check_keys(settings, EVALUATION, "evaluation.")
    return settings


def of_pictures(images: Path, prompts: Path, photos: Path, config: ConfigDict) -> list[Row]:
    """Rows of pictures that are there already."""
    by_subject = read_pictures(images, prompts, photos)
    encoders = load_encoders(find_encoders(config.evaluation))
    rows = []
    for subject, pictures in tqdm(by_subject.items(), desc="subjects"):
        rows += score(encoders, subject, pictures)
    return rows


if __name__ == "__main__":
    command.run(main, define_flags, required=())
