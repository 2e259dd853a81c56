"""The train step and the sampling of diffusers' modules, as its `train_dreambooth.py` and its pipelines use them."""

import resource
from pathlib import Path
from typing import Any

import diffusers
import torch

from experiments.peers.cases import (
    CHANNELS_LAST,
    CLIP_NORM,
    COMPILED,
    LAMBDA,
    LEARNING_RATE,
    REMAT,
    Case,
    embeddings,
    pictures,
    timed,
)


def measure(case: Case, layout: str, phase: str, weights: Path) -> dict[str, float]:
    """The same as `ours.measure`, on a GPU if torch finds one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if phase == "train" else getattr(torch, case.dtype)
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(weights, torch_dtype=dtype)  # diffusers is not typed
    unet = unet.to(device)
    if CHANNELS_LAST in layout:
        unet = unet.to(memory_format=torch.channels_last)
    if REMAT in layout:
        unet.enable_gradient_checkpointing()
    times = {"train": _train, "sample": _sample}[phase](case, layout, unet)
    return times | {"peak": _peak(device)}


def _train(case: Case, layout: str, unet: Any) -> dict[str, float]:
    noising = diffusers.DDPMScheduler.from_config(case.scheduler)
    x, text = _inputs(case, layout, unet, 2 * case.batch)
    channels, optimizer = x.shape[1], torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    network = torch.compile(unet.train()) if COMPILED in layout else unet.train()

    def train_step() -> None:
        noise = torch.randn_like(x)
        n = torch.randint(0, noising.config.num_train_timesteps, (len(x),), device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            output = network(noising.add_noise(x, noise, n), n, text, return_dict=False)[0]
        instance, prior = torch.chunk(output[:, :channels].float(), 2)
        instance_noise, prior_noise = torch.chunk(noise, 2)
        loss = torch.nn.functional.mse_loss(instance, instance_noise)
        loss = loss + LAMBDA * torch.nn.functional.mse_loss(prior, prior_noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device

    return timed(train_step, case.train_steps)


def _sample(case: Case, layout: str, unet: Any) -> dict[str, float]:
    scheduler = getattr(diffusers, case.scheduler["_class_name"]).from_config(case.scheduler)
    x, text = _inputs(case, layout, unet, 2 * case.samples)
    channels, network = x.shape[1], torch.compile(unet.eval()) if COMPILED in layout else unet.eval()

    @torch.no_grad()
    def sample() -> None:
        scheduler.set_timesteps(case.sampling_steps)
        z = torch.randn_like(x[: case.samples])
        for n in scheduler.timesteps:
            output = network(torch.cat([z] * 2), n, text, return_dict=False)[0]
            uncond, cond = output.chunk(2)
            guided = uncond[:, :channels] + case.guidance_scale * (cond[:, :channels] - uncond[:, :channels])
            z = scheduler.step(torch.cat([guided, cond[:, channels:]], dim=1), n, z, return_dict=False)[0]
        z.cpu()  # waits for the device

    times = timed(sample, count=2)
    return times | {"seconds": times["seconds"] / case.sampling_steps}


def _inputs(case: Case, layout: str, unet: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [count, C, H, W] and embedded texts, in the dtype of the U-Net and on its device."""
    x = torch.from_numpy(pictures(case, count)).permute(0, 3, 1, 2)
    layout_of_x = torch.channels_last if CHANNELS_LAST in layout else torch.contiguous_format
    x = x.to(unet.device, unet.dtype).contiguous(memory_format=layout_of_x)
    return x, torch.from_numpy(embeddings(case, count)).to(unet.device, unet.dtype)


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
