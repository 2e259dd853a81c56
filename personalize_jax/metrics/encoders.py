"""Encoders with which the paper measures: DINO, CLIP and LPIPS, read from safetensors without torch.

DINO's and CLIP's are named on the Hugging Face hub (facebook/dino-vits16, openai/clip-vit-base-patch32,
openai/clip-vit-large-patch14), or by a folder with the same files; "world" are those that ship, trained on the
rendered world by `world.encoder`. LPIPS comes as pickles only, of which one line of Python makes a folder:

    import lpips, safetensors.torch; safetensors.torch.save_model(lpips.LPIPS(net="alex"), "lpips/model.safetensors")

Where there is none, `cosine_distance` of an encoder stands in for it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from personalize_jax import hosts
from personalize_jax.errors import UserError
from personalize_jax.metrics.preprocessing import Preprocessing
from personalize_jax.models.clip import Clip
from personalize_jax.models.lpips import Backbone, Lpips
from personalize_jax.models.port_weights import load_weights
from personalize_jax.models.vit import VisionTransformer
from personalize_jax.pipeline import hub
from personalize_jax.pipeline.storage import ASSETS
from personalize_jax.pipeline.tokenizer import Tokenizer
from personalize_jax.training.sharding import BATCH, make_mesh, replicated

BATCH_SIZE = 64
PAIRS = 8  # compared at once, at whatever size they have: LPIPS keeps 64 features of every pixel
WORLD = "world"  # the name of the encoders that ship
_HUB_FILES = (
    *("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
)
_LPIPS_SIDE = 64  # to make parameters with; they serve every size


class ImageEncoder(NamedTuple):
    """A network that embeds pictures.

    Attributes:
        prepare: pictures to its input.
        embed: prepared pictures [B, H, W, 3] to embeddings [B, D].
    """

    prepare: Preprocessing
    embed: Callable[[Array], Array]

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Embed pictures.

        Args:
            images: uint8 [H, W, 3], each of its own size.

        Returns:
            float32 [N, D], of unit length.

        Raises:
            ValueError: no images.
        """
        embedded_ND = in_batches(lambda part: self.embed(self.prepare(part)), images)
        return embedded_ND / np.linalg.norm(embedded_ND, axis=-1, keepdims=True)


class ClipEncoder(NamedTuple):
    """CLIP's two towers.

    Attributes:
        images: embeds pictures.
        tokenizer: of its texts.
        embed_texts: token ids [B, L] to embeddings of unit length [B, D].
    """

    images: ImageEncoder
    tokenizer: Tokenizer
    embed_texts: Callable[[Array], Array]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts; those that are longer than the network's are cut.

        Returns:
            float32 [N, D], of unit length.

        Raises:
            ValueError: no texts.
        """
        return in_batches(lambda part: self.embed_texts(self.tokenizer(part)), texts)


class Distance(NamedTuple):
    """LPIPS; 0 for the same pictures, and the greater the less they look alike.

    Attributes:
        compare: two batches of pictures [B, H, W, 3] in [-1, 1] to distances [B].
    """

    compare: Callable[[Array, Array], Array]

    def __call__(self, images_NHWC: np.ndarray, others_NHWC: np.ndarray) -> np.ndarray:
        """Distance of each picture to its counterpart, at the size that they have.

        Args:
            images_NHWC: uint8, of 32 x 32 pixels or more.
            others_NHWC: the same.

        Returns:
            float32 [N].

        Raises:
            ValueError: no images.
        """

        def compare(pairs: Sequence[np.ndarray]) -> Array:
            x_B2HWC = np.stack(pairs).astype(np.float32) / 127.5 - 1
            return self.compare(x_B2HWC[:, 0], x_B2HWC[:, 1])

        return in_batches(compare, np.stack([images_NHWC, others_NHWC], axis=1), PAIRS)


def load_dino(source: str | Path, prepare: Preprocessing | None = None) -> ImageEncoder:
    """Read a ViT that was trained by DINO; its embedding is that of the class token.

    Args:
        source: "world" for the instance encoder that stands in DINO's place on the rendered world; a folder with
            `config.json`, `model.safetensors` and `preprocessor_config.json`; or a name on the Hugging Face hub.
        prepare: of pictures, instead of what the last of the files says.

    Raises:
        UserError: there is no such model.
    """
    folder = _folder(source, "dino")
    network = VisionTransformer.from_config(_config(folder))
    picture = jax.ShapeDtypeStruct((1, network.resolution, network.resolution, 3), jnp.float32)
    abstract = jax.eval_shape(network.init, jax.random.key(0), picture)["params"]
    params = load_weights(folder, abstract, "vit")
    return ImageEncoder(prepare or Preprocessing.read(folder), _on_every_device(network.apply, params))


def load_clip(source: str | Path) -> ClipEncoder:
    """Read a CLIP.

    Args:
        source: "world" for the rendered world's; a folder with `config.json`, `model.safetensors`,
            `preprocessor_config.json` and the tokenizer's files; or a name on the Hugging Face hub.

    Raises:
        UserError: there is no such model.
    """
    folder = _folder(source, "clip")
    network = Clip.from_config(_config(folder))
    picture = jax.ShapeDtypeStruct((1, network.resolution, network.resolution, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, network.max_length), jnp.int32)
    abstract = jax.eval_shape(network.init, jax.random.key(0), picture, tokens)["params"]
    params = load_weights(folder, abstract, "clip")

    def tower(method: Callable) -> Callable:
        return _on_every_device(lambda params, x: network.apply(params, x, method=method), params)

    images = ImageEncoder(Preprocessing.read(folder), tower(Clip.encode_images))
    return ClipEncoder(images, Tokenizer.from_folder(folder, network.max_length), tower(Clip.encode_texts))


def load_lpips(source: str | Path, backbone: Backbone = "alex") -> Distance:
    """Read LPIPS.

    Args:
        source: a folder with a `model.safetensors` made as the module's docstring says, or the name of a repository on
            the Hugging Face hub that holds one.
        backbone: of which network.

    Raises:
        UserError: there is no such model.
    """
    folder = _folder(source, None)
    network = Lpips(backbone)
    picture = jax.ShapeDtypeStruct((1, _LPIPS_SIDE, _LPIPS_SIDE, 3), jnp.float32)
    abstract = jax.eval_shape(network.init, jax.random.key(0), picture, picture)["params"]
    return Distance(_on_every_device(network.apply, load_weights(folder, abstract, "lpips")))


def cosine_distance(encoder: ImageEncoder) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """One minus the cosine of two pictures' embeddings, in [0, 2]: what `similarity.diversity` takes in LPIPS's place.

    Args:
        encoder: of the pictures.

    Returns:
        Of two batches of pictures, uint8 [N, H, W, 3], to float32 [N].
    """

    def distance(images_NHWC: np.ndarray, others_NHWC: np.ndarray) -> np.ndarray:
        return 1 - np.sum(encoder(images_NHWC) * encoder(others_NHWC), axis=-1)

    return distance


def in_batches(function: Callable[[Sequence[Any]], Array], items: Sequence[Any], size: int = BATCH_SIZE) -> np.ndarray:
    """Apply a function to a sequence in batches of one size, the last of them filled up, as one program takes them.

    Args:
        function: of a batch; its result's first axis is the batch's.
        items: the sequence.
        size: of a batch, at most; rounded up to a multiple of the number of devices.

    Returns:
        The results, joined.

    Raises:
        ValueError: the sequence is empty.
    """
    if not len(items):
        raise ValueError("There is nothing to embed or compare; give at least one picture or text.")
    size = min(size, len(items))
    size += -size % jax.device_count()
    results = []
    for start in range(0, len(items), size):
        part = list(items[start : start + size])
        results.append(hosts.whole(function(part + part[-1:] * (size - len(part))))[: len(part)])
    return np.concatenate(results)


def _on_every_device(apply: Callable, params: Any) -> Callable:
    """The network with its parameters, batches split over all devices."""
    mesh = make_mesh((-1, 1, 1))
    params = hosts.put({"params": params}, replicated(mesh))
    apply = jax.jit(apply)

    def call(*batches: np.ndarray) -> Array:
        return apply(params, *hosts.put(batches, NamedSharding(mesh, BATCH)))

    return call


def _folder(source: str | Path, shipped: str | None) -> Path:
    """Where an encoder's files lie, after downloading them if need be.

    Args:
        source: see `load_dino`.
        shipped: the folder of the rendered world's, or None if there is none.
    """
    if str(source) == WORLD and shipped is not None:
        return ASSETS / WORLD / shipped
    if str(source) and Path(source).is_dir():
        return Path(source)
    if not hub.is_name(source):
        world = "" if shipped is None else f"{WORLD!r}, "
        raise UserError(
            f"{str(source)!r} is no encoder; give {world}a folder, or a name on the Hugging Face hub such as "
            "'facebook/dino-vits16'."
        )
    return hub.download(str(source), _HUB_FILES)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give the folder of a model of the hub.") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); restore the file.") from error
