import signal

import jax
import numpy as np
import pytest
from PIL import Image

from personalize_jax.pipeline import save_pipeline
from tests import tiny

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells have it for what they start in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """Programs that several tests run are compiled once in a session, in subprocesses too."""
    directory = str(tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", directory)
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        yield


@pytest.fixture(scope="module")
def lightly_compiled():
    """Where programs run a few times only, compiling them takes nearly all the time."""
    jax.clear_caches()  # programs that round otherwise are not for these tests, nor theirs for others
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A folder with a cascade of the smallest networks that there are."""
    folder = tmp_path_factory.mktemp("cascade") / "pretrained"
    smallest = {"channels": (16,), "down_blocks": (0,), "up_blocks": (0,), "attention": (False,)}
    save_pipeline(tiny.pipeline(**smallest), folder, np.float32)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with three pictures."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(folder / f"{i}.png")
    return folder
