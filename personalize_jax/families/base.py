"""The protocol of model families: everything that the rest of the package knows of a model.

A family is one file here, and a line in `families.registry`. Nothing outside its file names its text encoders, its
denoiser, its autoencoder or its folders.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, Self

from jax import Array
from jax.typing import DTypeLike

from personalize_jax.families.batch import Batch, Tokens
from personalize_jax.families.objective import Objective
from personalize_jax.families.sources import Origin
from personalize_jax.families.stage import Conditioning, Stage
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.params import Params

Place = Callable[[Params], Params]  # from a tree of shapes to a tree of shardings

UNCONDITIONAL = ""  # the caption whose conditioning is the unconditional one of classifier-free guidance


class Family(Protocol):
    """A model of a family, without its parameters.

    Parameters are a dict of networks by name: the `encoders`, each stage's denoiser under the stage's name, and
    whatever else the family needs.

    Attributes:
        encoders: names of the networks that turn tokens into conditioning. They can be tuned with a denoiser.
    """

    encoders: ClassVar[tuple[str, ...]]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The denoisers in the order of sampling; each after the first enlarges the pictures of the one before it."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The vocabulary that identifiers are chosen from; None in a model for planning only."""

    @property
    def vocabulary_size(self) -> int:
        """Rows V of the embedding table, ids that the vocabulary does not use included."""

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Token ids of captions, for `condition`."""

    def condition(self, params: Params, tokens: Tokens) -> Conditioning:
        """The denoisers' input from captions; traceable.

        Args:
            params: parameters with those of the networks in `encoders`.
            tokens: token ids from `tokenize`.
        """

    def loss(
        self,
        stage: Stage,
        objective: Objective,
        params: Params,
        frozen_params: Params,
        batches: Mapping[str, Batch],
        rng: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """The weighted sum of all groups' losses; traceable.

        Args:
            stage: the stage in training.
            objective: constants of the loss, and the groups.
            params: {"denoiser": ...} and the `encoders`, for `models.adapters.apply`: some may come with adapters.
            frozen_params: the pretrained parameters, as far as targets need them.
            batches: a batch of each group by its name, all of one size.
            rng: random key of this step.

        Returns:
            The scalar loss, and metrics by name, each group's "<group>_loss" among them.
        """

    def to_latents(self, params: Params, x_BHWC: Array) -> tuple[Array, Array] | None:
        """Mean and standard deviation of the latents of pictures in [-1, 1]; None where pictures are denoised.

        Args:
            params: parameters of all networks.
            x_BHWC: pictures.
        """

    def to_pictures(self, params: Params, z_BHWC: Array) -> Array:
        """Pictures, about in [-1, 1], from the result of the last step of sampling.

        Args:
            params: parameters of all networks.
            z_BHWC: latents, or pictures already.
        """

    def shapes(self) -> Params:
        """Shapes and dtypes of all parameters, as they lie in memory.

        Raises:
            UserError: no networks can be built of such sizes.
        """

    def token_shapes(self, count: int) -> Tokens:
        """Shapes of the tokens of `count` captions."""

    def with_stages(self, stages: Sequence[Stage]) -> Self:
        """The same model with its first stages only, or with stages that are sampled in another way."""

    def write(self, read: Callable[[str], Params], folder: Path, dtype: DTypeLike) -> None:
        """Write the model in the layout that the family is read from, each file to a temporary name first.

        Args:
            read: gives the float32 parameters of a network by its name.
            folder: made if missing; files of the same names are replaced.
            dtype: dtype of the stored parameters.

        Raises:
            UserError: a file cannot be written.
        """

    def write_adapters(self, adapters: Mapping[str, Params], folder: Path) -> None:
        """Write low-rank adapters by themselves, beside a pipeline, in the layout that others read.

        Args:
            adapters: adapters by stage.
            folder: the pipeline's folder.
        """


class OwnFamily(Family, Protocol):
    """A family with a layout of its own on disk."""

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """Whether a folder is one that `write` wrote."""

    @classmethod
    def read_folder(cls, folder: Path, place: Place | None = None) -> "Loaded":
        """Read a folder that `write` wrote.

        Args:
            folder: the folder.
            place: maps a tree of shapes to a tree of shardings for the parameters; None for the default device.

        Raises:
            UserError: a file cannot be used.
        """


class Loaded(NamedTuple):
    """A model that was read.

    Attributes:
        family: the model without its parameters.
        params: parameters by network, in the dtypes of the computation.
        read_float32: functions that read a network's float32 parameters, by name, where `params` has them rounded.
        origin: what it was read from; None where that is not known.
    """

    family: Family
    params: Params
    read_float32: Mapping[str, Callable[[], Params]]
    origin: Origin | None = None
