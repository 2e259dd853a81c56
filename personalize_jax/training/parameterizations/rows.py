"""Rows of embeddings: only the vectors of the identifier's tokens are trained (Gal et al. 2022).

For n tokens the rows of {"text_encoder": {"tokens": {"embedding": [V, D]}}} are {"text_encoder": {"tokens":
{"embedding": [n, D]}}}. Which rows these are is data, so that one program can train several subjects.
"""

from collections.abc import Mapping

from jax import Array
from ml_collections import ConfigDict

from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.parameterizations.base import Chosen, Identifier, Parameterization, matching


def select(params: Mapping[str, Array], config: ConfigDict) -> Chosen:
    """The tables whose rule says "identifier"."""
    return matching(params, config.trainable, "identifier")


def init(values: Mapping[str, Array], chosen: Chosen, identifier: Identifier | None, key: Array) -> Params:
    """The identifier's rows [n, D] of each table, each the mean of the pretrained rows that it starts from."""
    assert identifier is not None, "rows are trained of an identifier's tokens, see `needed_identifier`"
    return unflatten({path: values[path][identifier.start_ids].mean(1) for path in chosen})


def apply(networks: Params, trained: Params, token_ids: Array | None) -> Params:
    """The networks with the trained rows in their tables, rounded to the table's dtype.

    Raises:
        UserError: the trained rows belong to no table of these networks.
    """
    params = flatten(networks)
    for path, rows_ND in flatten(trained).items():
        if path not in params:
            raise UserError(
                f"The trained rows of {path!r} fit no embedding here. If an earlier version of this program began the "
                "training, give another --workdir."
            )
        table_VD = params[path]
        params[path] = table_VD.at[token_ids].set(rows_ND.astype(table_VD.dtype))
    return unflatten(params)


ROWS = Parameterization("rows", "trainable", True, True, select, init, apply, export=apply)
