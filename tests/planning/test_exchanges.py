"""Exchanges of small programs, compiled for a slice of four chips, against what they must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from personalize_jax.planning import hlo, slices
from personalize_jax.planning.exchanges import Collective, collectives
from personalize_jax.planning.loops import count_runs

pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(slices.devices(slices.parse("v5e:2x2"))).reshape(4), ("d",))


def read(text):
    module = hlo.read(text)
    return collectives(module, count_runs(module))


def exchanges(mesh, function, into, out, *shapes):
    specs = [
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, i)) for s, i in zip(shapes, into, strict=True)
    ]
    compiled = jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*specs).compile()
    return read(compiled.as_text())


def test_gathering_parts(mesh):
    found = exchanges(mesh, lambda x: x + 1, [P("d")], P(), (1024, 256))
    assert found == [Collective("all-gather", 4 * 1024 * 256, 4, 1)]
    assert found[0].received == 4 * 1024 * 256 * 3 / 4


def test_gathering_over_one_axis_of_a_mesh():
    for axis, sizes in (("a", (2, 2)), ("b", (2, 2)), ("b", (1, 4))):
        square = Mesh(np.array(slices.devices(slices.parse("v5e:2x2"))).reshape(sizes), ("a", "b"))
        found = exchanges(square, lambda x: x + 1, [P(axis)], P(), (1024, 256))
        assert found == [Collective("all-gather", 4 * 1024 * 256, square.shape[axis], 1)]


def test_adding_up_products_over_devices(mesh):
    found = exchanges(mesh, jnp.matmul, [P(None, "d"), P("d")], P(), (512, 256), (256, 1024))
    assert [(e.kind, e.bytes, e.group) for e in found] == [("all-reduce", 4 * 512 * 1024, 4)]
    assert found[0].received == 2 * 4 * 512 * 1024 * 3 / 4  # every part is reduced once, and sent around once


def test_adding_up_and_keeping_a_part_receives_half_as_much(mesh):
    found = exchanges(mesh, jnp.matmul, [P(None, "d"), P("d")], P("d"), (512, 256), (256, 1024))
    assert sum(e.received for e in found) == 4 * 512 * 1024 * 3 / 4


def test_what_lies_in_a_loop_is_exchanged_in_every_round(mesh):
    def loop(x, w):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ w), x)

    found = exchanges(mesh, loop, [P(None, "d"), P("d")], P(None, "d"), (256, 256), (256, 256))
    assert {e.group for e in found} == {4}
    assert sum(e.received for e in found) == 7 * 4 * 256 * 256 * 3 / 4  # products are added up, and each keeps a part


def test_what_is_only_started_is_counted_by_its_result():
    """An exchange that runs beside other work is given with its operand when it starts, and once more when it ends."""
    start = "%start = (f32[256,256]{1,0}, f32[1024,256]{1,0}) all-gather-start(%p), channel_id=1"
    program = (
        "HloModule program\n\n"
        "ENTRY %main (p: f32[256,256]) -> f32[1024,256] {\n"
        "  %p = f32[256,256]{1,0} parameter(0)\n"
        f"  {start}, replica_groups=[1,4]<=[4], dimensions={{0}}\n"
        "  ROOT %done = f32[1024,256]{1,0} all-gather-done(%start), channel_id=1\n"
        "}\n"
    )
    assert read(program) == [Collective("all-gather", 4 * 1024 * 256, 4, 1)]


def test_one_device_exchanges_nothing():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile()
    assert read(compiled.as_text()) == []
