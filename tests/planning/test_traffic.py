"""Bytes of main memory that small programs must read and write, compiled for one chip of a v5e with 128 MiB of VMEM."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from personalize_jax.planning import compiler, hlo, slices
from personalize_jax.planning.loops import count_runs
from personalize_jax.planning.traffic import traffic

pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")

MIB = 2**20


def compiled_traffic(function, *shapes, dtype=jnp.float32, **options):
    devices = slices.devices(slices.parse("v5e-1"))
    one = jax.sharding.SingleDeviceSharding(devices[0])
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape in shapes]
    return compiler.analyse(jax.jit(function, **options).lower(*inputs), devices).traffic


def test_a_result_is_read_and_written_once():
    assert compiled_traffic(lambda x: jnp.sin(x) + 1, (512, 512)) == 2 * MIB


def test_what_fits_the_chip_is_read_once_however_often_it_is_used():
    def loop(x, w):
        return lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), x)

    found = compiled_traffic(loop, (512, 512), (512, 512))
    assert found == pytest.approx(3 * MIB, rel=1e-3)  # both operands, and the result


def test_what_does_not_fit_is_read_and_written_in_every_round():
    def loop(x):
        return lax.fori_loop(0, 7, lambda _, x: jnp.sin(x), x)

    size = 4 * 2**14 * 2**13
    assert compiled_traffic(loop, (2**14, 2**13), donate_argnums=0) == pytest.approx(7 * 2 * size, rel=0.01)


def test_a_loop_over_parts_reads_each_part_once():
    def loop(x, ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    found = compiled_traffic(loop, (128, 4096), (6, 4096, 4096), dtype=jnp.bfloat16)
    assert found == pytest.approx(6 * 2 * 4096**2, rel=0.05)


def test_a_slice_is_read_as_far_as_it_goes():
    found = compiled_traffic(lambda x: jnp.sin(x[8:136]), (2**14, 2**13))
    assert found == 2 * 4 * 128 * 2**13


@pytest.mark.parametrize("update", [lambda u: u, jnp.sin], ids=["as it is", "computed in the same fusion"])
def test_an_update_in_place_writes_as_far_as_it_goes(update):
    found = compiled_traffic(
        lambda x, u: lax.dynamic_update_slice(x, update(u), (8, 0)), (2**14, 2**13), (128, 2**13), donate_argnums=0
    )
    assert found == 2 * 4 * 128 * 2**13


def test_a_loop_that_fills_an_array_writes_each_part_once():
    """Rounds yield rows of a result that is larger than VMEM."""
    found = compiled_traffic(lambda x: lax.scan(lambda x, _: (x + 1, x), x, None, length=64)[1], (1024, 1024))
    assert found == pytest.approx(64 * 4 * MIB, rel=0.05)


def test_kernels_copies_and_exchanges_under_way():
    """What compilers write, with everything counted by hand; S(1) is VMEM."""
    memory, vmem = "f32[512,512]{1,0:T(8,128)}", "f32[512,512]{1,0:T(8,128)S(1)}"
    part, part_vmem = "f32[128,512]{1,0:T(8,128)}", "f32[128,512]{1,0:T(8,128)S(1)}"
    carried = f"({part}, {memory})"
    aliases = "output_to_operand_aliasing={{0}: (0, {}), {1}: (1, {})}"
    text = f"""HloModule program

%sliced (p0: f32[512,512]) -> f32[128,512] {{
  %p0 = {memory} parameter(0)
  ROOT %slice = {part_vmem} slice(%p0), slice={{[0:128], [0:512]}}
}}

%begin (p1: f32[128,512]) -> (f32[128,512], f32[512,512]) {{
  %p1 = {part} parameter(0)
  %gather.1 = {memory} all-gather(%p1), channel_id=1, replica_groups=[1,4]<=[4], dimensions={{0}}
  ROOT %c.1 = {carried} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}}

%carry (p2: f32[128,512], p3: f32[512,512], p4: f32[512,512]) -> (f32[128,512], f32[512,512], f32[512,512]) {{
  %p2 = {part} parameter(0)
  %p3 = {memory} parameter(1)
  %p4 = {memory} parameter(2)
  %gather.2 = {memory} all-gather(%p2), channel_id=1, replica_groups=[1,4]<=[4], dimensions={{0}}
  %sine = {memory} sine(%p4)
  ROOT %t = ({part}, {memory}, {memory}) tuple(%p2, %gather.2, %sine)
}}

%end (p5: f32[128,512], p6: f32[512,512]) -> f32[512,512] {{
  %p5 = {part} parameter(0)
  %p6 = {memory} parameter(1)
  ROOT %c.2 = {memory} custom-call(%p5, %p6), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (a: f32[512,512], b: f32[128,512]) -> f32[512,512] {{
  %a = {memory} parameter(0)
  %b = {part} parameter(1)
  %buffer = {vmem} custom-call(), custom_call_target="AllocateBuffer"
  %copy-start = ({vmem}, {memory}, u32[]{{:S(2)}}) copy-start(%a)
  %copy-done = {vmem} copy-done(%copy-start)
  %slice-start = (({memory}), {part_vmem}, s32[]{{:S(2)}}) async-start(%a), calls=%sliced
  %slice-done = {part_vmem} async-done(%slice-start)
  %kernel = ({memory}, {vmem}) custom-call(%a, %copy-done, %slice-done), custom_call_target="tpu_custom_call"
  %first = {memory} get-tuple-element(%kernel), index=0
  %start = {carried} fusion(%b), kind=kCustom, output_to_operand_aliasing={{{{0}}: (0, {{}})}}, calls=%begin
  %s0 = {part} get-tuple-element(%start), index=0
  %s1 = {memory} get-tuple-element(%start), index=1
  %under_way = ({part}, {memory}, {memory}) fusion(%s0, %s1, %first), kind=kOutput, {aliases}, calls=%carry
  %u0 = {part} get-tuple-element(%under_way), index=0
  %u1 = {memory} get-tuple-element(%under_way), index=1
  ROOT %done = {memory} fusion(%u0, %u1), kind=kCustom, output_to_operand_aliasing={{{{}}: (1, {{}})}}, calls=%end
}}
"""
    module = hlo.read(text)
    copied, sliced, kernel, gathered, meanwhile = 1, 1 / 4, 1 + 1, 1 / 4 + 1, 1 + 1
    assert traffic(module, count_runs(module)) == MIB * (copied + sliced + kernel + gathered + meanwhile)
