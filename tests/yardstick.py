"""Numbers that a change of structure keeps, bit for bit on one machine: write them before it, and compare after it.

python -m tests.yardstick --out=before.json
python -m tests.yardstick --out=after.json --against=before.json

For the embedded cascade, a tiny Stable Diffusion and a tiny DeepFloyd IF cascade, each by four ways to tune: losses of
ten steps a stage, a digest of the tuned parameters, and one of pictures. On 2 cores of an AMD EPYC, about ten minutes.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import deepfloyd_if, stable_diffusion, world
from personalize_jax.method.personalization import load_pretrained, load_subject, personalize_subject
from personalize_jax.method.personalized import Personalized, load_personalized
from tests import tiny_public

PHOTOS = Path(__file__).parents[1] / "personalize_jax" / "assets" / "world" / "subject"
NUM_STEPS = 10
METHODS = {  # the method, and changes of each training
    "sampled": ("dreambooth", {"prior.form": "sampled"}),
    "frozen_prediction": ("dreambooth", {"prior.form": "frozen_prediction"}),
    "lora": ("lora", {"lora.rank": 2}),
    "textual_inversion": ("textual_inversion", {}),
}


def write_stable_diffusion(folder: Path) -> str:
    """A tiny Stable Diffusion in a folder as diffusers writes it."""
    tiny_public.stable_diffusion().save_pretrained(folder / "sd")
    return str(folder / "sd")


def write_deepfloyd_if(folder: Path) -> tuple[str, str]:
    """Tiny first and second stages of DeepFloyd IF, each in a folder as diffusers writes it."""
    tiny_public.deepfloyd_if().save_pretrained(folder / "first")
    tiny_public.deepfloyd_if_super_resolution().save_pretrained(folder / "second")
    return str(folder / "first"), str(folder / "second")


CASCADES: dict[str, tuple[Callable[[str], ConfigDict], Callable[[Path], str | tuple[str, str]]]] = {
    "world": (world.get_config, lambda folder: "world"),
    "stable_diffusion": (lambda method: stable_diffusion.get_config(f"1.5:{method}"), write_stable_diffusion),
    "deepfloyd_if": (lambda method: deepfloyd_if.get_config(f"M:{method}"), write_deepfloyd_if),
}


def short(
    config: ConfigDict, pretrained: str | tuple[str, str], folder: Path, changes: dict[str, object]
) -> ConfigDict:
    """The configuration with all that takes long cut down, and changes of each stage's training."""
    config = config.copy_and_resolve_references().unlock()
    config.pretrained = pretrained
    config.subject.update(registry=str(folder / "registry.json"), rule="rarest")
    config.class_images.update(count=4, num_steps=3, batch_size=4)
    if "compute" in config:
        config.compute.dtype = "float32"
    for name in ("training", "super_resolution_training"):
        if name in config:
            config[name].update(num_steps=NUM_STEPS, batch_size=2, steps_per_dispatch=1, log_every=1)
            config[name].optimizer.learning_rate = 1e-3
            config[name].update_from_flattened_dict(changes)
    return config.lock()


def losses(file: Path) -> list[float]:
    """The loss of each step, as a training's `metrics.jsonl` has it."""
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


def digest(arrays: list[np.ndarray]) -> str:
    """Of values and shapes, whatever their names and order."""
    each = sorted(hashlib.sha256(str(a.shape).encode() + np.ascontiguousarray(a).data).hexdigest() for a in arrays)
    return hashlib.sha256("".join(each).encode()).hexdigest()[:16]


def measure(config: ConfigDict, folder: Path) -> dict[str, object]:
    """Personalise, and read the run back."""
    pipeline = load_pretrained(config)
    photos = load_subject(sorted(PHOTOS.glob("*.png"))[:4], "dog", pipeline.stages[-1].resolution)
    workdir = folder / "run"
    tuned = personalize_subject(pipeline, photos, config, workdir)
    pictures = sample(tuned)
    return {
        "losses": {name: losses(workdir / name / "metrics.jsonl") for name in config.tune},
        "parameters": digest([np.asarray(a) for a in jax.tree.leaves(tuned.pipeline.params)]),
        "pictures": digest([pictures]),
        "pictures of the run directory": digest([sample(load_personalized(workdir))]),
    }


def sample(personalized: Personalized) -> np.ndarray:
    """Three pictures of a prompt, uint8 [3, H, W, 3]."""
    return personalized.sample("a [V] dog in the snow", num_images=3, seed=5, batch_size=4)


def differences(before: dict, after: dict) -> list[str]:
    """What is no longer the same, a line each."""
    lines = []
    for case in sorted(before.keys() | after.keys()):
        old, new = before.get(case, {}), after.get(case, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                lines.append(f"{case}: {key} {old.get(key)} -> {new.get(key)}")
    return lines


def main() -> None:
    """Measure all cases, or those whose names hold a text; write them; compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", default="", help="text in the names of cases")
    arguments = parser.parse_args()
    measured = {}
    for cascade, (get_config, write) in CASCADES.items():
        for method, (kind, changes) in METHODS.items():
            case = f"{cascade}, {method}"
            if arguments.only not in case:
                continue
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                measured[case] = measure(short(get_config(kind), write(folder), folder, changes), folder)
            print(case, measured[case]["pictures"], flush=True)
            arguments.out.write_text(json.dumps(measured, indent=1))
    if arguments.against:
        before = {k: v for k, v in json.loads(arguments.against.read_text()).items() if arguments.only in k}
        if lines := differences(before, json.loads(json.dumps(measured))):
            sys.exit("\n".join(lines))
        print("All is as before.")


if __name__ == "__main__":
    main()
