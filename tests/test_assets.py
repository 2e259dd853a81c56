"""What ships with the package: the cascade pretrained on the rendered world, its probe, the bundled subject."""

from pathlib import Path

import numpy as np
import pytest

import personalize_jax as pj
from configs import common, world
from personalize_jax.families.world import read_stage
from personalize_jax.method.personalization import class_knowledge
from personalize_jax.runtime.files import ASSETS
from personalize_jax.subject.class_noun import determine
from personalize_jax.subject.identifier import choose_identifier
from personalize_jax.world.scene import CLASSES, COLOURS, CONTEXTS
from tests import processes

MAX_BYTES = 40 * 2**20


@pytest.fixture(scope="module")
def pipeline():
    return pj.load_pipeline("world")


def test_weights_are_small():
    weights = sum(file.stat().st_size for file in (ASSETS / "world").glob("*.safetensors"))
    assert 2**20 < weights <= MAX_BYTES


def test_stages_are_those_of_the_configuration(pipeline):
    for stage, config in zip(pipeline.stages, (common.base_stage(), common.super_resolution_stage()), strict=True):
        expected = read_stage(config.to_dict())
        assert (stage.name, stage.network, stage.process) == (expected.name, expected.network, expected.process)
        assert (stage.resolution, stage.prediction) == (expected.resolution, expected.prediction)


def test_parameters_are_finite_and_trained(pipeline):
    for name, params in pipeline.params.items():
        leaves = [np.asarray(leaf) for leaf in _leaves(params)]
        assert all(np.isfinite(leaf).all() for leaf in leaves), name
        # Output layers start at zero: none is left so.
        assert all(np.any(leaf) for leaf in leaves if leaf.ndim > 1), name


def _leaves(tree):
    return [leaf for value in tree.values() for leaf in (_leaves(value) if hasattr(value, "items") else [value])]


def test_what_pretraining_read_was_counted(pipeline):
    tokenizer = pipeline.tokenizer
    assert tokenizer.counts.shape == (tokenizer.size,) and tokenizer.counts.dtype == np.int64
    for words in (*CLASSES, *COLOURS, *CONTEXTS):
        assert all(tokenizer.counts[token] > 1000 for token in tokenizer.encode(words)), words
    assert not any(tokenizer.counts[token] for token in tokenizer.special_ids)
    rare = tokenizer.counts < 3e-7 * tokenizer.counts.sum()
    assert np.sum(rare) > 400  # identifiers for hundreds of subjects


def test_a_benchmarks_subjects_get_rare_identifiers_of_their_own(pipeline):
    """As many subjects as the DreamBooth dataset has; rare is one token in a hundred thousand, or fewer."""
    rare = np.sum(pipeline.tokenizer.counts) / 100_000
    in_use = frozenset()
    for i in range(30):
        identifier = choose_identifier(pipeline.tokenizer, CLASSES[i % len(CLASSES)], in_use=in_use)
        assert identifier.counts[0] <= rare and not in_use & set(identifier.token_ids)
        in_use |= set(identifier.token_ids)


def test_the_first_subjects_get_the_tokens_that_the_demo_shows(pipeline):
    first = choose_identifier(pipeline.tokenizer, "dog", nouns=CLASSES)
    second = choose_identifier(pipeline.tokenizer, "dog", in_use=first.own_tokens, nouns=CLASSES)
    assert (first.text, second.text) == ("xii", "mah")


@pytest.mark.parametrize("noun", CLASSES)
def test_every_class_gets_a_rare_identifier(pipeline, noun):
    identifier = choose_identifier(pipeline.tokenizer, noun)
    assert identifier.counts == (0,) and len(identifier.text) <= 3
    assert pipeline.tokenizer.encode(f"a {identifier.text} {noun}")[1:2] == list(identifier.token_ids)


def test_what_means_a_class_identifies_no_subject_of_another(pipeline):
    def chosen(**how):
        how |= {"seed": 0, "rule": "frequent"}
        in_use, texts = frozenset(), set()
        for _ in range(50):
            identifier = choose_identifier(pipeline.tokenizer, "dog", in_use=in_use, **how)
            in_use |= identifier.own_tokens
            texts.add(identifier.text)
        return texts

    words = {word for noun in CLASSES for word in noun.split()}
    assert chosen() & words
    assert not chosen(nouns=CLASSES) & words


def test_the_cascade_draws_what_it_is_asked_for(pipeline):
    prompts = [f"a {colour} {noun} on the beach" for colour, noun in (("red", "dog"), ("blue", "teapot"))]
    base, enlarged = pipeline.sample(prompts, [0, 0], batch_size=2)
    assert base.shape == (2, 32, 32, 3) and enlarged.shape == (2, 128, 128, 3)
    assert base.std() > 20
    small = enlarged.reshape(2, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(small - base).mean() < 20  # an enlarged picture shows the same


def test_the_classifier_recognises_the_bundled_subject():
    photos = pj.load_subject(ASSETS / "world" / "subject")
    config = world.get_config()
    noun = determine(photos.images, None, *class_knowledge(config), config.subject.class_threshold)
    assert noun.source == "classifier" and noun.noun in CLASSES


def test_the_world_refuses_classes_that_it_does_not_know(tmp_path):
    finished = processes.command(
        tmp_path,
        "personalize_jax.personalize",
        f"--config={Path(__file__).parent.parent / 'configs' / 'world.py'}",
        f"--images={ASSETS / 'world' / 'subject'}",
        "--class_noun=axolotl",
        f"--workdir={tmp_path / 'run'}",
        f"--config.subject.registry={tmp_path / 'registry.json'}",
    )
    assert finished.status == 2 and finished.error.splitlines()[-1].startswith("error: The class noun 'axolotl'")
    assert not (tmp_path / "run" / "subject").exists()
