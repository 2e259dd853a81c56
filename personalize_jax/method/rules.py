"""Rules for single values of a configuration, and the words in which an error sentence tells them."""

import math
import re
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be.

    Attributes:
        wanted: the allowed values, in the words of an error sentence.
        holds: whether a value is allowed; never raises.
        required: whether the key must be there.
    """

    wanted: str
    holds: Callable[[Any], bool]
    required: bool = True


Rules = Mapping[str, Rule]


def one_of(*choices: str) -> Rule:
    """One of a few names."""
    return Rule(f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices)


def truth() -> Rule:
    """True or False."""
    return Rule("True or False", lambda value: isinstance(value, bool))


def whole(least: int, most: int | None = None) -> Rule:
    """A whole number from `least` to `most`."""
    wanted = f"a whole number of {least} or more" if most is None else f"a whole number from {least} to {most}"
    end = math.inf if most is None else most
    return Rule(wanted, lambda value: _is_number(value, Integral) and least <= value <= end)


def number(least: float = -math.inf, most: float = math.inf, above: float = -math.inf, below: float = math.inf) -> Rule:
    """A finite number within limits."""
    limits = {"of at least": least, "of at most": most, "above": above, "below": below}
    said = " and ".join(f"{how} {limit:g}" for how, limit in limits.items() if math.isfinite(limit))

    def holds(value: Any) -> bool:
        if not _is_number(value, Real) or not math.isfinite(value):
            return False
        return least <= value <= most and above < value < below

    return Rule(f"a finite number {said}".rstrip(), holds)


def text(wanted: str, empty: bool = False) -> Rule:
    """A name or a path, without zero bytes, which no system opens."""
    return Rule(wanted, lambda value: isinstance(value, str) and (empty or bool(value.strip())) and "\0" not in value)


def several(wanted: str, each: Rule, least: int = 1) -> Rule:
    """At least `least` values, each of which another rule allows."""
    return Rule(wanted, lambda value: is_several(value) and len(value) >= least and all(map(each.holds, value)))


def either(first: Rule, second: Rule) -> Rule:
    """A value that one of two rules allows."""
    return Rule(f"{first.wanted}, or {second.wanted}", lambda value: first.holds(value) or second.holds(value))


def patterns(wanted: str, says: Callable[[Any], bool], least: int = 1) -> Rule:
    """Pairs of a regular expression and a value for the paths that it matches."""

    def is_pair(value: Any) -> bool:
        return is_several(value) and len(value) == 2 and _is_pattern(value[0]) and says(value[1])

    return several(wanted, Rule("", is_pair), least)


def within(section: str, rules: Rules) -> dict[str, Rule]:
    """The rules of a section, by their keys in the whole configuration."""
    return {f"{section}.{key}": rule for key, rule in rules.items()}


def optional(rules: Rules) -> dict[str, Rule]:
    """The same rules for keys that may be missing."""
    return {key: rule._replace(required=False) for key, rule in rules.items()}


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def is_several(value: Any) -> bool:
    """Whether a value is a list or a tuple."""
    return isinstance(value, list | tuple)


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return isinstance(value, str)
