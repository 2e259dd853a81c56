"""What the rest of the package asks of a model family.

A family is one file here, and a line in `families.registry`. Nothing outside its file names its text encoders, its
denoiser, its autoencoder or its folders.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from jax import Array

from personalize_jax.families.batch import Batch, Tokens
from personalize_jax.families.objective import Objective
from personalize_jax.families.stage import Conditioning, Stage
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.params import Params

Place = Callable[[Params], Params]  # from a tree of shapes to a tree of shardings

UNCONDITIONAL = ""  # the caption whose conditioning is the unconditional one of classifier-free guidance


class Family(Protocol):
    """One model of a family, all but its parameters.

    Parameters are a dict of networks by name: those of `encoders`, one for each stage under the stage's name, and
    whatever else the family needs.

    Attributes:
        stages: the denoisers in the order of sampling; each after the first enlarges what the one before it made.
        tokenizer: the vocabulary that identifiers are chosen from; None in a model that is only planned with.
        encoders: names of the networks that turn tokens into conditioning. They can be tuned with a denoiser.
        vocabulary_size: number of tokens V, those that the vocabulary leaves unused among them.
    """

    stages: tuple[Stage, ...]
    tokenizer: Tokenizer | None
    encoders: ClassVar[tuple[str, ...]]

    @property
    def vocabulary_size(self) -> int:
        """V."""

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Token ids of captions, for `condition`."""

    def condition(self, params: Params, tokens: Tokens) -> Conditioning:
        """What the denoisers see of captions; traceable.

        Args:
            params: of the networks in `encoders`, by name.
            tokens: from `tokenize`.
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
        """The weighted sum of all groups' losses, and each group's own by name; traceable.

        Args:
            stage: the stage in training.
            objective: constants of the loss, and the groups.
            params: {"denoiser": ...} and the `encoders`, for `models.adapters.apply`: some may come with adapters.
            frozen_params: the pretrained ones, as far as targets need them.
            batches: a batch of each group by its name, all of one size.
            rng: random key of this step.
        """

    def to_latents(self, params: Params, x_BHWC: Array) -> tuple[Array, Array] | None:
        """Mean and standard deviation of the latents of pictures in [-1, 1]; None where pictures are denoised.

        Args:
            params: of all networks.
            x_BHWC: pictures.
        """

    def to_pictures(self, params: Params, z_BHWC: Array) -> Array:
        """Pictures, about in [-1, 1], of what the last step of sampling gives.

        Args:
            params: of all networks.
            z_BHWC: latents, or pictures already.
        """

    def shapes(self) -> Params:
        """Shapes and dtypes of all parameters, as they lie in memory.

        Raises:
            UserError: no networks can be built of such sizes.
        """

    def token_shapes(self, count: int) -> Tokens:
        """Shapes of the tokens of so many captions."""

    def with_stages(self, stages: Sequence[Stage]) -> Self:
        """The same model with its first stages only, or with stages that are sampled in another way."""

    def write(self, read: Callable[[str], Params], folder: Path, dtype: Any) -> None:
        """Write a pipeline in the layout that the family is read from, each file to a temporary name first.

        Args:
            read: the float32 parameters of a network, by its name.
            folder: made if missing; files of the same names are replaced.
            dtype: of the stored parameters.

        Raises:
            UserError: a file cannot be written.
        """

    def write_adapters(self, adapters: Mapping[str, Params], folder: Path) -> None:
        """Write low-rank adapters by themselves, beside a pipeline, in the layout that others read.

        Args:
            adapters: by stage.
            folder: of the pipeline.
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
            place: from a tree of shapes to a tree of shardings for the parameters; None for the default device.

        Raises:
            UserError: a file cannot be used.
        """


class Loaded(NamedTuple):
    """A model that was read.

    Attributes:
        family: all but its parameters.
        params: by network, as they are computed with.
        read_float32: what reads a network's float32 parameters, by name, where `params` has them rounded.
    """

    family: Family
    params: Params
    read_float32: Mapping[str, Callable[[], Params]]
