"""No two subjects of a registry share a token."""

import json
import multiprocessing
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.class_noun import ClassNoun
from personalize_jax.subject.dataset import read_dataset, write_dataset
from personalize_jax.subject.identifier import Identifier
from personalize_jax.subject.images import SubjectImage
from personalize_jax.subject.registry import Registry, reserve_identifier
from tests import tiny
from tests.waiting import PATIENCE


def lowest_free(in_use: frozenset[int], num_tokens: int = 1) -> Identifier:
    free = tuple(i for i in range(1000) if i not in in_use)[:num_tokens]
    return Identifier("-".join(map(str, free)), free, (0,) * num_tokens)


def reserve(path: Path, n: int, num_tokens: int = 1) -> Identifier:
    return Registry(path).reserve(
        f"subject {n}", "dog", path.parent / f"run{n}", lambda in_use: lowest_free(in_use, num_tokens)
    )


def in_use(path: Path) -> set[int]:
    return {token for subject in Registry(path).subjects() for token in subject.identifier.token_ids}


def test_runs_get_different_tokens_and_keep_them(tmp_path):
    path = tmp_path / "new folder" / "subjects.json"
    assert Registry(path).subjects() == []
    first, second = reserve(path, 0), reserve(path, 1)
    assert (first.text, second.text) == ("0", "1")
    before = path.read_bytes()
    assert reserve(path, 0) == first and reserve(path, 1) == second
    assert path.read_bytes() == before
    assert in_use(path) == {*first.token_ids, *second.token_ids}
    assert Registry(path).subjects()[0] == ("subject 0", first, "dog", "run0", None)


def test_what_was_reserved_for_a_run_without_a_subject_is_given_up(tmp_path):
    """As after a wrong class noun, or for another number of tokens; the tokens of others stay theirs."""
    path = tmp_path / "subjects.json"
    for n in range(3):
        reserve(path, n)
    assert reserve(path, 1, num_tokens=2).token_ids == (1, 3)
    chosen = Registry(path).reserve("cat", "cat", tmp_path / "run0", lambda _: Identifier("7", (7,), ()))
    assert [(s.name, s.class_noun, s.identifier.token_ids) for s in Registry(path).subjects()] == [
        ("cat", "cat", chosen.token_ids),
        ("subject 1", "dog", (1, 3)),
        ("subject 2", "dog", (2,)),
    ]


def test_tokens_are_kept_apart_within_a_vocabulary(tmp_path):
    path = tmp_path / "subjects.json"
    reserve(path, 0)  # of which no vocabulary is known, as in older files
    for n, vocabulary, expected in ((1, "T5", "1"), (2, "CLIP", "1"), (3, "T5", "2"), (4, None, "3")):
        registry = Registry(path, vocabulary)
        assert registry.reserve(f"{n}", "dog", tmp_path / f"run{n}", lowest_free).text == expected
    assert Registry(path, "CLIP").reserve("1", "dog", tmp_path / "run1", lowest_free).text == "2"


def test_files_without_vocabularies_and_with_whole_paths_are_read(tmp_path):
    path = tmp_path / "subjects.json"
    entry = {"name": "rex", "identifier": "0", "token_ids": [0], "token_counts": [5], "class_noun": "dog"}
    path.write_text(json.dumps({"subjects": [entry | {"run_directory": str(tmp_path / "run0")}]}))
    assert Registry(path, "T5").reserve("max", "dog", tmp_path / "run1", lowest_free).text == "1"
    assert Registry(path, "T5").reserve("rex", "dog", tmp_path / "run0", lowest_free).text == "0"
    assert [(s.run_directory, s.vocabulary) for s in Registry(path).subjects()] == [("run0", "T5"), ("run1", "T5")]


# --- runs ---


TOKENIZER = tiny.tokenizer()


def start(run: Path, class_noun: str = "dog", registry: Path | None = None) -> Identifier:
    """What the first phase of a run does: reserve, and write the labelled dataset if there is none."""
    config = ConfigDict({"seed": 0, "subject": {"num_tokens": 1, "rule": "rarest", "frequency": "recorded"}})
    config.subject.registry = str(registry or run.parent / "registry.json")
    identifier = reserve_identifier(TOKENIZER, config, run, class_noun, ())
    if not (run / "subject").exists():
        pixels = np.zeros((8, 8, 3), np.uint8)
        noun = ClassNoun(class_noun, 1.0, "given")
        write_dataset(run / "subject", [SubjectImage(Path("0.png"), "", pixels)], noun, identifier)
    assert read_dataset(run / "subject").identifier == identifier
    return identifier


def test_a_deleted_run_may_begin_anew_as_another_class(tmp_path):
    first = start(tmp_path / "rex", "cat")
    other = start(tmp_path / "max")
    with pytest.raises(UserError, match="rex holds a 'cat', not a 'dog'; give the same .* or delete this one"):
        start(tmp_path / "rex", "dog")
    shutil.rmtree(tmp_path / "rex")
    assert start(tmp_path / "rex", "dog") == first != other
    assert [s.class_noun for s in Registry(tmp_path / "registry.json").subjects()] == ["dog", "dog"]


def test_a_moved_run_keeps_its_identifier_and_its_old_place_gets_another(tmp_path):
    rex, other = start(tmp_path / "rex"), start(tmp_path / "max")
    (tmp_path / "rex").rename(tmp_path / "rex_1")
    assert start(tmp_path / "rex_1") == rex
    assert [s.run_directory for s in Registry(tmp_path / "registry.json").subjects()] == ["rex_1", "max"]
    assert len({rex, other, start(tmp_path / "rex")}) == 3


def test_runs_and_registry_move_together(tmp_path):
    chosen = [start(tmp_path / "runs" / name) for name in ("rex", "max")]
    before = (tmp_path / "runs" / "registry.json").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert [start(tmp_path / "moved" / name) for name in ("rex", "max")] == chosen
    assert (tmp_path / "moved" / "registry.json").read_bytes() == before


def test_a_copy_keeps_the_identifier_that_it_was_trained_with_and_a_warning_says_so_once(tmp_path, caplog):
    rex = start(tmp_path / "rex")
    shutil.copytree(tmp_path / "rex", tmp_path / "copy")
    for _ in range(2):
        assert start(tmp_path / "copy") == rex
    [record] = caplog.records
    assert re.search(rf"copy and .*rex share tokens of the identifier '{rex.text}'.*registry.json", record.getMessage())
    assert start(tmp_path / "max") != rex


def test_a_run_is_entered_again_where_the_registry_was_lost(tmp_path):
    rex = start(tmp_path / "rex")
    (tmp_path / "registry.json").unlink()
    assert start(tmp_path / "rex") == rex != start(tmp_path / "max")


def test_labels_in_which_the_subject_is_not_read_are_refused(tmp_path):
    text = start(tmp_path / "rex").text
    manifest = tmp_path / "rex" / "subject" / "subject.json"
    manifest.write_text(manifest.read_text().replace(f"a {text} dog", f"{'dog ' * 8}and a {text}"))
    with pytest.raises(UserError, match=f'and a {text}" the subject is named within'):
        start(tmp_path / "rex")


def test_a_noun_in_another_subjects_tokens_is_refused_with_the_registrys_name(tmp_path):
    other = start(tmp_path / "max")
    with pytest.raises(UserError, match=f"'{other.text} dog' is written with .*of the registry .*registry.json"):
        start(tmp_path / "rex", f"{other.text} dog")


def slow_reserve(path: Path, n: int, barrier) -> None:
    barrier.wait()
    for m in range(20):
        Registry(path).reserve(f"{n} {m}", "dog", path.parent / f"{n}-{m}", lowest_free)


def test_processes_that_reserve_at_once_get_different_tokens(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    path = tmp_path / "subjects.json"
    processes = [context.Process(target=slow_reserve, args=(path, n, barrier)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    subjects = Registry(path).subjects()
    assert len({subject.name for subject in subjects}) == 40
    assert in_use(path) == set(range(40))


def test_registry_guards(tmp_path):
    path = tmp_path / "subjects.json"
    taken = reserve(path, 0)
    with pytest.raises(ValueError, match="another subject has them"):
        Registry(path).reserve("rex", "dog", tmp_path / "run1", lambda _: taken)
    assert len(Registry(path).subjects()) == 1


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"subjects": [{}]}', '{"subjects": ["rex"]}', '{"subjects": 1}', "null"]
)
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
