import ast
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from personalize_jax.runtime import command

ROOT = Path(__file__).parents[2]
COMMANDS = [
    file.relative_to(ROOT)
    for folder in ("personalize_jax", "experiments", "launch")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if 'if __name__ == "__main__":' in file.read_text()
]


@pytest.fixture
def start(monkeypatch):
    """Starts a command of two flags with arguments; what its main is given, and its flags' values."""
    monkeypatch.setattr(command, "set_up", lambda: None)

    def start(*arguments, **options):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(command.app, "run", lambda main, flags_parser: main(flags_parser(["command", *arguments])))
        given = []

        def define_flags():
            flags.DEFINE_multi_string("images", None, "Pictures.", flag_values=values)
            flags.DEFINE_string("workdir", None, "Run directory.", flag_values=values)
            flags.DEFINE_integer("number", 3, "How many.", flag_values=values)
            config = ConfigDict({"pretrained": ("~/a", "b"), "subject": {"registry": "~/r.json"}}).lock()
            config_flags.DEFINE_config_dict("config", config, flag_values=values)

        command.run(given.append, define_flags, required=(), **options)
        return given[0], values

    return start


def sentence(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_progress_after_a_resume_counts_from_where_it_went_on(capsys):
    with command.steps_bar("training", 10) as progress:
        progress(6, {})
        begun = capsys.readouterr().err
        progress(10, {"loss": 0.125})
    written = capsys.readouterr().err
    assert "6/10" in begun and "10/10" in written and "loss=0.1250" in written


@pytest.mark.parametrize(
    ("arguments", "left_over"),
    [
        (("--images", "a.jpg", "b.jpg", "c.jpg"), "'b.jpg' and 'c.jpg'"),
        (("--workdir", "a", "red", "teapot", "--number=2", "in", "snow"), "'red' and 3 more"),
        (("rex", "--workdir=runs"), "'rex'"),
        (("--workdir=runs", "--", "--number=4"), "'--number=4'"),
    ],
)
def test_words_beside_the_flags_are_refused(start, capsys, arguments, left_over):
    with pytest.raises(SystemExit) as ended:
        start(*arguments)
    assert ended.value.code == 2
    said = sentence(capsys)
    assert said.startswith(f"error: {left_over} ") and "in quotes" in said
    assert "--images once for each" in said  # the flag of this command that may be given several times


def test_a_command_that_starts_another_takes_its_words(start):
    assert start("--number=4", "--", "python", "--images=a", takes_words=True)[0][1:] == ["python", "--images=a"]


@pytest.mark.parametrize("file", COMMANDS, ids=str)
def test_every_command_is_run_by_the_same_function(file):
    main = next(
        node
        for node in ast.parse((ROOT / file).read_text()).body
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    )
    (start,) = main.body
    assert ast.unparse(start).startswith(("command.run(", "study.run("))
    takes_words = "takes_words" in ast.unparse(start)
    assert takes_words == (file.as_posix() == "launch/tpu_vm.py")


def test_the_home_folder_is_meant_by_a_tilde(start, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    _, values = start("--images=~/photos", "--images", "~", "--images=a~b", "--workdir=~/runs/rex")
    assert values.images == ["/home/me/photos", "/home/me", "a~b"] and values.workdir == "/home/me/runs/rex"
    known = {"pretrained": ("/home/me/a", "b"), "subject": {"registry": "/home/me/r.json"}}
    assert values.config.to_dict() == known and values.config.is_locked
