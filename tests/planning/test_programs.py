import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import deepfloyd_if, stable_diffusion, world
from personalize_jax import plan
from personalize_jax.families import public
from personalize_jax.families.batch import Batch
from personalize_jax.families.world import read_stage
from personalize_jax.method.changes import changed
from personalize_jax.planning import slices
from personalize_jax.planning.estimate import Run, Usage, fits, part_seconds, roofline
from personalize_jax.planning.exchanges import Collective
from personalize_jax.planning.programs import (
    bytes_per_device,
    conditioning_shapes,
    example_shapes,
    kept_bytes,
    pretrained_shapes,
    program_usage,
)
from personalize_jax.training.program import mesh_of, stage_program
from tests import tiny


def usage(**changes):
    start = Usage({"parameters": 2**30}, 2e12, 8e9, [], 0, True, 1.0)
    return start._replace(**changes)


V5E_8 = slices.parse("v5e-8")


def test_the_longest_of_three_bounds_a_step():
    assert roofline(usage(), V5E_8).bound == "compute"
    assert roofline(usage(), V5E_8).seconds == pytest.approx(2e12 / V5E_8.chip.flops)
    assert roofline(usage(bytes=1e11), V5E_8).bound == "memory"
    gather = Collective("all-gather", 10**10, 8, 1)
    assert roofline(usage(exchanges=[gather]), V5E_8).bound == "network"


def test_a_ring_has_two_links_though_other_sides_are_lines():
    exchanges = [Collective("all-gather", 8000, 8, 1)]
    line, ring, rings = (
        roofline(usage(exchanges=exchanges), slices.parse(text)) for text in ("v5e:8x8", "v5e:8x16", "v5e:16x16")
    )
    assert line.network == pytest.approx(7000 / V5E_8.chip.link_bandwidth)
    assert ring.network == rings.network == line.network / 2


def test_an_exchange_counts_as_often_as_it_runs():
    gather, after = Collective("all-gather", 8000, 8, 3), Collective("all-reduce", 800, 8, 1)
    found = usage(exchanges=[gather, after])
    assert (found.received("all-gather"), found.received()) == (3 * 7000, 3 * 7000 + 2 * 700)


def test_what_the_compiler_refuses_or_a_chip_cannot_hold_does_not_fit():
    assert fits(usage(), V5E_8)
    assert not fits(usage(memory={"parameters": 16 * 2**30}), V5E_8)
    assert not fits(usage(compiled=False), V5E_8)


def test_a_program_that_is_too_large_is_measured_all_the_same():
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")
    devices = slices.devices(slices.parse("v5e-1"))
    side = 2**16
    one = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((side, side), jnp.bfloat16, sharding=one)  # 8 GiB, and its square 16 GiB
    lowered = jax.jit(lambda x: jnp.sum(jnp.sort(x @ x, axis=0), axis=1)).lower(x)
    found = program_usage(lowered, {"parameters": 2 * side**2}, [x], devices)
    assert not found.compiled and not fits(found, slices.parse("v5e-1"))
    assert found.memory["activations"] > 6 * 2**30


def test_arguments_of_a_refused_program_count_once():
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")
    devices = slices.devices(slices.parse("v5e-1"))
    one = jax.sharding.SingleDeviceSharding(devices[0])
    x = jax.ShapeDtypeStruct((2**15, 17 * 2**14), jnp.bfloat16, sharding=one)  # 17 GiB, added up to one number
    found = program_usage(jax.jit(jnp.sum).lower(x), {"x": bytes_per_device(x)}, [x], devices)
    assert not found.compiled and found.total == pytest.approx(17 * 2**30, rel=0.01)


@pytest.mark.slow
def test_microbatches_split_the_same_work():
    """A loop goes through them, whose rounds count."""
    smallest = {"channels": (64,), "down_blocks": (0,), "up_blocks": (0,), "attention": (False,)}
    stage = read_stage({**tiny.BASE, "network": {**tiny.BASE["network"], **smallest}})
    pretrained = {"denoiser": tiny.stage_params(stage), "text_encoder": tiny.text_params()}
    examples = {"instance": tiny.examples()}
    flops = []
    for count in (1, 4):
        config = tiny.training(batch_size=32, microbatches=count, prior__weight=0.0)
        lowered = stage_program(stage, tiny.family(), pretrained, examples, config, 0).lower()
        flops.append(program_usage(lowered, {}, (), jax.devices()).flops)
    assert flops[1] == pytest.approx(flops[0], rel=0.1)


@pytest.mark.parametrize("tpu", [True, False], ids=["tpu", "cpu"])
def test_an_argument_that_jit_drops_takes_its_memory_all_the_same(tpu):
    """It lies on the device throughout a run, beside what the program takes."""
    if tpu:
        pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")
    devices = slices.devices(slices.parse("v5e-1")) if tpu else jax.devices()[:1]
    one = jax.sharding.SingleDeviceSharding(devices[0])
    x, unused = (jax.ShapeDtypeStruct((side, side), jnp.float32, sharding=one) for side in (512, 1024))
    lowered = jax.jit(lambda x, unused: jnp.sin(x)).lower(x, unused)
    arguments = (x, unused)
    found = program_usage(lowered, {"all": bytes_per_device(arguments)}, arguments, devices)
    result = 4 * 512**2
    assert found.total == pytest.approx(bytes_per_device(arguments) + result, rel=0.01)
    assert kept_bytes(lowered, arguments) == lowered.compile().memory_analysis().argument_size_in_bytes == 4 * 512**2


def test_a_run_is_its_steps_and_batches():
    run = Run({"base": 100}, {"base": (3, 10)}, {"base": (2, 5)})
    assert part_seconds(run, {"base": 0.5}, {"base": 0.25}) == {"class images": 7.5, "tuning": 50.0, "evaluation": 2.5}


@pytest.fixture(scope="module")
def abstract():
    """`abstract_pipeline`, once for each configuration."""
    return functools.cache(lambda family, name: plan.abstract_pipeline(family.get_config(name)))


@pytest.mark.parametrize(
    ("config", "published"),
    [
        pytest.param(
            (stable_diffusion, "1.5"),
            {"base": 859.5e6, "text_encoder": 123.1e6, "codec": 83.7e6},
            marks=pytest.mark.slow,
        ),
        ((stable_diffusion, "2.1"), {"base": 865.9e6, "text_encoder": 340.4e6, "codec": 83.7e6}),
        ((deepfloyd_if, "XL"), {"base": 4.3e9, "super_resolution": 1.2e9, "text_encoder": 4.76e9}),
    ],
    ids=["SD 1.5", "SD 2.1", "IF XL"],
)
def test_shapes_of_published_models_need_no_weights(config, published, abstract):
    pipeline = abstract(*config)
    for name, count in published.items():
        found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(pipeline.params[name]))
        assert found == pytest.approx(count, rel=0.04), name  # given to two digits


def test_plans_are_for_the_attention_that_tpus_get(abstract):
    config, pipeline = stable_diffusion.get_config("2.1"), abstract(stable_diffusion, "2.1")
    assert pipeline.stages[0].network.attention == "flash"
    here = public.build(type(pipeline.family), pipeline.family.spec, None, **config.compute)
    assert here.stages[0].network.attention == "xla"  # on this machine
    chosen = changed(config, compute__attention="xla")
    assert plan.abstract_pipeline(chosen).stages[0].network.attention == "xla"


@pytest.mark.slow
def test_pretrained_parameters_are_planned_as_they_lie():
    """Rounded where activations are; what is trained is float32 all the same."""
    held, trained = {}, {}
    for dtype in ("float32", "bfloat16"):
        config = changed(stable_diffusion.get_config("1.5"), compute__dtype=dtype)
        pipeline, mesh = plan.abstract_pipeline(config), mesh_of(config.training, jax.devices()[:1])
        held[dtype] = bytes_per_device(pretrained_shapes(pipeline, config.training, mesh))
        pretrained = {"denoiser": pipeline.params["base"], "text_encoder": pipeline.params["text_encoder"]}
        stage, examples = (
            pipeline.stages[0],
            {"instance": example_shapes(pipeline, pipeline.stages[0], 4, with_cond=True)},
        )
        program = stage_program(
            stage, pipeline.family, pretrained, examples, config.training, 0, devices=jax.devices()[:1]
        )
        trained[dtype] = bytes_per_device(program.state.params)
    count = sum(leaf.size for leaf in jax.tree.leaves(pipeline.params))
    assert held["float32"] == 4 * count and held["bfloat16"] == pytest.approx(2 * count, rel=1e-2)
    assert trained["bfloat16"] == trained["float32"] == pytest.approx(4 * 859.5e6, rel=1e-3)


@pytest.mark.slow
def test_planned_operations_are_those_of_the_products():
    """XLA's count for the world's base stage against one of the products in its equations, which XLA has not seen."""
    pipeline = plan.abstract_pipeline(world.get_config())
    stage, B = pipeline.stages[0], 8
    objective = tiny.objective()
    group = jax.eval_shape(lambda: tiny_batch(pipeline, stage, B))
    params = {"denoiser": pipeline.params["base"]}

    def loss(denoiser, batch):
        return pipeline.family.loss(stage, objective, {"denoiser": denoiser}, {}, batch, jax.random.key(0))[0]

    step = jax.grad(loss)
    batch = {"instance": group, "prior": group}
    counted = product_flops(jax.make_jaxpr(step)(params["denoiser"], batch).jaxpr)
    compiled = jax.jit(step).lower(params["denoiser"], batch).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
def test_a_step_takes_the_memory_that_is_planned():
    command = [sys.executable, "-m", "tests.planning.step_memory"]
    found = json.loads(subprocess.check_output(command, cwd=Path(__file__).parents[2], timeout=1800))
    assert found["planned"] > 2**30  # large beside what the allocator and the threads keep
    assert found["measured"] == pytest.approx(found["planned"], rel=0.2)


def tiny_batch(pipeline, stage, size):
    tokens = jnp.zeros(pipeline.family.token_shapes(size).shape, jnp.int32)
    cond = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), conditioning_shapes(pipeline, size))
    return Batch(jnp.zeros((size, *stage.shape)), tokens, cond, None, None)


def product_flops(jaxpr):
    """Two operations for each product of numbers in matrix products and convolutions."""
    total = 0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval.shape
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(out) * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            total += convolution_flops(equation)
        inner = [product_flops(jaxpr) for jaxpr in jax.core.jaxprs_in_params(equation.params)]
        # Of a condition one branch is run; where a network has one for each platform, their products are the same.
        total += max(inner) if equation.primitive.name == "cond" else sum(inner)
    return total


def convolution_flops(equation):
    """Padding and the zeros between dilated numbers are not multiplied with."""
    x, kernel = (v.aval.shape for v in equation.invars)
    out, given = equation.outvars[0].aval.shape, equation.params
    numbers = given["dimension_numbers"]
    pairs = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for i, (low, _) in enumerate(given["padding"]):
        length, taps, places = (
            shape[spec[2 + i]]
            for shape, spec in ((x, numbers.lhs_spec), (kernel, numbers.rhs_spec), (out, numbers.out_spec))
        )
        gap, spread, stride = given["lhs_dilation"][i], given["rhs_dilation"][i], given["window_strides"][i]
        at = [place * stride + tap * spread - low for place in range(places) for tap in range(taps)]
        pairs *= sum(0 <= a <= (length - 1) * gap and a % gap == 0 for a in at)
    return 2 * pairs
