"""Plan a personalisation on TPUs that are not at hand: memory, time, traffic, and changes that make it fit.

    python -m personalize_jax.plan --config=configs/stable_diffusion.py:2.1 --topology=v5e-8 --topology=v5p-8

The real train step and the real sampling step of each stage are compiled ahead of time, on any machine with libtpu
(`pip install libtpu`) and without weights: the shapes of published models are known, those of a folder are read from
it. The compiler is stopped before it generates machine code (`planning/compiler.py`). For a step of a large model that
takes a few minutes on one core, once. `--out=plan.json` keeps all numbers.

Times are those of a roofline, the least that a step can take; real steps take longer.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from personalize_jax.families import public, registry
from personalize_jax.families.base import Family
from personalize_jax.method.changes import changed
from personalize_jax.method.class_images import prior_sampling
from personalize_jax.method.configuration import (
    check_values,
    stage_trainings,
    training_sections,
    trains_encoders,
)
from personalize_jax.pipeline import Pipeline
from personalize_jax.planning import published, slices
from personalize_jax.planning.compiler import run_in_subprocess
from personalize_jax.planning.estimate import Run, fits, part_seconds, roofline
from personalize_jax.planning.programs import Usage, model_flops, sampling_step, train_step
from personalize_jax.planning.slices import Topology
from personalize_jax.runtime import command
from personalize_jax.runtime.chips import GIB
from personalize_jax.runtime.files import write_text
from personalize_jax.training.program import check_sizes, mesh_of

SUBJECTS, CLASSES, PROMPTS = 30, 15, 25  # of the paper's protocol


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/deepfloyd_if.py:XL.")
    flags.DEFINE_multi_string("topology", None, "A slice, such as v5e:4x4 or v5e-16; may be repeated.")
    flags.DEFINE_bool("sampling", True, "Whether to plan sampling, too, and with it whole runs.")
    flags.DEFINE_bool("advise", True, "Whether to look for changes that make tuning fit where it does not.")
    flags.DEFINE_string("out", None, "A JSON file for all numbers.")


def main(_: list[str]) -> None:
    """Compile, print tables, write JSON."""
    jax.config.update("jax_platforms", "cpu")  # chips that this machine may have are left alone
    arguments = flags.FLAGS
    check_values(arguments.config)
    topologies = [slices.parse(text) for text in arguments.topology]
    pipeline = abstract_pipeline(arguments.config)
    plans: list[dict[str, Any]] = []
    own: dict[str, float] = {}
    for topology in topologies:
        plans.append(plan(pipeline, arguments.config, topology, arguments.sampling, arguments.advise))
        own = own or own_flops(arguments.config)
        for program in plans[-1]["programs"]:
            if program["program"] in own:
                program["model_flops"] = own[program["program"]] / topology.size
        if arguments.out:
            write_text(Path(arguments.out), json.dumps(plans, indent=2))
    print(table(plans))


def abstract_pipeline(config: ConfigDict) -> Pipeline:
    """The pretrained cascade of a configuration, with shapes in place of parameters and without a vocabulary."""
    sources = [config.pretrained] if isinstance(config.pretrained, str) else list(config.pretrained)
    compute = {"platform": "tpu", **config.get("compute", {})}
    model: Family
    if spec := published.spec(sources):
        model = public.build(registry.family_of(spec["stages"][0]["class"]), spec, None, **compute)
    else:
        model = registry.describe(sources, **compute)
    return Pipeline(model, model.shapes())


def own_flops(config: ConfigDict) -> dict[str, float]:
    """Operations of the model itself in a step of each tuning, on all chips together, by the program's name."""
    plain = changed(config, compute__remat=False, compute__attention="xla") if "compute" in config else config
    pipeline, found = abstract_pipeline(plain), {}
    for name in config.tune:
        training, trains_text, count = _tuning(pipeline, plain, name)
        found[f"tuning {name}"] = model_flops(pipeline, pipeline.stage(name), training, count, trains_text)
    return found


def plan(
    pipeline: Pipeline,
    config: ConfigDict,
    topology: Topology,
    sampling: bool = True,
    advise: bool = True,
) -> dict[str, Any]:
    """The plan of a configuration on one slice, as plain data.

    Args:
        pipeline: from `abstract_pipeline`.
        config: the run's configuration.
        topology: the slice.
        sampling: whether to plan sampling, too.
        advise: whether to look for changes where tuning does not fit.

    Raises:
        UserError: the configuration does not fit the number of chips.
    """
    devices = slices.devices(topology)
    trainings = stage_trainings(config)
    for name in config.tune:  # before the first of them is compiled
        check_sizes(trainings[name], mesh_of(trainings[name], devices))
    train_seconds, sampling_seconds, programs = {}, {}, []
    for name in config.tune:
        usage = tuning_usage(pipeline, config, name, topology)
        programs.append(usage_dict(f"tuning {name}", usage, topology))
        train_seconds[name] = roofline(usage, topology).seconds
        if advise and not fits(usage, topology):
            programs[-1]["changes"] = changes_that_fit(pipeline, config, name, topology)
    if sampling:
        for stage in pipeline.stages:
            batch = config.class_images.batch_size
            usage = run_in_subprocess(sampling_step, pipeline, stage, stage.sampling, batch, config.training, topology)
            programs.append(usage_dict(f"sampling {stage.name}", usage, topology))
            sampling_seconds[stage.name] = roofline(usage, topology).seconds
    result = {"topology": str(topology), "chips": topology.size, "mesh": list(config.training.mesh)}
    result |= {"hbm": topology.chip.hbm_bytes, "programs": programs}
    if sampling:
        with_prior = any(trainings[name].prior.weight > 0 for name in config.tune)
        result["seconds"] = run_seconds(pipeline, config, topology, with_prior, train_seconds, sampling_seconds)
    return result


def tuning_usage(pipeline: Pipeline, config: ConfigDict, name: str, topology: Topology) -> Usage:
    """The usage of one step of a stage's tuning."""
    training, trains_text, count = _tuning(pipeline, config, name)
    return run_in_subprocess(train_step, pipeline, pipeline.stage(name), training, count, trains_text, topology)


def _tuning(pipeline: Pipeline, config: ConfigDict, name: str) -> tuple[ConfigDict, bool, int]:
    """A stage's training configuration, whether it trains encoders, and the number of class images."""
    training = stage_trainings(config)[name]
    return training, trains_encoders(pipeline, name, training), config.class_images.count


def changes_that_fit(pipeline: Pipeline, config: ConfigDict, name: str, topology: Topology) -> list[str] | None:
    """Changes with which a stage's tuning fits; None if it never does.

    Changes are added until it fits, the cheapest first: another sharding, an attention kernel and a rounded moment cost
    next to nothing, computing activations again a third more time, and small batches leave the chip idle. Then every
    change without which it still fits is taken back, the dearest first.
    """

    def fits_with(changes: dict[str, Any]) -> bool:
        other = changed(config, **{key.replace(".", "__"): value for key, value in changes.items()})
        rebuilt = abstract_pipeline(other) if any(key.startswith("compute.") for key in changes) else pipeline
        return fits(tuning_usage(rebuilt, other, name, topology), topology)

    changes: dict[str, Any] = {}
    for key, value in _memory_savings(config, name):
        changes[key] = value
        if fits_with(changes):
            break
    else:
        return None
    *others, _ = changes
    for key in reversed(others):
        fewer = {other: value for other, value in changes.items() if other != key}
        if fits_with(fewer):
            changes = fewer
    return [f"{key}={value}" for key, value in changes.items()]


def _memory_savings(config: ConfigDict, name: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys with values that take less memory than the configuration's own, the cheapest first."""
    section, training = training_sections(config)[name], stage_trainings(config)[name]
    if tuple(training.mesh) != (1, -1, -1):
        yield f"{section}.mesh", (1, -1, -1)
    if "compute" in config and config.compute.attention not in ("auto", "flash"):  # "auto" is flash on TPUs
        yield "compute.attention", "flash"
    if training.optimizer.moment_dtype != "bfloat16":
        yield f"{section}.optimizer.moment_dtype", "bfloat16"
    if "compute" in config and not config.compute.remat:
        yield "compute.remat", True
    for count in (2, 4, 8):
        if count > training.microbatches and training.batch_size % count == 0:
            yield f"{section}.microbatches", count


def usage_dict(program: str, usage: Usage, topology: Topology) -> dict[str, Any]:
    """The usage of a program as plain data, with its times."""
    least = roofline(usage, topology)
    return {
        "program": program,
        "fits": fits(usage, topology),
        "memory": usage.memory,
        "flops": usage.flops,
        "bytes": usage.bytes,
        "unknown_loops": usage.unknown_loops,
        "received": {kind: usage.received(kind) for kind in dict.fromkeys(e.kind for e in usage.exchanges)},
        "seconds": least.seconds,
        "bound": least.bound if usage.compiled else None,
        "roofline": least._asdict(),
        "compile_seconds": usage.seconds,
    }


def run_seconds(
    pipeline: Pipeline,
    config: ConfigDict,
    topology: Topology,
    with_prior: bool,
    train_step_seconds: dict[str, float],
    sampling_step_seconds: dict[str, float],
) -> dict[str, float]:
    """Seconds of the parts of a personalisation, of the whole, and of the paper's protocol of 30 subjects.

    Subjects of one class share its class images.
    """
    settings, evaluation = config.class_images, config.evaluation
    trainings = stage_trainings(config)

    def batches(pictures: int, batch_size: int) -> int:
        return math.ceil(pictures / (batch_size + -batch_size % topology.size))

    class_batches = batches(settings.count, settings.batch_size) * with_prior
    evaluated = PROMPTS * evaluation.images_per_prompt + evaluation.class_samples
    picture_batches = batches(evaluated, settings.batch_size)
    run = Run(
        {name: trainings[name].num_steps for name in config.tune},
        {stage.name: (class_batches, prior_sampling(stage, settings).num_steps) for stage in pipeline.stages},
        {stage.name: (picture_batches, stage.sampling.num_steps) for stage in pipeline.stages},
    )
    parts = part_seconds(run, train_step_seconds, sampling_step_seconds)
    personalisation = parts["class images"] + parts["tuning"]
    protocol = CLASSES * parts["class images"] + SUBJECTS * (parts["tuning"] + parts["evaluation"])
    return parts | {"personalisation": personalisation, "protocol": protocol}


def table(plans: list[dict[str, Any]]) -> str:
    """Plans as Markdown: memory of a chip in GiB, time, work and traffic of a step, and whole runs.

    A tuning's operations are also given over the model's own: what is more is computed again, or padding.
    """
    kinds = ("parameters", "optimizer", "average", "pretrained", "examples", "activations")
    columns = ["slice", "program", "fits", *kinds, "of GiB", "ms", "bound", "TFLOP", "of the model's", "HBM GB"]
    lines = ["| " + " | ".join([*columns, "received MB"]) + " |", "|---" * (len(columns) + 1) + "|"]
    notes = []
    for plan in plans:
        for program in plan["programs"]:
            memory = program["memory"]
            cells = [f"{memory.get(kind, 0) / GIB:.2f}" for kind in kinds]
            cells.append(f"{plan['hbm'] / GIB:.0f}")
            if program["bound"] is None:
                cells += [""] * 6
            else:
                cells += [f"{1e3 * program['seconds']:.1f}", program["bound"]]
                flops, own = program["flops"], program.get("model_flops")
                cells += [f"{flops / 1e12:.2f}", f"{flops / own:.2f}" if own else "", f"{program['bytes'] / 1e9:.1f}"]
                cells.append(f"{sum(program['received'].values()) / 1e6:.0f}")
            row = [plan["topology"], program["program"], "yes" if program["fits"] else "no", *cells]
            lines.append("| " + " | ".join(row) + " |")
            if count := program["unknown_loops"]:
                notes.append(
                    f"{plan['topology']}, {program['program']}: how often {count} loops run cannot be told; they are "
                    "counted once, so that operations, exchanges and times are too low."
                )
            if "changes" in program:
                change = ", ".join(program["changes"]) if program["changes"] else "no change that was tried"
                notes.append(f"{plan['topology']}, {program['program']}: fits with {change}.")
        if "seconds" in plan and not math.isnan(plan["seconds"]["protocol"]):
            one, all_subjects = plan["seconds"]["personalisation"], plan["seconds"]["protocol"]
            notes.append(
                f"{plan['topology']}: a personalisation takes at least {one / 60:.2g} min "
                f"({one * plan['chips'] / 3600:.2g} chip-hours), {SUBJECTS} subjects with evaluation "
                f"{all_subjects / 3600:.2g} h ({all_subjects * plan['chips'] / 3600:.2g} chip-hours)."
            )
    return "\n".join([*lines, "", *notes])


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "topology"))
