"""What families of this project's own networks have in common: text encoder, vocabulary, and their layout on disk.

`personalize_jax.pretrain` makes such models. A folder holds

<index>                     the stages and the text encoder, as plain data, in a file that each family names itself
tokenizer.json              the vocabulary
token_counts.json           how often each token was processed in pretraining
text_encoder.safetensors    parameters, one file a network
base.safetensors ...
"""

import abc
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
from jax.typing import DTypeLike

from personalize_jax.families.base import Family, Loaded, Place
from personalize_jax.families.stage import Stage
from personalize_jax.families.text import TextConditioned
from personalize_jax.formats.parameters import load_params, save_params
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.params import Params
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text


@dataclasses.dataclass(frozen=True)
class OwnNetworks(TextConditioned):
    """Such a family; its tokenizer has the token counts that pretraining recorded.

    Attributes:
        specs: each network that pretraining trains in a training of its own, as plain data with its "name".
    """

    text_encoder: TextEncoder
    specs: tuple[Mapping[str, Any], ...] = dataclasses.field(compare=False)

    index: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def read_stages(cls, specs: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
        """Build the stages from plain data, as stored in the index and written in configs.

        Raises:
            ValueError, LookupError or TypeError: the data describe no stages.
        """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all networks."""
        return ("text_encoder", *(spec["name"] for spec in self.specs))

    def with_counts(self, counts: np.ndarray) -> Self:
        """The same model after further pretraining: `counts`, int64 [V], are added to its token counts."""
        assert self.tokenizer is not None and self.tokenizer.counts is not None  # both are in a folder of such a family
        tokenizer = dataclasses.replace(self.tokenizer, counts=self.tokenizer.counts + counts)
        return dataclasses.replace(self, tokenizer=tokenizer)

    def with_stage(self, spec: Mapping[str, Any]) -> Self:
        """The same model with a network in place of its own of that name, or after all; later ones are dropped."""
        i = next((i for i, other in enumerate(self.specs) if other["name"] == spec["name"]), len(self.specs))
        specs = (*self.specs[:i], spec)
        return dataclasses.replace(self, stages=self.read_stages(specs), specs=specs)

    def write(self, read: Callable[[str], Params], folder: Path, dtype: DTypeLike) -> None:
        """Write a folder that `read_folder` reads."""
        assert self.tokenizer is not None and self.tokenizer.counts is not None  # as read, or from pretraining
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.names:
            save_params(read(name), folder / f"{name}.safetensors", dtype)
        write_text(folder / "tokenizer.json", self.tokenizer.backend.backend_tokenizer.to_str())
        write_text(folder / "token_counts.json", json.dumps(self.tokenizer.counts.tolist()))
        fields = ("vocab_size", "width", "num_layers", "num_heads", "max_length")
        encoder = {field: getattr(self.text_encoder, field) for field in fields}
        write_text(folder / self.index, json.dumps({"text_encoder": encoder, "stages": list(self.specs)}, indent=2))

    def write_adapters(self, adapters: Mapping[str, Params], folder: Path) -> None:
        """Nothing: nobody else reads adapters of these networks."""

    @classmethod
    def reads(cls, folder: Path) -> bool:
        """Whether a folder is one that `write` wrote."""
        return (folder / cls.index).is_file()

    @classmethod
    def read_folder(cls, folder: Path, place: Place | None = None) -> Loaded:
        """Read a folder that `write` wrote; see `OwnFamily.read_folder`."""
        try:
            return cls._read(folder, place)
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{folder} is damaged ({type(error).__name__}: {error}); restore it, or write it again."
            ) from error

    @classmethod
    def _read(cls, folder: Path, place: Place | None) -> Loaded:
        spec = json.loads((folder / cls.index).read_text())
        text_encoder = TextEncoder(**spec["text_encoder"])
        counts = np.array(json.loads((folder / "token_counts.json").read_text()), np.int64)
        tokenizer = Tokenizer.read(folder / "tokenizer.json", text_encoder.max_length, counts)
        tokenizer.check_rows(text_encoder.vocab_size)
        family = cls(tokenizer, text_encoder, cls.read_stages(spec["stages"]), tuple(spec["stages"]))

        def read_network(name: str) -> Params:
            place_network = None if place is None else lambda shapes: place({name: shapes})[name]
            return load_params(folder / f"{name}.safetensors", place_network)

        params = {name: read_network(name) for name in family.names}
        return Loaded(cast(Family, family), params, {})  # of a subclass, which has the rest of the protocol
