"""A family that is no diffusion model, in this one file: it is personalised, sampled, exported and read back."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from personalize_jax.export import export
from personalize_jax.families import registry
from personalize_jax.families.base import Loaded
from personalize_jax.families.objective import PRIOR
from personalize_jax.families.stage import Sampling
from personalize_jax.formats.parameters import load_params, save_params
from personalize_jax.method.personalization import load_pretrained, load_subject, personalize_subject
from personalize_jax.method.personalized import load_personalized
from personalize_jax.pipeline import load_pipeline
from tests import tiny, tiny_world

SIDE, LEVELS, WIDTH = 8, 4, 16


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A stage that samples every pixel by itself, from a distribution over a few levels that the caption gives."""

    name: str = "base"
    resolution: int = SIDE
    low_resolution: int | None = None
    sampling: Sampling = Sampling("ancestral", 1, 1.0)
    learned_variance: bool = False

    def init_params(self, key, cond):
        return {"logits": {"kernel": jax.random.normal(key, (cond.shape[-1], SIDE, SIDE, 3, LEVELS))}}

    def logits(self, params, cond):
        return jnp.einsum("bd,dhwcl->bhwcl", cond, params["logits"]["kernel"])

    def times(self, sampling):
        return jnp.ones((1,))

    def sample(self, params, keys_B, cond, null_cond, sampling, low_BHWC=None):
        levels = jax.vmap(jax.random.categorical)(keys_B, self.logits(params, cond))
        return 2 * levels / (LEVELS - 1) - 1


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Captions are bags of embedded words; the loss is the cross-entropy of every pixel's level."""

    tokenizer: object = dataclasses.field(compare=False)
    stages: tuple = (Canvas(),)
    vocabulary_size: int = 8000
    encoders: ClassVar[tuple[str, ...]] = ("words",)

    def tokenize(self, captions):
        return self.tokenizer(captions)

    def token_shapes(self, count):
        return jax.ShapeDtypeStruct((count, tiny.TEXT["max_length"]), jnp.int32)

    def condition(self, params, tokens):
        return jnp.mean(params["words"]["embedding"][tokens], axis=1)

    def loss(self, stage, objective, params, frozen_params, batches, rng):
        loss, metrics = jnp.zeros(()), {}
        for group in objective.groups:
            batch = batches[group.name]
            cond = self.condition(params, batch.tokens) if batch.cond is None else batch.cond
            levels = jnp.round((batch.x + 1) / 2 * (LEVELS - 1)).astype(int)
            logits = stage.logits(params["denoiser"], cond)
            term = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, levels))
            metrics[f"{group.name}_loss"] = term
            loss += group.weight * term
        return loss, metrics

    def to_latents(self, params, x_BHWC):
        return None

    def to_pictures(self, params, x_BHWC):
        return x_BHWC

    def shapes(self):
        cond = jnp.zeros((1, WIDTH))
        base = jax.eval_shape(lambda: self.stages[0].init_params(jax.random.key(0), cond))
        return {"words": {"embedding": jax.ShapeDtypeStruct((8000, WIDTH), jnp.float32)}, "base": base}

    def with_stages(self, stages):
        return dataclasses.replace(self, stages=tuple(stages))

    def write(self, read, folder, dtype):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("words", "base"):
            save_params(read(name), folder / f"{name}.safetensors", dtype)
        (folder / "pixels.json").write_text("{}")

    def write_adapters(self, adapters, folder):
        """Nothing."""

    @classmethod
    def reads(cls, folder):
        return (folder / "pixels.json").is_file()

    @classmethod
    def read_folder(cls, folder, place=None):
        params = {name: load_params(folder / f"{name}.safetensors") for name in ("words", "base")}
        return Loaded(cls(tiny.tokenizer()), params, {})


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    """A run: its pretrained model, configuration, directory and result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "OWN", (*registry.OWN, Pixels))
        folder = tmp_path_factory.mktemp("pixels")
        rng = np.random.default_rng(0)
        family = Pixels(tiny.tokenizer())
        params = jax.tree.map(lambda s: np.asarray(rng.normal(size=s.shape), np.float32), family.shapes())
        family.write(params.__getitem__, folder / "pretrained", np.float32)
        config = tiny_world.get_config(
            folder / "pretrained", training__num_steps=60, training__prior__weight=0.5, training__prior__form="sampled"
        ).unlock()
        config.training.trainable = (("denoiser/", True), (".*", False))
        del config.super_resolution_training
        config.tune = ("base",)
        config.training.optimizer.learning_rate = 0.1
        config.lock()
        pipeline = load_pretrained(config)
        subject = load_subject(photos, "dog", SIDE)
        yield pipeline, config, folder / "run", personalize_subject(pipeline, subject, config, folder / "run"), subject


def test_its_own_loss_is_what_is_trained(run):
    pipeline, config, workdir, tuned, subject = run
    assert config.training.prior.weight > 0 and (workdir / "class_images" / "base").is_dir() and PRIOR
    photos = np.stack([image.pixels for image in subject.images])

    def distance(pipeline, prompt):
        pictures = pipeline.sample([prompt] * 16, range(16))[-1]
        return np.mean(np.abs(pictures[:, None] / 255.0 - photos[None] / 255.0))

    prompt = f"a {tuned.subject.identifier.text} dog"
    assert distance(tuned.pipeline, prompt) < 0.8 * distance(pipeline, prompt)


def test_it_is_sampled_from_its_run_directory_and_exported(run, tmp_path):
    _, config, workdir, tuned, _ = run
    prompt = "a [V] dog in the snow"
    np.testing.assert_array_equal(load_personalized(workdir).sample(prompt), tuned.sample(prompt))
    assert export(workdir, tmp_path) == {"base": config.training.num_steps}
    jax.tree.map(np.testing.assert_array_equal, load_pipeline(tmp_path).params, tuned.pipeline.params)
