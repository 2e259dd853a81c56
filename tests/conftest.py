import os
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
def quickly_compiled(tmp_path_factory):
    """Compiling takes nearly all the time: without LLVM's optimisations it takes less, and once in a session is enough.

    This holds in subprocesses, and for all workers of pytest-xdist together.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    settings = {
        "jax_compilation_cache_dir": str(folder / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_disable_most_optimizations": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # the user's own stays as it is
        yield


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
