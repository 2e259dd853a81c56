"""Do we train and sample faster than diffusers does, on the same machine with the same weights?

    python -m experiments.benchmark_peers --out=runs/peers
    python -m experiments.benchmark_peers --device=gpu --out=runs/peers_gpu

Timed are a DreamBooth train step (as many class as instance images, AdamW, clipped gradient) and a guided sampling step
of either library. On CPU there are two U-Nets in float32, shaped like those of Stable Diffusion and DeepFloyd IF, with
35 million parameters each; on a GPU there is that of Stable Diffusion 1.5 at full size with random weights, in
bfloat16 (trained parameters and moments are float32), also compiled by torch and with activations computed again
("remat"). diffusers' modules are used as in its training script and pipelines, of whose layouts the fastest counts.

Each measurement is a process of its own, and all of them run `--rounds` times, in turn, where the fastest step counts:
other work on a machine only ever slows a step. Compiling is what the first step takes longer, and memory the peak: on
CPU of the process, on a GPU of what its arrays take, however much JAX sets aside. Needs an otherwise idle machine and
tests/requirements.txt installed, on a GPU with jax[cuda] and a torch for CUDA.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from experiments.peers.cases import CASES, OURS, REMAT, Case
from personalize_jax.runtime import command
from personalize_jax.runtime.chips import GIB
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text

PHASES = ("train", "sample")
_FOUND = "import jax, torch; print(jax.default_backend(), torch.cuda.is_available())"

Measured = dict[tuple[str, str], list[dict[str, float]]]  # of each layout and phase, one a round


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("out", None, "Folder for the results.")
    flags.DEFINE_enum("device", "cpu", list(CASES), "What to measure on.")
    flags.DEFINE_integer("rounds", 3, "How often each process runs.", lower_bound=1)
    flags.DEFINE_string(
        "measure", None, "'case/layout/phase' of one process; the command itself starts such processes."
    )
    flags.DEFINE_string("weights", None, "Folder of the weights, for --measure.")


def measure(case: Case, layout: str, phase: str, weights: Path) -> dict[str, float]:
    """Seconds of a step, of compiling, and the peak of memory in bytes: the work of one process."""
    if layout.startswith(OURS):
        from experiments.peers import ours as library
    else:
        from experiments.peers import theirs as library  # type: ignore[no-redef]
    return library.measure(case, layout, phase, weights)


def check_gpu(environment: dict[str, str]) -> None:
    """Refuse to measure on a GPU that either library does not find; asked in a process that holds none of its memory.

    Raises:
        UserError: no GPU.
    """
    done = subprocess.run([sys.executable, "-c", _FOUND], capture_output=True, text=True, check=False, env=environment)
    backend, has_cuda = (done.stdout.split() or ["nothing", "False"])[-2:]
    missing = [name for name, found in (("JAX", backend == "gpu"), ("torch", has_cuda == "True")) if not found]
    if missing:
        raise UserError(
            f"--device=gpu, and {' and '.join(missing)} found no GPU; give --device=cpu, or install both for CUDA."
        )


def run_process(device: str, name: str, weights: Path, environment: dict[str, str]) -> dict[str, float]:
    """Call `measure` in a new process."""
    arguments = [f"--device={device}", f"--measure={name}", f"--weights={weights}", "--out=-"]
    words = [sys.executable, "-m", "experiments.benchmark_peers", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(f"Measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(device: str, case_name: str, rounds: int, environment: dict[str, str]) -> dict[str, Any]:
    """All measurements of one case."""
    import diffusers

    case = CASES[device][case_name]
    measured: Measured = {(layout, phase): [] for layout in case.layouts for phase in PHASES}
    with tempfile.TemporaryDirectory() as folder:
        unet: Any = diffusers.UNet2DConditionModel.from_config(case.unet)  # its base class is not typed
        unet.save_pretrained(folder)
        million = round(unet.num_parameters() / 1e6, 1)
        del unet
        # Programs are compiled in the first round, and found again in the others.
        cached = environment | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
        for _ in range(rounds):
            for layout, phase in measured:
                measured[layout, phase].append(
                    run_process(device, f"{case_name}/{layout}/{phase}", Path(folder), cached)
                )
    return {"million parameters": million, **summary(case, measured)}


def summary(case: Case, measured: Measured) -> dict[str, Any]:
    """Pictures a second, our rate by the best of diffusers', seconds of compiling, and peaks of memory."""
    result: dict[str, Any] = {}
    for phase, pictures in (("train", 2 * case.batch), ("sample", case.samples)):
        runs = {layout: measured[layout, phase] for layout in case.layouts}
        rates = {layout: pictures / min(run["seconds"] for run in runs[layout]) for layout in runs}
        best = {
            mine: max(rate for layout, rate in rates.items() if layout.startswith(OURS) == mine and REMAT not in layout)
            for mine in (True, False)
        }
        result[phase] = {
            "pictures a second": {layout: round(rate, 3) for layout, rate in rates.items()},
            "ratio": round(best[True] / best[False], 3),
            "seconds of compiling": {layout: round(max(run["compile"] for run in runs[layout]), 1) for layout in runs},
            "peak memory, GiB": {layout: round(max(run["peak"] for run in runs[layout]) / GIB, 2) for layout in runs},
        }
    return result


def main(_: list[str]) -> None:
    """Compare and print."""
    arguments = flags.FLAGS
    if arguments.measure is not None:
        case, layout, phase = arguments.measure.split("/")
        print(json.dumps(measure(CASES[arguments.device][case], layout, phase, Path(arguments.weights))))
        return
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise UserError("diffusers is not installed; pip install -r tests/requirements.txt") from None
    environment = dict(os.environ)
    if arguments.device == "gpu":
        check_gpu(environment)
    else:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    results = {name: compare(arguments.device, name, arguments.rounds, environment) for name in CASES[arguments.device]}
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "peers.json", json.dumps(results, indent=2))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    command.run(main, define_flags, required=("out",))
