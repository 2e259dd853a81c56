"""The rendered world's benchmark: 30 held-out subjects, of the world's classes in turn."""

from personalize_jax.benchmark.prompts import LIVE_CLASSES, world_prompts
from personalize_jax.benchmark.subjects import Benchmark, BenchmarkSubject
from personalize_jax.world.photos import heldout_subject
from personalize_jax.world.scene import CLASSES

NUM_SUBJECTS = 30
NUM_PHOTOS = 5


def rendered_benchmark() -> Benchmark:
    """The benchmark of 30 held-out subjects with five photos each, which are the same at every call."""
    nouns = tuple(CLASSES[i % len(CLASSES)] for i in range(NUM_SUBJECTS))
    names = tuple(f"{noun.replace(' ', '_')}_{i // len(CLASSES)}" for i, noun in enumerate(nouns))
    return Benchmark(names, nouns, lambda i: _subject(names[i], nouns[i], i // len(CLASSES)))


def _subject(name: str, class_noun: str, number: int) -> BenchmarkSubject:
    held = heldout_subject(class_noun, number, NUM_PHOTOS)
    return BenchmarkSubject(
        name=name,
        class_noun=class_noun,
        is_live=class_noun in LIVE_CLASSES,
        photos=list(held.photos),
        prompts=world_prompts(class_noun),
        truth=held.subject,
    )
