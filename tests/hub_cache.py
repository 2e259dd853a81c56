"""The Hugging Face hub's cache, laid out by hand as its downloads leave it, and nothing but that cache to read."""

import hashlib
from pathlib import Path

import huggingface_hub


def use(monkeypatch, folder):
    """Read the hub from this folder alone."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def lay_out(cache, name, content):
    """Put a repository into a cache.

    Args:
        cache: the folder.
        name: "organisation/repository", perhaps with "@revision".
        content: a folder, or bytes by file name.

    Returns:
        The folder in which a download of it is.
    """
    if isinstance(content, Path):
        files = [file for file in content.rglob("*") if file.is_file()]
        content = {file.relative_to(content).as_posix(): file.read_bytes() for file in files}
    repository, _, revision = name.partition("@")
    root = cache / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    reference = root / "refs" / (revision or "main")
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    snapshot = root / "snapshots" / commit
    for file, data in content.items():
        blob, link = root / "blobs" / hashlib.sha1(data).hexdigest(), snapshot / file
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(blob)
    return snapshot
