"""Methods of personalisation: what each of them trains, for every configuration.

A configuration says how DreamBooth runs; a method changes what is trained, and takes its own numbers from
`config.methods`. Patterns name the parameters of the embedded cascade and of public models alike.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from personalize_jax.method.configuration import changed

DREAMBOOTH = "dreambooth"

_EMBEDDING = "text_encoder/(tokens|(.*/)?token_embedding|shared)/embedding"
# In the embedded cascade, in Stable Diffusion, and in DeepFloyd IF, where text is added to the keys and values.
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

    They act beside their layers: a step forms neither W + down up nor the gradient of a whole kernel. A step of Stable
    Diffusion 2.1 takes 8.8 GiB and 122 TFLOP where training all layers takes 20.7 GiB and 148 TFLOP, by

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
        config: how DreamBooth runs, with the methods' own numbers in `config.methods`.

    Raises:
        ValueError: there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"The method is {method!r}; give one of {', '.join(METHODS)}.")
    return METHODS[method](config)


def _trained(config: ConfigDict, method: str, rules: tuple, **changes: object) -> ConfigDict:
    """The base stage alone trained by rules, with a method's numbers and further changes of the training's keys."""
    copy = config.copy_and_resolve_references().unlock()
    copy.training.update(copy.methods[method])
    changes = {f"training__{key}": value for key, value in {"trainable": rules, **changes}.items()}
    return changed(copy, tune=("base",), **changes)
