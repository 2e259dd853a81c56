import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Compiling takes nearly all the time of these tests; subprocesses compile in the same way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
