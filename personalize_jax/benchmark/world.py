"""The rendered world's benchmark: 30 held-out subjects, of the world's classes in turn; and others for settings."""

from collections.abc import Sequence

from personalize_jax.benchmark.prompts import LIVE_CLASSES, world_prompts
from personalize_jax.benchmark.subjects import Benchmark, BenchmarkSubject
from personalize_jax.world.photos import heldout_subject
from personalize_jax.world.scene import CLASSES

NUM_SUBJECTS = 30
NUM_PHOTOS = 5
# The classes whose next subject, after the benchmark's, is for choosing settings.
SETTINGS_CLASSES = ("teapot", "boot", "dog", "vase", "backpack")


def rendered_benchmark() -> Benchmark:
    """The benchmark of 30 held-out subjects with five photos each, which are the same at every call."""
    return _benchmark([(CLASSES[i % len(CLASSES)], i // len(CLASSES)) for i in range(NUM_SUBJECTS)])


def settings_benchmark() -> Benchmark:
    """Five held-out subjects that `rendered_benchmark` does not have, to choose settings on without looking at it."""
    next_number = -(-NUM_SUBJECTS // len(CLASSES))
    return _benchmark([(class_noun, next_number) for class_noun in SETTINGS_CLASSES])


def _benchmark(subjects: Sequence[tuple[str, int]]) -> Benchmark:
    """The benchmark of held-out subjects, each given by its class noun and its number in the class."""
    names = tuple(f"{class_noun.replace(' ', '_')}_{number}" for class_noun, number in subjects)
    nouns = tuple(class_noun for class_noun, _ in subjects)
    return Benchmark(names, nouns, lambda i: _subject(names[i], *subjects[i]))


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
