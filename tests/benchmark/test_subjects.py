import pytest

from personalize_jax.benchmark.subjects import Benchmark, BenchmarkSubject


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
