import errno
import os
import signal

import numpy as np
import pytest
from safetensors.numpy import save_file

from personalize_jax.runtime import files
from personalize_jax.runtime.files import naming, remove_temporaries, replacing, write_text
from tests import processes


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


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_mode_of_any_new_one_whatever_wrote_it(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "weights", own_folder=True) as temporary:
            save_file({"a": np.ones(3)}, temporary)
        write_text(tmp_path / "text", "")
        (tmp_path / "ordinary").touch()
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("weights", "text", "ordinary")} == {0o666 & ~mask}


def be_killed_writing(file, beside):
    with replacing(file, own_folder=beside is not None) as temporary:
        temporary.touch()
        if beside is not None:
            temporary.with_name(beside).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_killed_processes_of_this_host_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    for where in (elsewhere, folder / "samples"):
        where.mkdir(parents=True)
        for name in (".a.json.txt", ".hidden", "a.json", "a.json.123", ".a.json.123", ".tmpbgGcno"):
            (where / name).write_text("")
    (folder / "link").symlink_to(elsewhere)
    kept = sorted(folder.rglob("*"))
    for file, beside in ((folder / "samples" / "a.json", None), (folder / "b", ".tmpbgGcno"), (elsewhere / "b", None)):
        assert processes.call(be_killed_writing, file, beside) == -signal.SIGKILL
    left = sorted(folder.rglob("*"))
    assert len(left) == len(kept) + 4
    with monkeypatch.context() as patch:
        patch.setattr(files, "_HOST", "another")
        remove_temporaries(folder)
        assert sorted(folder.rglob("*")) == left  # a host cannot tell who lives on another
    in_elsewhere = sorted(elsewhere.rglob("*"))
    with replacing(folder / "samples" / "c", own_folder=True):  # which this process is about to write
        remove_temporaries(folder)
    assert sorted(folder.rglob("*")) == sorted([*kept, folder / "samples" / "c"])
    assert sorted(elsewhere.rglob("*")) == in_elsewhere
