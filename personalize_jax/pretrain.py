"""Pretrain one stage of the embedded cascade on the rendered world.

    python -m personalize_jax.pretrain --config=configs/pretrain_world.py:base --workdir=runs/world_base

The same command continues a training that was killed. A larger `--config.training.num_steps` prolongs it, and
`--config.pretrained` names weights to start from (`world` for the shipped ones). The result is in `pipeline/` of the
run directory: the cascade up to this stage, for `--config.pretrained` and `load_pipeline`.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from personalize_jax.families.objective import INSTANCE
from personalize_jax.families.world import World
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.method.configuration_keys import check_keys, rules_of_pretraining
from personalize_jax.method.personalized import with_trained
from personalize_jax.models.params import Params
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.pipeline import Pipeline, load_pipeline, save_pipeline
from personalize_jax.runtime import command, hosts, manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import ASSETS
from personalize_jax.training import tracking
from personalize_jax.training.examples import Examples, downsample_uint8, make_examples
from personalize_jax.training.loop import check_length, train
from personalize_jax.training.program import check_sizes, mesh_of, stage_program
from personalize_jax.training.tracking import JSONL_ONLY, Tracking
from personalize_jax.training.trained import trained_of
from personalize_jax.world import dataset_builder


def starting_pipeline(config: ConfigDict) -> Pipeline:
    """The cascade that ends with the stage to train, which `config.stage` describes.

    The parameters of text encoder and stage are those of the pipeline `config.pretrained` if it has them, and random
    otherwise.

    Raises:
        UserError: that pipeline's stage has another network.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), np.uint32(2**32 - 1))  # the training folds in another number
    if config.pretrained:
        before = load_pipeline(config.pretrained)
    else:
        tokenizer = Tokenizer.read(ASSETS / "world" / "tokenizer.json", config.text_encoder.max_length)
        encoder = TextEncoder(vocab_size=tokenizer.size, **config.text_encoder)
        tokens = np.ones((1, encoder.max_length), np.int32)
        params: Params = {"text_encoder": encoder.init(jax.random.fold_in(key, 0), tokens)["params"]}
        before = Pipeline(World(tokenizer, encoder, (), ()), params)
    if not isinstance(before.family, World):
        raise UserError(f"{config.pretrained} is a public model; pretraining goes on from one of this project's own.")
    family = before.family.with_stage(config.stage.to_dict())
    stage, params = family.stages[-1], before.params
    known = {stage.name: stage for stage in before.stages}
    if stage.name not in known:
        cond = jax.eval_shape(family.condition, params, family.token_shapes(1))
        params = {**params, stage.name: stage.init_params(jax.random.fold_in(key, 1), cond)}
    elif known[stage.name].network != stage.network:
        raise UserError(
            f"The {stage.name} of {config.pretrained} has another network than config.stage; give the same to go on "
            "from it."
        )
    return dataclasses.replace(before, family=family, params=params)


def world_examples(pipeline: Pipeline, data: dict[str, np.ndarray]) -> Examples:
    """The training set of the pipeline's last stage.

    Args:
        pipeline: the cascade, of which the tokenizer and the last stage's resolutions are needed.
        data: "image", uint8 [N, R, R, 4] with the object's mask as fourth channel, and "captions", K strings a picture.
    """
    stage = pipeline.stages[-1]
    rgba = downsample_uint8(data["image"], stage.resolution)
    low_res = None if stage.low_resolution is None else downsample_uint8(rgba[..., :3], stage.low_resolution)
    return make_examples(rgba[..., :3], data["captions"], pipeline.family.tokenize, low_res, rgba[..., 3])


def pretrain(
    config: ConfigDict, workdir: Path, data: dict[str, np.ndarray], tracking: Tracking = JSONL_ONLY
) -> Pipeline:
    """Train the stage and write the pipeline to `workdir/pipeline`.

    Args:
        config: a configuration of `configs/pretrain_world.py`.
        workdir: run directory.
        data: see `world_examples`.
        tracking: additional destinations of metrics.
    """
    pipeline = starting_pipeline(config)
    pictures = hashlib.sha256(np.ascontiguousarray(data["image"]).data).hexdigest()
    made_from = {"start": pipeline.fingerprint, "pictures": pictures}
    with manifest.record(workdir, {"training": config.seed}, made_from), tracking.running(config):
        with manifest.phase(workdir, f"pretraining {pipeline.stages[-1].name}"):
            pipeline = _trained(pipeline, config, workdir, data, tracking)
        with manifest.phase(workdir, "pipeline"):
            save_pipeline(pipeline, workdir / "pipeline")
    return pipeline


def _trained(
    pipeline: Pipeline, config: ConfigDict, workdir: Path, data: dict[str, np.ndarray], tracking: Tracking
) -> Pipeline:
    """The pipeline with its last stage trained, and its tokens counted."""
    stage = pipeline.stages[-1]
    start = pipeline.networks(stage.name)
    examples = {INSTANCE: world_examples(pipeline, data)}
    program = stage_program(stage, pipeline.family, start, examples, config.training, config.seed)
    with command.steps_bar(f"pretraining {stage.name}", config.training.num_steps) as progress:
        state = train(program, workdir, progress, tracking.for_part(stage.name))
    trained = trained_of(state)
    pipeline = with_trained(pipeline, stage.name, lambda: trained)
    if state.token_counts is None:
        return pipeline
    counts = hosts.to_numpy(state.token_counts).astype(np.int64)
    counts[sorted(pipeline.tokenizer.special_ids)] = 0  # padding is not processed
    family = pipeline.family
    assert isinstance(family, World)  # see `starting_pipeline`
    return dataclasses.replace(pipeline, family=family.with_counts(counts))


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/pretrain_world.py:base.")
    flags.DEFINE_string("workdir", None, "Run directory.")
    flags.DEFINE_string("data_dir", "runs/data", "Where the rendered world is kept.")
    command.define_multihost()
    tracking.define_flags()


def main(_: list[str]) -> None:
    """Render or read the data, train, save."""
    config, workdir = flags.FLAGS.config, Path(flags.FLAGS.workdir)
    check_keys(config, rules_of_pretraining(config))
    check_sizes(config.training, mesh_of(config.training))
    tracked = tracking.from_flags().tracking(workdir)
    hosts.check_shared(workdir)
    before = manifest.recorded(workdir, "training.num_steps", config.training.num_steps)
    check_length(workdir, config.training, before)
    manifest.record_config(config, workdir, may_change=["training.num_steps"])
    load = functools.cache(
        lambda: dataset_builder.load(config.dataset.resolution, "train", config.dataset.count, flags.FLAGS.data_dir)
    )
    hosts.first_does(load)  # whoever else shares the folder finds it rendered
    pretrain(config, workdir, load(), tracked)


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "workdir"))
