import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import world
from experiments import (
    class_noun,
    method_settings,
    pretraining_recipe,
    prior_preservation,
    study,
    super_resolution,
    tables,
    training_length,
)
from experiments.pretrained_cascade import pattern_prompts, prompt_grid, side_by_side
from personalize_jax.families.world import read_stage
from personalize_jax.method.configuration_keys import check_keys, rules_of_pretraining
from personalize_jax.metrics.similarity import Estimate
from personalize_jax.pipeline import load_pipeline
from personalize_jax.runtime.errors import UserError
from personalize_jax.world.captions import requested_properties
from personalize_jax.world.pictures import rendered
from personalize_jax.world.scene import CLASSES, COLOURS, CONTEXTS, PATTERNS
from tests import processes, tiny

EXPERIMENTS = sorted(
    f"experiments.{file.stem}"
    for file in (Path(__file__).parent.parent / "experiments").glob("*.py")
    if file.stem not in ("__init__", "folders", "study", "tables")
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_asks_its_question_and_names_its_command(name):
    documentation = importlib.import_module(name).__doc__
    assert documentation.partition("\n")[0].split(". ")[0].rstrip(".").endswith("?") or "?" in documentation[:120]
    assert f"python -m {name} --" in documentation


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_explains_its_flags(name, tmp_path):
    finished = processes.command(tmp_path, name, "--help")
    assert finished.status in (0, 1) and "Traceback" not in finished.error
    documentation = importlib.import_module(name).__doc__
    assert documentation.split("?")[0] in finished.output + finished.error


def test_wandb_that_is_not_installed_is_missed_before_anything_is_done(tmp_path):
    where = "--config=configs/world.py", f"--workdir={tmp_path / 'runs'}", "--wandb=dogs"
    refused = processes.command(tmp_path, "experiments.class_noun", *where, before=processes.without_wandb)
    assert refused.status == 2 and not (tmp_path / "runs").exists()
    assert refused.error.strip().splitlines()[-1].startswith("error: --wandb=dogs needs Weights & Biases")


def test_prompts_go_through_all_properties_evenly():
    prompts, truth = prompt_grid(200)
    sizes = {"class_id": len(CLASSES), "context": len(CONTEXTS), "body_colour": len(COLOURS)}
    assert len(set(prompts)) == len(prompts) == 200
    for name, size in sizes.items():
        counts = np.bincount(truth[name], minlength=size)
        assert len(counts) == size and np.ptp(counts) <= 2
    for a, b in (("class_id", "context"), ("class_id", "body_colour"), ("context", "body_colour")):
        pairs = len(set(zip(truth[a].tolist(), truth[b].tolist(), strict=True)))
        assert pairs >= 0.9 * min(200, sizes[a] * sizes[b])


def test_prompts_say_the_truth():
    prompts, truth = prompt_grid(30)
    for i, text in enumerate(prompts):
        words = CLASSES[truth["class_id"][i]], CONTEXTS[truth["context"][i]], tuple(COLOURS)[truth["body_colour"][i]]
        assert all(word in text for word in words)


def test_prompts_ask_for_each_pattern_as_often_whatever_else_they_say():
    prompts, truth = pattern_prompts(200)
    grid, others = prompt_grid(200)
    assert np.ptp(np.bincount(truth["pattern"], minlength=len(PATTERNS))[1:]) <= 1 and 0 not in truth["pattern"]
    for a, b in ((truth["pattern"], others[name]) for name in others):
        assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == 3 * len(set(b.tolist()))
    for text, without, pattern in zip(prompts, grid, truth["pattern"], strict=True):
        asked = requested_properties(text)
        assert asked.pop("pattern") == pattern and asked == requested_properties(without)
        assert text.replace(f"{PATTERNS[pattern]} ", "") == without


def test_cascades_stand_side_by_side_prompt_by_prompt():
    pictures = {
        "world": {"base": np.full((3, 8, 8, 3), 1, np.uint8), "super_resolution": np.full((3, 16, 16, 3), 1, np.uint8)},
        "other": {"base": np.full((3, 4, 4, 3), 2, np.uint8)},
    }
    panels = side_by_side(["a dog", "a cat", "a car"], pictures)
    assert [(panel.prompt, panel.note, panel.images.max()) for panel in panels] == [
        (text, *cascade) for text in ("a dog", "a cat", "a car") for cascade in (("world", 1), ("other", 2))
    ]
    assert {panel.title for panel in panels} == {"base: world, then other"}  # the only stage that both have


def test_a_cascade_is_not_compared_with_itself(tmp_path):
    flags = "--pipeline=world", "--against=world", f"--out={tmp_path / 'out'}"
    refused = processes.command(tmp_path, "experiments.pretrained_cascade", *flags)
    assert refused.status == 2 and "are both world; give two cascades to compare" in refused.error


ARMS = {"tuned": {f"s{i}": {"DINO": 0.5 + i / 50, "DINO (real)": 0.8} for i in range(10)}}
ARMS["worse"] = {subject: {"DINO": scores["DINO"] - 0.1} for subject, scores in ARMS["tuned"].items()}


def test_tables_show_real_pictures_arms_and_the_paper(tmp_path):
    finding = tables.Finding("tuning helps", "DINO", "tuned", "worse")
    text = tables.write(ARMS, [finding], {"DreamBooth": {"DINO": 0.668}}, tmp_path)
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows[:5] == ["|", "| real pictures", "| tuned", "| worse", "| paper: DreamBooth"]
    assert re.search(r"\| tuned \| \.590 \(.* to .*\), worst \.500 \|", text)
    assert "| real pictures | .800 |" in text and "| paper: DreamBooth | .668 |" in text
    assert "| tuning helps | DINO | .100 | yes |" in text
    assert (tmp_path / "tables.md").read_text() == text
    assert (tmp_path / "tables.csv").exists() and (tmp_path / "figure.png").stat().st_size > 1000


def test_a_finding_holds_when_its_interval_excludes_zero():
    assert [tables.verdict(Estimate(0.1, *ends)) for ends in ((0.05, 0.2), (-0.05, 0.2), (-0.2, -0.1))] == [
        "yes",
        "undecided",
        "no, the opposite",
    ]


def test_parts_share_the_subjects_out():
    assert sorted(i for k in (1, 2, 3) for i in study.select_subjects(range(30), 10, f"{k}/3")) == list(range(10))
    assert study.select_subjects("abcd", 3, "1/1") == ["a", "b", "c"]
    for wrong in ("0/2", "3/2", "2", "a/b", "1/", "11/11"):
        with pytest.raises(UserError, match="--part"):
            study.select_subjects(range(30), 10, wrong)
    with pytest.raises(UserError, match="31 subjects were asked for and the benchmark has 30"):
        study.select_subjects(range(30), 31, "1/1")


def test_prompts_are_worded_as_the_labels_are():
    prompt = "a red [V] stuffed animal on the beach"
    both, alone = "identifier_and_class", "identifier"
    assert study.reword(prompt, "stuffed animal", "stuffed animal", both) == prompt
    assert study.reword(prompt, "stuffed animal", "dog", both) == "a red [V] dog on the beach"
    assert study.reword(prompt, "stuffed animal", "stuffed animal", alone) == "a red [V] on the beach"


def test_some_arms_take_their_findings_along():
    whole = prior_preservation.make_study(world.get_config())
    some = study.select_arms(whole, ["dreambooth", "without_prior"])
    assert [arm.name for arm in some.arms] == ["dreambooth", "without_prior"]
    assert 0 < len(some.findings) < len(whole.findings)
    assert study.select_arms(whole, None) == whole
    with pytest.raises(UserError, match="names nobody; the arms are dreambooth"):
        study.select_arms(whole, ["nobody"])
    with pytest.raises(UserError, match="vary dreambooth"):
        study.select_arms(whole, ["without_prior"])


def test_a_wrong_noun_is_another_one():
    for count in (2, 3, 12):
        nouns = CLASSES[:count]
        assert all(class_noun.wrong(noun, nouns) in set(nouns) - {noun} for noun in nouns)


def test_trainings_go_on_from_shorter_ones():
    arms = training_length.make_study(world.get_config()).arms
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        if arm.continues is not None:
            before = by_name[arm.continues]
            assert arms.index(before) < arms.index(arm)
            assert before.config.training.num_steps < arm.config.training.num_steps
            assert before.config.training.prior.weight == arm.config.training.prior.weight


def flat(config, prefix=""):
    """The values of a configuration by dotted key."""
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return found


def test_settings_vary_by_one_key_or_two():
    made = method_settings.make_study(world.get_config())
    first, *others = made.arms
    whole = first.config.training.num_steps, first.config.training.optimizer.decay_steps
    varied = []
    for arm in others:
        differing = {key for key, value in flat(arm.config).items() if value != flat(first.config)[key]}
        varied.append(differing - {"training.optimizer.decay_steps"})
        steps = arm.config.training.num_steps, arm.config.training.optimizer.decay_steps
        assert steps[1] / steps[0] == whole[1] / whole[0]
    assert {len(keys) for keys in varied} == {1, 2}
    assert {key for keys in varied for key in keys} == {
        "tune",
        "training.num_steps",
        "training.optimizer.learning_rate",
        *(f"training.prior.{key}" for key in ("form", "weight", "caption_dropout")),
    }
    assert len({arm.name for arm in made.arms}) == len(made.arms)


def test_enlarging_is_measured_on_the_object():
    """The middle of the picture is the object: there the enlarged views are off by a tenth of the range."""
    truth = np.zeros((8, 128, 128, 4), np.uint8)
    truth[:, 32:96, 32:96, 3] = 255
    enlarged = np.full((8, 128, 128, 3), 200, np.uint8)
    enlarged[:, 32:96, 32:96] = 26
    psnr = np.mean([super_resolution.object_psnr(*pair) for pair in zip(enlarged, truth, strict=True)])
    assert psnr == pytest.approx(-20 * np.log10(26 / 255))


@pytest.fixture(scope="module")
def world_pipeline():
    return load_pipeline("world")


def test_recipes_are_compared_at_the_same_noise(world_pipeline):
    stage = world_pipeline.stages[0]
    for noise in pretraining_recipe.NOISES:
        assert pretraining_recipe.time_of(stage, noise) == pytest.approx(2 / np.pi * np.arctan(noise), abs=5e-4)


def test_errors_weigh_as_much_at_every_noise_for_pictures_that_are_noise_themselves():
    """The best denoiser of normal values of standard deviation s has the error s n / sqrt(s^2 + n^2)."""
    s = pretraining_recipe.PICTURE_STD
    errors = {str(n): s * n / np.hypot(s, n) for n in pretraining_recipe.NOISES}
    assert pretraining_recipe.weighted(errors) == pytest.approx(1)
    assert pretraining_recipe.weighted({**errors, "0.05": 2 * errors["0.05"]}) == pytest.approx(1 + 3 / len(errors))


@pytest.mark.parametrize("recipe", pretraining_recipe.RECIPES)
def test_a_recipe_is_a_configuration_that_can_be_trained(recipe, world_pipeline):
    config = pretraining_recipe.config_of(recipe)
    check_keys(config, rules_of_pretraining(config))
    stage = read_stage(pretraining_recipe.section_of(config, "base").stage.to_dict())
    tokens = world_pipeline.family.token_shapes(1)
    cond = jax.eval_shape(world_pipeline.family.condition, world_pipeline.params, tokens)
    assert stage.resolution == 32 and jax.eval_shape(stage.init_params, jax.random.key(0), cond)


def test_a_network_that_predicts_nothing_has_a_known_error():
    """A velocity of zero makes x of z_t: alpha z_t = alpha^2 x + alpha sigma eps, where alpha^2 + sigma^2 = 1."""
    pipeline, rng = tiny.pipeline(), np.random.default_rng(0)
    nothing = pipeline.replace_params(base=jax.tree.map(jnp.zeros_like, pipeline.params["base"]))
    pictures = rng.integers(0, 256, (256, 8, 8, 4), np.uint8)
    x = pictures[..., :3] / 127.5 - 1
    errors = pretraining_recipe.denoising_errors(nothing, pictures, 4.0, ["a dog"] * len(pictures))
    for noise in pretraining_recipe.NOISES:
        alpha2 = 1 / (1 + noise**2)
        expected = (1 - alpha2) ** 2 * np.mean(x**2) + alpha2 * (1 - alpha2)
        assert errors[f"at noise {noise}"] == pytest.approx(expected**0.5, rel=0.01)


@pytest.mark.slow
def test_a_better_denoiser_has_smaller_errors(world_pipeline):
    pipeline, rng = world_pipeline, np.random.default_rng(0)
    held_out = rendered(32, "heldout", 8)
    untrained = pipeline.replace_params(
        base=jax.tree.map(lambda a: a + 0.05 * rng.normal(size=a.shape), pipeline.params["base"])
    )
    captions = [of_picture[0] for of_picture in held_out["captions"].tolist()]
    good, bad = (
        pretraining_recipe.denoising_errors(p, held_out["image"], 4.0, captions) for p in (pipeline, untrained)
    )
    assert all(good[noise] < bad[noise] for noise in good) and good["at noise 0.05"] < 0.05
