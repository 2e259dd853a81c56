"""A public model's scheduler file: the forward process, the prediction, and the way to sample.

The format is that of diffusers' `scheduler/scheduler_config.json`. Keys that its class does not know are ignored, as
there, and so are options of solvers that are not ours, such as `solver_order` or `use_karras_sigmas`: the class only
decides which of our samplers comes nearest.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import numpy as np

from personalize_jax.diffusion.prediction import Prediction
from personalize_jax.diffusion.process import (
    Process,
    discrete,
    linear_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    squaredcos_betas,
)
from personalize_jax.diffusion.samplers import Spacing, SpacingKind, Variance
from personalize_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)

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
        process: the forward process, discrete.
        prediction: the kind of the network's prediction.
        spacing: the times that sampling visits.
        threshold_percentile: quantile of dynamic thresholding.
        threshold_max: largest threshold; 1 is static thresholding, None leaves predictions as they are.
        variance: variance of the ancestral sampler's steps; "small" where the class is not DDPM's.
        sampler: "ancestral", "ddim" or "dpm_solver_pp", the nearest to the file's class.
    """

    process: Process
    prediction: Prediction
    spacing: Spacing
    threshold_percentile: float
    threshold_max: float | None
    variance: Variance
    sampler: str


class _Class(NamedTuple):
    """A scheduler class of diffusers.

    Attributes:
        sampler: the nearest of our samplers.
        defaults: values of keys that the file leaves out, beside `_COMMON`.
    """

    sampler: str
    defaults: dict[str, Any]


# Values of keys that the file leaves out: for every class, then for the classes that know the key.
_COMMON = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0}
_NO_CLIPPING = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_FINAL_SIGMA = {"final_sigmas_type": "zero"}
_LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_FLOW = {"use_flow_sigmas": False}
_LEADING, _LINSPACE = ({"timestep_spacing": kind, "steps_offset": 0} for kind in ("leading", "linspace"))
_DDPM = _LEADING | _CLIPPING | _THRESHOLDING | _ZERO_SNR | {"variance_type": "fixed_small"}
_DDIM = _LEADING | _CLIPPING | _THRESHOLDING | _ZERO_SNR | {"set_alpha_to_one": True}
_CONSISTENCY = _DDIM | _NO_CLIPPING | _LATENT_BETAS | {"beta_schedule": "scaled_linear"}
_CLASSES = {
    "DDPMScheduler": _Class("ancestral", _DDPM),
    "DDPMParallelScheduler": _Class("ancestral", _DDPM),
    "DDIMScheduler": _Class("ddim", _DDIM),
    "DDIMParallelScheduler": _Class("ddim", _DDIM),
    "PNDMScheduler": _Class("ddim", _LEADING | {"set_alpha_to_one": False}),
    "LMSDiscreteScheduler": _Class("ddim", _LINSPACE),
    "EulerDiscreteScheduler": _Class("ddim", _LINSPACE | _ZERO_SNR | _FINAL_SIGMA | {"timestep_type": "discrete"}),
    "EulerAncestralDiscreteScheduler": _Class("ancestral", _LINSPACE | _ZERO_SNR),
    "KDPM2AncestralDiscreteScheduler": _Class("ancestral", _LINSPACE | _LATENT_BETAS),
    "LCMScheduler": _Class("ddim", _CONSISTENCY),
    "TCDScheduler": _Class("ddim", _CONSISTENCY),
    "HeunDiscreteScheduler": _Class("dpm_solver_pp", _LINSPACE | _LATENT_BETAS | _NO_CLIPPING),
    "KDPM2DiscreteScheduler": _Class("dpm_solver_pp", _LINSPACE | _LATENT_BETAS),
    "DPMSolverSDEScheduler": _Class("dpm_solver_pp", _LINSPACE | _LATENT_BETAS),
    "DPMSolverSinglestepScheduler": _Class("dpm_solver_pp", _THRESHOLDING | _FINAL_SIGMA | _FLOW),
    "DPMSolverMultistepScheduler": _Class(
        "dpm_solver_pp", _LINSPACE | _THRESHOLDING | _ZERO_SNR | _FINAL_SIGMA | _FLOW
    ),
    "UniPCMultistepScheduler": _Class("dpm_solver_pp", _LINSPACE | _THRESHOLDING | _ZERO_SNR | _FINAL_SIGMA | _FLOW),
    "DEISMultistepScheduler": _Class("dpm_solver_pp", _LINSPACE | _THRESHOLDING | _FLOW),
    "SASolverScheduler": _Class("dpm_solver_pp", _LINSPACE | _THRESHOLDING | _FLOW),
}
# The classes whose steps are the sampler's; the others have another method's.
_SAME_STEPS = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler")
# Values for the classes that do not know the key.
_ABSENT: dict[str, Any] = {
    "clip_sample": False,
    "set_alpha_to_one": True,
    "variance_type": "fixed_small",
    "timestep_type": "discrete",
}
_ABSENT |= _THRESHOLDING | _ZERO_SNR | _FINAL_SIGMA | _FLOW | _LINSPACE


def read_scheduler(config: Mapping[str, Any]) -> SchedulerSpec:
    """Read a scheduler file's dict.

    Our times are those of diffusers' `set_timesteps` for DDPM, DDIM and PNDM (without its repeated steps), and for
    Euler and LMS but for their fractional "linspace"; DPM-Solver and UniPC space one step more and drop the last.

    Args:
        config: the content of `scheduler_config.json`.

    Raises:
        UserError: the class or a value is unknown or cannot be used.
    """
    facts = _ABSENT | _known(config)
    prediction = _choose("prediction_type", facts["prediction_type"], PREDICTIONS)
    if facts["rescale_betas_zero_snr"] and prediction == "eps":
        raise UserError(
            "The scheduler has rescale_betas_zero_snr with prediction_type 'epsilon', which says nothing where only "
            "noise is left; give a model that predicts v_prediction or sample."
        )
    for key in ("use_flow_sigmas", "timestep_type"):
        if facts[key] != _ABSENT[key]:
            raise UserError(
                f"The scheduler's {key} is {facts[key]!r}, which makes another process of it than diffusion by betas; "
                f"give a model where it is {_ABSENT[key]!r}."
            )
    _choose("timestep_spacing", facts["timestep_spacing"], dict.fromkeys(get_args(SpacingKind)))
    ends_clean = facts["set_alpha_to_one"] and facts["final_sigmas_type"] == "zero"
    percentile, threshold_max = _threshold(facts)
    return SchedulerSpec(
        process=_process(facts),
        prediction=prediction,
        spacing=Spacing(facts["timestep_spacing"], facts["steps_offset"], ends_clean),
        threshold_percentile=percentile,
        threshold_max=threshold_max,
        variance=_choose("variance_type", facts["variance_type"], VARIANCES),
        sampler=_class_of(config).sampler,
    )


def for_latents(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler file's dict as diffusers' `StableDiffusionPipeline` mends those of old models.

    Latents are not clipped, and times begin at index 1; a warning says where the file had it otherwise.

    Args:
        config: the content of `scheduler_config.json`.

    Raises:
        UserError: the class cannot be used.
    """
    known, mended = _known(config), dict(config)
    for key, value in {"steps_offset": 1, "clip_sample": False}.items():
        if key in known and known[key] != value:
            logger.warning(
                "The scheduler's %s is %r; %r is taken, as diffusers does for latents.", key, known[key], value
            )
            mended[key] = value
    return mended


def warn_of_another_sampler(config: Mapping[str, Any]) -> None:
    """Log a warning where pictures are sampled by another method than the scheduler file names.

    Args:
        config: the content of `scheduler_config.json`.

    Raises:
        UserError: the class cannot be used.
    """
    name, sampler = config.get("_class_name"), _class_of(config).sampler
    if name not in _SAME_STEPS:
        logger.warning("Pictures are sampled by %s, of our samplers the nearest to the pipeline's %s.", sampler, name)


def _class_of(config: Mapping[str, Any]) -> _Class:
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        raise UserError(
            f"The scheduler's _class_name is {name!r}, which is unknown or of another process than diffusion by betas; "
            f"give a model whose scheduler is one of {', '.join(_CLASSES)}."
        )
    return _CLASSES[name]


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """The file's values, or defaults, of the keys that its class knows."""
    known = _COMMON | _class_of(config).defaults
    for key, default in known.items():
        value = config.get(key, default)
        if default is not None and (isinstance(default, bool) != isinstance(value, bool) or not _alike(value, default)):
            raise UserError(f"The scheduler's {key} is {value!r}; give a value such as {default!r}.")
        known[key] = value
    return known


def _alike(value: Any, default: Any) -> bool:
    return isinstance(value, int | float) if isinstance(default, float) else isinstance(value, type(default))


def _process(facts: Mapping[str, Any]) -> Process:
    n, ends = facts["num_train_timesteps"], (facts["beta_start"], facts["beta_end"])
    if n < 1:
        raise UserError(f"The scheduler's num_train_timesteps is {n}; give a number such as 1000.")
    if (trained := facts["trained_betas"]) is not None:
        if not isinstance(trained, list) or not all(isinstance(beta, float) for beta in trained):
            raise UserError(f"The scheduler's trained_betas are {trained!r}; give a list of numbers between 0 and 1.")
        betas = np.asarray(trained)
        if len(betas) != n:
            raise UserError(f"The scheduler has {len(betas)} trained_betas for num_train_timesteps {n}; give {n}.")
    else:
        kinds = {
            "linear": lambda: linear_betas(*ends, n),
            "scaled_linear": lambda: scaled_linear_betas(*ends, n),
            "squaredcos_cap_v2": lambda: squaredcos_betas(n),
        }
        betas = _choose("beta_schedule", facts["beta_schedule"], kinds)()
    if not np.all((betas > 0) & (betas < 1)):
        raise UserError(f"The scheduler's betas run from {betas[0]} to {betas[-1]}; give numbers between 0 and 1.")
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
    if not isinstance(given, str) or given not in choices:
        raise UserError(f"The scheduler's {key} is {given!r}; give one of {', '.join(choices)}.")
    return choices[given]
