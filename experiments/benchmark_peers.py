"""Do we train and sample faster than diffusers does, on the same machine with the same weights?

    python -m experiments.benchmark_peers --out=runs/peers

Two U-Nets in float32, shaped like those of Stable Diffusion and DeepFloyd IF, with 35 million parameters each. Timed
are a DreamBooth train step (as many class as instance images, AdamW, clipped gradient) and a guided sampling step of
either library, each in its own process. diffusers' modules are used as in its training script and pipelines, in both
memory layouts, of which the faster counts. Every process runs `--rounds` times, in turn, and the fastest step counts:
other work on a machine only ever slows a step. Needs an otherwise idle machine and tests/requirements.txt installed.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from personalize_jax.planning import published
from personalize_jax.runtime import command
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text

LAYOUTS = ("ours", "diffusers", "diffusers, channels last")
LAMBDA, LEARNING_RATE, CLIP_NORM = 1.0, 1e-5, 1.0
TRAIN_STEPS, SAMPLING_STEPS = 6, 8
TEXT = {"length": 77, "width": 256}


@dataclasses.dataclass(frozen=True)
class Case:
    """A U-Net with its process.

    Attributes:
        pipeline: the class of diffusers whose U-Net it resembles.
        shared: configurations of the pipeline's other networks, which are not run.
        unet: arguments of diffusers' UNet2DConditionModel.
        scheduler: arguments of its scheduler.
        guidance_scale: guidance scale of sampling.
        batch: pictures sampled at once, and pictures of each group in a training batch.
    """

    pipeline: str
    shared: dict[str, Any]
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    guidance_scale: float
    batch: int = 2


CASES = {
    "Stable Diffusion": Case(
        "StableDiffusionPipeline",
        {
            "text_encoder": published.clip_text("1.5") | {"hidden_size": TEXT["width"], "num_attention_heads": 4},
            "vae": published.vae(),
        },
        {
            "sample_size": 32,
            "block_out_channels": (64, 128, 256, 256),
            "attention_head_dim": 8,
            "cross_attention_dim": TEXT["width"],
        },
        {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1},
        7.5,
    ),
    "DeepFloyd IF": Case(
        "IFPipeline",
        {"text_encoder": published.t5_xxl() | {"d_model": TEXT["width"]}},
        {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 6,
            "block_out_channels": (64, 128, 192, 256),
            "layers_per_block": 3,
            "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
            "attention_head_dim": 64,
            "cross_attention_dim": 128,
            "cross_attention_norm": "group_norm",
            "encoder_hid_dim": TEXT["width"],
            "encoder_hid_dim_type": "text_proj",
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 4,
            "resnet_time_scale_shift": "scale_shift",
            "act_fn": "gelu",
            "time_embedding_act_fn": "gelu",
        },
        {
            "_class_name": "DDPMScheduler",
            "beta_schedule": "squaredcos_cap_v2",
            "variance_type": "learned_range",
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.95,
            "sample_max_value": 1.5,
        },
        7.0,
    ),
}


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("out", None, "Folder for the results.")
    flags.DEFINE_integer("rounds", 3, "How often each process runs.", lower_bound=1)
    flags.DEFINE_string("measure", None, "'case/layout' of one process; the command itself starts such processes.")
    flags.DEFINE_string("weights", None, "Folder of the weights, for --measure.")


def fastest(step: Callable[[], object], count: int) -> float:
    """Seconds of the fastest of `count` steps, after one that is not counted."""
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def pictures(case: Case, count: int) -> np.ndarray:
    """Random pictures or latents [count, H, W, C]."""
    side, channels = case.unet["sample_size"], case.unet.get("in_channels", 4)
    return np.random.default_rng(0).uniform(-1, 1, (count, side, side, channels)).astype(np.float32)


def embeddings(count: int) -> np.ndarray:
    """Random text embeddings [count, L, D]."""
    return np.random.default_rng(1).normal(size=(count, TEXT["length"], TEXT["width"])).astype(np.float32)


def measure_ours(case: Case, weights: Path) -> dict[str, float]:
    """Seconds of a train step and of a sampling step."""
    import jax
    import jax.numpy as jnp

    from configs import common
    from personalize_jax.families import public, registry
    from personalize_jax.families.text import Text
    from personalize_jax.formats.port_weights import load_weights
    from personalize_jax.pipeline.cascade import sample_pictures
    from personalize_jax.training.examples import Examples
    from personalize_jax.training.program import stage_program

    def text(count: int) -> Text:
        return Text(jnp.asarray(embeddings(count)), jnp.ones((count, TEXT["length"]), bool))

    unet = json.loads((weights / "config.json").read_text())
    spec = {**case.shared, "stages": [{"class": case.pipeline, "unet": unet, "scheduler": case.scheduler}]}
    family = public.build(registry.family_of(case.pipeline), spec, None, attention="heads")
    (stage,) = family.stages
    abstract = jax.eval_shape(lambda key: stage.init_params(key, text(1)), jax.random.key(0))
    params = load_weights(weights, abstract, "unet")

    x = jnp.asarray(pictures(case, 8))
    examples = Examples(
        image=jnp.zeros((8, 1, 1, 3), jnp.uint8),
        caption=jnp.ones((8, 1), jnp.int32),
        tokens=jnp.zeros((2, TEXT["length"]), jnp.int32),
        cond=text(2),
        latent=(x, jnp.zeros_like(x)),
    )
    config = common.training()
    config.batch_size, config.prior.weight, config.prior.caption_dropout = case.batch, LAMBDA, 0.0
    config.optimizer.learning_rate, config.optimizer.clip_norm = LEARNING_RATE, CLIP_NORM
    start, groups = {"denoiser": params, "text_encoder": {}}, {"instance": examples, "prior": examples}
    program = stage_program(stage, family, start, groups, config, 0)
    state = program.init()

    def train_step() -> None:
        nonlocal state
        state, metrics = program.advance(state, program.frozen_params, program.examples)
        float(metrics["loss"])

    train = fastest(train_step, TRAIN_STEPS)
    sampling = stage.sampling._replace(num_steps=SAMPLING_STEPS, guidance_scale=case.guidance_scale)
    keys = jax.random.split(jax.random.key(0), case.batch)
    cond = text(case.batch)
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    sample = fastest(
        lambda: jax.block_until_ready(sample_pictures(stage, sampling, mesh, params, keys, cond, cond, None)), count=2
    )
    return {"train": train, "sample": sample / SAMPLING_STEPS}


def measure_diffusers(case: Case, weights: Path, channels_last: bool) -> dict[str, float]:
    """The same with diffusers' modules, as its `train_dreambooth.py` and pipelines use them."""
    import diffusers
    import torch

    unet = diffusers.UNet2DConditionModel.from_pretrained(weights)
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    scheduler = getattr(diffusers, case.scheduler["_class_name"]).from_config(case.scheduler)
    noising = diffusers.DDPMScheduler.from_config(case.scheduler)
    x = torch.from_numpy(pictures(case, 2 * case.batch)).permute(0, 3, 1, 2).contiguous()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    channels, text = x.shape[1], torch.from_numpy(embeddings(2 * case.batch))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)

    def train_step() -> None:
        noise = torch.randn_like(x)
        n = torch.randint(0, noising.config.num_train_timesteps, (len(x),))
        output = unet(noising.add_noise(x, noise, n), n, text, return_dict=False)[0]
        instance, prior = torch.chunk(output[:, :channels], 2)
        instance_noise, prior_noise = torch.chunk(noise, 2)
        loss = torch.nn.functional.mse_loss(instance, instance_noise)
        loss = loss + LAMBDA * torch.nn.functional.mse_loss(prior, prior_noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    unet.train()
    train = fastest(train_step, TRAIN_STEPS)

    @torch.no_grad()
    def sample() -> None:
        scheduler.set_timesteps(SAMPLING_STEPS)
        z = torch.randn_like(x[: case.batch])
        for n in scheduler.timesteps:
            output = unet(torch.cat([z] * 2), n, text, return_dict=False)[0]
            uncond, cond = output.chunk(2)
            guided = uncond[:, :channels] + case.guidance_scale * (cond[:, :channels] - uncond[:, :channels])
            z = scheduler.step(torch.cat([guided, cond[:, channels:]], dim=1), n, z, return_dict=False)[0]

    unet.eval()
    return {"train": train, "sample": fastest(sample, count=2) / SAMPLING_STEPS}


def measure(name: str, weights: Path) -> dict[str, float]:
    """The work of one process: both times and the peak of its memory."""
    case_name, layout = name.split("/")
    case = CASES[case_name]
    if layout == "ours":
        times = measure_ours(case, weights)
    else:
        times = measure_diffusers(case, weights, channels_last=layout != "diffusers")
    return {**times, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def run_process(name: str, weights: Path) -> dict[str, float]:
    """Call `measure` in a new process."""
    arguments = [f"--measure={name}", f"--weights={weights}", "--out=-"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmark_peers", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"Measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(case_name: str, rounds: int) -> dict[str, Any]:
    """All measurements of one case."""
    import diffusers

    case = CASES[case_name]
    runs: dict[str, list[dict[str, float]]] = {layout: [] for layout in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        unet: Any = diffusers.UNet2DConditionModel(**case.unet)  # its base class is not typed
        unet.save_pretrained(folder)
        for _ in range(rounds):
            for layout in LAYOUTS:
                runs[layout].append(run_process(f"{case_name}/{layout}", Path(folder)))
    pictures_a_step = {"train": 2 * case.batch, "sample": case.batch}
    result: dict[str, Any] = {"million parameters": round(unet.num_parameters() / 1e6, 1)}
    for kind, count in pictures_a_step.items():
        rates = {layout: count / min(run[kind] for run in runs[layout]) for layout in LAYOUTS}
        result[kind] = {
            **{f"{layout}, pictures a second": round(rate, 3) for layout, rate in rates.items()},
            "ratio": round(rates["ours"] / max(rates[layout] for layout in LAYOUTS[1:]), 3),
        }
    result["peak memory, GB"] = {layout: round(max(run["peak_gb"] for run in runs[layout]), 2) for layout in LAYOUTS}
    return result


def main(_: list[str]) -> None:
    """Compare and print."""
    arguments = flags.FLAGS
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, Path(arguments.weights))))
        return
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise UserError("diffusers is not installed; pip install -r tests/requirements.txt") from None
    results = {name: compare(name, arguments.rounds) for name in CASES}
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "peers.json", json.dumps(results, indent=2))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    command.run(main, define_flags, required=("out",))
