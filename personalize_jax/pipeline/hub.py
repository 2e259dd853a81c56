"""The Hugging Face hub: names of its repositories, and downloads of chosen files."""

import re
from collections.abc import Sequence
from pathlib import Path

from personalize_jax.errors import UserError

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_name(source: str | Path) -> bool:
    """Whether a source could be "organisation/repository"."""
    return bool(_NAME.fullmatch(str(source)))


def download(repository: str, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """Download files of a repository, those that are not in the hub's cache yet.

    Args:
        repository: "organisation/repository".
        wanted: patterns of file names.
        unwanted: patterns of those to leave out.

    Returns:
        The folder in which they lie.

    Raises:
        UserError: no network, no such repository, no permission.
    """
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        return Path(snapshot_download(repository, allow_patterns=list(wanted), ignore_patterns=list(unwanted)))
    except Exception as error:  # of several libraries
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{repository!r} is no folder and could not be downloaded from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); check the name, the network and, for gated models, the access token."
        ) from error
