"""A pretrained or tuned model as one object: prompts and seeds in, pictures out."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from personalize_jax.families.base import UNCONDITIONAL, Family
from personalize_jax.families.sources import Origin
from personalize_jax.families.stage import Conditioning, Sampling, Stage
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models import attention
from personalize_jax.models.params import Params
from personalize_jax.pipeline.digests import kept_digest
from personalize_jax.runtime import hosts, interruption
from personalize_jax.runtime.errors import UserError

REMEMBERED = 64  # prompts whose conditioning is kept for the next batch


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A model of any family with its parameters.

    Attributes:
        family: the model without its parameters.
        params: parameters by network, in the dtypes of the computation.
        read_float32: reads a network's float32 parameters, by name, if `params` has them rounded.
        digests: digests of networks by name, which `fingerprint` fills in; copies that share networks share digests.
        origins: what networks were read from, by name; without those that were replaced.
    """

    family: Family
    params: Params
    read_float32: Mapping[str, Callable[[], Params]] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in the order of sampling; each after the first enlarges the pictures of the one before."""
        return self.family.stages

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary that identifiers are chosen from."""
        assert self.family.tokenizer is not None, "a model that is only planned with has no vocabulary"
        return self.family.tokenizer

    @property
    def fingerprint(self) -> str:
        """A digest of all parameters, and of how the stages are sampled.

        The first call hashes every float32 network whose files `kept_digest` does not know; copies what was replaced.
        """
        for name in sorted(self.params.keys() - self.digests.keys()):  # one float32 network at a time is in memory
            read = functools.partial(self.float32_params, name)
            self.digests[name] = kept_digest(self.origins.get(name), name, self.params[name], read)
        samplings = [stage.sampling._asdict() for stage in self.stages]
        digests = {name: self.digests[name] for name in self.params}
        made_of = json.dumps({"samplings": samplings, "networks": digests}, sort_keys=True)
        return hashlib.sha256(made_of.encode()).hexdigest()[:16]

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            UserError: there is none.
        """
        by_name = {stage.name: stage for stage in self.stages}
        if name not in by_name:
            raise UserError(f"The pipeline has no stage {name!r}; its stages are {' and '.join(by_name)}.")
        return by_name[name]

    def float32_params(self, name: str) -> Params:
        """The float32 parameters of a network, which training and saving need.

        Raises:
            UserError: `params` has them rounded, and their file cannot be read again.
        """
        return self.read_float32[name]() if name in self.read_float32 else self.params[name]

    def networks(self, stage: str) -> Params:
        """The networks that a stage can train, by the names that its training has for them: "denoiser" and encoders."""
        encoders = {name: self.params[name] for name in self.family.encoders}
        return {"denoiser": self.params[stage], **encoders}

    def float32_network(self, stage: str, name: str) -> Params:
        """The float32 parameters of one of the `networks` of a stage."""
        return self.float32_params(stage if name == "denoiser" else name)

    def replace_params(self, **params: Params) -> "Pipeline":
        """The same pipeline with other float32 parameters of some networks, by name."""
        read_float32 = {name: read for name, read in self.read_float32.items() if name not in params}
        digests = {name: digest for name, digest in self.digests.items() if name not in params}
        origins = {name: origin for name, origin in self.origins.items() if name not in params}
        return dataclasses.replace(
            self, params={**self.params, **params}, read_float32=read_float32, digests=digests, origins=origins
        )

    def replace_networks(self, params: Params, read_float32: Mapping[str, Callable[[], Params]]) -> "Pipeline":
        """The same pipeline with other parameters of some networks, rounded like the ones before.

        Args:
            params: float32 parameters by network.
            read_float32: reads them again.
        """
        old = {name: self.params[name] for name in params}
        replaced = self.replace_params(**jax.tree.map(lambda new, old: new.astype(old.dtype), params, old))
        again = {name: read for name, read in read_float32.items() if name in self.read_float32}
        return dataclasses.replace(replaced, read_float32={**replaced.read_float32, **again})

    def take_networks(self, other: "Pipeline", names: Collection[str]) -> "Pipeline":
        """The same pipeline with some of the networks of another one."""

        def merged(mine: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
            taken = {name: others[name] for name in names if name in others}
            return {**{name: value for name, value in mine.items() if name not in names}, **taken}

        return dataclasses.replace(
            self,
            params=merged(self.params, other.params),
            read_float32=merged(self.read_float32, other.read_float32),
            digests=merged(self.digests, other.digests),
            origins=merged(self.origins, other.origins),
        )

    def replace_sampling(self, **samplings: Sampling) -> "Pipeline":
        """The same pipeline with other sampling of some stages, by name."""
        stages = tuple(
            dataclasses.replace(stage, sampling=samplings.get(stage.name, stage.sampling)) for stage in self.stages
        )
        return dataclasses.replace(self, family=self.family.with_stages(stages))

    def up_to(self, name: str) -> "Pipeline":
        """The cascade that ends with the stage of that name.

        Raises:
            UserError: there is none.
        """
        end = self.stages.index(self.stage(name)) + 1
        return dataclasses.replace(self, family=self.family.with_stages(self.stages[:end]))

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of prompts, which the denoisers see."""
        return self.family.condition(self.params, self.family.tokenize(prompts))

    def to_latents(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and standard deviation of the latents of uint8 pictures [N, H, W, 3], float32 [N, h, w, C] each.

        None if the model denoises pictures and not latents.
        """
        pairs = []
        for picture in pictures:
            if (pair := self.family.to_latents(self.params, to_float(picture[None]))) is None:
                return None
            pairs.append(pair)
        mean, std = (np.concatenate([hosts.to_numpy(a) for a in part]) for part in zip(*pairs, strict=True))
        return mean, std

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        batch_size: int = 16,
        samplings: Mapping[str, Sampling] | None = None,
        progress: Callable[[int], object] = lambda pictures: None,
        full_batches: bool = False,
    ) -> list[np.ndarray]:
        """Sample one picture for each prompt; the arguments and errors are those of `sample_batches`.

        Returns:
            One uint8 array [N, H, W, 3] for each stage, low resolution first.
        """
        batches = [*self.sample_batches(prompts, seeds, batch_size, samplings, progress, full_batches)]
        return [np.concatenate(of_stage) for of_stage in zip(*batches, strict=True)]

    def sample_batches(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        batch_size: int = 16,
        samplings: Mapping[str, Sampling] | None = None,
        progress: Callable[[int], object] = lambda pictures: None,
        full_batches: bool = False,
    ) -> Iterator[list[np.ndarray]]:
        """Sample one picture for each prompt, and give each batch as soon as its pictures are finished.

        A picture is a function of its prompt and seed: neighbours, order and number of the others do not change it,
        and not a bit of it where batches are of one size. Each size is a program of its own, which may round otherwise,
        so that pixels differ by a level here and there.

        Args:
            prompts: one a picture.
            seeds: one a picture.
            batch_size: largest number of pictures sampled at once, rounded up to a multiple of the devices that they
                are split over. Fewer pictures are sampled as the next power of two; the last of several batches is
                filled up, and cut.
            samplings: overrides of the stages' own sampling, by stage name.
            progress: called with the number of pictures that a stage has just finished.
            full_batches: fill up every batch to `batch_size`, however few pictures are asked for. A call that resumes
                needs this: a picture is then the same, bit for bit, whichever others are missing.

        Yields:
            Of each batch one uint8 array [n, H, W, 3] for each stage, low resolution first.

        Raises:
            UserError: a picture is not finite.
            Stopped: on request, before a stage samples a batch.
        """
        for start, size in _batches(prompts, seeds, batch_size, full_batches):
            rows = slice(start, start + size)
            pictures: list[np.ndarray] = []
            for stage in self.stages:
                low, sampling = pictures[-1] if pictures else None, (samplings or {}).get(stage.name)
                pictures.append(self._sample_batch(stage, prompts[rows], seeds[rows], low, size, sampling))
                progress(len(pictures[-1]))
            yield pictures

    def sample_stage(
        self,
        stage: Stage,
        prompts: Sequence[str],
        seeds: Sequence[int],
        low_res: np.ndarray | None = None,
        batch_size: int = 16,
        sampling: Sampling | None = None,
        progress: Callable[[int], object] = lambda pictures: None,
        full_batches: bool = False,
    ) -> np.ndarray:
        """Sample from one stage; uint8 [N, H, W, 3]. Other arguments and errors are those of `sample_batches`.

        Args:
            stage: one of `stages`.
            prompts: one a picture.
            seeds: one a picture.
            low_res: uint8 pictures of the stage before, for a super-resolution stage.
            batch_size: largest number of pictures sampled at once.
            sampling: in place of the stage's own.
            progress: called with the number of pictures just finished.
            full_batches: fill up every batch to `batch_size`.
        """
        pictures = []
        for start, size in _batches(prompts, seeds, batch_size, full_batches):
            rows = slice(start, start + size)
            low = None if low_res is None else low_res[rows]
            pictures.append(self._sample_batch(stage, prompts[rows], seeds[rows], low, size, sampling))
            progress(len(pictures[-1]))
        return np.concatenate(pictures)

    def _sample_batch(
        self,
        stage: Stage,
        prompts: Sequence[str],
        seeds: Sequence[int],
        low_res: np.ndarray | None,
        size: int,
        sampling: Sampling | None,
    ) -> np.ndarray:
        """Sample up to `size` pictures at once, filled up to that number with the last one."""
        interruption.check()
        rows = [min(i, len(prompts) - 1) for i in range(size)]
        keys = jnp.stack([_picture_key(seeds[row], self.stages.index(stage)) for row in rows])
        cond = self._encoded([prompts[row] for row in rows])
        null = self._encoded([UNCONDITIONAL] * size)
        inputs = _split_over_devices((keys, cond, null, None if low_res is None else low_res[rows]))
        batch = sample_pictures(stage, sampling or stage.sampling, _devices(), self._placed(stage.name), *inputs)
        batch = self.family.to_pictures(self.params, batch)
        _check_finite(hosts.to_numpy(finite(batch)), stage.name, prompts, seeds)
        return hosts.to_numpy(to_uint8(batch))[: len(prompts)]

    def _encoded(self, prompts: Sequence[str]) -> Conditioning:
        """`condition` of as many prompts as a batch has, each of them encoded once.

        Always so many are encoded at once, so that a prompt's conditioning does not depend on its neighbours' number.
        """
        size, known = len(prompts), self._conditions
        new = [prompt for prompt in dict.fromkeys(prompts) if (prompt, size) not in known]
        if new:
            cond = jax.tree.map(hosts.to_numpy, self.condition([*new, *new[-1:] * (size - len(new))]))
            known.update({(prompt, size): jax.tree.map(lambda a, i=i: a[i], cond) for i, prompt in enumerate(new)})
        cond = jax.tree.map(lambda *rows: np.stack(rows), *(known[prompt, size] for prompt in prompts))
        while len(known) > REMEMBERED:
            del known[next(iter(known))]
        return cond

    @functools.cached_property
    def _conditions(self) -> dict[tuple[str, int], Conditioning]:
        """The conditioning of single prompts, by prompt and by how many were encoded at once; the latest last."""
        return {}

    @functools.cached_property
    def _placed(self) -> Callable[[str], Params]:
        """The parameters of a stage on every device, placed once for all calls."""
        return functools.cache(lambda name: _on_every_device(self.params[name]))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def sample_pictures(
    stage: Stage,
    sampling: Sampling,
    mesh: Mesh,
    params: Params,
    keys_B: Array,
    cond: Conditioning,
    null_cond: Conditioning,
    low_res: Array | None,
) -> Array:
    """`Stage.sample` of uint8 low-resolution pictures, compiled, on a mesh whose devices split the batch.

    Each device samples pictures of its own, and needs all parameters for them: sharded ones are gathered once a batch.
    Left to itself, XLA gathers them again in every step.
    """
    low = None if low_res is None else to_float(low_res)
    params = jax.lax.with_sharding_constraint(params, NamedSharding(mesh, P()))
    with attention.over(mesh):
        return stage.sample(params, keys_B, cond, null_cond, sampling, low)


def _batches(
    prompts: Sequence[str], seeds: Sequence[int], batch_size: int, full_batches: bool
) -> Iterator[tuple[int, int]]:
    """Where each batch of pictures begins, and its size."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds were given; give one seed for each prompt.")
    size = batch_of(batch_size if full_batches else len(prompts), batch_size)
    for start in range(0, len(prompts), size):
        yield start, size


def batch_of(count: int, batch_size: int) -> int:
    """The size of the batches in which `count` pictures are sampled.

    It is the next power of two, as every size is a program that has to be compiled, or `batch_size` if that is less;
    rounded up to a multiple of the number of devices, which share a batch.
    """
    size = min(batch_size, 1 << (count - 1).bit_length())
    return size + -size % jax.device_count()


def to_float(u: Array) -> Array:
    """uint8 pictures as float32 in [-1, 1]."""
    return jnp.asarray(u, jnp.float32) / 127.5 - 1


@jax.jit
def to_uint8(x: Array) -> Array:
    """Pictures in [-1, 1] as uint8, rounded."""
    return jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5).astype(jnp.uint8)


@jax.jit
def finite(x_BHWC: Array) -> Array:
    """Whether all of a picture is finite, [B]."""
    return jnp.isfinite(x_BHWC).all((1, 2, 3))


def _check_finite(finite_B: np.ndarray, stage: str, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    for prompt, seed, is_finite in zip(prompts, seeds, finite_B, strict=False):  # of a batch that was filled up
        if not is_finite:
            raise UserError(
                f"The stage {stage} gives no finite picture of {prompt!r} (seed {seed}). Its weights may hold values "
                "that are not finite: get them again from their source. Or, of a public model, the computation "
                "overflows: give --config.compute.dtype=float32."
            )


def _split_over_devices(batch: Any) -> Any:
    """A pytree of [B, ...] arrays, sharded over the devices by their batch axis."""
    return hosts.device_put(batch, NamedSharding(_devices(), P("data"))) if jax.device_count() > 1 else batch


def _on_every_device(params: Params) -> Params:
    """Parameters replicated on all devices; those that are sharded stay so."""
    if jax.device_count() == 1:
        return params
    replicated = NamedSharding(_devices(), P())

    def place(value: Any) -> Array:
        sharded = isinstance(value, Array) and len(value.sharding.device_set) > 1
        return value if sharded else hosts.device_put(value, replicated)

    return jax.tree.map(place, params)


def _devices() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))


def _picture_key(seed: int, stage_index: int) -> Array:
    return jax.random.fold_in(jax.random.key(seed), stage_index)
