"""Which parameters are trained: regular expressions over slash-separated paths.

A parameter is trained as a whole, or in those rows that stand for the tokens of the identifier (of an embedding), or
through adapters. Rows are trained as parameters of their own, [n, D] at the path of their table [V, D]. Which rows
these are is data, so that one program can train several subjects.
"""

import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import jax
from jax import Array
from ml_collections import ConfigDict

from personalize_jax.errors import UserError
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.training.lora import adapted_kernels, apply_adapters

# Where trained parameters hold adapters and rows, beside the networks.
LORA = "lora"
ROWS = "rows"


class Identifier(NamedTuple):
    """The tokens of an identifier whose rows are trained.

    Attributes:
        token_ids: int32 [n], each token once.
        start_ids: int32 [n, k], for each of them the tokens whose rows' mean it starts from.
    """

    token_ids: Array
    start_ids: Array


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


def init_rows(tables: Params, identifier: Identifier) -> Params:
    """Rows to train; traceable.

    Args:
        tables: the embeddings [V, D].
        identifier: its tokens.

    Returns:
        Rows [n, D] at the path of each table.
    """
    return jax.tree.map(lambda table_VD: table_VD[identifier.start_ids].mean(1), tables)


def merge(trained: Params, others: Params, token_ids: Array | None = None) -> Params:
    """Parameters as the networks take them; traceable. Rows are rounded to their table's dtype.

    Args:
        trained: parameters, and under "lora" adapters, under "rows" rows, if there are any.
        others: what completes them; the kernels that adapters change are here, and the embeddings.
        token_ids: int32 [n], which rows of the embeddings are trained, where any are.

    Raises:
        UserError: rows of another kind than these embeddings'.
    """
    direct = {name: network for name, network in trained.items() if name not in (LORA, ROWS)}
    merged = {**flatten(others), **flatten(direct)}
    for path, rows_ND in flatten(trained.get(ROWS, {})).items():
        if path not in merged:
            raise UserError(
                f"Rows of {path!r} were trained, which is no embedding here; those of a training that was begun with "
                "an earlier version of this program cannot be read: give another --workdir."
            )
        table_VD = merged[path]
        merged[path] = table_VD.at[token_ids].set(rows_ND.astype(table_VD.dtype))
    return apply_adapters(unflatten(merged), trained.get(LORA, {}))
