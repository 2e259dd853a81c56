"""Encoders with which the paper measures: DINO, CLIP and LPIPS, read from safetensors without torch.

DINO's and CLIP's are named on the Hugging Face hub (see `formats.hub`), or by a folder with the same files, DINO's as
transformers or timm publishes it; "world" are those that ship, trained on the rendered world by `world.encoder`. LPIPS
comes as pickles only, of which `_CONVERT_LPIPS` makes a folder. Where there is none, `cosine_distance` of an encoder
stands in for it.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from personalize_jax.formats import hub
from personalize_jax.formats.port_weights import load_weights
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.metrics import timm_vit
from personalize_jax.metrics.preprocessing import Preprocessing
from personalize_jax.models.clip import Clip
from personalize_jax.models.lpips import Lpips
from personalize_jax.models.params import Params
from personalize_jax.models.vit import VisionTransformer
from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import ASSETS
from personalize_jax.runtime.sharding import BATCH, make_mesh, replicated

BATCH_SIZE = 64
PAIRS = 8  # compared at once, at whatever size they have: LPIPS keeps 64 features of every pixel
WORLD = "world"  # the name of the encoders that ship
_HUB_FILES = (
    *("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
)
# Python by which pickled weights become a folder that can be read.
_CONVERT = "for part in ({}): part.from_pretrained({!r}).save_pretrained(folder)"
_CONVERT_LPIPS = (
    "import lpips, safetensors.torch; safetensors.torch.save_model(lpips.LPIPS(net='alex'), '{}/model.safetensors')"
)
_DINO_PARTS = "transformers.ViTModel, transformers.ViTImageProcessor"
_CLIP_PARTS = "transformers.CLIPModel, transformers.CLIPImageProcessor, transformers.CLIPTokenizer"
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


def label(source: str | Path) -> str:
    """What an encoder is called in tables: the last part of its name, without a revision.

    >>> label("openai/clip-vit-base-patch32@refs/pr/66")
    'clip-vit-base-patch32'
    """
    return str(source).partition("@")[0].rstrip("/").rpartition("/")[2]


def find_dino(source: str | Path) -> Callable[[], ImageEncoder]:
    """Find a ViT that was trained by DINO, after downloading it if need be; see `load_dino`.

    Returns:
        Reads its weights.

    Raises:
        UserError: there is no such model.
    """
    folder = _folder(source, "dino", _DINO_PARTS)
    config = _config(folder)
    if timm_vit.ARCHITECTURE in config:
        network = timm_vit.network(config)
        prepare = timm_vit.preprocessing(network.resolution)
        read = functools.partial(timm_vit.load_params, num_layers=network.num_layers)
    else:
        network = VisionTransformer.from_config(config)
        prepare = Preprocessing.read(folder)
        read = functools.partial(load_weights, network="vit")
    return lambda: _image_encoder(folder, network, prepare, read)


def find_clip(source: str | Path) -> Callable[[], ClipEncoder]:
    """Find a CLIP, after downloading it if need be; see `load_clip`.

    Returns:
        Reads its weights.

    Raises:
        UserError: there is no such model.
    """
    folder = _folder(source, "clip", _CLIP_PARTS)
    network = Clip.from_config(_config(folder))
    prepare, tokenizer = Preprocessing.read(folder), Tokenizer.from_folder(folder, network.max_length)
    return lambda: _clip_encoder(folder, network, prepare, tokenizer)


def find_lpips(source: str | Path) -> Callable[[], Distance]:
    """Find LPIPS; see `load_lpips`.

    Returns:
        Reads its weights.

    Raises:
        UserError: it is not there, or holds no safetensors.
    """
    folder = Path(source)
    if not str(source) or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{str(source)!r} is no folder with LPIPS as safetensors, and it is published as pickles only; make the "
            f"folder in Python by `{_CONVERT_LPIPS.format(source)}`, or give config.evaluation.lpips='' for the cosine "
            "of DINO in its place."
        )
    hub.refuse_pointers(folder, ["*"])
    return lambda: _distance(folder)


def load_dino(source: str | Path) -> ImageEncoder:
    """Read a ViT that was trained by DINO; its embedding is that of the class token.

    Args:
        source: "world" for the instance encoder that stands in DINO's place on the rendered world; a folder with
            `config.json`, `model.safetensors` and `preprocessor_config.json`, or with timm's files; or a name on the
            Hugging Face hub.

    Raises:
        UserError: there is no such model.
    """
    return find_dino(source)()


def load_clip(source: str | Path) -> ClipEncoder:
    """Read a CLIP.

    Args:
        source: "world" for the rendered world's; a folder with `config.json`, `model.safetensors`,
            `preprocessor_config.json` and the tokenizer's files; or a name on the Hugging Face hub.

    Raises:
        UserError: there is no such model.
    """
    return find_clip(source)()


def load_lpips(source: str | Path) -> Distance:
    """Read LPIPS.

    Args:
        source: a folder with a `model.safetensors` made as the module's docstring says.

    Raises:
        UserError: there is no such model.
    """
    return find_lpips(source)()


def cosine_distance(encoder: ImageEncoder) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """One minus the cosine of two pictures' embeddings, in [0, 2]: what `distances_within` takes in LPIPS's place.

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
        results.append(hosts.to_numpy(function(part + part[-1:] * (size - len(part))))[: len(part)])
    return np.concatenate(results)


def _image_encoder(
    folder: Path, network: VisionTransformer, prepare: Preprocessing, read: Callable[..., Params]
) -> ImageEncoder:
    picture = jax.ShapeDtypeStruct((1, network.resolution, network.resolution, 3), jnp.float32)
    abstract = jax.eval_shape(network.init, jax.random.key(0), picture)["params"]
    return ImageEncoder(prepare, _on_every_device(network.apply, read(folder, abstract=abstract)))


def _clip_encoder(folder: Path, network: Clip, prepare: Preprocessing, tokenizer: Tokenizer) -> ClipEncoder:
    picture = jax.ShapeDtypeStruct((1, network.resolution, network.resolution, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, network.max_length), jnp.int32)
    abstract = jax.eval_shape(network.init, jax.random.key(0), picture, tokens)["params"]
    params = load_weights(folder, abstract, "clip")

    def tower(method: Callable) -> Callable:
        return _on_every_device(lambda params, x: network.apply(params, x, method=method), params)

    return ClipEncoder(ImageEncoder(prepare, tower(Clip.encode_images)), tokenizer, tower(Clip.encode_texts))


def _distance(folder: Path) -> Distance:
    network = Lpips()
    picture = jax.ShapeDtypeStruct((1, _LPIPS_SIDE, _LPIPS_SIDE, 3), jnp.float32)
    abstract = jax.eval_shape(network.init, jax.random.key(0), picture, picture)["params"]
    return Distance(_on_every_device(network.apply, load_weights(folder, abstract, "lpips")))


def _on_every_device(apply: Callable, params: Any) -> Callable:
    """The network with its parameters, batches split over all devices."""
    mesh = make_mesh((-1, 1, 1))
    params = hosts.device_put({"params": params}, replicated(mesh))
    apply = jax.jit(apply)

    def call(*batches: np.ndarray) -> Array:
        return apply(params, *hosts.device_put(batches, NamedSharding(mesh, BATCH)))

    return call


def _folder(source: str | Path, shipped: str, parts: str) -> Path:
    """Where an encoder's files lie, after downloading them if need be.

    Args:
        source: see `load_dino`.
        shipped: the folder of the rendered world's.
        parts: classes of transformers that read pickled weights, and what goes with them.
    """
    if str(source) == WORLD:
        return ASSETS / WORLD / shipped
    is_folder = bool(str(source)) and Path(source).is_dir()
    if not is_folder and not hub.is_name(source):
        raise UserError(
            f"{str(source)!r} is no encoder; give {WORLD!r}, a folder, or a name on the Hugging Face hub such as "
            f"'openai/clip-vit-large-patch14'{hub.hint(source)}."
        )
    folder = Path(source) if is_folder else hub.download(str(source), _HUB_FILES)
    hub.refuse_pointers(folder, ["*"])
    if not any(folder.glob("*.safetensors")):
        raise hub.no_safetensors(str(source), _CONVERT.format(parts, str(source).partition("@")[0]))
    return folder


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give the folder of a model of the hub.") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); restore the file.") from error
