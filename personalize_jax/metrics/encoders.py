"""Encoders with which the paper measures: DINO, CLIP and LPIPS, read from safetensors without torch.

DINO and CLIP come from the Hugging Face hub (see `formats.hub`) or from a folder with the same files, DINO's as
transformers or timm publishes it; "world" names those that ship, trained on the rendered world by `world.encoder`.
LPIPS is published as pickles only, of which `_CONVERT_LPIPS` makes a folder; without one, `cosine_distance` takes its
place.

Of each there is `find_...`, which fails early, before pictures are sampled, and gives a function that reads the
weights; and `load_...`, which does both.
"""

import dataclasses
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
from personalize_jax.metrics.similarity import Distance
from personalize_jax.models.clip import Clip
from personalize_jax.models.lpips import Lpips
from personalize_jax.models.params import Params
from personalize_jax.models.vit import VisionTransformer
from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import ASSETS
from personalize_jax.runtime.sharding import BATCH, make_mesh, replicated

BATCH_SIZE = 64
PAIRS = 8  # compared at once, at their own size: LPIPS keeps 64 features of every pixel
WORLD = "world"  # the name of the encoders that ship
_HUB_FILES = (
    *("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
)
# Python that makes folders of safetensors from pickled weights.
_CONVERT = "for part in ({}): part.from_pretrained({!r}).save_pretrained(folder)"
_CONVERT_LPIPS = (
    "import lpips, safetensors.torch; safetensors.torch.save_model(lpips.LPIPS(net='alex'), '{}/model.safetensors')"
)
_DINO_PARTS = "transformers.ViTModel, transformers.ViTImageProcessor"
_CLIP_PARTS = "transformers.CLIPModel, transformers.CLIPImageProcessor, transformers.CLIPTokenizer"
_LPIPS_SIDE = 64  # of the pictures by which parameters get their shapes; these serve every size


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """A network that embeds pictures.

    Attributes:
        prepare: the preprocessing of pictures.
        embed: the network, from prepared pictures [B, H, W, 3] to embeddings [B, D].
    """

    prepare: Preprocessing
    embed: Callable[[np.ndarray], Array]

    def __call__(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
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
        images: the encoder of pictures.
        tokenizer: the tokenizer of texts.
        embed_texts: the network from token ids [B, L] to embeddings of unit length [B, D].
    """

    images: ImageEncoder
    tokenizer: Tokenizer
    embed_texts: Callable[[np.ndarray], Array]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts; one longer than the network's length is cut.

        Returns:
            float32 [N, D], of unit length.

        Raises:
            ValueError: no texts.
        """
        return in_batches(lambda part: self.embed_texts(self.tokenizer(part)), texts)


def label(source: str | Path) -> str:
    """The name of an encoder in tables: the last part of its source, without a revision.

    >>> label("openai/clip-vit-base-patch32@refs/pr/66")
    'clip-vit-base-patch32'
    """
    return str(source).partition("@")[0].rstrip("/").rpartition("/")[2]


def find_dino(source: str | Path) -> Callable[[], ImageEncoder]:
    """Find a ViT that was trained by DINO, and download it if need be; its embedding is that of the class token.

    Args:
        source: "world" for the instance encoder that stands in DINO's place on the rendered world; a folder with
            `config.json`, `model.safetensors` and `preprocessor_config.json`, or with timm's files; or a name on the
            Hugging Face hub.

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
        read = functools.partial(load_weights, naming="vit")

    def load() -> ImageEncoder:
        params = read(folder, abstract=_shapes(network, _picture(network.resolution)))
        return ImageEncoder(prepare, _on_every_device(network.apply, params))

    return load


def load_dino(source: str | Path) -> ImageEncoder:
    """Read a ViT that was trained by DINO; see `find_dino`."""
    return find_dino(source)()


def find_clip(source: str | Path) -> Callable[[], ClipEncoder]:
    """Find a CLIP, and download it if need be.

    Args:
        source: "world" for the rendered world's; a folder with `config.json`, `model.safetensors`,
            `preprocessor_config.json` and the tokenizer's files; or a name on the Hugging Face hub.

    Raises:
        UserError: there is no such model.
    """
    folder = _folder(source, "clip", _CLIP_PARTS)
    network = Clip.from_config(_config(folder))
    prepare, tokenizer = Preprocessing.read(folder), Tokenizer.from_folder(folder, network.max_length)

    def load() -> ClipEncoder:
        tokens = jax.ShapeDtypeStruct((1, network.max_length), jnp.int32)
        params = load_weights(folder, _shapes(network, _picture(network.resolution), tokens), "clip")
        images, texts = (
            _on_every_device(functools.partial(network.apply, method=tower), params)
            for tower in (Clip.encode_images, Clip.encode_texts)
        )
        return ClipEncoder(ImageEncoder(prepare, images), tokenizer, texts)

    return load


def load_clip(source: str | Path) -> ClipEncoder:
    """Read a CLIP; see `find_clip`."""
    return find_clip(source)()


def find_lpips(source: str | Path) -> Callable[[], Distance]:
    """Find LPIPS: 0 for equal pictures, and the greater the less two look alike; for sides of 32 pixels or more.

    Args:
        source: a folder with the `model.safetensors` that `_CONVERT_LPIPS` makes.

    Raises:
        UserError: there is no such folder, or it holds no safetensors.
    """
    folder = Path(source)
    if not str(source) or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{str(source)!r} is no folder with LPIPS as safetensors, and it is published as pickles only; make the "
            f"folder in Python by `{_CONVERT_LPIPS.format(source)}`, or give config.evaluation.lpips='' for the cosine "
            "of DINO in its place."
        )
    hub.refuse_pointers(folder, ["*"])

    def load() -> Distance:
        network = Lpips()
        params = load_weights(folder, _shapes(network, _picture(_LPIPS_SIDE), _picture(_LPIPS_SIDE)), "lpips")
        compare = _on_every_device(network.apply, params)

        def of_pairs(pairs: Sequence[np.ndarray]) -> Array:
            x_B2HWC = np.stack(pairs).astype(np.float32) / 127.5 - 1
            return compare(x_B2HWC[:, 0], x_B2HWC[:, 1])

        def distance(images_NHWC: np.ndarray, others_NHWC: np.ndarray) -> np.ndarray:
            return in_batches(of_pairs, np.stack([images_NHWC, others_NHWC], axis=1), PAIRS)

        return distance

    return load


def load_lpips(source: str | Path) -> Distance:
    """Read LPIPS; see `find_lpips`."""
    return find_lpips(source)()


def cosine_distance(encoder: ImageEncoder) -> Distance:
    """One minus the cosine of two pictures' embeddings, in [0, 2], in place of LPIPS."""

    def distance(images_NHWC: np.ndarray, others_NHWC: np.ndarray) -> np.ndarray:
        return 1 - np.sum(encoder(images_NHWC) * encoder(others_NHWC), axis=-1)

    return distance


def in_batches(
    function: Callable[[Sequence[Any]], Array], items: Sequence[Any] | np.ndarray, size: int = BATCH_SIZE
) -> np.ndarray:
    """Apply a function to a sequence in batches of one size, of which the last is filled up, as one program takes them.

    Args:
        function: a function of a batch, whose result has the batch's axis first.
        items: the sequence.
        size: the size of a batch, at most; rounded up to a multiple of the number of devices.

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


def _picture(side: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)


def _shapes(network: VisionTransformer | Clip | Lpips, *inputs: jax.ShapeDtypeStruct) -> Params:
    """The shapes of a network's parameters."""
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]


def _on_every_device(apply: Callable[..., Any], params: Params) -> Callable[..., Array]:
    """The jitted network with its parameters; batches are split over all devices."""
    mesh = make_mesh((-1, 1, 1))
    variables = hosts.device_put({"params": params}, replicated(mesh))
    jitted = jax.jit(apply)

    def call(*batches: np.ndarray) -> Array:
        return jitted(variables, *hosts.device_put(batches, NamedSharding(mesh, BATCH)))

    return call


def _folder(source: str | Path, shipped: str, parts: str) -> Path:
    """Find the folder of an encoder's files, and download them if need be.

    Args:
        source: see `find_dino`.
        shipped: the folder of the rendered world's encoder.
        parts: classes of transformers that read pickled weights, and the files beside them.
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
