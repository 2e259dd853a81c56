"""Tell what a personalisation takes of TPUs that are not at hand: memory, time, traffic, and what to change.

    python -m personalize_jax.plan --config=configs/stable_diffusion.py:2.1 --topology=v5e-8 --topology=v5p-8

The real train step and the real sampling step of each stage are compiled ahead of time, on any machine with libtpu
(`pip install libtpu`) and without weights: a published model's shapes are known, a folder's are read. The compiler is
stopped before it writes machine code (`planning/compiler.py`), after a few minutes of a core for a step of a large
model, once. `--out=plan.json` keeps all numbers.

Times are a roofline's, the least that a step can take; real steps take longer.
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
from personalize_jax.method.class_images import prior_sampling
from personalize_jax.method.configuration import (
    changed,
    check_values,
    stage_trainings,
    training_sections,
    trains_encoders,
)
from personalize_jax.pipeline import Pipeline
from personalize_jax.planning import published, slices
from personalize_jax.planning.compiler import apart
from personalize_jax.planning.estimate import Run, fits, roofline, seconds
from personalize_jax.planning.programs import Usage, sampling_step, train_step
from personalize_jax.planning.slices import Topology
from personalize_jax.runtime import command
from personalize_jax.runtime.chips import GIB
from personalize_jax.runtime.files import write_text
from personalize_jax.training.program import check_sizes, mesh_of

SUBJECTS, CLASSES, PROMPTS = 30, 15, 25  # of the paper's protocol


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/deepfloyd_if.py:XL.")
    flags.DEFINE_multi_string("topology", None, "A slice, such as v5e:4x4 or v5e-16; as often as wanted.")
    flags.DEFINE_bool("sampling", True, "Whether to plan drawing, too, and with it whole runs.")
    flags.DEFINE_bool("advise", True, "Where tuning does not fit, try which changes make it fit.")
    flags.DEFINE_string("out", None, "A JSON file for all numbers.")


def main(_: list[str]) -> None:
    """Compile, print tables, write JSON."""
    jax.config.update("jax_platforms", "cpu")  # chips that this machine may have are left alone
    arguments = flags.FLAGS
    check_values(arguments.config)
    topologies = [slices.parse(text) for text in arguments.topology]
    pipeline = abstract_pipeline(arguments.config)
    plans = []
    for topology in topologies:
        plans.append(plan(pipeline, arguments.config, topology, arguments.sampling, arguments.advise))
        if arguments.out:
            write_text(Path(arguments.out), json.dumps(plans, indent=2))
    print(table(plans))


def abstract_pipeline(config: ConfigDict) -> Pipeline:
    """The pretrained cascade that a configuration names, with shapes in place of parameters and without vocabulary."""
    named = config.pretrained
    sources = [named] if isinstance(named, str) else list(named)
    compute = {"platform": "tpu", **config.get("compute", {})}
    if spec := published.spec(sources):
        family = registry.family_of(spec["stages"][0]["class"])
        model = public.build(family, spec, None, **compute)
    else:
        model = registry.describe(sources, **compute)
    return Pipeline(model, model.shapes())


def plan(
    pipeline: Pipeline, config: ConfigDict, topology: Topology, sampling: bool = True, advise: bool = True
) -> dict[str, Any]:
    """What a configuration takes of one slice, as plain data.

    Args:
        pipeline: from `abstract_pipeline`.
        config: of the run.
        topology: the slice.
        sampling: whether to plan drawing, too.
        advise: whether to look for changes where tuning does not fit.

    Raises:
        UserError: the configuration does not fit the number of chips.
    """
    devices = slices.devices(topology)
    trainings = stage_trainings(config)
    for name in config.tune:  # before the first of them is compiled
        check_sizes(trainings[name], mesh_of(trainings[name], devices))
    steps, draws, programs = {}, {}, []
    for name in config.tune:
        usage = tuning(pipeline, config, name, topology)
        programs.append(described(f"tuning {name}", usage, topology))
        steps[name] = roofline(usage, topology).seconds
        if advise and not fits(usage, topology):
            programs[-1]["changes"] = changes_that_fit(pipeline, config, name, topology)
    if sampling:
        for stage in pipeline.stages:
            batch = config.class_images.batch_size
            usage = apart(sampling_step, pipeline, stage, stage.sampling, batch, config.training, topology)
            programs.append(described(f"drawing {stage.name}", usage, topology))
            draws[stage.name] = roofline(usage, topology).seconds
    result = {"topology": str(topology), "chips": topology.size, "mesh": list(config.training.mesh)}
    result |= {"hbm": topology.chip.hbm_bytes, "programs": programs}
    if sampling:
        with_prior = any(trainings[name].prior.weight > 0 for name in config.tune)
        result["seconds"] = run_seconds(pipeline, config, topology, with_prior, steps, draws)
    return result


def tuning(pipeline: Pipeline, config: ConfigDict, name: str, topology: Topology) -> Usage:
    """What the tuning of a stage takes."""
    training = stage_trainings(config)[name]
    trains_text = trains_encoders(pipeline, name, training)
    count, stage = config.class_images.count, pipeline.stage(name)
    return apart(train_step, pipeline, stage, training, count, trains_text, topology)


def changes_that_fit(pipeline: Pipeline, config: ConfigDict, name: str, topology: Topology) -> list[str] | None:
    """Changes with which a stage's tuning fits; None if it never does.

    They are made one on top of the other until it fits, in the order of what they cost: how parameters lie, an
    attention kernel and a rounded moment cost next to nothing, computing activations again a third more time, and
    small batches the use of the chip. Then those are taken back without which it fits as well, the dearest first.
    """

    def fits_with(changes: dict[str, Any]) -> bool:
        other = changed(config, **{key.replace(".", "__"): value for key, value in changes.items()})
        of_other = abstract_pipeline(other) if any(key.startswith("compute.") for key in changes) else pipeline
        return fits(tuning(of_other, other, name, topology), topology)

    made: dict[str, Any] = {}
    for key, value in _candidates(config, name):
        made[key] = value
        if fits_with(made):
            break
    else:
        return None
    *others, _ = made
    for key in reversed(others):
        fewer = {other: value for other, value in made.items() if other != key}
        if fits_with(fewer):
            made = fewer
    return [f"{key}={value}" for key, value in made.items()]


def _candidates(config: ConfigDict, name: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys with values that take less memory than those that the configuration has."""
    part, training = training_sections(config)[name], stage_trainings(config)[name]
    if tuple(training.mesh) != (1, -1, -1):
        yield f"{part}.mesh", (1, -1, -1)
    if "compute" in config and config.compute.attention not in ("auto", "flash"):  # which is what "auto" is on TPUs
        yield "compute.attention", "flash"
    if training.optimizer.moment_dtype != "bfloat16":
        yield f"{part}.optimizer.moment_dtype", "bfloat16"
    if "compute" in config and not config.compute.remat:
        yield "compute.remat", True
    for count in (2, 4, 8):
        if count > training.microbatches and training.batch_size % count == 0:
            yield f"{part}.microbatches", count


def described(program: str, usage: Usage, topology: Topology) -> dict[str, Any]:
    """A program's usage as plain data."""
    least = roofline(usage, topology)
    by_kind = {kind: usage.received(kind) for kind in dict.fromkeys(e.kind for e in usage.exchanges)}
    return {
        "program": program,
        "fits": fits(usage, topology),
        "memory": usage.memory,
        "flops": usage.rounds * usage.flops,
        "bytes": usage.rounds * usage.bytes,
        "received": by_kind,
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
    steps: dict[str, float],
    draws: dict[str, float],
) -> dict[str, float]:
    """Seconds of the parts of a personalisation, of all of it, and of the paper's protocol of 30 subjects.

    Subjects of one class share its class images.
    """
    settings, evaluation = config.class_images, config.evaluation
    trainings = stage_trainings(config)

    def batches(pictures: int, batch_size: int) -> int:
        return math.ceil(pictures / (batch_size + -batch_size % topology.size))

    drawn = batches(settings.count, settings.batch_size) * with_prior
    shown = batches(PROMPTS * evaluation.images_per_prompt + evaluation.class_samples, settings.batch_size)
    run = Run(
        {name: trainings[name].num_steps for name in config.tune},
        {stage.name: (drawn, prior_sampling(stage, settings).num_steps) for stage in pipeline.stages},
        {stage.name: (shown, stage.sampling.num_steps) for stage in pipeline.stages},
    )
    parts = seconds(run, steps, draws)
    whole = parts["class images"] + parts["tuning"]
    protocol = CLASSES * parts["class images"] + SUBJECTS * (parts["tuning"] + parts["evaluation"])
    return parts | {"personalisation": whole, "protocol": protocol}


def table(plans: list[dict[str, Any]]) -> str:
    """Plans as Markdown: memory a chip in GiB, time in ms a step, exchanges in MB a step, and whole runs."""
    kinds = ("parameters", "optimizer", "average", "pretrained", "examples", "activations")
    lines = ["| slice | program | fits | " + " | ".join(kinds) + " | of GiB | ms | bound | TFLOP | received MB |"]
    lines.append("|---" * (8 + len(kinds)) + "|")
    notes = []
    for plan in plans:
        for program in plan["programs"]:
            memory = program["memory"]
            cells = [f"{memory.get(kind, 0) / GIB:.2f}" for kind in kinds]
            fitting = "yes" if program["fits"] else "no"
            time = [f"{1e3 * program['seconds']:.1f}", program["bound"] or ""]
            work = [f"{program['flops'] / 1e12:.2f}", f"{sum(program['received'].values()) / 1e6:.0f}"]
            if program["bound"] is None:
                time, work = ["", ""], ["", ""]
            row = [plan["topology"], program["program"], fitting, *cells, f"{plan['hbm'] / GIB:.0f}", *time, *work]
            lines.append("| " + " | ".join(row) + " |")
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
