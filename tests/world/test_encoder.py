import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, ViTImageProcessorPil, ViTModel

import personalize_jax as pj
from personalize_jax.metrics.encoders import load_clip, load_dino
from personalize_jax.metrics.similarity import similarities, similarities_within
from personalize_jax.models.params import flatten
from personalize_jax.runtime.files import ASSETS
from personalize_jax.training.loop import train
from personalize_jax.world import dataset_builder, encoder
from personalize_jax.world.captions import caption_variants, prompt
from personalize_jax.world.encoder import augmented, clip_program, instance_program, save, second_views
from personalize_jax.world.probe import mild
from personalize_jax.world.render import render
from personalize_jax.world.scene import CLASSES, CONTEXTS, Scene, sample_subjects, sample_views

SHIPPED = ASSETS / "world"
SHOWN = [CLASSES.index(noun) for noun in ("dog", "teapot")]  # each takes seconds to compile
SUBJECTS, VIEWS = 24, 2
MAX_BYTES = 5.5 * 2**20


@pytest.fixture(scope="module")
def fresh():
    """Held-out subjects that no dataset holds, without hats: their scenes and uint8 [48, 32, 32, 3], two views each."""
    rng = np.random.default_rng(12)
    subjects = sample_subjects(rng, SUBJECTS, "heldout", class_id=np.resize(SHOWN, SUBJECTS))
    subjects = jax.tree.map(lambda a: np.repeat(a, VIEWS, axis=0), subjects)
    contexts = np.arange(SUBJECTS * VIEWS) % len(CONTEXTS)
    scenes = Scene(subjects, sample_views(rng, subjects, context=contexts, accessory=0))
    return scenes, render(scenes, 32)[..., :3]


@pytest.fixture(scope="module")
def clip():
    return load_clip("world")


@pytest.fixture(scope="module")
def dino():
    return load_dino("world")


def quality(name):
    return json.loads((SHIPPED / name / "quality.json").read_text())


def test_the_shipped_encoders_are_small():
    assert sum(file.stat().st_size for name in ("clip", "dino") for file in (SHIPPED / name).iterdir()) < MAX_BYTES


@pytest.mark.parametrize("kind", ["clean", "mild"])
def test_the_shipped_qualities_meet_the_targets(kind):
    clip, dino = (quality(name)[kind] for name in ("clip", "dino"))
    assert clip["class"] > 0.85 and clip["context"] > 0.99 and clip["body_colour"] > 0.65
    assert clip["clip_t"] > clip["clip_t_wrong"] + 0.3
    assert dino["same_subject"] > dino["same_class"] + 0.5 and dino["same_class"] > dino["other_class"]
    assert dino["auc"] > 0.99 and dino["identification"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clean", "mild"])
def test_the_clip_reads_fresh_pictures_as_well_as_recorded(clip, fresh, kind):
    scenes, images = fresh
    e_ND = clip.images(images if kind == "clean" else mild(images, seed=0))
    classes = clip.texts([prompt(noun) for noun in CLASSES])
    nouns = [CLASSES[k] for k in scenes.subject.class_id]
    contexts = np.stack([clip.texts([prompt(noun, context=c) for noun in nouns]) for c in CONTEXTS], axis=1)
    found = {
        "class": np.argmax(e_ND @ classes.T, axis=1) == scenes.subject.class_id,
        "context": np.argmax(np.einsum("nd,ncd->nc", e_ND, contexts), axis=1) == scenes.view.context,
    }
    for name, right in found.items():
        p = quality("clip")[kind][name]
        assert np.mean(right) > p - 3 * np.sqrt(p * (1 - p) / len(right)) - 0.03, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clean", "mild"])
def test_the_instance_encoder_finds_the_other_view_of_fresh_subjects(dino, fresh, kind):
    scenes, images = fresh
    first_ND, second_ND = (
        dino(x) for x in (images[::2], images[1::2] if kind == "clean" else mild(images[1::2], seed=0))
    )
    cosines = second_ND @ first_ND.T
    classes = scenes.subject.class_id[::2]
    same, kin = np.eye(SUBJECTS, dtype=bool), classes[:, None] == classes
    assert cosines[same].mean() > cosines[kin & ~same].mean() + 0.2
    assert cosines[kin & ~same].mean() > cosines[~kin].mean()
    assert np.mean(cosines.argmax(axis=1) == np.arange(SUBJECTS)) > 0.6  # by one photo, where five were given


def test_the_metrics_tell_the_bundled_subject(dino, clip):
    photos = [photo.pixels for photo in pj.load_subject(SHIPPED / "subject").images]
    noise = list(np.random.default_rng(0).integers(256, size=(3, 128, 128, 3), dtype=np.uint8))
    for encode in (dino, clip.images):
        embedded = encode(photos)
        assert similarities_within(embedded).mean() > similarities(embedded, encode(noise)).mean() + 0.2


def test_transformers_reads_the_shipped_clip_alike(clip, fresh):
    texts = ["a dog in the snow", "a photo of a striped purple teapot with a mountain in the background"]
    model = CLIPModel.from_pretrained(SHIPPED / "clip", dtype=torch.float32)
    processor = CLIPImageProcessorPil.from_pretrained(SHIPPED / "clip")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "clip")
    tokens = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
    tokens = torch.tensor([ids + [tokenizer.pad_token_id] * (32 - len(ids)) for ids in tokens])
    images = processor([Image.fromarray(image) for image in fresh[1][:2]], return_tensors="pt")
    with torch.no_grad():
        theirs = model(input_ids=tokens, **images)
    np.testing.assert_allclose(clip.texts(texts), theirs.text_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(clip.images(fresh[1][:2]), theirs.image_embeds.numpy(), atol=1e-4)


def test_transformers_reads_the_shipped_instance_encoder_alike(dino, fresh):
    model = ViTModel.from_pretrained(SHIPPED / "dino", add_pooling_layer=False, dtype=torch.float32)
    processor = ViTImageProcessorPil.from_pretrained(SHIPPED / "dino")
    with torch.no_grad():
        inputs = processor([Image.fromarray(image) for image in fresh[1][:2]], return_tensors="pt")
        theirs = model(**inputs).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(dino.embed(dino.prepare(fresh[1][:2])), theirs, atol=1e-4 * np.abs(theirs).max())


def test_the_clip_reads_texts_by_the_cascades_vocabulary(clip):
    texts = ["a shiny red can on the beach", "an orange boot"]
    cascade = pj.load_pipeline("world").tokenizer
    np.testing.assert_array_equal(clip.tokenizer(texts), cascade(texts))


@pytest.fixture
def small(monkeypatch):
    """Networks and trainings that take seconds."""
    for tower in (encoder.CLIP["vision_config"], encoder.CLIP["text_config"], encoder.INSTANCE):
        monkeypatch.setitem(tower, "num_hidden_layers", 1)


def config(num_steps, batch_size):
    config = encoder.CLIP_TRAINING.copy_and_resolve_references()
    config.update(num_steps=num_steps, batch_size=batch_size, log_every=1, checkpoint_every=3)
    config.optimizer.update(warmup_steps=2, decay_steps=0)
    return config


def programs(fresh, num_steps=8):
    """The training of each encoder."""
    scenes, images = fresh
    captions = np.array(caption_variants(scenes, np.random.default_rng(0), 2))
    yield clip_program({"image": images, "captions": captions}, config(num_steps, 24))
    yield instance_program(scenes.subject.class_id[::2], images[::2], images[1::2], config(num_steps, 6))


def losses(directory):
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_lowers_the_clips_loss(small, fresh, tmp_path):
    train(next(programs(fresh)), tmp_path)
    assert np.mean(losses(tmp_path)[-3:]) < np.mean(losses(tmp_path)[:3])


@pytest.mark.slow
def test_training_lowers_the_instance_encoders_loss_and_goes_on_where_it_was_stopped(small, fresh, tmp_path):
    (_, part), (_, whole) = programs(fresh, num_steps=4), programs(fresh)
    train(part, tmp_path)
    before = losses(tmp_path)
    params = train(whole, tmp_path).params
    after = losses(tmp_path)
    assert (len(before), len(after)) == (4, 8) and after[:4] == before
    assert np.mean(after[-3:]) < np.mean(after[:3])
    again = flatten(train(whole, tmp_path).params)  # there is nothing left to do
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


@pytest.mark.slow
def test_saved_encoders_embed_as_trained_but_for_half_precision(small, fresh, tmp_path):
    for program, name, read in zip(programs(fresh), ("clip", "vit"), (load_clip, load_dino), strict=True):
        params = program.init().params
        save(params, name, tmp_path / name)
        restored = read(tmp_path / name)
        embedded = (restored.images if name == "clip" else restored)(fresh[1][:3])
        assert embedded.shape == (3, 128)
        np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)


def test_half_of_the_pictures_are_degraded_and_remain_recognisable(fresh):
    images = encoder.resized(np.repeat(fresh[1], 4, axis=0))
    x = np.asarray(augmented(jnp.array(images), jax.random.key(3)))
    clean = images.astype(np.float32) / 127.5 - 1
    distance = np.abs(x - clean).mean(axis=(1, 2, 3))
    assert 0.4 < np.mean(distance < 1e-6) < 0.6
    assert distance.max() < 0.2
    np.testing.assert_allclose(x.mean(axis=(1, 2)), clean.mean(axis=(1, 2)), atol=0.05)


def test_second_views_show_the_same_subjects_elsewhere_and_are_rendered_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_builder, "BLOCK_SIZE", 4)
    rendered = []

    def record(scenes, resolution):
        rendered.append(scenes)
        return np.full((len(scenes.view.context), resolution, resolution, 4), len(rendered), np.uint8)

    monkeypatch.setattr(dataset_builder, "render", record)
    rng = np.random.default_rng(0)
    subjects = sample_subjects(rng, 10)
    first = sample_views(rng, subjects)
    data = subjects._asdict() | first._asdict()
    images = second_views(data, tmp_path)
    assert images[:, 0, 0, 0].tolist() == [1] * 4 + [2] * 4 + [3] * 2
    scenes = jax.tree.map(lambda *blocks: np.concatenate(blocks), *rendered)
    assert np.all(scenes.view.context != first.context) and np.all(scenes.view.yaw != first.yaw)
    jax.tree.map(np.testing.assert_array_equal, scenes.subject, subjects)
    np.testing.assert_array_equal(second_views(data, tmp_path), images)
    assert len(rendered) == 3
    shorter = second_views({name: column[:8] for name, column in data.items()}, tmp_path)
    np.testing.assert_array_equal(shorter, images[:8])
    assert len(rendered) == 3
