"""An autoregressive text-to-image model: pictures as tokens, sampled one after the other (specification [0035]).

A picture tokenizer, an autoencoder with quantised latents, turns a picture into a grid of tokens; a causal transformer,
conditioned on the caption, gives each token's distribution given the tokens before it in reading order. Both terms of
DreamBooth's objective are in its own likelihood, per token:

    -log p(photo | "a [V] dog")  +  lambda times  -log p(class image | "a dog"), or KL(p_frozen || p) along class images

`personalize_jax.pretrain` trains the tokenizer first, and then the transformer with the text encoder on its tokens.
`families.own` tells what a folder holds: `picture_tokenizer.safetensors` and `base.safetensors` are the two networks.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import einops
import jax
import jax.numpy as jnp
from jax import Array

from personalize_jax.diffusion.guidance import guide
from personalize_jax.families.batch import Batch, interleave, separate
from personalize_jax.families.objective import Objective
from personalize_jax.families.own import OwnNetworks
from personalize_jax.families.stage import Conditioning, Stage
from personalize_jax.models import adapters
from personalize_jax.models.adapters import Adapted
from personalize_jax.models.causal_transformer import CausalTransformer
from personalize_jax.models.params import Params
from personalize_jax.models.picture_tokenizer import PictureTokenizer, codes_of, ids_of
from personalize_jax.runtime.errors import UserError

TOKENIZER = "picture_tokenizer"  # name of the network, and of the stage that pretraining trains it as
TokenSampler = Literal["ancestral", "truncated"]


class TokenSampling(NamedTuple):
    """How pictures are sampled.

    Attributes:
        sampler: "ancestral" samples each token from the network's distribution; "truncated" from its likeliest tokens.
        num_steps: network evaluations a picture (doubled by guidance): one for each token.
        guidance_scale: w of classifier-free guidance, of logits; 1 switches it off.
        temperature: divisor of the logits ("truncated" only).
        top_k: number of the likeliest tokens that are left ("truncated" only).
    """

    sampler: TokenSampler
    num_steps: int
    guidance_scale: float
    temperature: float = 1.0
    top_k: int = 100

    def next_token(self, key: Array, logits_V: Array) -> Array:
        """Sample a token."""
        if self.sampler == "truncated":
            logits_V /= self.temperature
            least = jax.lax.top_k(logits_V, min(self.top_k, logits_V.shape[-1]))[0][-1]
            logits_V = jnp.where(logits_V < least, -jnp.inf, logits_V)
        return jax.random.categorical(key, logits_V)


@dataclasses.dataclass(frozen=True)
class TokenStage:
    """The causal transformer over the tokens of a picture tokenizer. It works on codes: see `models.picture_tokenizer`.

    Attributes:
        name: the key of its parameters in the pipeline.
        network: the transformer.
        codec: the picture tokenizer, whose parameters are another network's.
        resolution: side of the pictures, pixels.
        sampling: the default way to sample pictures.
    """

    name: str
    network: CausalTransformer
    codec: PictureTokenizer
    resolution: int
    sampling: TokenSampling

    low_resolution: ClassVar[None] = None
    learned_variance: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, dimensions) of a picture's codes."""
        side = self.resolution // self.codec.factor
        return side, side, len(self.codec.levels)

    def init_params(self, key: Array, cond: Conditioning) -> Params:
        """Random parameters, for conditioning of the shapes of `cond`."""
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), cond)
        return self.network.init(key, self._ids(jnp.zeros((1, *self.shape))), *zeros)["params"]

    def apply(self, params: Params | Adapted, codes_BHWD: Array, cond: Conditioning) -> Array:
        """Logits [B, H, W, V] of every token of pictures, given the tokens before it."""
        logits_BNV = adapters.apply(self.network, params, self._ids(codes_BHWD), *cond)
        return logits_BNV.reshape(*codes_BHWD.shape[:3], -1)

    def errors(self, logits_BHWV: Array, codes_BHWD: Array) -> Array:
        """The negative log-likelihood of every token, [B, H, W], in nats."""
        ids_BHW = ids_of(codes_BHWD, self.codec.levels)
        log_p = jax.nn.log_softmax(logits_BHWV)
        return -jnp.take_along_axis(log_p, ids_BHW[..., None], axis=-1)[..., 0]

    def times(self, sampling: TokenSampling) -> Array:
        """The positions that sampling visits.

        Raises:
            UserError: they are not as many as the sampling has steps.
        """
        count = self.network.length
        if sampling.num_steps != count:
            raise UserError(
                f"The {self.name} stage is to be sampled in num_steps={sampling.num_steps}, and each of its {count} "
                f"tokens takes a step; give {count}."
            )
        return jnp.arange(count)

    def sample(
        self,
        params: Params,
        keys_B: Array,
        cond: Conditioning,
        null_cond: Conditioning,
        sampling: TokenSampling,
        low_BHWC: Array | None = None,
    ) -> Array:
        """Sample codes of pictures; traceable.

        Args:
            params: parameters of the transformer.
            keys_B: one key a picture; a picture depends on its own key alone.
            cond: conditioning of B prompts.
            null_cond: the unconditional one, B times.
            sampling: sampler and guidance.
            low_BHWC: None; other stages enlarge pictures.

        Returns:
            float32 [B, H, W, D]. NaN where the network's logits were not finite.
        """
        assert low_BHWC is None
        guided, count = sampling.guidance_scale != 1.0, len(keys_B)
        if guided:
            cond = jax.tree.map(lambda c, u: jnp.concatenate([c, u]), cond, null_cond)
        run = partial(self.network.apply, {"params": params})
        context: Any = run(*cond, method="read")
        size = 2 * count if guided else count
        ids = jnp.zeros((size, self.network.length), jnp.int32)

        def step(before: tuple[Array, Any], position: Array) -> tuple[tuple[Array, Any], Array]:
            ids, cache = before
            output: Any = run(ids, position, context, cache, method="step")
            logits, cache = output
            if guided:
                logits = guide(logits[:count], logits[count:], sampling.guidance_scale)
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, position)
            ids_B = jax.vmap(sampling.next_token)(keys, logits)
            ids = ids.at[:, position].set(jnp.concatenate([ids_B, ids_B]) if guided else ids_B)
            return (ids, cache), jnp.isfinite(logits).all(-1)

        start = ids, self.network.empty_cache(size)
        (ids, _), finite_NB = jax.lax.scan(step, start, self.times(sampling))
        codes = codes_of(ids[:count].reshape(count, *self.shape[:2]), self.codec.levels)
        return jnp.where(finite_NB.all(0)[:, None, None, None], codes, jnp.nan)

    def _ids(self, codes_BHWD: Array) -> Array:
        return ids_of(codes_BHWD, self.codec.levels).reshape(len(codes_BHWD), -1)


@dataclasses.dataclass(frozen=True)
class TokenizerStage:
    """The picture tokenizer in training; only a model that has no transformer yet has it as a stage.

    Attributes:
        network: the picture tokenizer.
        resolution: side of the pictures, pixels.
    """

    network: PictureTokenizer
    resolution: int

    name: ClassVar[str] = TOKENIZER
    low_resolution: ClassVar[None] = None
    learned_variance: ClassVar[bool] = False
    sampling: ClassVar[TokenSampling] = TokenSampling("ancestral", 0, 1.0)  # no tokens

    def init_params(self, key: Array, cond: Conditioning) -> Params:
        """Random parameters; there is no conditioning."""
        return self.network.init(key, jnp.zeros((1, self.resolution, self.resolution, 3)))["params"]

    def apply(self, params: Params | Adapted, x_BHWC: Array, cond: Conditioning) -> Array:
        """Pictures through the codes and back."""
        return adapters.apply(self.network, params, x_BHWC)

    def errors(self, output_BHWC: Array, x_BHWC: Array) -> Array:
        """The mean absolute error of every pixel, [B, H, W]."""
        return jnp.abs(output_BHWC - x_BHWC).mean(-1)

    def sample(self, *_: Any) -> Array:
        """Refuse to sample.

        Raises:
            UserError: always.
        """
        raise UserError(
            "This model has a picture tokenizer and no transformer yet, which samples pictures; pretrain that by "
            "--config=configs/pretrain_autoregressive.py:base with this folder as --config.pretrained."
        )


@dataclasses.dataclass(frozen=True)
class Autoregressive(OwnNetworks):
    """Such a model. Its one stage is the transformer's, or the tokenizer's as long as there is no transformer."""

    # It has what the package uses of any stage; what `Stage` has beside that, diffusion models alone use.
    stages: tuple[Any, ...]

    index: ClassVar[str] = "autoregressive.json"

    @classmethod
    def read_stages(cls, specs: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
        """Build the stage, a `TokenizerStage` or a `TokenStage`.

        Args:
            specs: that of the tokenizer (name, resolution, network: arguments of `PictureTokenizer`), and that of the
                transformer, if there is one (name, network: width, num_layers and num_heads of `CausalTransformer`,
                sampling: fields of `TokenSampling`).

        Raises:
            UserError: a transformer has no tokenizer.
        """
        first, *others = specs
        if first["name"] != TOKENIZER:
            raise UserError(
                f"The stage {first['name']} needs a picture tokenizer; pretrain that first, by --config="
                "configs/pretrain_autoregressive.py:picture_tokenizer, and give its folder as --config.pretrained."
            )
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in first["network"].items()}
        codec = PictureTokenizer(**sizes)
        if not others:
            return (TokenizerStage(codec, first["resolution"]),)
        (spec,) = others
        side = first["resolution"] // codec.factor
        network = CausalTransformer(levels=codec.levels, rows=side, columns=side, **spec["network"])
        sampling = TokenSampling(**spec["sampling"])
        if sampling.sampler not in get_args(TokenSampler):
            raise ValueError(f"sampler is {sampling.sampler!r}; give one of {', '.join(get_args(TokenSampler))}.")
        return (TokenStage(spec["name"], network, codec, first["resolution"], sampling),)

    def shapes(self) -> Params:
        """Shapes of all parameters, float32."""
        shapes = self.network_shapes()
        if TOKENIZER not in shapes:
            (codec,) = self.read_stages(self.specs[:1])
            shapes[TOKENIZER] = jax.eval_shape(lambda: codec.init_params(jax.random.key(0), ()))
        return shapes

    def with_stages(self, stages: Sequence[Stage]) -> "Autoregressive":
        """The same model, sampled in another way."""
        (stage,) = stages
        if stage.name == TOKENIZER:
            return self
        specs = (*self.specs[:-1], {**self.specs[-1], "sampling": stage.sampling._asdict()})
        return dataclasses.replace(self, stages=tuple(stages), specs=specs)

    def to_latents(self, params: Params, x_BHWC: Array) -> tuple[Array, Array] | None:
        """Codes of pictures and zeros: they have no deviation. None while the tokenizer itself is trained."""
        if self.stages[-1].name == TOKENIZER:
            return None
        codes = _encode(self.stages[-1].codec, params[TOKENIZER], x_BHWC)
        return codes, jnp.zeros_like(codes)

    def to_pictures(self, params: Params, z_BHWC: Array) -> Array:
        """Pictures, about in [-1, 1], of codes."""
        return _decode(self.stages[-1].codec, params[TOKENIZER], z_BHWC)

    def loss(
        self,
        stage: Any,
        objective: Objective,
        params: Params,
        frozen_params: Params,
        batches: Mapping[str, Batch],
        rng: Array,
    ) -> tuple[Array, dict[str, Array]]:
        """The mean errors of all groups' tokens or pixels, weighted and summed; see `Family.loss`.

        Raises:
            UserError: the objective is about noise.
        """
        if objective.weighting != "none" or objective.offset_noise > 0:
            raise UserError(
                f"The training's weighting is {objective.weighting} and its offset_noise {objective.offset_noise}, "
                "which are about noise, and an autoregressive model is trained without any; give none and 0."
            )
        groups = objective.groups
        examples = [batches[group.name] for group in groups]
        inputs = [(batch.x, self._condition(params, batch)) for batch in examples]
        outputs = separate(stage.apply(params["denoiser"], *interleave(*inputs)), len(groups))
        loss, metrics = jnp.zeros(()), {}
        for group, batch, output in zip(groups, examples, outputs, strict=True):
            if group.target.needs_frozen:
                frozen = stage.apply(frozen_params["denoiser"], batch.x, self._condition(frozen_params, batch))
                error = divergence(jax.lax.stop_gradient(frozen), output)
            else:
                error = stage.errors(output, batch.x)
            term = jnp.mean(error * _weight(batch, error.shape[1]))
            metrics[f"{group.name}_loss"] = term
            loss += group.weight * term
        return loss, metrics

    def _condition(self, params: Params, batch: Batch) -> Conditioning:
        return self.condition(params, batch.tokens) if batch.cond is None else batch.cond


def divergence(frozen_logits: Array, logits: Array) -> Array:
    """KL(p_frozen || p) of distributions [..., V] by their logits, in nats [...]: 0, with no gradient, where equal."""
    frozen_log_p, log_p = jax.nn.log_softmax(frozen_logits), jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(frozen_log_p) * (frozen_log_p - log_p), axis=-1)


def _weight(batch: Batch, side: int) -> Array:
    """The mean weight of the pixels of each of side x side parts of a picture, [B, side, side]; or 1."""
    if batch.pixel_weight is None:
        return jnp.ones(())
    return einops.reduce(batch.pixel_weight, "b (h p) (w q) 1 -> b h w", "mean", h=side, w=side)


@partial(jax.jit, static_argnums=0)
def _encode(codec: PictureTokenizer, params: Params, x_BHWC: Array) -> Any:
    return codec.apply({"params": params}, x_BHWC, method="encode")


@partial(jax.jit, static_argnums=0)
def _decode(codec: PictureTokenizer, params: Params, codes_BHWD: Array) -> Any:
    return codec.apply({"params": params}, codes_BHWD, method="decode")
