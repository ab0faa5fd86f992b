"""Hub ids, fetched by the hub's own client from a server on this machine that answers as the hub does."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

from layouts import (
    expected,
    numbers,
    timm_state,
    tiny,
    transformers_json,
    transformers_state,
    write_safetensors,
    write_shards,
)

import convert
import jaxvit
from convert import ConversionError
from convert.sources import BIN_INDEX, INDEX
from jaxvit.experiments.models.subjects import Spec, load
from jaxvit.model.params import to_params

ROOT = Path(__file__).parents[1]
CONFIG = tiny()
NUMBERS, OTHERS = numbers(CONFIG), numbers(CONFIG, seed=1)
REPO = "someone/tiny"
WEIGHTS = "model.safetensors"
FIRST, SECOND = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"
"""Commits."""

Files = dict[str, bytes]


# The server -----------------------------------------------------------------------------------------------------------


@dataclass
class Repository:
    commits: dict[str, Files]
    refs: dict[str, str] = field(default_factory=lambda: {"main": FIRST})
    gated: bool = False


class Hub:
    """A hub. Weights are on a host of their own, to which it sends the client on, and which may misbehave.

    Attributes:
      served: checksum of a file -> other bytes to serve in its place.
      broken: checksum of a file -> how many more times the connection breaks off: in the middle, then at once.
      ranges: the parts of files that were asked for.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.served: Files = {}
        self.broken: dict[str, int] = {}
        self.ranges: list[str] = []
        self.requests: list[str] = []
        self.port = 0
        self.start()

    def start(self):
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"


def is_large(file):
    return file.endswith((".safetensors", ".bin"))


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    pass


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if found := re.fullmatch(r"/large/([0-9a-f]{64})", path):
                self.large(found[1])
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self.about(found[1], *self.commit(found[1], found[2] or "main"))
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
                self.tree(self.commit(found[1], found[2])[1])
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.file(found[1], *self.commit(found[1], found[2]), found[3])
            else:
                raise Refused(404, "", "there is no such page")
        except Refused as error:
            status, code, message = error.args
            headers = {"X-Error-Code": code} if code else {}
            self.answer(json.dumps({"error": message}).encode(), status, {"X-Error-Message": message} | headers)

    def commit(self, repo, revision):
        if repo not in self.hub.repositories:
            if repo.startswith("private/"):
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            if repo.startswith("locked/"):
                raise Refused(401, "", "Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        repository = self.hub.repositories[repo]
        name = repository.refs.get(revision, revision)
        if name not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name, repository.commits[name]

    def about(self, repo, commit, files):
        siblings = [{"rfilename": name} for name in files]
        self.answer(json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []}).encode())

    def tree(self, files):
        entries = []
        for name, content in files.items():
            large = {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 134}}
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
            entries.append(entry | large if is_large(name) else entry)
        self.answer(json.dumps(entries).encode())

    def file(self, repo, commit, files, name):
        if self.hub.repositories[repo].gated:
            raise Refused(403, "GatedRepo", f"Access to model {repo} is restricted")
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            self.answer(b"", 404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif is_large(name):
            digest, elsewhere = sha256(files[name]), f"http://localhost:{self.hub.port}"
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[name]))}
            self.answer(b"", 302, headers | {"Location": f"{elsewhere}/large/{digest}"})
        else:
            self.answer(files[name], 200, headers | {"ETag": f'"{git_sha1(files[name])}"'})

    def large(self, digest):
        contents = (c for r in self.hub.repositories.values() for files in r.commits.values() for c in files.values())
        content = self.hub.served.get(digest) or next(c for c in contents if sha256(c) == digest)
        status, headers, start = 200, {"ETag": '"of another store"', "Accept-Ranges": "bytes"}, 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.hub.ranges.append(found[0])
        if self.hub.broken.get(digest, 0) > 0:
            self.hub.broken[digest] -= 1
            if start == 0:
                self.answer(content, status, headers, sent=len(content) // 2)
        else:
            self.answer(content[start:], status, headers)

    def answer(self, content, status=200, headers=None, sent=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])


# Repositories ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    """Writes weights, and gives the bytes of the file."""

    def made(state, file=WEIGHTS):
        return write_safetensors(tmp_path / "made" / file, state).read_bytes()

    return made


@pytest.fixture
def files(made):
    """A repository of transformers."""
    return {"README.md": b"# tiny", "config.json": described(), WEIGHTS: made(transformers_state(CONFIG, NUMBERS))}


def described():
    return json.dumps(transformers_json(CONFIG)).encode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and the client set to it, with an empty cache."""
    hub = Hub()
    settings = {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("AGENT_HARNESSES_PATH", "HF_TOKEN_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / name), raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits a second before it asks once more
    forget = getattr(huggingface_hub, "close_session", lambda: None)
    forget()
    yield hub
    forget()
    hub.stop()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"


def assert_loads(n=NUMBERS, config=CONFIG, repo=REPO, **options):
    """The model has these numbers, to the last bit. Gives what is known of its source."""
    model, provenance = convert.load_described(repo, **options)
    description = provenance.source
    params, wanted = to_params(model), expected(replace(config, mask_token=model.config.mask_token), n)
    assert set(params) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(np.asarray(params[name]), array, err_msg=name, strict=True)
    assert (description["kind"], description["path"]) == ("hub", repo)
    return description


def fails(*words, repo=REPO, **options):
    """A load fails with one sentence, in which all these words stand; gives it."""
    with pytest.raises(ConversionError) as raised:
        convert.load(repo, **options)
    message = str(raised.value)
    assert "\n" not in message and ". " not in message, message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    return message


# What is there --------------------------------------------------------------------------------------------------------


def test_transformers(hub, files, cache):
    hub.repositories[REPO] = Repository({FIRST: files | {"pytorch_model.bin": b"the same weights once more"}})
    description = assert_loads()
    assert description["revision"] == FIRST and "revision given" not in description
    assert description["sha256"] == {WEIGHTS: sha256(files[WEIGHTS])}
    assert description["config sha256"] == {"config.json": sha256(files["config.json"])}
    snapshot = cache / "snapshots" / FIRST
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == {
        name: files[name] for name in ("config.json", WEIGHTS)
    }
    hub.requests.clear()
    assert assert_loads() == description
    assert not [request for request in hub.requests if "/resolve/" in request or "/large/" in request]


def test_timm(hub, made):
    config = replace(CONFIG, heads=16)
    prepared = {"input_size": [3, 56, 56], "crop_pct": 0.875, "mean": [0.5] * 3, "std": [0.25] * 3}
    about = {"architecture": "vit_large_patch14_reg4_dinov2", "num_classes": 0, "pretrained_cfg": prepared}
    about["model_args"] = {"depth": 2, "embed_dim": 64}
    content = {"config.json": json.dumps(about).encode(), WEIGHTS: made(timm_state(config, NUMBERS))}
    hub.repositories[REPO] = Repository({FIRST: content})
    description = assert_loads(config=config)
    assert description["layout"] == "timm" and set(description["config sha256"]) == {"config.json"}
    model = convert.load(REPO)
    assert model.config.heads == 16 and model.config.preprocess == jaxvit.Preprocess(
        64, 56, (0.5,) * 3, (0.25,) * 3, margin="round"
    )


def test_open_clip(hub, made):
    rng = np.random.default_rng(0)
    D, names = 64, {"ln_1": (64,), "ln_2": (64,), "attn.out_proj": (64, 64), "mlp.c_fc": (256, 64)}
    shapes = {"class_embedding": (D,), "positional_embedding": (17, D), "conv1.weight": (D, 3, 4, 4), "proj": (D, 24)}
    shapes |= {f"{name}.{kind}": (D,) for name in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    for name, shape in (names | {"mlp.c_proj": (64, 256)}).items():
        at = f"transformer.resblocks.0.{name}"
        shapes |= {f"{at}.weight": shape, f"{at}.bias": shape[:1]}
    attention = "transformer.resblocks.0.attn.in_proj"
    shapes |= {f"{attention}_weight": (192, 64), f"{attention}_bias": (192,)}
    state = {f"visual.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    state |= {"text_projection": np.zeros((8, 24), np.float32), "logit_scale": np.ones((), np.float32)}
    vision = {"layers": 1, "width": D, "patch_size": 4, "image_size": 16}
    about = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {}}, "preprocess_cfg": {}}
    file, config = "open_clip_model.safetensors", "open_clip_config.json"
    hub.repositories[REPO] = Repository({FIRST: {config: json.dumps(about).encode(), file: made(state, file)}})
    model, provenance = convert.load_described(REPO)
    description = provenance.source
    assert (model.config.mlp, model.config.heads, model.config.depth) == ("gelu", 1, 1)
    assert set(description["sha256"]) == {file} and set(description["config sha256"]) == {config}
    np.testing.assert_array_equal(np.asarray(to_params(model)["norm.scale"]), state["visual.ln_post.weight"])


def test_pickle_only(hub, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(array) for name, array in transformers_state(CONFIG, NUMBERS).items()}
    torch.save(state, tmp_path / "some.bin")
    content = (tmp_path / "some.bin").read_bytes()
    hub.repositories[REPO] = Repository({FIRST: {"config.json": described(), "pytorch_model.bin": content}})
    assert assert_loads()["sha256"] == {"pytorch_model.bin": sha256(content)}


@pytest.mark.parametrize("broken", [False, True])
def test_shards_of_pickles(hub, tmp_path, broken):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(array) for name, array in transformers_state(CONFIG, NUMBERS).items()}
    content, where = {"config.json": described()}, {}
    for i in range(2):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        part = {name: state[name] for name in sorted(state)[i::2]}
        torch.save(part, tmp_path / file)
        content[file] = (tmp_path / file).read_bytes()
        where |= dict.fromkeys(part, file)
    shards = {name: sha256(each) for name, each in content.items() if name.endswith(".bin")}
    content[BIN_INDEX] = json.dumps({"weight_map": where}).encode()
    hub.repositories[REPO] = Repository({FIRST: content})
    if broken:  # the index and one shard are here, and stay
        hub.broken[list(shards.values())[1]] = 100
        fails(REPO, "the hub did not give it")
        hub.broken.clear()
    assert assert_loads()["sha256"] == shards


def test_variants(hub, files, made, cache):
    """Only the one that is taken is fetched, and not if there are weights without a variant."""
    other = made(transformers_state(CONFIG, OTHERS))
    half = {"model.fp16.safetensors": files[WEIGHTS], "model.bf16.safetensors": other}
    about = {"config.json": described()}
    hub.repositories[REPO] = Repository({FIRST: about | half})
    description = assert_loads()
    assert description["weights"] == "model.fp16.safetensors" and description["revision"] == FIRST
    assert {path.name for path in (cache / "snapshots" / FIRST).iterdir()} == {"config.json", "model.fp16.safetensors"}
    hub.repositories[REPO] = Repository({SECOND: files | {"model.fp16.safetensors": other}}, {"main": SECOND})
    assert "weights" not in assert_loads()
    assert not (cache / "snapshots" / SECOND / "model.fp16.safetensors").exists()


def test_pickled_variants(hub, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(array) for name, array in transformers_state(CONFIG, NUMBERS).items()}
    torch.save(state, tmp_path / "some.bin")
    content = {"config.json": described(), "pytorch_model.fp16.bin": (tmp_path / "some.bin").read_bytes()}
    hub.repositories[REPO] = Repository({FIRST: content})
    assert assert_loads()["weights"] == "pytorch_model.fp16.bin"


def test_revisions(hub, files, made):
    """A commit, a tag and a branch are other weights than main; what was given is recorded, and its commit."""
    later = files | {WEIGHTS: made(transformers_state(CONFIG, OTHERS))}
    refs = {"main": SECOND, "v1.0": FIRST, "pull/7": FIRST}
    hub.repositories[REPO] = Repository({FIRST: files, SECOND: later}, refs)
    assert assert_loads(OTHERS)["revision"] == SECOND
    for revision in ("v1.0", "pull/7"):
        description = assert_loads(revision=revision)
        assert (description["revision"], description["revision given"]) == (FIRST, revision)
    description = assert_loads(revision=FIRST)
    assert description["revision"] == FIRST and "revision given" not in description
    # A branch moves on.
    assert Spec(REPO).identity["revision"] == SECOND
    refs["main"] = FIRST
    assert assert_loads()["revision"] == FIRST
    assert Spec(REPO).identity["revision"] == FIRST
    pinned = load(Spec(REPO), "model", revision=SECOND)
    assert pinned.about.source["revision"] == SECOND


def test_command_line(hub, files, tmp_path):
    """In a process of its own, in which the environment alone says where the hub is."""
    hub.repositories[REPO] = Repository({FIRST: files})
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"JAX_PLATFORMS": "cpu", "NO_PROXY": "*", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HF_TOKEN")} | environment
    command = [sys.executable, "-m", "convert", REPO, str(tmp_path / "model"), "--revision", "main"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, source = jaxvit.read_config(tmp_path / "model")
    assert (source["path"], source["revision"], source["revision given"]) == (REPO, FIRST, "main")
    for name, array in expected(CONFIG, NUMBERS).items():
        found = to_params(jaxvit.load(tmp_path / "model"))[name]
        np.testing.assert_array_equal(np.asarray(found), array, err_msg=name, strict=True)


# Downloads that break off ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2**16, None])
def test_one_break(hub, files, monkeypatch, chunk):
    """What has arrived in whole chunks is not asked for again; a file smaller than one is fetched anew."""
    if chunk:
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    hub.repositories[REPO] = Repository({FIRST: files})
    hub.broken[sha256(files[WEIGHTS])] = 1
    assert_loads()
    half = len(files[WEIGHTS]) // 2
    assert hub.ranges == ([f"bytes={half // chunk * chunk}-"] if chunk else [])


@pytest.mark.parametrize("chunk", [2**16, None])
def test_broken_off(hub, files, cache, monkeypatch, chunk):
    """In the middle, and whenever the client tries once more; later the hub is well again."""
    if chunk:
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    hub.repositories[REPO] = Repository({FIRST: files})
    hub.broken[sha256(files[WEIGHTS])] = 100
    fails(REPO, "the hub did not give it", "connect")
    assert not (cache / "snapshots" / FIRST / WEIGHTS).exists()
    hub.broken.clear()
    assert_loads()
    assert (cache / "snapshots" / FIRST / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_broken_off_between_shards(hub, tmp_path):
    """The index and one shard are here, and stay; the other is fetched when the hub is well again."""
    folder = write_shards(tmp_path / "shards", transformers_state(CONFIG, NUMBERS))
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories[REPO] = Repository({FIRST: content | {"config.json": described()}})
    shards = sorted(name for name in content if name != INDEX)
    hub.broken[sha256(content[shards[1]])] = 100
    fails(REPO, "the hub did not give it")
    hub.broken.clear()
    assert assert_loads()["sha256"] == {name: sha256(content[name]) for name in shards}
    hub.stop()
    assert_loads()
    hub.start()


# Checksums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["other weights", "noise"])
def test_other_bytes(hub, files, made, cache, kind):
    """Of the same length. Nothing of them is read, and after what the message says, all is well."""
    good = files[WEIGHTS]
    other = made(transformers_state(CONFIG, OTHERS)) if kind == "other weights" else os.urandom(len(good))
    assert len(other) == len(good)
    hub.repositories[REPO] = Repository({FIRST: files})
    hub.served[sha256(good)] = other
    blob = cache / "blobs" / sha256(good)
    words = (WEIGHTS, "sha256", sha256(good)[:12], sha256(other)[:12], f"delete {blob} ")
    fails(*words)
    hub.served.clear()
    fails(*words)  # from the cache
    fails(*words, repo=str(cache / "snapshots" / FIRST))
    fails(*words, repo=str(cache / "snapshots" / FIRST / WEIGHTS))
    hub.stop()
    fails(*words)
    hub.start()
    Path(re.findall(r"delete (\S+)", fails(*words))[0]).unlink()
    assert assert_loads()["sha256"] == {WEIGHTS: sha256(good)}


def test_pickles_are_checked_before_they_are_read(hub):
    torch = pytest.importorskip("torch")
    content = b"what was published"
    hub.repositories[REPO] = Repository({FIRST: {"config.json": described(), "pytorch_model.bin": content}})
    hub.served[sha256(content)] = b"what was not      "
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", None)
        fails("pytorch_model.bin", "damaged or was replaced", "delete")


def test_blobs_in_a_store(hub, files, cache):
    """A blob may be a link itself, to a file whose name has 64 digits that are no sha256."""
    hub.repositories[REPO] = Repository({FIRST: files})
    assert_loads()
    blob, stored = cache / "blobs" / sha256(files[WEIGHTS]), cache.parent / "blobs" / "ab" / ("ab" * 32)
    stored.parent.mkdir(parents=True)
    blob.rename(stored)
    blob.symlink_to(stored)
    assert_loads()
    stored.write_bytes(files[WEIGHTS][::-1])
    fails(WEIGHTS, sha256(files[WEIGHTS])[:12], f"delete {stored} ")
    stored.unlink()
    assert_loads()


# What is not there ----------------------------------------------------------------------------------------------------


def test_no_repository(hub):
    fails("someone/else is no path here", "no such repository", repo="someone/else")
    fails("private/tiny is no path here", "no such repository, or a private one", "HF_TOKEN", repo="private/tiny")
    fails("locked/tiny is no path here", "401 Unauthorized", repo="locked/tiny")


def test_no_revision(hub, files):
    hub.repositories[REPO] = Repository({FIRST: files})
    for revision in ("v2.0", SECOND):
        fails(REPO, f"the repository has no revision {revision}", revision=revision)
    assert_loads(revision="main")
    fails(REPO, "the repository has no revision v2.0", revision="v2.0")


def test_gated(hub, files):
    hub.repositories[REPO] = Repository({FIRST: files}, gated=True)
    fails(REPO, "it is gated", "accept its terms", "HF_TOKEN")


def test_no_weights(hub, files):
    hub.repositories[REPO] = Repository({FIRST: {"README.md": b"# tiny", "tf_model.h5": b"other"}})
    fails(f"{REPO} on the hub holds none of", WEIGHTS, "pytorch_model.bin")


def test_no_server(hub, files):
    hub.repositories[REPO] = Repository({FIRST: files})
    hub.stop()
    fails(REPO, "the hub did not give it", "refused")
    fails(REPO, "the hub did not give it", "refused", revision=FIRST)
    hub.start()
    first = assert_loads()
    hub.stop()
    assert assert_loads() == first
    assert_loads(revision=FIRST)
    fails(REPO, "the hub did not give it", "refused", revision="v1.0")
    hub.start()


def test_offline(hub, files, monkeypatch):
    hub.repositories[REPO] = Repository({FIRST: files})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails(REPO, "the hub did not give it", "outgoing traffic has been disabled")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert_loads()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert_loads()
    assert not hub.requests
