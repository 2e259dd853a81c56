"""Measures how well encoders tell pictures of the rendered world apart, on subjects that they were not trained on."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from personalize_jax.metrics.encoders import ClipEncoder, ImageEncoder
from personalize_jax.metrics.similarity import similarities
from personalize_jax.world.captions import prompt
from personalize_jax.world.photos import RESOLUTION, heldout_subject, unseen_views
from personalize_jax.world.probe import mild
from personalize_jax.world.render import render
from personalize_jax.world.scene import (
    CLASSES,
    COLOURS,
    CONTEXTS,
    PATTERNS,
    Scene,
    Subject,
    sample_subjects,
    sample_views,
)

NUM_CANDIDATES = 128  # captions from which a picture's own is to be chosen
NUM_SUBJECTS = 30  # as many as the DreamBooth dataset has
NUM_CHANGED = 60  # subjects whose properties are changed
NUM_PHOTOS, NUM_VIEWS = 5, 4  # of each, in different places
SEED = 0


def clip_quality(clip: ClipEncoder, data: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Measure a CLIP on clean pictures and on mildly degraded ones ("clean", "mild").

    Args:
        clip: the encoder.
        data: "image" uint8 [N, R, R, 3 or more], "captions", "class_id", "context" and "body_colour", all [N].

    Returns:
        retrieval: share of pictures whose own caption is the nearest of 128; captions omit much, so that several may be
            true of a picture.
        class, context, body_colour: share of pictures whose nearest prompt is the true one, among prompts that differ
            in this property alone; prompts with contexts and colours name the true class.
        clip_t: mean cosine of a picture and "a class context".
        clip_t_wrong: the same with another context.
    """
    images = data["image"][..., :3]
    return {kind: _clip_quality(clip, x, data) for kind, x in (("clean", images), ("mild", mild(images, SEED)))}


def _clip_quality(clip: ClipEncoder, images: np.ndarray, data: Mapping[str, np.ndarray]) -> dict[str, float]:
    classes, contexts, colours = data["class_id"], data["context"], data["body_colour"]
    e_ND = clip.images(images)

    def cosines(texts_CP: Sequence[Sequence[str]]) -> np.ndarray:
        """Cosines of each picture with the P prompts of its class -> [N, P]."""
        t_CPD = clip.texts([text for texts in texts_CP for text in texts]).reshape(len(CLASSES), -1, e_ND.shape[-1])
        return np.einsum("nd,npd->np", e_ND, t_CPD[classes])

    def right(cosines_NP: np.ndarray, truth_N: np.ndarray) -> float:
        return float(np.mean(cosines_NP.argmax(axis=1) == truth_N))

    of_contexts = cosines([[prompt(noun, context=context) for context in CONTEXTS] for noun in CLASSES])
    of_colours = cosines([[prompt(noun, colour=colour) for colour in COLOURS] for noun in CLASSES])
    rng = np.random.default_rng(SEED)
    wrong = (contexts + rng.integers(1, len(CONTEXTS), len(contexts))) % len(CONTEXTS)
    rows = np.arange(len(images))
    return {
        "retrieval": _retrieval(e_ND, clip.texts(data["captions"][:, 0].tolist())),
        "class": right(cosines([[prompt(noun) for noun in CLASSES]] * len(CLASSES)), classes),
        "context": right(of_contexts, contexts),
        "body_colour": right(of_colours, colours),
        "clip_t": float(of_contexts[rows, contexts].mean()),
        "clip_t_wrong": float(of_contexts[rows, wrong].mean()),
    }


def _retrieval(images_ND: np.ndarray, texts_ND: np.ndarray) -> float:
    size = min(NUM_CANDIDATES, len(images_ND))
    starts = range(0, len(images_ND) - size + 1, size)
    right = [np.argmax(images_ND[i : i + size] @ texts_ND[i : i + size].T, axis=1) == np.arange(size) for i in starts]
    return float(np.mean(right))


def heldout_pictures() -> tuple[np.ndarray, np.ndarray]:
    """Render pictures of 30 held-out subjects, subject i of class i mod 12.

    Returns:
        Photos, uint8 [30, 5, 128, 128, 3], and other views in contexts that no photo shows, [30, 4, 128, 128, 3].
    """
    subjects = [heldout_subject(CLASSES[i % len(CLASSES)], i // len(CLASSES), NUM_PHOTOS) for i in range(NUM_SUBJECTS)]
    views = [unseen_views(subject.subject, NUM_VIEWS)[..., :3] for subject in subjects]
    return np.stack([subject.photos for subject in subjects]), np.stack(views)


def instance_quality(encoder: ImageEncoder, photos: np.ndarray, views: np.ndarray) -> dict[str, dict[str, float]]:
    """Measure how an encoder tells individuals apart, with clean views and with mildly degraded ones ("clean", "mild").

    Args:
        encoder: the encoder.
        photos: uint8 [S, P, R, R, 3] of S subjects, subject i of class i mod 12.
        views: other pictures of the subjects, uint8 [S, V, R, R, 3].

    Returns:
        same_subject, same_class, other_class: mean cosine of a view and the photos of its subject, of the other
            subjects of its class, and of subjects of other classes.
        auc: the probability that a view is more similar to its own subject than a view is to another subject of its
            class, over all such pairs of similarities.
        identification: share of views whose most similar subject is their own.
    """
    S, V = views.shape[:2]
    flat = views.reshape(-1, *views.shape[2:])
    photos_SPD = encoder(photos.reshape(-1, *photos.shape[2:])).reshape(S, photos.shape[1], -1)
    shown_N = np.repeat(np.arange(S), V)
    same_NS = shown_N[:, None] == np.arange(S)
    class_NS = shown_N[:, None] % len(CLASSES) == np.arange(S) % len(CLASSES)

    def measured(images: np.ndarray) -> dict[str, float]:
        views_ND = encoder(images)
        x_NS = np.stack([similarities(views_ND, photos_PD) for photos_PD in photos_SPD], axis=1)
        return {
            "same_subject": float(x_NS[same_NS].mean()),
            "same_class": float(x_NS[class_NS & ~same_NS].mean()),
            "other_class": float(x_NS[~class_NS].mean()),
            "auc": _auc(x_NS[same_NS], x_NS[class_NS & ~same_NS]),
            "identification": float(np.mean(x_NS.argmax(axis=1) == shown_N)),
        }

    return {"clean": measured(flat), "mild": measured(mild(flat, SEED))}


def similarities_after_changes(encoder: ImageEncoder) -> dict[str, float]:
    """Measure how much an encoder notices a change of each property of a subject.

    Args:
        encoder: the encoder.

    Returns:
        The mean cosine of a view of a subject and a view of the changed subject, over 60 held-out subjects of all
        classes, by the change: "nothing"; "shape", the proportions; "pattern", "accent_colour", "body_colour".
    """
    rng = np.random.default_rng(SEED)
    N = NUM_CHANGED
    subject = sample_subjects(rng, N, "heldout", class_id=np.arange(N) % len(CLASSES))
    body, accent = subject.body_colour, subject.accent_colour

    def other_colour() -> np.ndarray:
        """A colour that is neither the body's nor the accent's."""
        free = [np.setdiff1d(np.arange(len(COLOURS)), pair) for pair in zip(body, accent, strict=True)]
        return np.array([rng.choice(colours) for colours in free], np.int32)

    changes: dict[str, dict[str, np.ndarray]] = {
        "nothing": {},
        "shape": {"shape": rng.random((N, 4), np.float32)},
        "pattern": {"pattern": (subject.pattern + rng.integers(1, len(PATTERNS), N, np.int32)) % len(PATTERNS)},
        "accent_colour": {"accent_colour": other_colour()},
        "body_colour": {"body_colour": other_colour()},
    }

    def embedded(subject: Subject) -> np.ndarray:
        return encoder(render(Scene(subject, sample_views(rng, subject, accessory=0)), RESOLUTION)[..., :3])

    own_ND = embedded(subject)
    return {
        name: float(np.mean(np.sum(own_ND * embedded(subject._replace(**change)), axis=1)))
        for name, change in changes.items()
    }


def _auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Area under the receiver operating characteristic, by ranks (Mann & Whitney 1947)."""
    n, m = len(positives), len(negatives)
    ranks = rankdata(np.concatenate([positives, negatives]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
