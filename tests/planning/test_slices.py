import pytest

from personalize_jax.planning import slices
from personalize_jax.runtime.chips import peak_flops
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.sharding import make_mesh

pytest.importorskip("libtpu", reason="libtpu compiles for TPUs; it comes with tests/requirements.txt")


@pytest.mark.parametrize(
    ("text", "shape", "rented"),
    [
        ("v5e:4x4", (4, 4), "v5e-16"),
        ("v5e-8", (2, 4), "v5e-8"),
        ("v5e-1", (1, 1), "v5e-1"),
        ("v4-8", (2, 2, 1), "v4-8"),  # four chips of two cores
        ("v5p:2x2x2", (2, 2, 2), "v5p-16"),
        ("v6e-8", (2, 4), "v6e-8"),
    ],
)
def test_a_slice_by_shape_or_by_size(text, shape, rented):
    topology = slices.parse(text)
    assert topology.shape == shape and topology.accelerator_type == rented
    devices = slices.devices(topology)
    assert len(devices) == topology.size
    assert peak_flops(devices[0].device_kind) == topology.chip.flops


@pytest.mark.parametrize("text", ["v5e", "v9:2x2", "v5e:2x2x2", "v5e-7", "v5p:4x4", "v5e:0x4", "a100-8"])
def test_what_is_no_slice_is_refused_in_a_sentence(text):
    with pytest.raises(UserError, match=r"--topology is .*v5e:4x4"):
        slices.parse(text)


def test_a_slice_that_is_not_rented_is_refused_in_a_sentence():
    with pytest.raises(UserError, match="cannot be compiled here"):
        slices.devices(slices.parse("v5e:3x5"))


@pytest.mark.parametrize(
    ("topology", "batch_size", "sizes"),
    [("v5e-1", 8, (1, 1, 1)), ("v5e-8", 8, (1, 8, 1)), ("v5e-16", 8, (1, 8, 2)), ("v5e-16", 12, (1, 4, 4))],
)
def test_fsdp_takes_what_splits_the_batch_and_tensor_the_rest(topology, batch_size, sizes):
    mesh = make_mesh((1, -1, -1), batch_size, slices.devices(slices.parse(topology)))
    assert tuple(mesh.shape.values()) == sizes
