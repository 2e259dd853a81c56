"""A pretrained or tuned text-to-image model, of any family, as one object."""

from personalize_jax.families.stage import Sampling, Stage
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.pipeline.cascade import Pipeline
from personalize_jax.pipeline.storage import load_pipeline, save_pipeline

__all__ = ["Pipeline", "Sampling", "Stage", "Tokenizer", "load_pipeline", "save_pipeline"]
