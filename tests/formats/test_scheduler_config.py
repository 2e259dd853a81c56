"""What scheduler files mean, step by step, against diffusers.

Its tables are float32, with which 1 - alpha^2 keeps about four digits near t = 0: hence 1e-4.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.diffusion.guidance import dynamic_threshold
from personalize_jax.diffusion.prediction import to_x0_eps
from personalize_jax.diffusion.process import discrete, scaled_linear_betas, squaredcos_betas
from personalize_jax.diffusion.samplers import Spacing, ancestral, ddim, timesteps
from personalize_jax.formats.scheduler_config import (
    for_latents,
    read_scheduler,
    warn_of_another_sampler,
)
from personalize_jax.runtime.errors import UserError

# As Stable Diffusion 1.5, 2.1 (768) and DeepFloyd IF publish them.
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD21 = {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
IF = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "dynamic_thresholding_ratio": 0.95,
    "sample_max_value": 1.5,
    "thresholding": True,
    "variance_type": "learned_range",
}
SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": np.linspace(0.01, 0.3, 50).tolist(), "num_train_timesteps": 50},
    "short": {"beta_schedule": "scaled_linear", "num_train_timesteps": 200},
}
KINDS = ["epsilon", "v_prediction", "sample"]
CLASSES = [
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
]
OTHER_PROCESSES = [  # that diffusers may load in a Stable Diffusion pipeline, or whose names look alike
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "EDMEulerScheduler",
    "IPNDMScheduler",
    "DDIMInverseScheduler",
    "CogVideoXDDIMScheduler",
    "UnCLIPScheduler",
    "VQDiffusionScheduler",
]
N_STEPS, SHAPE = 10, (2, 3, 4, 4)


@pytest.fixture(scope="module")
def diffusers():
    pytest.importorskip("torch")
    return pytest.importorskip("diffusers")


@pytest.fixture
def build(diffusers):
    """The same scheduler, theirs and ours."""

    def build(name, **config):
        if name == "DPMSolverSDEScheduler":
            pytest.importorskip("torchsde")
        return getattr(diffusers, name)(**config), read_scheduler({"_class_name": name, **config})

    return build


def assert_steps_agree(reference, spec, sampler, their_step):
    """Walks along their times with random outputs; each of our steps starts from their z_t."""
    import torch

    rng = np.random.default_rng(0)
    reference.set_timesteps(N_STEPS)
    ts = np.asarray(timesteps(N_STEPS, spec.spacing, spec.process.num_timesteps))
    z_t = rng.normal(size=SHAPE).astype(np.float32)
    for i, index in enumerate(reference.timesteps.tolist()):
        t, s = ts[i], ts[i + 1]
        assert spec.process.network_time(t) == index
        output, v, noise = rng.normal(size=(3, *SHAPE)).astype(np.float32)
        v = np.tanh(v)
        x0_hat, _ = to_x0_eps(spec.prediction, output, z_t, spec.process.alpha(t), spec.process.sigma(t))
        if spec.threshold_max is not None:
            x0_hat = dynamic_threshold(x0_hat, spec.threshold_percentile, spec.threshold_max)
        learned = spec.variance == "learned_range"
        _, z_s = sampler.step(None, z_t, (x0_hat, v) if learned else x0_hat, t, s, jnp.asarray(noise))
        model_output = np.concatenate([output, v], 1) if learned else output
        expected = their_step(*(torch.from_numpy(a) for a in (model_output, noise)), index, torch.from_numpy(z_t))
        np.testing.assert_allclose(z_s, expected, rtol=1e-4, atol=1e-4, err_msg=f"index {index}")
        z_t = expected.numpy()


def assert_ddpm_agrees(reference, spec, monkeypatch):
    from diffusers.schedulers import scheduling_ddpm

    def step(output, noise, index, z_t):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: noise)
        return reference.step(output, index, z_t).prev_sample

    assert_steps_agree(reference, spec, ancestral(spec.process, spec.variance), step)


def assert_ddim_agrees(reference, spec):
    def step(output, noise, index, z_t):
        return reference.step(output, index, z_t, use_clipped_model_output=True).prev_sample

    assert_steps_agree(reference, spec, ddim(spec.process), step)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_the_class(name, build):
    reference, spec = build(name)
    assert spec.spacing.kind == reference.config.get("timestep_spacing", "linspace")
    np.testing.assert_allclose(spec.process.alpha(np.arange(1, 1001) / 1000) ** 2, reference.alphas_cumprod, atol=1e-6)
    assert (spec.threshold_max is not None) == bool(reference.config.get("clip_sample"))
    assert spec.process == read_scheduler({"_class_name": name, **reference.config}).process
    assert spec == read_scheduler({"_class_name": name, **reference.config})


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", ["DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_schedules_agree(name, schedule, build):
    reference, spec = build(name, **schedule)
    n = len(reference.alphas_cumprod)
    assert spec.process.num_timesteps == n
    np.testing.assert_allclose(
        spec.process.alpha(np.arange(1, n + 1) / n) ** 2, reference.alphas_cumprod, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos"])
def test_zero_terminal_snr_agrees(schedule, build):
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    reference, spec = build("DDIMScheduler", **SCHEDULES[schedule], **options)
    t = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(spec.process.alpha(t) ** 2, reference.alphas_cumprod, rtol=0, atol=1e-6)
    assert spec.process.alpha(1.0) == 0


@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler"])
def test_times_agree_for_every_number_of_steps(name, kind, build):
    config = {"num_train_timesteps": 100, "timestep_spacing": kind}
    reference, spec = build(name, **config, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
    for steps in range(2, 101):  # from a single step of "linspace" they start at index 0
        reference.set_timesteps(steps)
        ts = np.asarray(timesteps(steps, spec.spacing, 100))
        indices = np.unique(reference.timesteps)[::-1]  # PNDM repeats one
        indices = indices[indices >= 0]  # for some numbers of "trailing" steps, rounding gives them one more, -1
        np.testing.assert_allclose(100 * ts[:-1], indices + 1, rtol=1e-6, err_msg=f"{steps} steps")


@pytest.mark.parametrize("kind", ["leading", "trailing"])
def test_times_agree_with_euler(kind, build):
    reference, spec = build("EulerDiscreteScheduler", timestep_spacing=kind, steps_offset=1)
    reference.set_timesteps(30)
    expected = reference.timesteps.numpy()
    np.testing.assert_array_equal(spec.process.network_time(timesteps(30, spec.spacing, 1000)[:-1]), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("variance", "spacing"),
    [
        ("fixed_small", "trailing"),
        ("fixed_small_log", "linspace"),
        ("fixed_large", "leading"),
        ("learned_range", "leading"),
    ],
)
def test_ddpm_steps_agree(kind, variance, spacing, build, monkeypatch):
    options = {"prediction_type": kind, "variance_type": variance, "timestep_spacing": spacing}
    assert_ddpm_agrees(*build("DDPMScheduler", beta_schedule="squaredcos_cap_v2", **options), monkeypatch)


@pytest.mark.parametrize("ratio", [0.8, 0.95])
@pytest.mark.parametrize("max_value", [1.0, 1.5])
def test_ddpm_steps_agree_with_dynamic_thresholds(ratio, max_value, build, monkeypatch):
    options = {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": max_value}
    assert_ddpm_agrees(*build("DDPMScheduler", prediction_type="sample", **options), monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip_sample", [True, False])
def test_ddim_steps_agree(kind, clip_sample, build):
    options = {"prediction_type": kind, "clip_sample": clip_sample}
    assert_ddim_agrees(*build("DDIMScheduler", **SCHEDULES["scaled_linear"], **options))


@pytest.mark.parametrize(
    "options",
    [
        {"set_alpha_to_one": False},
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"thresholding": True, "sample_max_value": 1.5},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
def test_ddim_steps_agree_with_options(options, build):
    assert_ddim_agrees(*build("DDIMScheduler", **SCHEDULES["scaled_linear"], **options))


def test_stable_diffusion_is_read():
    spec = read_scheduler(SD15)
    assert spec.process == discrete(scaled_linear_betas())
    assert spec.spacing == Spacing("leading", offset=1, ends_clean=False)
    assert (spec.prediction, spec.threshold_max, spec.variance, spec.sampler) == ("eps", None, "small", "ddim")
    assert read_scheduler(SD21) == spec._replace(prediction="v")


def test_deepfloyd_if_is_read():
    spec = read_scheduler(IF)
    assert spec.process == discrete(squaredcos_betas())
    assert spec.spacing == Spacing("leading")
    assert (spec.prediction, spec.variance, spec.sampler) == ("eps", "learned_range", "ancestral")
    assert (spec.threshold_percentile, spec.threshold_max) == (0.95, 1.5)
    assert read_scheduler({**IF, "thresholding": False}).threshold_max == 1


def test_every_class_that_is_compatible_in_diffusers_is_read_or_of_another_process(diffusers):
    compatible = {kind.__name__ for kind in diffusers.DDIMScheduler().compatibles}
    assert compatible - {"EDMEulerScheduler"} <= set(CLASSES)


@pytest.mark.parametrize("name", OTHER_PROCESSES)
def test_another_process_is_refused_by_its_name(name, diffusers):
    assert hasattr(diffusers, name)
    with pytest.raises(UserError, match=f"'{name}'.*another process.*give"):
        read_scheduler({"_class_name": name})


@pytest.mark.parametrize("name", CLASSES)
def test_for_latents_a_file_means_what_their_pipeline_makes_of_it(name, build, diffusers, caplog):
    """Steps offset and clipping, given, left out, or otherwise."""
    first, _ = build(name)
    knows_offset = "steps_offset" in first.config
    for given in ({}, {"steps_offset": 0}, {"clip_sample": True}, {"steps_offset": 1, "clip_sample": False}):
        caplog.clear()
        absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
        scheduler = getattr(diffusers, name).from_config(given)
        theirs = diffusers.StableDiffusionPipeline(**absent, scheduler=scheduler, requires_safety_checker=False)
        mended = for_latents({"_class_name": name, **given})
        spec, config = read_scheduler(mended), theirs.scheduler.config
        assert spec.threshold_max is None
        assert spec.spacing.offset == int(knows_offset)
        assert read_scheduler({"_class_name": name, **config}) == spec
        assert ("steps_offset is 0" in caplog.text) == (mended.get("steps_offset") != given.get("steps_offset"))
        assert ("clip_sample is True" in caplog.text) == (mended.get("clip_sample") != given.get("clip_sample"))


def test_a_sampler_that_is_not_the_files_own_is_said(caplog):
    for name in CLASSES:
        caplog.clear()
        warn_of_another_sampler({"_class_name": name})
        same = name.removesuffix("Scheduler").removesuffix("Parallel") in ("DDPM", "DDIM")
        assert bool(caplog.records) != same
        assert same or f"nearest to the pipeline's {name}" in caplog.text


def test_each_class_has_its_sampler():
    samplers = {name: read_scheduler({"_class_name": name}).sampler for name in CLASSES}
    assert samplers["DDPMScheduler"] == samplers["EulerAncestralDiscreteScheduler"] == "ancestral"
    assert samplers["DPMSolverMultistepScheduler"] == samplers["UniPCMultistepScheduler"] == "dpm_solver_pp"
    assert {samplers[f"{name}Scheduler"] for name in ("DDIM", "PNDM", "EulerDiscrete", "LMSDiscrete")} == {"ddim"}


def test_keys_of_other_classes_count_for_nothing():
    pndm = {"_class_name": "PNDMScheduler"}
    other = {"clip_sample": True, "thresholding": True, "rescale_betas_zero_snr": True, "variance_type": "learned"}
    assert read_scheduler({**pndm, **other}) == read_scheduler(pndm)
    solver = {"_class_name": "DPMSolverMultistepScheduler"}  # knows the variance but takes no notice of it
    assert read_scheduler({**solver, "variance_type": "learned_range"}) == read_scheduler(solver)


def test_the_last_sigma_tells_where_sampling_ends():
    assert not read_scheduler(
        {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"}
    ).spacing.ends_clean


def test_the_variance_can_be_switched():
    assert read_scheduler(IF).variance == "learned_range"
    assert read_scheduler({**IF, "variance_type": "fixed_small"}) == read_scheduler(IF)._replace(variance="small")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, "_class_name is None"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "'FlowMatchEulerDiscreteScheduler'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"variance_type": "learned"}, "variance_type is 'learned'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras'"),
        ({"clip_sample_range": 2.0}, "clip_sample_range is 2.0"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas"),
        ({"trained_betas": "many"}, "trained_betas are 'many'"),
        ({"trained_betas": [[0.1]]}, "trained_betas are [[0.1]]"),
        ({"beta_schedule": ["linear"]}, "beta_schedule is ['linear']"),
        ({"beta_schedule": "linear", "beta_end": 2}, "betas run from 0.0001 to 2"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps is 'many'"),
        ({"steps_offset": True}, "steps_offset is True"),
        ({"clip_sample": "no"}, "clip_sample is 'no'"),
        ({"beta_end": None}, "beta_end is None"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_what_cannot_be_used_is_named(config, named):
    with pytest.raises(UserError, match="give") as error:
        read_scheduler(config if not config or "_class_name" in config else {**IF, "thresholding": False, **config})
    assert named in str(error.value)
