"""Which parameters are trained: regular expressions over slash-separated paths.

A parameter is trained as a whole, or in those rows that stand for the tokens of the identifier (of an embedding), or
through adapters. Rows are trained as parameters of their own, by token: those of the tokens 5 and 9 of {"text_encoder":
{"tokens": {"embedding": [V, D]}}} are {"text_encoder": {"tokens": {"embedding": {"5": [D], "9": [D]}}}}.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from personalize_jax.errors import UserError
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.training.lora import adapted_kernels, apply_adapters

# Where trained parameters hold adapters and rows, beside the networks.
LORA = "lora"
ROWS = "rows"

Rule = tuple[str, bool | Literal["identifier"]]  # a pattern, and what is trained of the parameters that it matches


def partition(params: Params, rules: Sequence[Rule], adapted: Collection[str] = ()) -> tuple[Params, Params, list[str]]:
    """Split parameters into those trained themselves and all others.

    Args:
        params: nested dict, such as {"denoiser": ..., "text_encoder": ...}.
        rules: (regular expression, what is trained) pairs; the first that matches a path's beginning decides: True,
            False or "identifier", the rows of the identifier's tokens.
        adapted: paths of the kernels that get adapters; if there are any, the rules may leave nothing else to train.

    Returns:
        Two nested dicts without common leaves, and the paths of parameters of which rows are trained; like adapted
        kernels, they are among the others.

    Raises:
        UserError: a path that no rule matches, a rule that says something else, an adapted kernel that the rules train
            too, or nothing left to train.
    """
    if wrong := [trained for _, trained in rules if trained not in (True, False, "identifier")]:
        raise UserError(f'A rule of config.training.trainable says {wrong[0]!r}; give True, False or "identifier".')
    sides: dict[bool, dict] = {True: {}, False: {}}
    with_rows = []
    for path, value in flatten(params).items():
        trained = next((trained for pattern, trained in rules if re.match(pattern, path)), None)
        if trained is None:
            raise UserError(f"Parameter {path!r} matches no rule of config.training.trainable; add one, such as '.*'.")
        if trained and path in adapted:
            raise UserError(
                f"Kernel {path!r} is to be trained by config.training.trainable and to be adapted by lora.targets; "
                "choose one: the rules (('.*', False),) train adapters alone."
            )
        sides[trained is True][path] = value
        with_rows += [path] * (trained == "identifier")
    if not sides[True] and not adapted and not with_rows:
        raise UserError(
            f"The rules {list(rules)} of config.training.trainable leave nothing to train; mark a pattern True."
        )
    return unflatten(sides[True]), unflatten(sides[False]), with_rows


class Selection(NamedTuple):
    """What a training changes, and what it leaves.

    Attributes:
        trained: parameters that are trained themselves.
        frozen: all others.
        with_rows: paths of those of the frozen ones of which the identifier's rows are trained.
        adapted: those of the frozen ones that get adapters: number of input dimensions by path.
    """

    trained: Params
    frozen: Params
    with_rows: list[str]
    adapted: dict[str, int]

    @property
    def networks(self) -> set[str]:
        """Names of the networks that change, directly, in rows or through adapters."""
        return {*self.trained, *(path.partition("/")[0] for path in (*self.adapted, *self.with_rows))}


def select(params: Params, config: ConfigDict) -> Selection:
    """Tell what a configuration trains.

    Args:
        params: as for `partition`.
        config: keys of `configs.common.training()`.

    Raises:
        UserError: the rules or the targets do not fit the parameters.
    """
    adapted = adapted_kernels(params, config.lora.rank, config.lora.targets)
    return Selection(*partition(params, config.trainable, adapted), adapted)


def init_rows(params: Params, paths: Sequence[str], tokens: Mapping[int, Sequence[int]]) -> Params:
    """Rows to train; traceable.

    Args:
        params: with the embeddings [V, D].
        paths: of these.
        tokens: for each token of the identifier those whose rows' mean it starts from.
    """
    tables = flatten(params)
    return unflatten(
        {f"{path}/{i}": tables[path][np.asarray(start)].mean(0) for path in paths for i, start in tokens.items()}
    )


def merge(trained: Params, others: Params) -> Params:
    """Parameters as the networks take them; traceable. Rows are rounded to their table's dtype.

    Args:
        trained: parameters, and under "lora" adapters, under "rows" rows, if there are any.
        others: what completes them; the kernels that adapters change are here, and the embeddings.
    """
    direct = {name: network for name, network in trained.items() if name not in (LORA, ROWS)}
    merged = {**flatten(others), **flatten(direct)}
    by_path: dict[str, dict[int, jnp.ndarray]] = {}
    for path, row in flatten(trained.get(ROWS, {})).items():
        table, _, token = path.rpartition("/")
        by_path.setdefault(table, {})[int(token)] = row
    for path, rows in by_path.items():
        table, values = merged[path], jnp.stack(list(rows.values()))
        merged[path] = table.at[np.array(list(rows))].set(values.astype(table.dtype))
    return apply_adapters(unflatten(merged), trained.get(LORA, {}))
