"""The compiler's analysis: early, cached, and in a subprocess."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from personalize_jax.models.attention import attend
from personalize_jax.planning import compiler, hlo, slices
from personalize_jax.planning.exchanges import Collective, collectives
from personalize_jax.planning.loops import count_runs
from personalize_jax.runtime import interruption
from personalize_jax.runtime.errors import UserError


def test_early_figures_are_those_of_the_compiled_program():
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")
    devices = slices.devices(slices.parse("v5e:2x2"))
    mesh = Mesh(np.array(devices), ("data",))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=whole)

    def loss(w, x):
        return jnp.mean(jnp.sin(jax.nn.softmax(x @ w) @ w) ** 2)

    lowered = jax.jit(jax.grad(loss), out_shardings=whole).lower(w, x)
    early, compiled = compiler.analyse(lowered, devices), lowered.compile()
    assert early.flops == compiled.cost_analysis()["flops"] > 2 * 2 * 256 * 512**2
    module = hlo.read(compiled.as_text())
    assert list(early.exchanges) == collectives(module, count_runs(module))
    assert [e.bytes for e in early.exchanges] == [4 * 512**2]  # the gradient
    sizes = compiled.memory_analysis()
    needed = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    assert early.memory == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize("B", [1, 2])
def test_operations_of_the_flash_kernels_are_counted(B):
    """Two products forward, and five backward."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")
    devices = slices.devices(slices.parse("v5e-1"))
    L, S, N, D = 512, 256, 4, 64
    one = jax.sharding.SingleDeviceSharding(devices[0])
    q, k = (jax.ShapeDtypeStruct((B, length, N, D), jnp.bfloat16, sharding=one) for length in (L, S))
    attention = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, "flash")).astype(jnp.float32), (0, 1, 2)))
    flops = compiler.analyse(attention.lower(q, k, k), devices).flops
    assert flops == pytest.approx(7 * 2 * B * N * L * S * D, rel=0.05)


def test_a_program_is_compiled_once(monkeypatch):
    """And what the compiler says of it kept, where the tests' programs are kept."""
    compiled = []
    monkeypatch.setattr(compiler, "_compile", lambda lowered, count: compiled.append(count) or analysis)
    analysis = compiler.Analysis(flops=2.0, exchanges=(Collective("all-gather", 80, 8, 3),), seconds=1.5)
    programs = [jax.jit(lambda x, k=k: k * x).lower(jnp.ones(3)) for k in (2, 2, 3)]
    older, newer = (slices.devices(slices.parse(slice_))[:1] for slice_ in ("v4-8", "v5p-8"))
    assert repr(older) == repr(newer)  # which must not be taken for the same
    assert [compiler.analyse(program, older) for program in programs] == [analysis] * 3
    assert len(compiled) == 2  # the second is the first
    compiler.analyse(programs[0], newer)
    compiler.analyse(programs[0], older * 2)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--other")
    compiler.analyse(programs[0], older)
    assert len(compiled) == 5
    doubled = jax.jit(lambda x: 2 * x, compiler_options={"xla_other": True}).lower(jnp.ones(3))
    assert doubled.as_text() == programs[0].as_text()  # which does not tell the options
    compiler.analyse(doubled, older)
    assert len(compiled) == 6


def test_a_refusal_is_asked_again(monkeypatch):
    monkeypatch.setattr(compiler, "_compile", lambda lowered, count: answers.pop())
    answers = [compiler.Analysis(flops=1.0), compiler.Analysis(refusal="out of patience")]
    program = jax.jit(lambda x: 5 * x).lower(jnp.ones(3))
    assert [bool(compiler.analyse(program, jax.devices()).refusal) for _ in range(3)] == [True, False, False]


def backend_of(value):
    if value == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if value == "wrong":
        raise UserError("The value is wrong; give another.")
    return value, jax.default_backend(), os.getpid()


def test_a_process_of_its_own_answers_or_says_why_it_cannot():
    value, backend, process = compiler.run_in_subprocess(backend_of, 3)
    assert (value, backend) == (3, "cpu") and process != os.getpid()
    with pytest.raises(UserError, match="give another"):
        compiler.run_in_subprocess(backend_of, "wrong")
    with pytest.raises(UserError, match="status -9"):
        compiler.run_in_subprocess(backend_of, "killed")


def test_asked_to_stop_it_does_not_wait_for_the_compiler(monkeypatch):
    monkeypatch.setattr(interruption, "requested", lambda: True)
    with pytest.raises(interruption.Stopped):
        compiler.run_in_subprocess(time.sleep, 10**6)
