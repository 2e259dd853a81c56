"""What a public model's scheduler file says: the forward process, the prediction, and how pictures are drawn.

The format is that of diffusers' `scheduler/scheduler_config.json`. Keys that its class does not know count for
nothing, as there. Nor do facts of solvers that are not ours, such as `solver_order` or `use_karras_sigmas`: the class
only tells which of our samplers comes nearest.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import numpy as np

from personalize_jax.diffusion.prediction import Prediction
from personalize_jax.diffusion.samplers import Spacing, SpacingKind, Variance
from personalize_jax.diffusion.schedule import (
    Schedule,
    discrete,
    linear_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    squaredcos_betas,
)
from personalize_jax.errors import UserError

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
VARIANCES: dict[str, Variance] = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "learned_range": "learned_range",
}


class SchedulerSpec(NamedTuple):
    """A scheduler file's content in our terms.

    Attributes:
        schedule: of the diffusion, discrete.
        prediction: what the network predicts.
        spacing: which times sampling visits.
        threshold_percentile: of dynamic thresholding.
        threshold_max: largest threshold; 1 is static thresholding, None leaves predictions as they are.
        variance: of the ancestral sampler's steps; "small" where the class is not DDPM's.
        sampler: "ancestral", "ddim" or "dpm_solver_pp", the nearest to the file's class.
    """

    schedule: Schedule
    prediction: Prediction
    spacing: Spacing
    threshold_percentile: float
    threshold_max: float | None
    variance: Variance
    sampler: str


# What a key means where the file leaves it out: for every class, then for those classes alone that know the key.
_COMMON = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_FINAL_SIGMA = {"final_sigmas_type": "zero"}
_LEADING, _LINSPACE = {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPMScheduler": (
        "ancestral",
        _LEADING | _CLIPPING | _THRESHOLDING | _ZERO_SNR | {"variance_type": "fixed_small"},
    ),
    "DDIMScheduler": ("ddim", _LEADING | _CLIPPING | _THRESHOLDING | _ZERO_SNR | {"set_alpha_to_one": True}),
    "PNDMScheduler": ("ddim", _LEADING | {"set_alpha_to_one": False}),
    "LMSDiscreteScheduler": ("ddim", _LINSPACE),
    "EulerDiscreteScheduler": ("ddim", _LINSPACE | _ZERO_SNR | _FINAL_SIGMA),
    "EulerAncestralDiscreteScheduler": ("ancestral", _LINSPACE | _ZERO_SNR),
    "DPMSolverMultistepScheduler": ("dpm_solver_pp", _LINSPACE | _THRESHOLDING | _ZERO_SNR | _FINAL_SIGMA),
    "UniPCMultistepScheduler": ("dpm_solver_pp", _LINSPACE | _THRESHOLDING | _ZERO_SNR | _FINAL_SIGMA),
}
# What a class does that does not know the key.
_ABSENT = {"clip_sample": False, "set_alpha_to_one": True, "variance_type": "fixed_small"}
_ABSENT |= _THRESHOLDING | _ZERO_SNR | _FINAL_SIGMA


def read_scheduler(config: Mapping[str, Any]) -> SchedulerSpec:
    """Read a scheduler file's dict.

    Our times are those of diffusers' `set_timesteps` for DDPM, DDIM and PNDM (without its repeated steps), and for
    Euler and LMS but for their fractional "linspace"; DPM-Solver and UniPC space one step more and drop the last.

    Args:
        config: the content of `scheduler_config.json`.

    Raises:
        UserError: the class or a value is unknown or cannot be used.
    """
    sampler, own = _choose("_class_name", config.get("_class_name"), _CLASSES)
    known = _COMMON | own
    facts = _ABSENT | known | {key: value for key, value in config.items() if key in known}
    prediction = _choose("prediction_type", facts["prediction_type"], PREDICTIONS)
    if facts["rescale_betas_zero_snr"] and prediction == "eps":
        raise UserError(
            "The scheduler has rescale_betas_zero_snr with prediction_type 'epsilon', which says nothing where only "
            "noise is left; give a model that predicts v_prediction or sample."
        )
    _choose("timestep_spacing", facts["timestep_spacing"], dict.fromkeys(get_args(SpacingKind)))
    ends_clean = facts["set_alpha_to_one"] and facts["final_sigmas_type"] == "zero"
    percentile, threshold_max = _threshold(facts)
    return SchedulerSpec(
        schedule=_schedule(facts),
        prediction=prediction,
        spacing=Spacing(facts["timestep_spacing"], facts["steps_offset"], ends_clean),
        threshold_percentile=percentile,
        threshold_max=threshold_max,
        variance=_choose("variance_type", facts["variance_type"], VARIANCES),
        sampler=sampler,
    )


def with_variance(config: Mapping[str, Any], variance_type: str) -> dict[str, Any]:
    """A scheduler file's dict with another variance, such as "fixed_small" for a network whose own was not trained.

    Args:
        config: the content of `scheduler_config.json`.
        variance_type: in diffusers' words.

    Raises:
        UserError: unknown variance.
    """
    _choose("variance_type", variance_type, VARIANCES)
    return {**config, "variance_type": variance_type}


def _schedule(facts: Mapping[str, Any]) -> Schedule:
    n, ends = facts["num_train_timesteps"], (facts["beta_start"], facts["beta_end"])
    if facts["trained_betas"] is not None:
        betas = np.asarray(facts["trained_betas"])
        if len(betas) != n:
            raise UserError(f"The scheduler has {len(betas)} trained_betas for num_train_timesteps {n}; give {n}.")
    else:
        kinds = {
            "linear": lambda: linear_betas(*ends, n),
            "scaled_linear": lambda: scaled_linear_betas(*ends, n),
            "squaredcos_cap_v2": lambda: squaredcos_betas(n),
        }
        betas = _choose("beta_schedule", facts["beta_schedule"], kinds)()
    if facts["rescale_betas_zero_snr"]:
        betas = rescale_zero_terminal_snr(betas)
    return discrete(betas)


def _threshold(facts: Mapping[str, Any]) -> tuple[float, float | None]:
    """Percentile and largest value."""
    if facts["thresholding"]:
        return facts["dynamic_thresholding_ratio"], facts["sample_max_value"]
    if facts["clip_sample"] and facts["clip_sample_range"] != 1:
        raise UserError(
            f"The scheduler's clip_sample_range is {facts['clip_sample_range']}; give 1, as pictures lie in [-1, 1]."
        )
    return facts["dynamic_thresholding_ratio"], 1.0 if facts["clip_sample"] else None


def _choose(key: str, given: Any, choices: Mapping[Any, Any]) -> Any:
    if given not in choices:
        raise UserError(f"The scheduler's {key} is {given!r}; give one of {', '.join(choices)}.")
    return choices[given]
