"""Trains the rendered world's encoders, which the paper's metrics need: a CLIP, and one in DINO's place.

    python -m personalize_jax.world.encoder --output=runs/encoder

renders the data that is missing, trains both and writes runs/encoder/clip and runs/encoder/dino, folders as on the
Hugging Face hub, each with a quality.json, measured on subjects that it was not trained on. Those that ship are in
personalize_jax/assets/world. The same command continues a training from its last checkpoint.

The CLIP learns which caption belongs to which picture (`contrastive.info_nce`). The instance encoder has DINO's network
but not its training: it learns which two pictures, in different places, show the same subject among many of its class
(`contrastive.nt_xent`), which is the paper's purpose for DINO. Samples of a cascade are softer and noisier than
renders, so half of the pictures are degraded to look like a base model's.

The shipped CLIP ran its steps 300 to 800 under a learning rate that fell to 0 by then; otherwise the constants below
hold. The instance encoder hardly sees proportions: see "changed" in its quality.json.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array
from ml_collections import ConfigDict

from personalize_jax.formats.port_weights import Naming, save_weights
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.metrics.encoders import load_clip, load_dino
from personalize_jax.metrics.preprocessing import FILE, Preprocessing
from personalize_jax.models.clip import Clip
from personalize_jax.models.params import Params
from personalize_jax.models.vit import VisionTransformer
from personalize_jax.runtime import command
from personalize_jax.runtime.files import ASSETS, write_text
from personalize_jax.training.program import Program
from personalize_jax.world import dataset_builder, encoder_quality
from personalize_jax.world.contrastive import info_nce, nt_xent
from personalize_jax.world.probe import RESOLUTION as BASE_RESOLUTION
from personalize_jax.world.probe import as_uint8, degrade
from personalize_jax.world.scene import CONTEXTS, Scene, sample_views, select
from personalize_jax.world.training import SEED, network_program, train_network, training_config

NAMES = ("clip", "dino")
RENDER_RESOLUTION = 64
CLIP_COUNT = 60_000  # pictures
INSTANCE_COUNT = 24_576  # subjects: the first of those pictures, and another view of each
TEST_COUNT = 2_048
CLASSES_IN_BATCH = 2  # of the instance encoder: most of a subject's negatives are of its own class
INSTANCE_SCALE = 10.0
MAX_LOGIT_SCALE = 100.0  # as CLIP
MAX_NOISE, MAX_BLUR = 0.15, 0.8  # of degraded pictures, see `probe.degrade`; a good cascade's have about .1 and .6
LOG_EVERY, CHECKPOINT_EVERY = 10, 50  # steps
_OPTIMIZER = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.98, "weight_decay": 0.05, "warmup_steps": 60}
CLIP_TRAINING = training_config(1_400, 128, LOG_EVERY, CHECKPOINT_EVERY, decay_steps=600, **_OPTIMIZER)
INSTANCE_TRAINING = training_config(700, 64, LOG_EVERY, CHECKPOINT_EVERY, decay_steps=400, **_OPTIMIZER)

# The networks' config.json.
_TOWER = {"num_attention_heads": 4, "layer_norm_eps": 1e-5}
_VISION = _TOWER | {"image_size": 48, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512}
CLIP: dict[str, Any] = {
    "model_type": "clip",
    "architectures": ["CLIPModel"],
    "projection_dim": 128,
    "vision_config": _VISION | {"num_hidden_layers": 5, "hidden_act": "quick_gelu"},
    "text_config": _TOWER
    | {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "hidden_act": "quick_gelu"}
    | {"vocab_size": 4096, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
}
INSTANCE = _VISION | {
    "model_type": "vit",
    "architectures": ["ViTModel"],
    "num_hidden_layers": 5,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "num_channels": 3,
}
_PROCESSOR = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_SIDE = _VISION["image_size"]
CLIP_PROCESSOR = _PROCESSOR | {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": _SIDE},
    "crop_size": {"height": _SIDE, "width": _SIDE},
}
INSTANCE_PROCESSOR = _PROCESSOR | {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": _SIDE, "width": _SIDE},
}


def clip_program(data: Mapping[str, np.ndarray], config: ConfigDict = CLIP_TRAINING) -> Program:
    """The program that trains the CLIP on pictures with their captions.

    Args:
        data: the arrays of `dataset_builder.load`.
        config: keys of the training.
    """
    network = Clip.from_config(CLIP)
    captions = data["captions"]
    tokens_NKL = tokenizer()(captions.ravel().tolist()).reshape(*captions.shape, -1)

    def sample_batch(examples: Mapping[str, Array], key: Array) -> dict[str, Array]:
        row_key, caption_key = jax.random.split(key)
        N, K, _ = examples["tokens"].shape
        rows = jax.random.choice(row_key, N, (config.batch_size,), replace=False)
        texts = examples["tokens"][rows, jax.random.randint(caption_key, rows.shape, 0, K)]
        return {"images": examples["images"][rows], "tokens": texts}

    def loss(params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        pair = network.apply({"params": params}, augmented(batch["images"], key), batch["tokens"])
        images_BD, texts_BD = cast(tuple[Array, Array], pair)  # Flax does not know what a network returns
        return info_nce(images_BD, texts_BD, jnp.minimum(jnp.exp(params["logit_scale"]), MAX_LOGIT_SCALE))

    def init(key: Array) -> Params:
        return network.init(key, jnp.zeros((1, _SIDE, _SIDE, 3)), tokens_NKL[:1, 0])["params"]

    examples = {"images": resized(data["image"]), "tokens": tokens_NKL}
    return network_program(loss, sample_batch, init, examples, config)


def instance_program(
    class_id: np.ndarray, first: np.ndarray, second: np.ndarray, config: ConfigDict = INSTANCE_TRAINING
) -> Program:
    """The program that trains the instance encoder on subjects in two views each.

    Args:
        class_id: the class of each subject, int [N].
        first: one view of each, uint8 [N, R, R, 3 or more].
        second: another view of each.
        config: keys of the training; a batch is a number of subjects.
    """
    network = VisionTransformer.from_config(INSTANCE)
    views_N2HWC = np.stack([resized(first), resized(second)], axis=1)
    rows = [np.flatnonzero(class_id == k) for k in np.unique(class_id)]
    M = min(map(len, rows))  # used subjects of each class, equal so that one array holds all

    def sample_batch(examples: Mapping[str, Array], key: Array) -> dict[str, Array]:
        class_key, *keys = jax.random.split(key, CLASSES_IN_BATCH + 1)
        classes = jax.random.choice(class_key, len(rows), (CLASSES_IN_BATCH,), replace=False)
        count = config.batch_size // CLASSES_IN_BATCH
        subjects = jnp.stack([jax.random.choice(key, M, (count,), replace=False) for key in keys])
        views = examples["views"][classes[:, None], subjects]
        return {"views": views.reshape(-1, *views.shape[2:])}

    def loss(params: Params, batch: Mapping[str, Array], key: Array) -> Array:
        x_BHWC = augmented(jnp.concatenate([batch["views"][:, 0], batch["views"][:, 1]]), key)
        e_BD = network.apply({"params": params}, x_BHWC)
        e_BD /= jnp.linalg.norm(e_BD, axis=-1, keepdims=True)
        first_BD, second_BD = jnp.split(e_BD, 2)
        return nt_xent(first_BD, second_BD, INSTANCE_SCALE)

    def init(key: Array) -> Params:
        return network.init(key, jnp.zeros((1, _SIDE, _SIDE, 3)))["params"]

    examples = {"views": views_N2HWC[np.stack([r[:M] for r in rows])]}
    return network_program(loss, sample_batch, init, examples, config)


def augmented(images_BHWC: Array, key: Array) -> Array:
    """Bring pictures, uint8, to [-1, 1], and degrade half of them to look like a base model's, enlarged."""
    B, *shape = images_BHWC.shape
    kept_key, noise_key, blur_key, key = jax.random.split(key, 4)
    x_BHWC = images_BHWC.astype(jnp.float32) / 127.5 - 1
    small = jax.image.resize(x_BHWC, (B, BASE_RESOLUTION, BASE_RESOLUTION, 3), "cubic")
    noise, blur = jax.random.uniform(noise_key, (B,)), jax.random.uniform(blur_key, (B,))
    small = degrade(small, key, MAX_NOISE * noise, MAX_BLUR * blur)
    kept = jax.random.bernoulli(kept_key, 0.5, (B, 1, 1, 1))
    return jnp.where(kept, x_BHWC, jax.image.resize(small, (B, *shape), "cubic"))


def resized(images: np.ndarray) -> np.ndarray:
    """Resize pictures as the encoders' preprocessing does: uint8 [N, R, R, 3 or more] to uint8 [N, 48, 48, 3]."""
    prepare = Preprocessing.from_config(INSTANCE_PROCESSOR)
    return np.concatenate([as_uint8(prepare([image[..., :3]])) for image in images])


def second_views(data: Mapping[str, np.ndarray], data_dir: Path) -> np.ndarray:
    """Render another view of each subject, in another place, or read the views that an earlier call rendered.

    Args:
        data: the first views, the arrays of `dataset_builder.load`.
        data_dir: the folder of the views, which are kept in blocks.

    Returns:
        uint8 [N, 64, 64, 4].
    """
    scenes = dataset_builder.scenes_of(data)
    size = dataset_builder.BLOCK_SIZE
    images = []
    for block, start in enumerate(range(0, len(scenes.subject.class_id), size)):
        subject, first = select(scenes, slice(start, start + size))
        n = len(subject.class_id)
        rng = np.random.default_rng([SEED, block])
        contexts = (first.context + rng.integers(1, len(CONTEXTS), n)) % len(CONTEXTS)
        other = Scene(subject, sample_views(rng, subject, context=contexts))
        file = data_dir / "world_second_views" / f"{block:05d}_{n}.npy"
        images.append(dataset_builder.rendered_once(file, other, RENDER_RESOLUTION))
    return np.concatenate(images)


def tokenizer() -> Tokenizer:
    """The world's vocabulary, at the length of the CLIP's texts."""
    return Tokenizer.read(ASSETS / "world" / "tokenizer.json", CLIP["text_config"]["max_position_embeddings"])


def save(params: Params, network: Naming, folder: Path) -> None:
    """Write an encoder in half precision as a folder of the hub.

    Args:
        params: the network's parameters.
        network: "clip" or "vit".
        folder: the folder, which is made if it is missing.
    """
    config, processor = {"clip": (CLIP, CLIP_PROCESSOR), "vit": (INSTANCE, INSTANCE_PROCESSOR)}[network]
    save_weights(params, folder, "model.safetensors", network, jnp.float16)
    _write_json(folder / "config.json", config)
    _write_json(folder / FILE, processor)
    if network == "clip":
        backend = tokenizer().backend
        specials = {name: getattr(backend, name) for name in ("pad_token", "eos_token", "unk_token")}
        write_text(folder / "tokenizer.json", backend.backend_tokenizer.to_str())
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | specials)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(content, indent=2) + "\n")


def _write_quality(folder: Path, quality: Mapping[str, Mapping[str, float]]) -> None:
    rounded = {kind: {name: round(value, 4) for name, value in values.items()} for kind, values in quality.items()}
    _write_json(folder / "quality.json", rounded)


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("output", None, "Folder for clip/ and dino/, and for the trainings' checkpoints.")
    flags.DEFINE_string("data_dir", "runs/data", "Folder of the rendered world.")
    flags.DEFINE_multi_enum("encoder", NAMES, NAMES, "Which of the two to train.")


def train_encoders(output: Path, data_dir: Path, names: Sequence[str] = NAMES) -> None:
    """Train encoders, each from its last checkpoint if there is one, and write them with their quality.

    Args:
        output: folder for clip/ and dino/, and for the trainings' checkpoints.
        data_dir: folder of the rendered world; what it lacks is rendered.
        names: which of `NAMES` to train.
    """
    data = dataset_builder.load(RENDER_RESOLUTION, "train", CLIP_COUNT, data_dir)
    if "clip" in names:
        params = train_network(clip_program(data), output / "clip_training", "training the CLIP")
        save(params, "clip", output / "clip")
        test = dataset_builder.load(RENDER_RESOLUTION, "heldout", TEST_COUNT, data_dir)
        _write_quality(output / "clip", encoder_quality.clip_quality(load_clip(output / "clip"), test))
    if "dino" in names:
        first = {name: column[:INSTANCE_COUNT] for name, column in data.items()}
        program = instance_program(first["class_id"], first["image"], second_views(first, data_dir))
        params = train_network(program, output / "dino_training", "training the instance encoder")
        save(params, "vit", output / "dino")
        dino = load_dino(output / "dino")
        quality = encoder_quality.instance_quality(dino, *encoder_quality.heldout_pictures())
        _write_quality(output / "dino", quality | {"changed": encoder_quality.similarities_after_changes(dino)})


def main(_: list[str]) -> None:
    """Render or read the data, train, save, measure."""
    train_encoders(Path(flags.FLAGS.output), Path(flags.FLAGS.data_dir), flags.FLAGS.encoder)


if __name__ == "__main__":
    command.run(main, define_flags, required=("output",))
