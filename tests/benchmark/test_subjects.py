import pytest

from personalize_jax.benchmark.subjects import Benchmark, BenchmarkSubject, class_prompt


def test_subjects_are_read_when_they_are_taken_out():
    taken = []

    def read(index):
        taken.append(index)
        return BenchmarkSubject("abc"[index], "dog", True, [], ())

    benchmark = Benchmark(("a", "b", "c"), ("dog", "dog", "cat"), read)
    assert len(benchmark) == 3 and not taken
    assert benchmark[-1].name == "c" and taken == [2]
    assert [subject.name for subject in benchmark] == list(benchmark.names)
    with pytest.raises(IndexError):
        benchmark[3]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a [V] dog in the snow", "a dog in the snow"),
        ("a red [V] dog", "a red dog"),
        ("a photo of a [V] orange cat", "a photo of an orange cat"),
        ("an [V] dog", "a dog"),
        ("an orange [V] cat", "an orange cat"),
        ("a [V] umbrella beside a [V] unicorn", "an umbrella beside a unicorn"),
        ("a dog", "a dog"),
    ],
)
def test_the_class_prompt_lacks_the_identifier_and_its_articles_fit(prompt, expected):
    assert class_prompt(prompt) == expected
