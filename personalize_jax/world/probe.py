"""The probe: reads class, colours, pattern, context and accessory off pictures of the world.

    python -m personalize_jax.world.probe --output=personalize_jax/assets/world

trains it on renders and writes probe.safetensors and probe.json, the latter with its accuracies on subjects that it
was not trained on. Samples of a cascade are softer and noisier than renders: the probe is trained on renders degraded
in these ways, some of them beyond recognition, so that it learns to be unsure as well.

Its limits: patterns are its weakest property (spots are taken for plain, and the stripes of a striped subject for its
body); a picture of plain noise is given a context (probability .71) and a body colour (.52) too confidently, though no
class. The shipped weights come from 1700 steps on 90,240 renders, most of them of an earlier renderer that softened
the borders between materials more; the accuracies are measured on renders of the present one.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax import Array
from ml_collections import ConfigDict
from tqdm import tqdm

from personalize_jax.errors import UserError
from personalize_jax.metrics.world import Reading, accuracy
from personalize_jax.models.params import Params
from personalize_jax.models.probe import ProbeNetwork
from personalize_jax.pipeline.storage import ASSETS, load_params, save_params, write_text
from personalize_jax.training.optimizer import make_optimizer
from personalize_jax.world import dataset_builder
from personalize_jax.world.scene import CLASSES

RESOLUTION = 32
BATCH_SIZE = 64

RENDER_RESOLUTION = 64
TRAIN_COUNT = 80_000
TEST_COUNT = 2_048
SEED = 0
NUM_STEPS = 1_700
OPTIMIZER = {"learning_rate": 2e-3, "b1": 0.9, "b2": 0.99, "weight_decay": 1e-2, "clip_norm": 1.0}
MAX_SHIFT = 2  # pixels
MILD_NOISE, MILD_BLUR = 0.1, 0.6  # about what samples of a good cascade have; see `degrade`

PROPERTIES = tuple((name, len(dataset_builder.LABELS[name])) for name in Reading._fields)


class Probe:
    """A trained probe.

    Attributes:
        accuracies: its shares of right answers by split ("heldout", "test"), by degradation ("clean", "mild") and by
            property, as measured when it was trained.
    """

    def __init__(self, params: Params, accuracies: Mapping[str, Any]) -> None:
        self.params = params
        self.accuracies = accuracies

    @classmethod
    def load(cls, folder: str | Path = ASSETS / "world") -> "Probe":
        """Read probe.safetensors and probe.json; by default those that ship.

        Raises:
            UserError: a file is missing or damaged.
        """
        folder = Path(folder)
        try:
            accuracies = json.loads((folder / "probe.json").read_text())["accuracies"]
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise UserError(
                f"{folder / 'probe.json'} is missing or damaged; write it by python -m personalize_jax.world.probe "
                f"--output={folder}."
            ) from error
        return cls(load_params(folder / "probe.safetensors"), accuracies)

    def read(self, images: np.ndarray) -> Reading:
        """Read pictures.

        Args:
            images: uint8 [N, R, R, 3] RGB, R a multiple of 32; averaged to 32x32 first.

        Raises:
            ValueError: pictures of another kind.
        """
        n = len(images)
        x = np.pad(reduced(images), ((0, -n % BATCH_SIZE), (0, 0), (0, 0), (0, 0)))  # one program serves all
        batches = [_probabilities(self.params, x[i : i + BATCH_SIZE]) for i in range(0, n, BATCH_SIZE)]
        return Reading(*(np.concatenate([batch[name] for batch in batches])[:n] for name in Reading._fields))

    def classifier(self, images: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The class nouns and their probabilities [N, K]: a `subject.class_noun.Classifier`."""
        return list(CLASSES), self.read(images).class_id


def reduced(images: np.ndarray) -> np.ndarray:
    """Average uint8 pictures [N, R, R, 3] to float32 [N, 32, 32, 3] in [-1, 1].

    Raises:
        ValueError: no pictures, other shapes or types, or R is no multiple of 32.
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
        x_BHWC: pictures.
        key: of the noise.
        noise_B: standard deviation of the noise; 2 leaves nothing to recognise.
        blur_B: in [0, 1], how much of a binomial filter (1, 2, 1) / 4 is applied along each axis, twice.
    """
    share = blur_B[:, None, None, None] / 4
    for axis in (1, 2, 1, 2):
        padded = jnp.pad(x_BHWC, [(int(a == axis), int(a == axis)) for a in range(4)], mode="edge")
        before, after = (jax.lax.slice_in_dim(padded, i, i + x_BHWC.shape[axis], axis=axis) for i in (0, 2))
        x_BHWC = x_BHWC + share * (before + after - 2 * x_BHWC)
    x_BHWC = x_BHWC + noise_B[:, None, None, None] * jax.random.normal(key, x_BHWC.shape)
    return jnp.clip(x_BHWC, -1, 1)


def train(data: Mapping[str, np.ndarray], num_steps: int = NUM_STEPS) -> Params:
    """Train a probe.

    Args:
        data: "image" uint8 [N, R, R, 3 or more], and the true values of each property, int [N], under its name.
        num_steps: batches of 64.
    """
    blocks = np.array_split(data["image"], max(1, len(data["image"]) // 1000))  # spares memory
    images_u8 = np.concatenate([_as_uint8(reduced(block[..., :3])) for block in blocks])
    schedule = {"warmup_steps": num_steps // 16, "decay_steps": num_steps * 3 // 4}
    optimizer = make_optimizer(ConfigDict(OPTIMIZER | schedule), num_steps)
    params = ProbeNetwork(PROPERTIES).init(jax.random.key(SEED), jnp.zeros((1, RESOLUTION, RESOLUTION, 3)))["params"]
    optimizer_state = optimizer.init(params)
    step = jax.jit(functools.partial(_train_step, optimizer), donate_argnums=(0, 1))
    keys = jax.random.split(jax.random.key(SEED + 1), num_steps)
    with tqdm(_shuffled(len(images_u8), num_steps), total=num_steps, desc="training the probe", unit="step") as bar:
        for rows, key in zip(bar, keys, strict=True):  # not a scan: XLA's CPU convolutions are slow in loops
            truth = {name: data[name][rows] for name in Reading._fields}
            params, optimizer_state, loss = step(params, optimizer_state, images_u8[rows], truth, key)
            if bar.n % 50 == 0:
                bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    return params


def evaluate(probe: Probe, data: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Accuracies on clean pictures and on mildly degraded ones ("clean", "mild"), for data as in `train`."""
    images = data["image"][..., :3]
    x = reduced(images)
    amount = jnp.ones(len(x))
    mild = degrade(x, jax.random.key(SEED + 2), MILD_NOISE * amount, MILD_BLUR * amount)
    truth = {name: data[name] for name in Reading._fields}
    pictures = {"clean": images, "mild": _as_uint8(np.asarray(mild))}
    return {kind: accuracy(probe.read(images), **truth) for kind, images in pictures.items()}


def save(params: Params, tests: Mapping[str, Mapping[str, np.ndarray]], output: Path) -> Probe:
    """Write the probe in half precision, and the accuracies that it then has on each set of test data."""
    output.mkdir(parents=True, exist_ok=True)
    save_params(params, output / "probe.safetensors", jnp.float16)
    probe = Probe(load_params(output / "probe.safetensors"), {})
    accuracies = {name: evaluate(probe, data) for name, data in tests.items()}
    rounded = jax.tree.map(lambda a: round(a, 4), accuracies)
    write_text(output / "probe.json", json.dumps({"accuracies": rounded}, indent=2) + "\n")
    return Probe(probe.params, rounded)


def _train_step(
    optimizer: optax.GradientTransformation,
    params: Params,
    optimizer_state: optax.OptState,
    images: Array,
    truth: dict[str, Array],
    key: Array,
) -> tuple[Params, optax.OptState, Array]:
    """One step on uint8 [B, 32, 32, 3] pictures."""
    x = _augmented(images.astype(jnp.float32) / 127.5 - 1, key)

    def loss_of(params: Params) -> Array:
        logits = ProbeNetwork(PROPERTIES).apply({"params": params}, x)
        losses = [optax.softmax_cross_entropy_with_integer_labels(logits[name], truth[name]) for name in logits]
        return jnp.mean(sum(losses))

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, loss


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
def _probabilities(params: Params, x_BHWC: Array) -> dict[str, Array]:
    return jax.tree.map(jax.nn.softmax, ProbeNetwork(PROPERTIES).apply({"params": params}, x_BHWC))


def _as_uint8(x: np.ndarray) -> np.ndarray:
    return np.round((x + 1) * 127.5).astype(np.uint8)


def _shuffled(n: int, num_batches: int) -> Iterator[np.ndarray]:
    """Rows of `num_batches` batches: every one of n rows once an epoch."""
    rng = np.random.default_rng(SEED)
    rows = np.empty(0, np.int64)
    for _ in range(num_batches):
        if len(rows) < BATCH_SIZE:
            rows = np.concatenate([rows, *(rng.permutation(n) for _ in range(-(-BATCH_SIZE // n)))])
        yield rows[:BATCH_SIZE]
        rows = rows[BATCH_SIZE:]


def main(output: Path, data_dir: Path) -> None:
    """Render or read the data, train, measure, save."""
    params = train(dataset_builder.load(RENDER_RESOLUTION, "train", TRAIN_COUNT, data_dir))
    tests = {name: dataset_builder.load(RENDER_RESOLUTION, name, TEST_COUNT, data_dir) for name in ("heldout", "test")}
    save(params, tests, output)


if __name__ == "__main__":
    _OUTPUT = flags.DEFINE_string("output", None, "Folder for probe.safetensors and probe.json.", required=True)
    _DATA_DIR = flags.DEFINE_string("data_dir", "runs/data", "Folder of the rendered world.")
    app.run(lambda _: main(Path(_OUTPUT.value), Path(_DATA_DIR.value)))
