"""Sample pictures of any prompt from a run directory, or from a pretrained pipeline.

    python -m personalize_jax.sample --workdir=runs/rex --prompt="a [V] dog in the snow" --num_images=4 --out=out/
    python -m personalize_jax.sample --pipeline=world --prompt="a red teapot on the beach" --out=out/

Picture i of a prompt has seed `--seed` + i. The same command gives the same files on the same machine; on a CPU, with
as many cores. Few pictures are sampled in a small batch, which rounds in its own way: asked for among more pictures,
one may differ by a level here and there. Each batch is written as soon as it is sampled. A picture of the same weights,
prompt and seed that is in `--out` already is not sampled again; of other weights, it is replaced.
"""

from pathlib import Path

from absl import flags
from tqdm import tqdm

from personalize_jax.method.personalized import load_personalized, load_placed
from personalize_jax.pipeline.cascade import batch_of
from personalize_jax.pipeline.kept import sample_kept
from personalize_jax.pipeline.pictures import file_name
from personalize_jax.runtime import command, hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.identifier import PLACEHOLDER, substitute, warn_without_placeholder


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "Run directory of a personalised cascade.")
    flags.DEFINE_multi_string(
        "pipeline", None, "A pretrained pipeline instead: 'world', a folder, or a name on the hub; one for each stage."
    )
    flags.DEFINE_multi_string("prompt", None, "What the pictures show; repeat the flag for several prompts.")
    flags.DEFINE_integer("num_images", 4, "Pictures of each prompt.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of each prompt's first picture.", lower_bound=0, upper_bound=2**31)
    flags.DEFINE_integer("batch_size", 16, "Pictures sampled at once.", lower_bound=1)
    flags.DEFINE_string("out", None, "Folder for the pictures.")
    command.define_multihost()


def main(_: list[str]) -> None:
    """Sample and save."""
    arguments = flags.FLAGS
    if (arguments.workdir is None) == (arguments.pipeline is None):
        raise UserError("Give either --workdir (a personalised run) or --pipeline (a pretrained one).")
    prompts = arguments.prompt
    if arguments.workdir is not None:
        personalized = load_personalized(arguments.workdir)
        pipeline, identifier = personalized.pipeline, personalized.subject.identifier.text
        warn_without_placeholder(prompts)
    else:
        pipeline, identifier = load_placed(arguments.pipeline), ""
        if any(PLACEHOLDER in prompt for prompt in prompts):
            raise UserError(f"A pretrained pipeline knows no {PLACEHOLDER}; leave it out or give --workdir.")
    out = Path(arguments.out)
    hosts.check_shared(out)
    seeds = range(arguments.seed, arguments.seed + arguments.num_images)
    jobs = [(prompt, seed) for prompt in dict.fromkeys(prompts) for seed in seeds]
    texts = [substitute(prompt, identifier, pipeline.tokenizer) for prompt, _ in jobs]
    files = [out / file_name(prompt, seed) for prompt, seed in jobs]
    batch_size = batch_of(len(jobs), arguments.batch_size)  # of all jobs, so that a resumed call samples the same bits
    with tqdm(total=len(jobs), desc="sampling", unit="img") as bar:
        sample_kept(pipeline, pipeline.fingerprint, texts, [seed for _, seed in jobs], files, batch_size, bar.update)
    if hosts.is_first():
        print(*files, sep="\n")


if __name__ == "__main__":
    command.run(main, define_flags, required=("prompt", "out"))
