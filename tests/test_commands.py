"""Commands as they are typed: what cannot be used costs one sentence and exit status 2, and spoils nothing."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from personalize_jax.pipeline import cascade, load_pipeline, save_pipeline
from personalize_jax.pipeline.pictures import read_png
from tests import processes
from tests.deaths import stop_saving_the_second_picture

ROOT = Path(__file__).parent.parent


def refused(finished):
    """The sentence with which a command refuses."""
    assert finished.status == 2, finished
    lines = finished.error.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in finished.error
    assert sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]


def personalize(folder, pretrained, photos, *flags, before=None):
    return processes.command(
        folder,
        "personalize_jax.personalize",
        f"--config=tests/tiny_world.py:{pretrained}",
        f"--images={photos}",
        f"--workdir={folder / 'run'}",
        *flags,
        before=before,
    )


def huge_png(side):
    """The header of a PNG of side x side pixels, and next to no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def picture(file, side):
    Image.new("RGB", (side, side), "red").save(file)


def cut_short(file):
    picture(file, 64)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "write", "sentence"),
    [
        ("notes.txt", lambda file: file.write_text("a dog"), "holds no images (only notes.txt)"),
        ("dog.jpg", lambda file: file.write_text("a dog"), "dog.jpg is not a JPEG, PNG or WebP image"),
        ("dog.jpg", cut_short, "dog.jpg is damaged"),
        ("dog.png", lambda file: picture(file, 1), "is 1x1 pixels, at least 16x16 are expected"),
        ("dog.png", lambda file: file.write_bytes(huge_png(30_000)), "dog.png has more than 100 megapixels"),
    ],
    ids=["none", "text", "cut short", "tiny", "huge"],
)
def test_images_that_cannot_be_used(pretrained, tmp_path, name, write, sentence):
    photos = tmp_path / "photos"
    photos.mkdir()
    write(photos / name)
    assert sentence in refused(personalize(tmp_path, pretrained, photos, "--class_noun=dog"))
    assert not (tmp_path / "run").exists()


def know_the_worlds_classes():
    from personalize_jax.method import personalization
    from personalize_jax.world.scene import CLASSES

    personalization.class_knowledge = lambda config: (None, CLASSES)


def test_a_class_noun_that_the_cascade_does_not_know(pretrained, photos, tmp_path):
    finished = personalize(tmp_path, pretrained, photos, "--class_noun=axolotl", before=know_the_worlds_classes)
    assert "'axolotl' is unknown" in refused(finished) and "dog" in finished.error
    assert not (tmp_path / "run" / "subject").exists() and not (tmp_path / "run" / "base").exists()


def test_no_class_noun_and_nobody_to_tell(pretrained, photos, tmp_path):
    assert "--class_noun" in refused(personalize(tmp_path, pretrained, photos))


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--config.pretrained=nowhere", "No pipeline at 'nowhere': give 'world', or a folder"),
        ("--config.training.num_step=3", 'Did you mean "num_steps"'),
        ("--config.tune=('decoder',)", "give one or more of base, super_resolution, each once"),
        ("--config.training.mesh=2", "config.training.mesh is (2,); give three sizes"),
        ("--config=nowhere.py", "No such file or directory: 'nowhere.py'"),
    ],
)
def test_configurations_that_cannot_be_used(pretrained, photos, tmp_path, flag, sentence):
    assert sentence in refused(personalize(tmp_path, pretrained, photos, "--class_noun=dog", flag))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("personalize_jax.personalize", ["--images={photos}", "--workdir={out}"]),
        ("personalize_jax.plan", ["--topology=v5e-8", "--out={out}"]),
        ("personalize_jax.pretrain", ["--workdir={out}"]),
        ("experiments.num_images", ["--workdir={out}"]),
        ("experiments.speed", ["--out={out}"]),
        ("launch.sweep", ["--sweep=configs/sweeps/prior_weight.py", "--workdir={out}", "--benchmark=world"]),
    ],
)
def test_every_command_refuses_values_that_make_no_sense(photos, tmp_path, module, flags):
    given = [flag.format(photos=photos, out=tmp_path / "out") for flag in flags]
    config = "pretrain_world.py:base" if module.endswith("pretrain") else "world.py"
    given += [f"--config=configs/{config}", "--config.training.log_every=0"]
    sentence = refused(processes.command(tmp_path, module, *given))
    assert sentence == "error: config.training.log_every is 0; give a whole number of 1 or more."
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["world.py:hypernetwork", "stable_diffusion.py:1.5:hypernetwork"])
def test_methods_that_there_are_not(photos, tmp_path, config):
    flags = [f"--config=configs/{config}", f"--images={photos}", f"--workdir={tmp_path / 'run'}"]
    sentence = refused(processes.command(tmp_path, "personalize_jax.personalize", *flags))
    assert "The method is 'hypernetwork'; give one of dreambooth, textual_inversion" in sentence


def test_a_configuration_without_all_keys(pretrained, photos, tmp_path):
    (tmp_path / "short.py").write_text(
        "from tests import tiny_world\n\n\ndef get_config(folder):\n"
        "    config = tiny_world.get_config(folder).unlock()\n"
        "    del config.report, config.training.prior.weight\n"
        "    return config.lock()\n"
    )
    flag = f"--config={tmp_path / 'short.py'}:{pretrained}"
    sentence = refused(personalize(tmp_path, pretrained, photos, "--class_noun=dog", flag))
    assert "lacks training.prior.weight, report.contexts" in sentence and not (tmp_path / "run").exists()


@pytest.mark.parametrize("parent", ["a file", "/proc"])
def test_a_run_directory_that_cannot_be_made(pretrained, photos, tmp_path, parent):
    (tmp_path / "a file").write_text("")
    workdir = tmp_path / parent / "rex"
    sentence = refused(personalize(tmp_path, pretrained, photos, "--class_noun=dog", f"--workdir={workdir}"))
    assert str(workdir) in sentence and "cannot be used" in sentence


def test_required_flags_are_named(tmp_path):
    finished = processes.command(tmp_path, "personalize_jax.sample", "--prompt=a dog")
    assert "--out must have a value" in refused(finished).replace("Flag ", "").replace("flag ", "")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt=a dog"], "Give either --workdir"),
        (["--prompt=a [V] dog", "--pipeline={pretrained}"], "knows no [V]"),
        (["--prompt=a dog", "--workdir={photos}"], "is no run directory: it has no manifest.json"),
        (["--pipeline={pretrained}", "--prompt", "a", "red", "dog"], "'red' and 'dog' stand beside the flags"),
    ],
)
def test_samples_that_cannot_be_drawn(pretrained, photos, tmp_path, flags, sentence):
    flags = [flag.format(pretrained=pretrained, photos=photos) for flag in flags]
    finished = processes.command(tmp_path, "personalize_jax.sample", *flags, f"--out={tmp_path / 'out'}")
    assert sentence in refused(finished) and not (tmp_path / "out").exists()


def draw_one_at_once():
    """Let batches of more than one picture fail."""
    whole = cascade.sample_pictures

    def sample_pictures(stage, sampling, mesh, params, keys, *others):
        assert len(keys) == 1
        return whole(stage, sampling, mesh, params, keys, *others)

    cascade.sample_pictures = sample_pictures


def test_pictures_are_those_of_their_seeds_however_many_are_drawn(pretrained, tmp_path):
    flags = [f"--pipeline={pretrained}", "--batch_size=2", f"--out={tmp_path / 'out'}"]
    several = processes.command(
        tmp_path, "personalize_jax.sample", *flags, "--prompt=a dog", "--prompt=a cat", "--num_images=3"
    )
    assert several.status == 0 and len(several.output.splitlines()) == 6
    file = tmp_path / "out" / "a-cat-0002.png"
    drawn = read_png(file)[0]
    weights = load_pipeline(pretrained).fingerprint
    assert read_png(file)[1] == {"prompt": "a cat", "seed": "2", "weights": weights}
    file.unlink()
    one = ("--prompt=a cat", "--num_images=1", "--seed=2")
    alone = processes.command(tmp_path, "personalize_jax.sample", *flags, *one, before=draw_one_at_once)
    assert alone.output.split() == [str(file)]
    np.testing.assert_allclose(read_png(file)[0].astype(int), drawn.astype(int), atol=1)  # it may round otherwise


def test_sampling_that_was_stopped_goes_on_with_the_pictures_that_are_missing(pretrained, tmp_path):
    def sample(out, pipeline=pretrained, before=None):
        flags = [f"--pipeline={pipeline}", "--batch_size=2", f"--out={out}", "--prompt=a dog", "--num_images=3"]
        return processes.command(tmp_path, "personalize_jax.sample", *flags, "--prompt=a cat", before=before)

    def contents():
        return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in (tmp_path / "out").iterdir()}

    assert sample(tmp_path / "out", before=stop_saving_the_second_picture).status == 75
    stopped = contents()
    assert len(stopped) == 2  # the batch under way
    finished = sample(tmp_path / "out")
    assert finished.output.splitlines() == [
        str(tmp_path / "out" / f"a-{noun}-{seed:04d}.png") for noun in ("dog", "cat") for seed in range(3)
    ]
    after = contents()
    assert len(after) == 6 and stopped.items() <= after.items()
    assert sample(tmp_path / "anew").status == 0
    assert {f.name: f.read_bytes() for f in (tmp_path / "anew").iterdir()} == {n: c for n, (c, _) in after.items()}

    other = load_pipeline(pretrained)
    other = other.replace_params(base=jax.tree.map(lambda a: a / 2, other.params["base"]))
    save_pipeline(other, tmp_path / "other", np.float32)
    assert sample(tmp_path / "out", tmp_path / "other").status == 0
    replaced = contents()
    assert replaced.keys() == after.keys() and all(replaced[name][0] != content for name, (content, _) in after.items())


def test_a_pipeline_cut_short_is_named(pretrained, tmp_path):
    copy = tmp_path / "pretrained"
    copy.mkdir()
    for file in pretrained.iterdir():
        data = file.read_bytes()
        (copy / file.name).write_bytes(data[: len(data) // 2] if file.name == "base.safetensors" else data)
    finished = processes.command(
        tmp_path, "personalize_jax.sample", f"--pipeline={copy}", "--prompt=a dog", f"--out={tmp_path}"
    )
    assert f"{copy / 'base.safetensors'} cannot be read" in refused(finished)


# The package as a notebook sees it.


def test_the_notebooks_names_are_functions_whatever_is_imported():
    check = (
        "import importlib, pkgutil\n"
        "import personalize_jax as pj\n"
        "names = ['load_personalized', 'load_pipeline', 'load_subject', 'personalize_subject']\n"
        "assert sorted(pj.__all__) == names, pj.__all__\n"
        "modules = [module.name for module in pkgutil.iter_modules(pj.__path__)]\n"
        "for module in modules:\n"
        "    importlib.import_module(f'personalize_jax.{module}')\n"
        "assert 'personalize' in modules and all(callable(getattr(pj, name)) for name in names)\n"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_the_commands_start_on_their_own(tmp_path):
    """Without the imports that the other tests' processes find done."""
    started = subprocess.run(
        [sys.executable, "-m", "personalize_jax.sample", "--pipeline=nowhere", "--prompt=a dog", f"--out={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert refused(processes.Finished(started.returncode, started.stdout, started.stderr)).startswith("error: No pipel")
