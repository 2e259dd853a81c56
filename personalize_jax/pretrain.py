"""Pretrain the embedded cascade on the rendered world, as a whole or one of its stages.

    python -m personalize_jax.pretrain --config=configs/pretrain_world.py:all --budget_minutes=9 --workdir=runs/world

trains text encoder and base, then super-resolution. `--budget_minutes` is the time of the whole command, rendering,
compiling and saving included: each stage has its share of it, and as many steps as its share allows (see
`training.budget`). The result is in `pipeline/` of the run directory, for `--config.pretrained` and `load_pipeline`.
The same command continues a run that was killed, to the numbers of steps that were chosen (`length.json`), however long
that takes. `--config.pretrained=runs/world/pipeline` goes on from these weights with another budget, in another run
directory. `--with_probe` and `--with_encoders` train these afterwards (see `world.probe`, `world.encoder`), with
numbers of steps of their own, beyond the budget.

    python -m personalize_jax.pretrain --config=configs/pretrain_world.py:base --workdir=runs/world_base

trains one stage. A larger `--config.training.num_steps` prolongs it, and `--config.pretrained` names weights to start
from (`world` for the shipped ones). `pipeline/` then has the cascade up to this stage.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from personalize_jax.families.objective import INSTANCE
from personalize_jax.families.registry import PretrainedHere
from personalize_jax.method.configuration_keys import check_keys, rules_of_pretraining
from personalize_jax.method.personalization import with_latents
from personalize_jax.method.personalized import with_trained
from personalize_jax.method.pretraining_start import family_with_stage, starting_pipeline
from personalize_jax.method.rules import number
from personalize_jax.pipeline import Pipeline, load_pipeline, save_pipeline
from personalize_jax.runtime import command, hosts, manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.training import tracking
from personalize_jax.training.budget import Budget, of_length, train_until_length_is_known
from personalize_jax.training.examples import Examples, downsample_uint8, make_examples
from personalize_jax.training.loop import check_length, train
from personalize_jax.training.program import check_sizes, mesh_of, stage_program
from personalize_jax.training.tracking import JSONL_ONLY, Tracking
from personalize_jax.training.trained import trained_of
from personalize_jax.world.captions import in_tokens
from personalize_jax.world.encoder import train_encoders
from personalize_jax.world.pictures import training_pictures
from personalize_jax.world.probe import train_probe

Data = Mapping[str, np.ndarray]  # see `world_examples`


def world_examples(pipeline: Pipeline, data: Data) -> Examples:
    """The training set of the pipeline's last stage.

    Args:
        pipeline: the cascade, of which the tokenizer and the last stage's resolutions are needed.
        data: "image", uint8 [N, R, R, 4] with the object's mask as fourth channel, and "captions", K strings a picture,
            or "phrases" in their place, of which tokens are made sooner; see `world.pictures`.
    """
    stage = pipeline.stages[-1]
    rgba = downsample_uint8(data["image"], stage.resolution)
    low_res = None if stage.low_resolution is None else downsample_uint8(rgba[..., :3], stage.low_resolution)
    if "phrases" in data:
        tokens, rows_NK = in_tokens(data["phrases"], pipeline.tokenizer)
        examples = Examples(rgba[..., :3], rows_NK, tokens, None, low_res, rgba[..., 3])
    else:
        examples = make_examples(rgba[..., :3], data["captions"], pipeline.family.tokenize, low_res, rgba[..., 3])
    return with_latents(pipeline, examples)


def pretrain(config: ConfigDict, workdir: Path, data: Data, tracking: Tracking = JSONL_ONLY) -> Pipeline:
    """Train the stage and write the pipeline to `workdir/pipeline`.

    Args:
        config: a configuration of `configs/pretrain_world.py`.
        workdir: run directory.
        data: see `world_examples`.
        tracking: additional destinations of metrics.
    """
    pipeline = starting_pipeline(config)
    made_from = {"start": pipeline.fingerprint, "pictures": _digest(data)}
    with manifest.record(workdir, {"training": config.seed}, made_from), tracking.running(config):
        with manifest.phase(workdir, f"pretraining {pipeline.stages[-1].name}"):
            pipeline = _trained(pipeline, config, workdir, data, tracking)
        with manifest.phase(workdir, "pipeline"):
            save_pipeline(pipeline, workdir / "pipeline")
    return pipeline


def _trained(
    pipeline: Pipeline,
    config: ConfigDict,
    directory: Path,
    data: Data,
    tracking: Tracking,
    budget: Budget | None = None,
) -> Pipeline:
    """The pipeline with its last stage trained, and its tokens counted."""
    stage = pipeline.stages[-1]
    start = pipeline.networks(stage.name)
    examples = {INSTANCE: world_examples(pipeline, data)}
    program = stage_program(stage, pipeline.family, start, examples, config.training, config.seed)
    title, tracking = f"pretraining {stage.name}", tracking.for_part(stage.name)
    if budget is not None:
        with command.steps_bar(title, None) as progress:
            length = train_until_length_is_known(program, directory, budget, progress, tracking)
        program = of_length(program, length)
    with command.steps_bar(title, program.config.num_steps) as progress:
        state = train(program, directory, progress, tracking)
    trained = trained_of(state)
    pipeline = with_trained(pipeline, stage.name, lambda: trained)
    if state.token_counts is None:
        return pipeline
    counts = hosts.to_numpy(state.token_counts).astype(np.int64)
    counts[sorted(pipeline.tokenizer.special_ids)] = 0  # padding is not processed
    family = pipeline.family
    assert isinstance(family, PretrainedHere)  # see `starting_pipeline`
    return dataclasses.replace(pipeline, family=family.with_counts(counts))


class Pretraining(NamedTuple):
    """The pretraining of several stages, one after the other.

    Attributes:
        config: a configuration such as `configs/pretrain_world.py:all`.
        workdir: run directory; each stage has a folder in it.
        load: gives the data of a stage, see `world_examples`, from the stage's section of the configuration.
        minutes: time of all stages together; None to train the configured numbers of steps.
        tracking: additional destinations of metrics.
        clock: gives the time in seconds.
    """

    config: ConfigDict
    workdir: Path
    load: Callable[[ConfigDict], Data]
    minutes: float | None = None
    tracking: Tracking = JSONL_ONLY
    clock: Callable[[], float] = time.monotonic


def section_of(config: ConfigDict, stage: str) -> ConfigDict:
    """The configuration of one stage's pretraining, as it would be by itself."""
    return ConfigDict({"seed": config.seed, "pretrained": config.pretrained, **config[stage]}).lock()


def pretrain_cascade(
    pretraining: Pretraining, others: Mapping[str, Callable[[Path], object]] | None = None
) -> Pipeline:
    """Train the stages that `config.train` names, and write the cascade to `workdir/pipeline`.

    What an earlier call has finished is not done again.

    Args:
        pretraining: the stages, and their time.
        others: trainings of other networks by name, to follow outside of the budget; each is called with its folder.

    Raises:
        UserError: the stages do not follow one another, or do not fit the weights to go on from; the run directory
            belongs to another configuration or budget; or the time is too short.
        Stopped: on request, after saving.
    """
    config, workdir = pretraining.config, pretraining.workdir
    ends = pretraining.clock() + 60 * (pretraining.minutes or 0)
    _check_order(config)
    earlier = load_pipeline(config.pretrained) if config.pretrained else None
    if earlier is not None:
        for stage in config.train:
            family_with_stage(earlier, section_of(config, stage))  # or a sentence before anything is trained
    hosts.check_shared(workdir)
    budget = {} if pretraining.minutes is None else {"budget_minutes": pretraining.minutes}
    manifest.record_config(ConfigDict({**config, **budget}), workdir)
    made_from = manifest.read(workdir).get("data", {}) | {"start": earlier and earlier.fingerprint}

    def once(name: str, work: Callable[[], object]) -> None:
        if name not in manifest.phase_times(workdir):
            with manifest.phase(workdir, name):
                work()

    with manifest.record(workdir, {"training": config.seed}, made_from), pretraining.tracking.running(config):
        for stage in config.train:
            once(f"pretraining {stage}", functools.partial(_pretrain_in_turn, pretraining, stage, earlier, ends))
        for name, work in (others or {}).items():
            once(name, functools.partial(work, workdir / name))
    return load_pipeline(workdir / "pipeline")


def _pretrain_in_turn(pretraining: Pretraining, stage: str, earlier: Pipeline | None, ends: float) -> None:
    """Train one of the stages after the ones before it, and write the cascade up to it.

    Args:
        pretraining: the stages, and their time.
        stage: the stage's name.
        earlier: the cascade to go on from.
        ends: when the whole budget is over.
    """
    config, clock = pretraining.config, pretraining.clock
    section, position = section_of(config, stage), config.train.index(stage)
    budget = None
    if pretraining.minutes is not None:
        share = section.share / sum(config[name].share for name in config.train)
        budget = Budget(min(ends, clock() + 60 * pretraining.minutes * share), config.decay_share, clock)
    before = earlier
    if position > 0:
        before = load_pipeline(_result(pretraining, config.train[position - 1]))
        if earlier is not None:
            before = _with_stage_of(earlier, stage, before)
    pipeline, data = starting_pipeline(section, before), pretraining.load(section)
    manifest.record_data(pretraining.workdir, {f"pictures of {stage}": _digest(data)})
    pipeline = _trained(pipeline, section, pretraining.workdir / stage, data, pretraining.tracking, budget)
    save_pipeline(pipeline, _result(pretraining, stage))


def _with_stage_of(earlier: Pipeline, stage: str, pipeline: Pipeline) -> Pipeline:
    """The pipeline with a further stage, that of an earlier pipeline if it has one of that name."""
    # As `starting_pipeline` has it.
    assert isinstance(pipeline.family, PretrainedHere) and isinstance(earlier.family, PretrainedHere)
    for spec in earlier.family.specs:
        if spec["name"] == stage:
            family = pipeline.family.with_stage(spec)
            return dataclasses.replace(pipeline.take_networks(earlier, [stage]), family=family)
    return pipeline


def _result(pretraining: Pretraining, stage: str) -> Path:
    """The folder of the cascade up to a stage."""
    last = stage == pretraining.config.train[-1]
    return pretraining.workdir / "pipeline" if last else pretraining.workdir / stage / "pipeline"


def _digest(data: Data) -> str:
    return hashlib.sha256(np.ascontiguousarray(data["image"]).data).hexdigest()


def on_this_machine(config: ConfigDict, backend: str, given: Mapping[str, object]) -> ConfigDict:
    """The configuration of several stages for a kind of machine.

    Args:
        config: the configuration, of which a copy is changed.
        backend: "cpu", or an accelerator, for which the values of `config.accelerator` hold.
        given: values by dotted key that go before those.
    """
    config = config.copy_and_resolve_references()
    if backend != "cpu":
        config.update(config.accelerator)
        config.update_from_flattened_dict(given)
    return config


def _check_order(config: ConfigDict) -> None:
    """Refuse stages that do not follow one another.

    Raises:
        UserError: a stage does not enlarge the pictures of the one before it, or the first has no text encoder.
    """
    first, *later = config.train
    for before, stage in zip(config.train, later, strict=False):
        given, wanted = config[before].stage["resolution"], config[stage].stage["low_resolution"]
        if given != wanted:
            raise UserError(
                f"config.train has {stage} after {before}, whose pictures have {given} pixels a side, and "
                f"config.{stage}.stage.low_resolution is {wanted}; give stages in the order of the cascade."
            )
    if not config.pretrained and not config[first].text_encoder:
        raise UserError(
            f"config.train begins with {first}, which brings no text encoder; give --config.pretrained, or begin with "
            "the stage before it."
        )


def read_pictures(config: ConfigDict, data_dir: str) -> Data:
    """The data of a stage, see `world_examples`; process 0 renders what is missing.

    Args:
        config: the configuration of one stage's pretraining.
        data_dir: where the rendered world is kept.
    """
    load = functools.cache(
        lambda: training_pictures(config.dataset.resolution, "train", config.dataset.count, data_dir)
    )
    hosts.first_does(load)  # whoever else shares the folder finds it rendered
    return load()


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/pretrain_world.py:all.")
    flags.DEFINE_float("budget_minutes", None, "Of all stages together: train as many steps as this time allows.")
    flags.DEFINE_bool("with_probe", False, "After all stages train the probe, too, to probe/ of the run directory.")
    flags.DEFINE_bool("with_encoders", False, "Likewise the world's CLIP and the network in DINO's place.")
    flags.DEFINE_string("workdir", None, "Run directory.")
    flags.DEFINE_string("data_dir", "runs/data", "Where the rendered world is kept.")
    command.define_multihost()
    tracking.define_flags()


def main(_: list[str]) -> None:
    """Render or read the data, train, save."""
    config, workdir = flags.FLAGS.config, Path(flags.FLAGS.workdir)
    check_keys(config, rules_of_pretraining(config))
    (_pretrain_stages if "train" in config else _pretrain_one)(config, workdir)


def _pretrain_one(config: ConfigDict, workdir: Path) -> None:
    """The command for one stage."""
    if given := [name for name in ("budget_minutes", "with_probe", "with_encoders") if flags.FLAGS[name].value]:
        raise UserError(f"--{given[0]} goes with all stages, --config=configs/pretrain_world.py:all; leave it out.")
    check_sizes(config.training, mesh_of(config.training))
    tracked = tracking.from_flags().tracking(workdir)
    hosts.check_shared(workdir)
    before = manifest.recorded(workdir, "training.num_steps", config.training.num_steps)
    check_length(workdir, config.training, before)
    manifest.record_config(config, workdir, may_change=["training.num_steps"])
    pretrain(config, workdir, read_pictures(config, flags.FLAGS.data_dir), tracked)


def _pretrain_stages(config: ConfigDict, workdir: Path) -> None:
    """The command for several stages."""
    arguments = flags.FLAGS
    minutes = arguments.budget_minutes
    if minutes is not None and not number(above=0).holds(minutes):
        raise UserError(f"--budget_minutes is {minutes}; give a number above 0.")
    trainings: dict[str, Callable[..., object]] = {"probe": train_probe, "encoders": train_encoders}
    wanted = [name for name in trainings if arguments[f"with_{name}"].value]
    if wanted and jax.process_count() > 1:
        raise UserError(f"--with_{wanted[0]} trains on one host; leave it out, or leave out --multihost.")
    config = on_this_machine(config, jax.default_backend(), config_flags.get_override_values(arguments["config"]))
    for stage in config.train:
        check_sizes(config[stage].training, mesh_of(config[stage].training))
    tracked = tracking.from_flags().tracking(workdir)
    load = functools.partial(read_pictures, data_dir=arguments.data_dir)
    others = {name: functools.partial(trainings[name], data_dir=Path(arguments.data_dir)) for name in wanted}
    pretrain_cascade(Pretraining(config, workdir, load, minutes, tracked), others)


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "workdir"))
