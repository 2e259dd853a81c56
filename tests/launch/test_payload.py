import tarfile

import pytest

from launch import payload
from personalize_jax.runtime.errors import UserError
from tests.launch.cloud import Cloud


@pytest.fixture
def project(tmp_path, monkeypatch):
    return Cloud(tmp_path, monkeypatch).project


def test_buckets_are_named_by_where_they_are_mounted():
    program = payload.read_command(
        [
            "python",
            "-m",
            "x",
            "--images=gs://my-photos/rex",
            "--pair=('gs://b.ee-1/a','gs://b.ee-1')",
            "--workdir",
            "gs://runs/a b",
        ]
    )
    assert program.command[3:] == [
        "--images=/gcs/my-photos/rex",
        "--pair=('/gcs/b.ee-1/a','/gcs/b.ee-1')",
        "--workdir",
        "/gcs/runs/a b",
    ]
    assert program.buckets == ["b.ee-1", "my-photos", "runs"]
    assert program.workdir == "/gcs/runs/a b"
    assert program.local_outputs == []


@pytest.mark.parametrize("word", ["gs://", "gs://a;b", "gs://B/x", "--workdir=gs:///x", "gs://$(x)"])
def test_what_is_no_bucket_is_refused(word):
    with pytest.raises(UserError, match="names no bucket"):
        payload.read_command(["echo", word])


def test_no_command_is_refused():
    with pytest.raises(UserError, match="put it after --"):
        payload.read_command([])


@pytest.mark.parametrize(
    "words", [["--workdir=runs/a"], ["--workdir", "runs/a"], ["-out=runs/a"], ["--output", "runs/a"]]
)
def test_outputs_on_the_machines_disk_are_found(words):
    assert payload.read_command(["python", *words]).local_outputs == ["runs/a"]


def test_of_a_flag_that_is_repeated_the_last_value_counts():
    program = payload.read_command(["python", "--workdir=gs://bucket/rex", "--workdir=runs/rex"])
    assert program.local_outputs == ["runs/rex"]
    assert payload.read_command(["python", "--workdir=runs/rex", "--workdir=gs://bucket/rex"]).local_outputs == []


def test_what_git_ignores_is_left_out_unless_asked_for(project):
    for name in ("photos/a.png", "photos/more/b.png", "new.py", "deleted.py"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(name)
    listed = payload.project_files([])
    assert {"new.py", "requirements.txt"} <= set(listed)
    assert not any(name.startswith("photos") for name in listed)
    assert set(payload.project_files(["photos"])) == {*listed, "photos/a.png", "photos/more/b.png"}
    assert set(payload.project_files(["photos/a.png"])) == {*listed, "photos/a.png"}


@pytest.mark.parametrize("path", ["missing", "..", "../logs", "/etc"])
def test_only_what_is_in_the_project_can_be_copied(project, path):
    with pytest.raises(UserError, match="is not in the project's folder"):
        payload.project_files([path])


def test_a_folder_without_git_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "ROOT", tmp_path)
    with pytest.raises(UserError, match="git checkout"):
        payload.project_files([])


@pytest.mark.parametrize("word", ["--images=photos", "--images=photos/", "photos/a.png", "--images=./photos"])
def test_inputs_that_would_not_be_copied_are_named(project, word):
    (project / "photos").mkdir()
    (project / "photos" / "a.png").touch()
    program = payload.read_command(["python", "-m", "x", word, "--workdir=runs"])
    with pytest.raises(UserError, match="add --copy="):
        payload.check_inputs(program, payload.project_files([]))
    payload.check_inputs(program, payload.project_files(["photos"]))


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--images=photoz", "'photoz' is not in the project's folder"),
        ("--config=wrold.py:x", "'wrold.py' is not in the project's folder"),
        ("--config.pretrained=models/sd15/", "'models/sd15/' is not in the project's folder"),
        ("--config.pretrained=('models/I/', 'gs://bucket/II')", "'models/I/' is not in the project's folder"),
        ("--pipeline=../sd15", "'../sd15' is not in the project's folder"),
        ("--images=~/photos", "'~/photos' is not in the project's folder"),
    ],
)
def test_what_is_nowhere_is_refused(project, flag, sentence):
    (project / "personalize_jax").mkdir()
    (project / "personalize_jax" / "personalize.py").touch()
    program = payload.read_command(["python", "-m", "personalize_jax.personalize", flag])
    with pytest.raises(UserError, match=sentence):
        payload.check_inputs(program, payload.project_files([]))
    elsewhere = payload.read_command(["bash", "program.sh", flag])  # whose flags may mean anything
    payload.check_inputs(elsewhere, payload.project_files([]))


def test_models_of_the_hub_of_buckets_and_of_the_project_need_no_copy(project):
    command = ["python", "-m", "personalize_jax.personalize"]
    names = "('DeepFloyd/IF-I-M-v1.0','someone/model@refs/pr/1','gs://bucket/IF-II')"
    program = payload.read_command([*command, f"--config.pretrained={names}", "--images=gs://bucket/photos"])
    assert program.inputs == [] and program.hub_names == ["DeepFloyd/IF-I-M-v1.0", "someone/model@refs/pr/1"]
    assert program.is_gated
    program = payload.read_command([*command, "--config.pretrained=world"])
    assert program.inputs == program.hub_names == [] and not program.is_gated


def test_a_licence_is_asked_for_where_a_configuration_names_the_model():
    command = ["python", "-m", "personalize_jax.personalize", "--config=configs/deepfloyd_if.py:XL"]
    assert payload.read_command(command).is_gated
    assert not payload.read_command([*command, "--config.pretrained=gs://bucket/if"]).is_gated
    assert not payload.read_command([*command[:3], "--config=configs/stable_diffusion.py:1.5"]).is_gated


def test_commands_that_are_not_there_are_refused(project):
    program = payload.read_command(["python", "-m", "personalize_jax.personalise"])
    with pytest.raises(UserError, match="no command personalize_jax.personalise in .*; correct what follows -m"):
        payload.check_inputs(program, payload.project_files([]))


def test_paths_of_this_computer_are_refused(project, tmp_path):
    program = payload.read_command(["python", f"--images={tmp_path}"])
    with pytest.raises(UserError, match="on this computer only"):
        payload.check_inputs(program, payload.project_files([]))


def test_other_words_are_no_inputs(project):
    prompt = "--prompt=" + "a [V] dog in the snow, " * 50
    program = payload.read_command(["python", "-m", "x", "--pipeline=world", "--config=configs/world.py:x", prompt])
    assert program.inputs == []


def test_an_archive_holds_the_files(project, tmp_path):
    (project / "folder").mkdir()
    (project / "folder" / "it's a file").write_text("content")
    payload.pack(["folder/it's a file"], tmp_path / "new" / "code.tar.gz")
    with tarfile.open(tmp_path / "new" / "code.tar.gz") as tar:
        assert tar.getnames() == ["folder/it's a file"]
        assert tar.extractfile("folder/it's a file").read() == b"content"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["code.tar.gz"]


def test_the_pinned_version_of_jax_is_read(project):
    assert payload.jax_version() == "4.5.6"
