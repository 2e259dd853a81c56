import errno
import os
import subprocess
import sys

import pytest

from personalize_jax.files import naming, remove_temporaries, replacing, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    write_text(file, "old")
    with pytest.raises(RuntimeError), replacing(file) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
    write_text(file, "new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_a_failure_names_the_file_that_was_to_be_written(tmp_path):
    with pytest.raises(OSError) as full, replacing(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.filename == str(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError) as missing:
        write_text(tmp_path / "missing" / "a.json", "")
    assert missing.value.filename == str(tmp_path / "missing" / "a.json")
    with pytest.raises(FileNotFoundError) as another, naming(tmp_path / "a.json"):
        (tmp_path / "other").read_text()
    assert another.value.filename == str(tmp_path / "other")


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    kept = [".a.json.txt", ".hidden", "a.json", f"a.json.{dead.pid}", f".a.json.{os.getpid()}"]
    for where in (elsewhere, folder / "samples"):
        where.mkdir(parents=True)
        for name in (*kept, f".a.json.{dead.pid}", f".b.png.{dead.pid}", ".tmpbgGcno"):
            (where / name).write_text("")
    (folder / "link").symlink_to(elsewhere)
    remove_temporaries(folder)
    assert {file.name for file in (folder / "samples").iterdir()} == set(kept)
    assert len(list(elsewhere.iterdir())) == len(kept) + 3
