"""DreamBooth in JAX: personalise a text-to-image cascade with a few images of one subject.

import personalize_jax as pj

pipeline = pj.load_pipeline("world")
subject = pj.load_subject("photos/", class_noun="dog")
personalized = pj.personalize_subject(pipeline, subject, config, workdir="runs/rex")
images = personalized.sample("a [V] dog in the snow", num_images=4, seed=0)
"""

import importlib
import os
from importlib.metadata import distributions
from importlib.util import find_spec
from typing import Any

# No function here has the name of a module: an import of the module would take the function's place.
_HOMES = {
    "load_personalized": "personalize_jax.method.personalized",
    "load_pipeline": "personalize_jax.pipeline",
    "load_subject": "personalize_jax.method.personalization",
    "personalize_subject": "personalize_jax.method.personalization",
}
__all__ = list(_HOMES)

# By default XLA leaves convolutions to a CPU library that takes up to twice as long for them as its own code does. The
# flag is experimental: other versions may not know it, nor may the compilers that come with GPUs, and none starts with
# a flag that it does not know. It counts if it is set before the first array is made.
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_FLAGS = os.environ.get("XLA_FLAGS", "")
_KNOWN_TO = {"jaxlib": "0.10.2", "libtpu": "0.0.42"}
_KNOWN = find_spec("jax_plugins") is None and all(
    any(installed.version == known for installed in distributions(name=package))
    for package, known in _KNOWN_TO.items()
    if find_spec(package)
)
if _KNOWN and _FLAG not in _FLAGS:
    os.environ["XLA_FLAGS"] = f"{_FLAGS} {_FLAG}=LIBRARY_FUSION_TYPE_REDUCE"

# transformers is here for its tokenizers, and would advise everybody to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that a command does not wait for what it does not need."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
