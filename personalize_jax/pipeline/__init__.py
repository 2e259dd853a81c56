"""The text-to-image cascade: tokenizer, text encoder and a chain of diffusion stages."""

from personalize_jax.pipeline.cascade import Pipeline, Text
from personalize_jax.pipeline.stage import Sampling, Stage
from personalize_jax.pipeline.storage import is_pipeline, load_pipeline, save_pipeline
from personalize_jax.pipeline.tokenizer import Tokenizer

__all__ = ["Pipeline", "Sampling", "Stage", "Text", "Tokenizer", "is_pipeline", "load_pipeline", "save_pipeline"]
