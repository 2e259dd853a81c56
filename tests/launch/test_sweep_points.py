import json
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import deepfloyd_if, stable_diffusion, world
from launch.sweep_engines import _models_key
from launch.sweep_points import MAX_NAME, point_name, prolonged, read_points, values, varied
from personalize_jax.method.changes import changed
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.program import mesh_of

ROOT = Path(__file__).parent.parent.parent
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
CONFIGS = {
    "world": world.get_config("dreambooth"),
    "world lora": world.get_config("lora"),
    "deepfloyd_if lora": deepfloyd_if.get_config("XL:lora"),
    "stable_diffusion lora": stable_diffusion.get_config("1.5:lora"),
}


def sweep(folder, text):
    file = folder / "sweep.py"
    file.write_text(text if "def " in text else f"def sweep(config):\n    {text}\n")
    return file


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_the_sweeps_that_ship_suit_every_configuration(file, name):
    config = CONFIGS[name]
    if file.stem == "lora_rank" and config.training.lora.rank == 0:
        with pytest.raises(UserError, match="trains no adapters; give one that does"):
            read_points(file, config)
        return
    points = read_points(file, config)
    assert len(points) >= 5 and len({point.name for point in points}) == len(points)
    for point in points:
        held, before = values(point.config), values(config)
        assert point.overrides == {key: held[key] for key in point.overrides}
        assert {key for key in held if held[key] != before[key]} <= set(point.overrides)
        assert point.config.is_locked


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_the_sweeps_that_ship_name_their_command(file):
    assert f"--sweep=configs/sweeps/{file.name}" in file.read_text().partition('"""\n\n')[0]


def test_a_name_depends_on_the_overrides_alone():
    overrides = {"training.prior.weight": 0.5, "subject.rule": "rarest"}
    assert point_name(overrides) == point_name(dict(reversed(overrides.items())))
    assert point_name(overrides) == "subject.rule=rarest,training.prior.weight=0.5"


@pytest.mark.parametrize(
    "value", ["../../escape", "a/b", "", ".", "a b\n", "x" * 500, "ä,b=c", (("denoiser/.*", True),), None, -1e-5]
)
def test_a_name_is_a_folders_whatever_the_value(value, tmp_path):
    name = point_name({"training.x": value})
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*", name) and len(name) <= MAX_NAME
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()


def test_different_overrides_have_different_names():
    all_of_them = [
        *({"a.b": v} for v in ("x y", "x/y", "x_y", "x  y", 1, 1.5, -1, True, None, "x" * 500, "x" * 501)),
        *({"a.b": "1,c.d=2"}, {"a.b": 1, "c.d": 2}, {"a.b": 1, "c.d": "2 "}, {}),
    ]
    assert len({point_name(overrides) for overrides in all_of_them}) == len(all_of_them)


def test_values_become_what_the_configuration_holds(tmp_path):
    file = sweep(tmp_path, "yield {'training.prior.weight': 1, 'training.augmentation_levels': [0.0, 0.1]}")
    (point,) = read_points(file, world.get_config())
    assert point.overrides == {"training.prior.weight": 1.0, "training.augmentation_levels": (0.0, 0.1)}
    assert "training.prior.weight=1.0" in point.name


def test_the_configuration_itself_can_be_a_point_and_is_left_alone(tmp_path):
    config = world.get_config()
    points = read_points(sweep(tmp_path, "yield {}; yield {'training.num_steps': 7}"), config)
    assert [point.name for point in points] == ["unchanged", "training.num_steps=7"]
    assert [point.config.training.num_steps for point in points] == [200, 7] == varied(points)["training.num_steps"]
    assert config == world.get_config()


def test_values_may_depend_on_the_configuration(tmp_path):
    file = sweep(tmp_path, "yield {'training.num_steps': 2 * config.training.num_steps}")
    assert read_points(file, world.get_config())[0].overrides == {"training.num_steps": 400}


def test_a_prolonged_point_differs_in_its_steps_alone(tmp_path):
    (point,) = read_points(sweep(tmp_path, "yield {'training.prior.weight': 2.0}"), world.get_config())
    longer = prolonged(point, 1000)
    assert longer.name == point_name({"training.num_steps": 1000, "training.prior.weight": 2.0})
    before, after = values(point.config), values(longer.config)
    assert {key for key in after if after[key] != before[key]} == {"training.num_steps"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("yield {'training.num_step': 3}", "'training.num_step', which is no key .* did you mean training.num_steps?"),
        ("yield {'training.prior': 3}", "'training.prior', which is no key"),
        ("yield {3: 3}", "overrides 3, which is no key"),
        ("yield {'training.num_steps': 2.5}", "by 2.5; a value of type int is expected, such as 200"),
        ("yield {'training.prior.weight': 'much'}", "by 'much'; a value of type float is expected"),
        ("yield {'evaluation.class_samples': 3}", "which all points must share; give it by --config.evaluation.class"),
        ("yield ('training.num_steps', 3)", "yield a dictionary of dotted overrides"),
        ("yield from ()", "yields no points"),
        ("return 3", "not a generator of dictionaries"),
        ("yield {'seed': 1}; yield {'seed': 1}", "yields one point twice: seed=1 is the same"),
        ("yield {'seed': 0}; yield {}", "seed=0 and unchanged are the same configuration"),
        ("raise ValueError('Give another configuration.')", "cannot be used as a sweep: Give another configuration"),
        ("from personalize_jax.runtime.errors import UserError as E; raise E('Give it.')", "used as a sweep: Give it."),
        ("def points(config):\n    yield {}", "cannot be used as a sweep: AttributeError"),
        ("def sweep(config)\n    yield {}", "cannot be used as a sweep: SyntaxError"),
        ("def sweep():\n    yield {}", "cannot be used as a sweep: TypeError"),
        ("import nonesuch\ndef sweep(config):\n    yield {}", "ModuleNotFoundError: No module named 'nonesuch'"),
    ],
)
def test_sweeps_that_cannot_be_used(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        read_points(sweep(tmp_path, text), world.get_config())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nowhere.py", "", "sweep.txt"])
def test_files_that_are_no_sweeps(tmp_path, name):
    (tmp_path / "sweep.txt").write_text("def sweep(config):\n    yield {}\n")
    with pytest.raises(UserError, match="There is no sweep at|is no Python file"):
        read_points(tmp_path / name, world.get_config())


def test_models_are_read_anew_only_for_points_whose_parameters_lie_elsewhere(tmp_path):
    """And for those that name others, or compute otherwise."""
    config = deepfloyd_if.get_config("XL")

    def asked(**changes):
        return _models_key(changed(config, **changes))

    named = ConfigDict(json.loads(asked()))
    for part in ("training", "super_resolution_training"):
        if part in config:
            assert mesh_of(named[part]).shape == mesh_of(config[part]).shape
    assert asked(training__batch_size=16, training__optimizer__learning_rate=1e-3) == asked()
    for other in ({"training__mesh": (1, 1, -1), "training__sharding": ()}, {"pretrained": ("x", "y")}):
        assert asked(**other) != asked()
    assert asked(compute__dtype="float32") != asked()
