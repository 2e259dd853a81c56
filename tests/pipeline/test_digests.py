import os
import shutil

import jax
import pytest

from personalize_jax.families import sources
from personalize_jax.pipeline import digests, load_pipeline
from personalize_jax.runtime.files import cache_folder


@pytest.fixture
def folder(pretrained, tmp_path, monkeypatch):
    """A cascade's own copy, whose files count as old, and an empty cache folder."""
    monkeypatch.setattr(sources, "_RECENT", -(10**12))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(pretrained, tmp_path / "cascade")


@pytest.fixture
def hashed(monkeypatch):
    """The networks' parameters that are hashed, in order."""
    found, digest = [], digests._digest
    monkeypatch.setattr(digests, "_digest", lambda params: found.append(params) or digest(params))
    return found


def without_cache(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_read", lambda file: None)
        return load_pipeline(folder).fingerprint


def flip_last_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_files_that_have_not_changed_are_hashed_once(folder, hashed, monkeypatch):
    first = load_pipeline(folder)
    known = first.fingerprint
    assert len(hashed) == len(first.params)
    assert load_pipeline(folder).fingerprint == known and len(hashed) == len(first.params)
    assert without_cache(folder, monkeypatch) == known


def test_a_changed_byte_gives_another_fingerprint(folder, monkeypatch):
    known, file = load_pipeline(folder).fingerprint, folder / "base.safetensors"
    size, times = file.stat().st_size, (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    flip_last_byte(file)
    assert file.stat().st_size == size
    changed = load_pipeline(folder).fingerprint
    assert changed == without_cache(folder, monkeypatch) != known
    os.utime(file, ns=times)  # as if it had never been touched
    assert load_pipeline(folder).fingerprint == changed


def test_files_that_change_after_they_were_read_leave_no_digest_of_what_they_are_now(folder, hashed):
    early = load_pipeline(folder)
    flip_last_byte(folder / "base.safetensors")
    late = load_pipeline(folder)
    assert early.fingerprint != late.fingerprint == load_pipeline(folder).fingerprint
    assert len(hashed) == 2 * len(early.params)


def test_replaced_networks_are_hashed_as_they_are(folder):
    pipeline = load_pipeline(folder)
    known = pipeline.fingerprint
    other = jax.tree.map(lambda leaf: leaf + 1, pipeline.params["base"])
    again = load_pipeline(folder)
    tuned = again.replace_params(base=other)
    assert tuned.fingerprint == pipeline.replace_params(base=other).fingerprint != known
    assert again.take_networks(tuned, ["base"]).fingerprint == tuned.fingerprint
    assert tuned.take_networks(again, ["base"]).fingerprint == known == load_pipeline(folder).fingerprint


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"0" * 64, b"0" * 64 + b" " + b"0" * 64])
def test_a_damaged_entry_is_ignored_and_written_again(folder, hashed, damage):
    known = load_pipeline(folder).fingerprint
    count = len(hashed)
    entries = [*(cache_folder() / "digests").iterdir()]
    assert len(entries) == count
    for entry in entries:
        entry.write_bytes(damage)
    assert load_pipeline(folder).fingerprint == known and len(hashed) == 2 * count
    assert load_pipeline(folder).fingerprint == known and len(hashed) == 2 * count


def test_nothing_is_written_beside_the_weights_or_needed_of_the_cache(folder, tmp_path, monkeypatch):
    before = {file: file.stat().st_mtime_ns for file in [folder, *folder.iterdir()]}
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    known = load_pipeline(folder).fingerprint
    for file in [*folder.iterdir(), folder]:
        file.chmod(file.stat().st_mode & ~0o222)
    try:
        assert load_pipeline(folder).fingerprint == known
    finally:
        folder.chmod(0o755)
    assert {file: file.stat().st_mtime_ns for file in [folder, *folder.iterdir()]} == before


def test_files_that_were_changed_just_now_are_not_told_by_their_times(folder, hashed, monkeypatch):
    monkeypatch.setattr(sources, "_RECENT", 10**12)
    pipeline = load_pipeline(folder)
    assert pipeline.fingerprint == load_pipeline(folder).fingerprint and len(hashed) == 2 * len(pipeline.params)
    assert not (cache_folder() / "digests").exists()


def test_the_state_of_folders_tells_names_sizes_and_added_files(folder, tmp_path):
    states = {sources.state_of([folder])}
    assert states == {sources.state_of([folder])} != {None}
    (folder / "unet").mkdir()
    (folder / "unet" / "another.safetensors").touch()
    states.add(sources.state_of([folder]))
    states.add(sources.state_of([shutil.copytree(folder, tmp_path / "copy")]))
    assert len(states) == 3
    assert sources.state_of([tmp_path / "nothing"]) is None and sources.state_of([]) is None
