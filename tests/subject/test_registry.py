"""No two subjects of a registry share a token."""

import json
import multiprocessing
from pathlib import Path

import pytest

from personalize_jax.errors import UserError
from personalize_jax.subject.identifier import Identifier
from personalize_jax.subject.registry import Registry


def lowest_free(in_use: frozenset[int], num_tokens: int = 1) -> Identifier:
    free = tuple(i for i in range(1000) if i not in in_use)[:num_tokens]
    return Identifier("-".join(map(str, free)), free, (0,) * num_tokens)


def reserve(path: Path, n: int, num_tokens: int = 1) -> Identifier:
    return Registry(path).reserve(
        f"subject {n}", "dog", path.parent / f"run{n}", lambda in_use: lowest_free(in_use, num_tokens)
    )


def test_runs_get_different_tokens_and_keep_them(tmp_path):
    path = tmp_path / "new folder" / "subjects.json"
    assert Registry(path).in_use() == frozenset()
    first, second = reserve(path, 0), reserve(path, 1)
    assert (first.text, second.text) == ("0", "1")
    before = path.read_bytes()
    assert reserve(path, 0, num_tokens=3) == first
    assert path.read_bytes() == before
    assert Registry(path).in_use() == {*first.token_ids, *second.token_ids}
    [subject, _] = Registry(path).subjects()
    assert subject == ("subject 0", first, "dog", str((path.parent / "run0").resolve()))


def slow_reserve(path: Path, n: int, barrier) -> None:
    barrier.wait()
    for m in range(20):
        numbers = Registry(path)
        numbers.reserve(f"{n} {m}", "dog", path.parent / f"{n}-{m}", lowest_free)


def test_processes_that_reserve_at_once_get_different_tokens(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    path = tmp_path / "subjects.json"
    processes = [context.Process(target=slow_reserve, args=(path, n, barrier)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    subjects = Registry(path).subjects()
    assert len({subject.name for subject in subjects}) == 40
    assert Registry(path).in_use() == set(range(40))


def test_registry_guards(tmp_path):
    path = tmp_path / "subjects.json"
    taken = reserve(path, 0)
    with pytest.raises(UserError, match="holds a 'dog', not a 'cat'"):
        Registry(path).reserve("rex", "cat", tmp_path / "run0", lambda _: taken)
    with pytest.raises(ValueError, match="another subject has them"):
        Registry(path).reserve("rex", "dog", tmp_path / "run1", lambda _: taken)
    assert len(Registry(path).subjects()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"subjects": [{}]}', '{"subjects": 1}', "null"])
def test_damaged_registry_is_named_and_kept(tmp_path, content):
    path = tmp_path / "subjects.json"
    path.write_text(content)
    with pytest.raises(UserError, match="subjects.json is not a registry"):
        reserve(path, 0)
    assert path.read_text() == content


def test_failed_write_leaves_the_registry_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "subjects.json"
    reserve(path, 0)
    before = path.read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        reserve(path, 1)
    assert path.read_text() == before
    assert json.loads(before)["subjects"][0]["identifier"] == "0"


def test_registry_in_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be (read|written)"):
        reserve(tmp_path / "file" / "subjects.json", 0)
