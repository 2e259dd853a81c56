"""Methods of personalisation: the parameters that each of them trains, for every configuration.

A configuration is written for DreamBooth. A method changes which parameters are trained, and takes its own numbers from
`config.methods`. The patterns match parameters of the embedded cascade and of public models.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from personalize_jax.method.changes import changed

DREAMBOOTH = "dreambooth"

_EMBEDDING = "text_encoder/(tokens|(.*/)?token_embedding|shared)/embedding"
# Of the embedded cascade, of Stable Diffusion, and of DeepFloyd IF, which appends text to the keys and values.
_KEYS_AND_VALUES = "denoiser/.*(cross_attention/(key|value)|attn2/to_[kv]|add_[kv]_proj)/"


def dreambooth(config: ConfigDict) -> ConfigDict:
    """All layers, as configured (Ruiz et al. 2023)."""
    return changed(config)


def textual_inversion(config: ConfigDict) -> ConfigDict:
    """Only the identifier's embedding, which starts from the class noun's, in the base stage (Gal et al. 2022)."""
    rules = ((_EMBEDDING, "identifier"), (".*", False))
    return _trained(config, "textual_inversion", rules, identifier_init="class_noun", prior__weight=0.0)


def lora(config: ConfigDict) -> ConfigDict:
    """Low-rank adapters of the base stage's attention (Hu et al. 2021), with the prior term.

    Adapters act beside their layers: a step forms neither W + down up nor the gradient of a whole kernel. A step of
    Stable Diffusion 2.1 takes 101 TFLOP, and 128 TFLOP and more than twice the memory if all layers are trained, by

        python -m personalize_jax.plan --config=configs/stable_diffusion.py:2.1:lora --topology=v5p:1x1x1

    and by the same command with --config=configs/stable_diffusion.py:2.1.
    """
    return _trained(config, "lora", ((".*", False),))


def custom_diffusion(config: ConfigDict) -> ConfigDict:
    """The base stage's cross-attention keys and values, and the identifier's embedding (Kumari et al. 2023)."""
    rules = ((_KEYS_AND_VALUES, True), (_EMBEDDING, "identifier"), (".*", False))
    return _trained(config, "custom_diffusion", rules)


METHODS: dict[str, Callable[[ConfigDict], ConfigDict]] = {
    DREAMBOOTH: dreambooth,
    "textual_inversion": textual_inversion,
    "lora": lora,
    "custom_diffusion": custom_diffusion,
}


def apply(method: str, config: ConfigDict) -> ConfigDict:
    """The configuration of a method.

    Args:
        method: a key of `METHODS`.
        config: the configuration of DreamBooth, with the methods' own numbers in `config.methods`.

    Raises:
        ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"The method is {method!r}; give one of {', '.join(METHODS)}.")
    return METHODS[method](config)


def _trained(config: ConfigDict, method: str, rules: tuple, **changes: object) -> ConfigDict:
    """The configuration to train only the base stage by rules, with a method's numbers and further training keys."""
    copy = config.copy_and_resolve_references().unlock()
    copy.training.update(copy.methods[method])
    changes = {f"training__{key}": value for key, value in {"trainable": rules, **changes}.items()}
    return changed(copy, tune=("base",), **changes)
