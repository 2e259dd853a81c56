"""Does DreamBooth need diffusion? The cascade's base beside an autoregressive model, personalised and scored alike.

    python -m experiments.another_generator --config=configs/world.py --other=configs/autoregressive.py \
        --workdir=runs/another_generator

Both models' pictures have the resolution of their first stages, 32 pixels: a cascade is cut after its base. Each model
is tuned as its configuration says, with the other form of the prior term, and without the term. `--other` must name
weights that `personalize_jax.pretrain` has made; none are shipped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import study, tables
from experiments.study import Arm, Study
from experiments.tables import Finding
from personalize_jax.families.targets import PRIOR_FORMS
from personalize_jax.method.changes import changed
from personalize_jax.method.configuration import check_values
from personalize_jax.method.personalization import load_pretrained
from personalize_jax.metrics.table import SubjectScores
from personalize_jax.pipeline import Pipeline, save_pipeline
from personalize_jax.runtime import command
from personalize_jax.runtime.errors import UserError
from personalize_jax.training import tracking

NAME = "another_generator"
GENERATORS = "cascade", "autoregressive"


def define_flags() -> None:
    """The command line."""
    study.define_flags()
    config_flags.DEFINE_config_file("other", None, "Configuration of the other model: configs/autoregressive.py.")


def of_base(config: ConfigDict, folder: Path) -> tuple[ConfigDict, Pipeline]:
    """A configuration that tunes the first stage alone, and the pretrained model up to that stage.

    Args:
        config: a configuration of a model.
        folder: where a cascade without its later stages is written.
    """
    pipeline = load_pretrained(config)
    base = pipeline.stages[0].name
    if len(pipeline.stages) > 1:
        save_pipeline(pipeline.up_to(base), folder, np.float32)
        config = changed(config, pretrained=str(folder))
    config = changed(config, tune=(base,))
    return config, load_pretrained(config)


def make_study(generator: str, config: ConfigDict) -> Study:
    """One generator: as configured, with the other form of the prior term, and without the term."""
    arms, findings = [Arm(generator, config)], []
    for form in PRIOR_FORMS.keys() - {config.training.prior.form}:
        arms.append(Arm(f"{generator}_{form}", changed(config, training__prior__form=form), stage="base"))
    without = f"{generator}_without_prior"
    for arm in arms:
        findings += [
            Finding(f"{arm.name}: pictures of the class resemble the subject less", "PRES", without, arm.name),
            Finding(f"{arm.name}: the class keeps more of its diversity", "diversity kept", arm.name, without),
        ]
    arms.append(Arm(without, changed(config, training__prior__weight=0.0), stage="base"))
    return Study(NAME, arms, findings, paper={}, num_subjects=10)


def between(generators: tuple[str, str]) -> list[Finding]:
    """What is asked about the two as configured; neither answer is expected."""
    return [
        Finding(f"{generators[0]} shows the subject better", "DINO", *generators),
        Finding(f"{generators[0]} follows prompts better", "CLIP-T", *generators),
        Finding(f"{generators[0]} shows more of the contexts", "context", *generators),
        Finding(f"{generators[0]} keeps more of the class", "diversity kept", *generators),
    ]


def arms_asked_for(configs: Mapping[str, ConfigDict], names: Sequence[str] | None) -> dict[str, list[str]]:
    """The names of the arms of each generator that are asked for.

    Args:
        configs: the generators' configurations.
        names: names of arms; None for all.

    Raises:
        UserError: neither generator has an arm of that name.
    """
    known = {generator: [arm.name for arm in make_study(generator, configs[generator]).arms] for generator in configs}
    every = [name for of_one in known.values() for name in of_one]
    if unknown := sorted(set(names or ()) - set(every)):
        raise UserError(f"--arms names {', '.join(unknown)}; the arms are {', '.join(every)}.")
    return {generator: [n for n in of_one if names is None or n in names] for generator, of_one in known.items()}


def main(_: list[str]) -> None:
    """Personalise and score both generators, and write one table."""
    arguments, workdir = flags.FLAGS, Path(flags.FLAGS.workdir)
    configs = dict(zip(GENERATORS, (arguments.config, arguments.other), strict=True))
    for config in configs.values():
        check_values(config)
    names = arms_asked_for(configs, arguments.arms)
    destinations = tracking.from_flags()
    destinations.tracking(workdir)  # refuses destinations that are not installed
    subjects = study.subjects_of_command(make_study(GENERATORS[0], arguments.config))
    scores: dict[str, SubjectScores] = {}
    findings = between(GENERATORS)
    for generator, config in configs.items():
        if not names[generator]:
            continue
        config = study.quick(config) if arguments.quick else config
        config, pretrained = of_base(config, workdir / f"{generator}_base")
        one = study.select_arms(make_study(generator, config), names[generator])
        scores |= study.scores_of(one, pretrained, subjects, workdir, arguments.delete_weights, destinations)
        findings += one.findings
    findings = [finding for finding in findings if {finding.greater, finding.less} <= scores.keys()]
    print(tables.write(scores, findings, {}, workdir / NAME))


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "other", "workdir"))
