import subprocess

import pytest

from launch import worker


def bash(script, home):
    return subprocess.run(["bash", "-c", script], cwd=home, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "script",
    [
        worker.install("1.2.3"),
        worker.mount("bucket"),
        worker.keep_token(),
        worker.forget_token(),
        worker.start(["echo", "it's; $HOME"]),
        worker.stop(),
        worker.status(),
        worker.new_log(7),
        worker.manifest("it's"),
    ],
    ids=["install", "mount", "keep_token", "forget_token", "start", "stop", "status", "new_log", "manifest"],
)
def test_scripts_are_bash_of_one_line(script):
    subprocess.run(["bash", "-n", "-c", script], check=True)
    assert "\n" not in script


def test_a_log_is_read_byte_for_byte_from_where_it_was_left(tmp_path):
    content = bytes(range(256)) + "größer\r\n".encode() * 1000
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "log").write_bytes(content)
    for offset in (0, 1, 255, 260, len(content)):
        assert worker.read_log(bash(worker.new_log(offset), tmp_path)) == content[offset:]


def test_a_log_that_came_half_and_then_whole_is_whole(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "log").write_bytes(b"content" * 100)
    output = bash(worker.new_log(0), tmp_path)
    assert worker.read_log(output[: len(output) // 2] + output) == b"content" * 100


def test_before_the_start_there_is_nothing(tmp_path):
    assert worker.read_statuses(bash(worker.status(), tmp_path)) == [("-", worker.ABSENT)]
    assert bash(worker.stop(), tmp_path) == ""
    assert bash(worker.manifest("run"), tmp_path) == ""


def test_a_program_whose_process_is_gone_is_lost(tmp_path):
    ended = subprocess.Popen(["true"], start_new_session=True)
    ended.wait()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "pid").write_text(str(ended.pid))
    (tmp_path / "launch" / "command").write_text("abc")
    assert worker.read_statuses(bash(worker.status(), tmp_path)) == [("abc", worker.LOST)]
    bash(worker.stop(), tmp_path)
    assert not (tmp_path / "launch").exists()


def test_commands_are_told_apart_by_their_words():
    assert worker.digest(["a", "b"]) == worker.digest(["a", "b"])
    assert worker.digest(["a", "b"]) != worker.digest(["a b"])
