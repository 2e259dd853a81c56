import huggingface_hub
import pytest

from personalize_jax.errors import UserError
from personalize_jax.pipeline import hub


@pytest.mark.parametrize("source", ["facebook/dino-vits16", "stable-diffusion-v1-5/stable-diffusion-v1-5"])
def test_names_of_repositories_are_known(source):
    assert hub.is_name(source)


@pytest.mark.parametrize("source", ["", "dino", "../a", "/a/b", "a/b/c", "a b/c", "a/..", "a/b\n"])
def test_paths_are_no_names(source):
    assert not hub.is_name(source)


def test_a_failed_download_is_told_in_one_sentence(monkeypatch):
    def fail(name, **_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"'a/b' is no folder and could not be .* \(ConnectionError: no route\); check"):
        hub.download("a/b", ["*.json"])
