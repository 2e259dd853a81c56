"""The probe, which reads class, colours, pattern, finish, proportions, context and accessory off pictures of the world.

    python -m personalize_jax.world.probe --output=runs/probe

trains it on renders and writes probe.safetensors and probe.json, the latter with its accuracy on subjects that it was
not trained on; the same command continues a training that was stopped. Samples of a cascade are softer and noisier than
renders, so the probe is trained on renders degraded in these ways, some of them beyond recognition, and on pictures of
nothing, so that it learns to be unsure as well.

Its limits, on clean held-out renders: patterns are right in .88 (spots are taken for plain, stripes for spots) and the
finish in .92, little more than the .88 of always saying matte. Of the 48 proportions 32 can be told, with a mean error
of at most .15; guessing has .25. The shipped weights come from 7000 steps, the first 3500 of which weighed all
properties alike and followed the learning rate of a training of 5000.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import Array

from personalize_jax.formats.parameters import load_params, save_params
from personalize_jax.models.params import Params
from personalize_jax.models.probe import ProbeNetwork
from personalize_jax.runtime import command
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import ASSETS, write_text
from personalize_jax.training.program import Program
from personalize_jax.world.reading import IDENTITY, Reading, accuracy, is_subject
from personalize_jax.world.scene import CLASSES, LABELS
from personalize_jax.world.training import SEED, network_program, train_network, training_config

RESOLUTION = 32
BATCH_SIZE = 64

RENDER_RESOLUTION = 64
TRAIN_COUNT = 60_000
TEST_COUNT = 2_048
NUM_STEPS = 7_000
OPTIMIZER = {"learning_rate": 2e-3, "b1": 0.9, "b2": 0.99, "weight_decay": 1e-2}
MAX_SHIFT = 2  # pixels
BLANK_SHARE = 1 / 16  # of a batch; see `_blanks`
MILD_NOISE, MILD_BLUR = 0.1, 0.6  # about those of a good cascade's samples; see `degrade`
LOG_EVERY, CHECKPOINT_EVERY = 50, 500  # steps

NUM_PROPORTIONS = 4  # of a class; since they differ by class, each has outputs of its own
SHAPE_DEVIATION = 0.15  # of the normal distribution whose likelihood weighs proportions against the other properties
GUESS_ERROR = 0.25  # mean absolute error of guessing that a proportion, uniform in [0, 1], is .5
READABLE = 0.6  # share of GUESS_ERROR up to which the probe counts as able to tell a proportion
VALUES = {name: len(values) for name, values in LABELS.items()}
WEIGHTS = dict.fromkeys(VALUES, 1.0) | {"pattern": 2.0, "finish": 4.0}  # of losses: these are learnt last
OUTPUTS = (*VALUES.items(), ("shape", len(CLASSES) * NUM_PROPORTIONS))


class Probe:
    """A trained probe.

    Attributes:
        accuracies: the result of `evaluate` at the end of training, by split ("heldout", "test").
        shape_errors: the mean absolute error of each proportion on clean held-out renders, by class noun; that of
            always guessing .5 is .25.
    """

    def __init__(self, params: Params, accuracies: Mapping[str, Any], shape_errors: Mapping[str, list[float]]) -> None:
        self.params = params
        self.accuracies = accuracies
        self.shape_errors = shape_errors

    @classmethod
    def load(cls, folder: str | Path = ASSETS / "world") -> "Probe":
        """Read probe.safetensors and probe.json; by default those that ship.

        Raises:
            UserError: a file is missing or damaged.
        """
        folder = Path(folder)
        try:
            measured = json.loads((folder / "probe.json").read_text())
            accuracies, shape_errors = measured["accuracies"], measured["shape_errors"]
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder / 'probe.json'} is missing or damaged; write it by python -m personalize_jax.world.probe "
                f"--output={folder}."
            ) from error
        return cls(load_params(folder / "probe.safetensors"), accuracies, shape_errors)

    @property
    def readable(self) -> np.ndarray:
        """Which proportions of each class the probe can tell: bool [K, 4], an error of at most .6 of guessing's."""
        return np.array([self.shape_errors[noun] for noun in CLASSES]) <= READABLE * GUESS_ERROR

    def read(self, images: np.ndarray) -> Reading:
        """Read pictures; proportions are those of each picture's likeliest class, NaN where not `readable`.

        Args:
            images: uint8 [N, R, R, 3] RGB, R a multiple of 32; averaged to 32x32 first.

        Raises:
            ValueError: pictures of another shape or type.
        """
        n = len(images)
        x = np.pad(reduced(images), ((0, -n % BATCH_SIZE), (0, 0), (0, 0), (0, 0)))  # one program serves all
        batches = [_read(self.params, x[i : i + BATCH_SIZE]) for i in range(0, n, BATCH_SIZE)]
        columns = {name: np.concatenate([batch[name] for batch in batches])[:n] for name in Reading._fields}
        likeliest = columns["class_id"].argmax(axis=1)
        shape = columns["shape"][np.arange(n), likeliest]
        return Reading(**columns | {"shape": np.where(self.readable[likeliest], shape, np.float32(np.nan))})

    def classifier(self, images: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The class nouns and their probabilities [N, K], as a `subject.class_noun.Classifier` gives them."""
        return list(CLASSES), self.read(images).class_id


def reduced(images: np.ndarray) -> np.ndarray:
    """Average uint8 pictures [N, R, R, 3] to float32 [N, 32, 32, 3] in [-1, 1].

    Raises:
        ValueError: there are no pictures, they have another shape or type, or R is no multiple of 32.
    """
    n, *size = images.shape
    square = len(size) == 3 and size[0] == size[1] and size[2] == 3
    if images.dtype != np.uint8 or not n or not square or size[0] % RESOLUTION:
        raise ValueError(
            f"Pictures are {images.dtype} {list(images.shape)}; give one or more as uint8 [N, R, R, 3], R a multiple "
            f"of {RESOLUTION}."
        )
    blocks = images.reshape(n, RESOLUTION, size[0] // RESOLUTION, RESOLUTION, size[0] // RESOLUTION, 3)
    return blocks.mean(axis=(2, 4), dtype=np.float32) / np.float32(127.5) - 1


def degrade(x_BHWC: Array, key: Array, noise_B: Array, blur_B: Array) -> Array:
    """Make pictures in [-1, 1] worse: softer, then noisier.

    Args:
        x_BHWC: the pictures.
        key: the random key of the noise.
        noise_B: the standard deviation of the noise; 2 leaves nothing to recognise.
        blur_B: the share, in [0, 1], of a binomial filter (1, 2, 1) / 4 that is applied along each axis, twice.
    """
    share = blur_B[:, None, None, None] / 4
    for axis in (1, 2, 1, 2):
        padded = jnp.pad(x_BHWC, [(int(a == axis), int(a == axis)) for a in range(4)], mode="edge")
        before, after = (jax.lax.slice_in_dim(padded, i, i + x_BHWC.shape[axis], axis=axis) for i in (0, 2))
        x_BHWC = x_BHWC + share * (before + after - 2 * x_BHWC)
    x_BHWC = x_BHWC + noise_B[:, None, None, None] * jax.random.normal(key, x_BHWC.shape)
    return jnp.clip(x_BHWC, -1, 1)


def probe_program(data: Mapping[str, np.ndarray], num_steps: int = NUM_STEPS) -> Program:
    """The program that trains a probe.

    Args:
        data: "image" uint8 [N, R, R, 3 or more], and the true values of each property under its name: int [N], and
            float [N, 4] for "shape".
        num_steps: number of steps.
    """
    blocks = np.array_split(data["image"], max(1, len(data["image"]) // 1000))  # to save memory
    images = np.concatenate([as_uint8(reduced(block[..., :3])) for block in blocks])
    examples = {"image": images} | {name: data[name] for name in Reading._fields}
    schedule = {"warmup_steps": num_steps // 16, "decay_steps": num_steps * 3 // 4}
    config = training_config(num_steps, BATCH_SIZE, LOG_EVERY, CHECKPOINT_EVERY, **OPTIMIZER, **schedule)
    return network_program(_loss, _sample_batch, _init, examples, config)


def mild(images: np.ndarray, seed: int) -> np.ndarray:
    """Make pictures as soft and noisy as samples of a good cascade: uint8 [N, R, R, 3] to uint8 [N, 32, 32, 3]."""
    amount = jnp.ones(len(images))
    x = degrade(jnp.asarray(reduced(images)), jax.random.key(seed), MILD_NOISE * amount, MILD_BLUR * amount)
    return as_uint8(np.asarray(x))


def evaluate(probe: Probe, data: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Measure a probe on clean pictures and on mildly degraded ones ("clean", "mild").

    Args:
        probe: the probe.
        data: as in `probe_program`.

    Returns:
        The `accuracy` of each property, and as "is_subject" the share of pictures in which `is_subject` is true; it is
        1 for a perfect probe.
    """
    images = data["image"][..., :3]
    truth = {name: data[name] for name in Reading._fields}
    readings = {"clean": probe.read(images), "mild": probe.read(mild(images, SEED + 2))}
    identity = {name: truth[name] for name in IDENTITY}
    return {
        kind: accuracy(reading, **truth) | {"is_subject": float(is_subject(reading, **identity).mean())}
        for kind, reading in readings.items()
    }


def shape_errors(params: Params, data: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Mean absolute error of each proportion by class noun; GUESS_ERROR for a class that the data lack."""
    everything_readable = dict.fromkeys(CLASSES, [0.0] * NUM_PROPORTIONS)
    error = np.abs(Probe(params, {}, everything_readable).read(data["image"][..., :3]).shape - data["shape"])
    of_class = [error[data["class_id"] == k] for k in range(len(CLASSES))]
    guess = np.full(NUM_PROPORTIONS, GUESS_ERROR)
    means = [e.mean(axis=0) if len(e) else guess for e in of_class]
    return {noun: [round(float(e), 4) for e in mean] for noun, mean in zip(CLASSES, means, strict=True)}


def save(params: Params, tests: Mapping[str, Mapping[str, np.ndarray]], output: Path) -> Probe:
    """Write a probe in half precision, and its accuracy, as written, on each set of test data.

    Args:
        params: the network's parameters.
        tests: sets of data as in `probe_program`, by name; "heldout" decides which proportions can be told.
        output: the folder of the two files.
    """
    output.mkdir(parents=True, exist_ok=True)
    save_params(params, output / "probe.safetensors", jnp.float16)
    params = load_params(output / "probe.safetensors")
    probe = Probe(params, {}, shape_errors(params, tests["heldout"]))
    accuracies = {name: evaluate(probe, data) for name, data in tests.items()}
    probe.accuracies = jax.tree.map(lambda a: round(a, 4), accuracies)
    measured = {"accuracies": probe.accuracies, "shape_errors": probe.shape_errors}
    write_text(output / "probe.json", json.dumps(measured, indent=2) + "\n")
    return probe


def _init(key: Array) -> Params:
    return ProbeNetwork(OUTPUTS).init(key, jnp.zeros((1, RESOLUTION, RESOLUTION, 3)))["params"]


def _sample_batch(examples: Mapping[str, Array], key: Array) -> dict[str, Array]:
    rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(examples["image"]))
    return {name: column[rows] for name, column in examples.items()}


def _loss(params: Params, batch: Mapping[str, Array], key: Array) -> Array:
    """The mean of `_losses` over a batch, whose pictures, uint8 [B, 32, 32, 3], are degraded or replaced by blanks."""
    choice_key, blank_key, key = jax.random.split(key, 3)
    images = batch["image"]
    blank = jax.random.bernoulli(choice_key, BLANK_SHARE, (len(images),))
    x = _augmented(images.astype(jnp.float32) / 127.5 - 1, key)
    x = jnp.where(blank[:, None, None, None], _blanks(len(x), blank_key), x)
    return jnp.mean(_losses(_outputs(params, x), batch, blank))


def _outputs(params: Params, x_BHWC: Array) -> dict[str, Array]:
    outputs = ProbeNetwork(OUTPUTS).apply({"params": params}, x_BHWC)
    return cast(dict[str, Array], outputs)  # Flax does not know what a network returns


def _losses(outputs: Mapping[str, Array], truth: Mapping[str, Array], blank: Array) -> Array:
    """Negative log-likelihoods [B], summed over properties by WEIGHTS; a blank picture's values are all as likely."""
    B = len(blank)
    total = jnp.zeros(B)
    for name, K in VALUES.items():
        target_BK = jnp.where(blank[:, None], 1 / K, jax.nn.one_hot(truth[name], K))
        total += WEIGHTS[name] * optax.softmax_cross_entropy(outputs[name], target_BK)
    shape_BS = _shapes(outputs)[jnp.arange(B), truth["class_id"]]
    error_BS = shape_BS - jnp.where(blank[:, None], 0.5, truth["shape"])
    return total + 0.5 * jnp.sum((error_BS / SHAPE_DEVIATION) ** 2, axis=1)


def _shapes(outputs: Mapping[str, Array]) -> Array:
    """The proportions of each picture's object, were it of each class: [B, classes, 4] in [0, 1]."""
    return jax.nn.sigmoid(outputs["shape"]).reshape(-1, len(CLASSES), NUM_PROPORTIONS)


def _blanks(n: int, key: Array) -> Array:
    """Pictures of nothing [n, 32, 32, 3] in [-1, 1]: uniform noise in squares of one pixel up to the whole picture."""
    keys = jax.random.split(key, 7)
    sides = [2**i for i in range(6)]
    noises = [jax.random.uniform(k, (n, s, s, 3), minval=-1.0) for k, s in zip(keys, sides, strict=False)]
    noises = [a.repeat(RESOLUTION // a.shape[1], axis=1).repeat(RESOLUTION // a.shape[1], axis=2) for a in noises]
    return jnp.stack(noises)[jax.random.randint(keys[-1], (n,), 0, len(sides)), jnp.arange(n)]


def _augmented(x_BHWC: Array, key: Array) -> Array:
    """Pictures shifted by up to MAX_SHIFT pixels, half of them degraded: most a little, some beyond recognition."""
    shift_key, kept_key, noise_key, blur_key, key = jax.random.split(key, 5)
    B = len(x_BHWC)
    padded = jnp.pad(x_BHWC, ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)), mode="edge")
    shifts = jax.random.randint(shift_key, (B, 2), 0, 2 * MAX_SHIFT + 1)
    shifted = jax.vmap(lambda x, s: jax.lax.dynamic_slice(x, (s[0], s[1], 0), x_BHWC.shape[1:]))(padded, shifts)
    degraded = jax.random.bernoulli(kept_key, 0.5, (B,))
    noise = degraded * 2.0 * jax.random.uniform(noise_key, (B,)) ** 6
    return degrade(shifted, key, noise, degraded * jax.random.uniform(blur_key, (B,)))


@jax.jit
def _read(params: Params, x_BHWC: Array) -> dict[str, Array]:
    """Probabilities [B, K] of each property, and "shape" as in `_shapes`."""
    outputs = _outputs(params, x_BHWC)
    return {name: jax.nn.softmax(outputs[name]) for name in VALUES} | {"shape": _shapes(outputs)}


def as_uint8(x: np.ndarray) -> np.ndarray:
    """Pictures in [-1, 1] as uint8."""
    return np.round((x + 1) * 127.5).astype(np.uint8)


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("output", None, "Folder for checkpoints, weights and accuracies.")
    flags.DEFINE_string("data_dir", "runs/data", "Folder of the rendered world.")


def train_probe(output: Path, data_dir: Path) -> Probe:
    """Train the probe, from the last checkpoint if there is one, and write it with its accuracy.

    Args:
        output: folder for checkpoints, weights and accuracies.
        data_dir: folder of the rendered world; what it lacks is rendered.
    """
    from personalize_jax.world import dataset_builder  # slow to import, and needed for training alone

    program = probe_program(dataset_builder.load(RENDER_RESOLUTION, "train", TRAIN_COUNT, data_dir))
    params = train_network(program, output, "training the probe")
    tests = {name: dataset_builder.load(RENDER_RESOLUTION, name, TEST_COUNT, data_dir) for name in ("heldout", "test")}
    return save(params, tests, output)


def main(_: list[str]) -> None:
    """Render or read the data, train, measure, save."""
    train_probe(Path(flags.FLAGS.output), Path(flags.FLAGS.data_dir))


if __name__ == "__main__":
    command.run(main, define_flags, required=("output",))
