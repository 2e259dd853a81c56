"""Checks of published networks' `config.json` files before anything is built from them."""

import logging
import math
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from personalize_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)

_WORDS = {int: "a positive whole number", float: "a number", bool: "true or false", str: "a word", NoneType: "null"}


def known_keys(config: Mapping[str, Any], keys: Collection[str], network: str) -> dict[str, Any]:
    """The part of a configuration that a network's class knows, lists as tuples; as in diffusers, the rest is logged.

    Args:
        config: content of the file.
        keys: keys that the class knows; those that begin with an underscore are the file's own.
        network: name of the network in messages, such as "U-Net".
    """
    for key in config.keys() - keys:
        if not key.startswith("_"):
            logger.warning(
                "%s is %r in the %s's config.json; this key is unknown and ignored.", key, config[key], network
            )
    return {key: tuple(v) if isinstance(v, list) else v for key, v in config.items() if key in keys}


def check_kinds(config: Mapping[str, Any], kinds: Mapping[str, Any], network: str) -> None:
    """Refuse values of the wrong kind.

    Args:
        config: values, lists as tuples; keys without a kind are passed over.
        kinds: a type for each key, as annotations write them; whole numbers are positive.
        network: name of the network in messages.

    Raises:
        UserError: a value is of another kind.
    """
    for key, kind in kinds.items():
        if key in config and not _fits(config[key], kind):
            raise UserError(f"{key} is {config[key]!r} in the {network}'s config.json; expected {_in_words(kind)}.")


def check_choices(config: Mapping[str, Any], choices: Mapping[str, Collection[Any]], network: str) -> None:
    """Refuse values that are not supported.

    Args:
        config: values, lists as tuples, of the kinds that their keys have.
        choices: supported values of each key, or of each item where the value is a list.
        network: name of the network in messages.

    Raises:
        UserError: a value is none of the choices.
    """
    for key in config.keys() & choices.keys():
        for one in config[key] if isinstance(config[key], tuple) else (config[key],):
            if one not in choices[key]:
                known = ", ".join(map(str, choices[key]))
                raise UserError(f"{key} has {one!r} in the {network}'s config.json; supported are {known}.")


def check_groups(groups: int, widths: Collection[int], network: str) -> None:
    """Refuse group norms whose groups do not divide the channels of every level.

    Raises:
        UserError: a width is no multiple of the groups.
    """
    for width in widths:
        if width % groups:
            raise UserError(
                f"norm_num_groups is {groups} in the {network}'s config.json; expected what divides {width}, "
                "one of block_out_channels."
            )


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and bool(value) and all(_fits(one, parts[0]) for one in value)
    if kind in (int, float):
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return number and (value > 0 if kind is int else math.isfinite(value))
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"a list, each of it {_in_words(parts[0])}"
    return _WORDS[kind]
