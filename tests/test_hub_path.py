"""The way of every user with a network, against a hub of the tests' own: what it gives, what it refuses, and how."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import datasets.config
import huggingface_hub.utils._http
import pytest
from conftest import make_pairs, run_main
from datasets import Dataset
from hub_server import GOOD_TOKEN, hub
from huggingface_hub import constants

from reward_pipeline import hub as hub_room
from reward_pipeline import models, sources
from reward_pipeline.files import InputError
from reward_pipeline.sources import open_source, open_sources

MODEL, PAIRS = "tester/tiny", "tester/pairs"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_model, root / "models" / MODEL)
    data = root / "datasets" / PAIRS / "data"
    data.mkdir(parents=True)
    for split, count in (("average_rating_split", 30), ("train", 5)):
        Dataset.from_list(make_pairs(count)).to_parquet(data / f"{split}-00000-of-00001.parquet")
    files = [f"  - split: {split}\n    path: data/{split}-*\n" for split in ("average_rating_split", "train")]
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(files) + "---\n"
    (data.parent / "README.md").write_text(card)
    return root


def point_at(monkeypatch, server, home: Path) -> None:
    """Let the libraries, which read these at their import, use this server and an empty cache."""
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    changes = {
        constants: {
            "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_DOWNLOAD_TIMEOUT": 1, "HF_HUB_ETAG_TIMEOUT": 5,
        },
        datasets.config: {
            "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": str(home / "datasets"),
            "HUB_DATASETS_URL": server.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        },
        hub_room: {"PAUSES": (0, 0)},
        huggingface_hub.utils._http: {"time": SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})},
        sources: {"HUB_DATASET": PAIRS},
    }  # fmt: skip
    for module, values in changes.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    hub_room.hub_reachable.cache_clear()


@pytest.fixture
def server(repositories, tmp_path, monkeypatch, request):
    root = shutil.copytree(repositories, tmp_path / "root")
    with hub(root, getattr(request, "param", "")) as running:
        point_at(monkeypatch, running, tmp_path / "home")
        yield running
    hub_room.hub_reachable.cache_clear()


def offline(monkeypatch) -> None:
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    hub_room.hub_reachable.cache_clear()


def downloads(server) -> list[str]:
    return [path for method, path, _ in server.log if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize("server", ["", "/mirror/hf"], indirect=True)
def test_model_and_data_come_by_id_and_then_from_the_cache(server, monkeypatch):
    shas = [server.revision(server.root / kind) for kind in (f"models/{MODEL}", f"datasets/{PAIRS}")]
    first = models.resolve_model(MODEL), open_source("hub")
    assert first[0].origin == f"hub {MODEL}, revision {shas[0]}"
    assert first[1].origin == f"hub {PAIRS}, average_rating_split, revision {shas[1]}"
    assert models.load_sft_model(first[0].path).config.hidden_size == 32
    pairs = [row.values for row in first[1].rows]
    assert len(pairs) == 30
    server.log.clear()
    assert models.resolve_model(MODEL) == first[0] and open_source("hub").origin == first[1].origin
    assert not downloads(server)
    offline(monkeypatch)
    server.log.clear()
    assert models.resolve_model(MODEL) == first[0]
    (source,) = open_sources(None, None)
    assert source.origin == first[1].origin and [row.values for row in source.rows] == pairs
    assert not server.log


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_waited_for(server, status, capsys):
    server.rules += [["/api/models/", status, 2], ["/api/datasets/", status, 2], ["HEAD /$", status, 1]]
    assert models.resolve_model(MODEL).origin.startswith(f"hub {MODEL}")
    assert len(list(open_source(PAIRS, "train").rows)) == 5
    assert f"The hub answers {status}; trying again" in capsys.readouterr().out


def test_what_does_not_pass_is_said_and_nothing_else_is_taken_instead(server, monkeypatch):
    monkeypatch.setattr(models, "PACKAGED_MODEL", MODEL)
    server.rules += [["/api/", 503, 99]]
    with pytest.raises(InputError, match=f"{MODEL}: the hub answers 503 .*; try again later"):
        models.resolve_model(MODEL)
    with pytest.raises(InputError, match=f"{PAIRS}: the hub answers 503 .*; try again later"):
        open_sources(None, None)
    server.rules.clear()
    found = models.resolve_model(MODEL)
    server.rules += [["/api/", 503, 99]]
    assert models.resolve_model(MODEL) == found  # the cache is of the same model


def test_a_slow_first_answer_is_an_answer(server, monkeypatch):
    monkeypatch.setattr(hub_room, "CONNECT_TIMEOUT", 0.2)
    server.rules += [["HEAD /", 0.6, 1]]
    assert hub_room.hub_reachable()


def test_who_may_not_read_is_told_how(server, monkeypatch):
    server.gated |= {MODEL, PAIRS}
    for ask in (models.resolve_model, open_source):
        with pytest.raises(
            InputError, match=r"is gated; ask for access on its page of the hub, then log in by `hf auth"
        ):
            ask(MODEL if ask is models.resolve_model else PAIRS)
        with pytest.raises(InputError, match=r"nobody/nothing: no such repository on the hub, or a private one"):
            ask("nobody/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    for ask in (models.resolve_model, open_source):
        with pytest.raises(InputError, match=r"the hub refuses the token \(401\); log in by `hf auth login`"):
            ask("tester/other")


def test_a_login_page_is_not_the_hub(server):
    server.rules += [["/api/", 200, 99]]
    with pytest.raises(InputError, match=r"tester/tiny: what answers at http://127.* is not the hub; a login page"):
        models.resolve_model(MODEL)


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_download_that_breaks_off_or_stalls_goes_on(server, fault):
    server.rules += [["GET .*model.safetensors", fault, 1], ["GET .*parquet", fault, 1]]
    path = models.resolve_model(MODEL).path
    original = server.root / "models" / MODEL / "model.safetensors"
    assert (Path(path) / "model.safetensors").read_bytes() == original.read_bytes()
    assert len(list(open_source(PAIRS, "train").rows)) == 5


def test_what_is_recorded_is_what_was_loaded(server, capsys):
    old = open_source(PAIRS)
    (server.root / "datasets" / PAIRS / "data" / "average_rating_split-00000-of-00001.parquet").write_bytes(b"new")
    server.rules += [["/resolve/|/tree/", 503, 999]]
    new = open_source(PAIRS)
    assert (new.revision, new.origin) == (old.revision, old.origin) and len(list(new.rows)) == 30
    assert f"using revision {old.revision} from the cache" in capsys.readouterr().out


@pytest.fixture
def finished(tmp_path):
    """A directory as a training leaves it."""
    output = tmp_path / "my_model"
    for name in ("README.md", "plots/a.png", "checkpoints/c/optimizer.pt", "runs/r/log", ".lock", "training_args.bin"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("content")
    return output


def test_a_finished_directory_is_pushed_whole_and_alone(server, finished):
    address = hub_room.push_directory(finished, "my_model", GOOD_TOKEN)
    assert address == f"{server.url}/tester/my_model"
    pushed = server.root / "models" / "tester" / "my_model"
    files = {str(path.relative_to(pushed)) for path in pushed.rglob("*") if path.is_file()}
    assert files - {".gitattributes"} == {"README.md", "plots/a.png"}
    hub_room.check_login(GOOD_TOKEN)


def test_a_push_that_fails_keeps_what_there_is_and_says_so(server, finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    server.rules += [["/commit/", 503, 99]]
    with pytest.raises(InputError, match=r"the hub answers 503 .* is complete; the same command uploads it"):
        hub_room.push_directory(finished, "tester/my_model", GOOD_TOKEN)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    server.rules.clear()
    with pytest.raises(InputError, match=r"the hub refuses the token \(401\)"):
        hub_room.push_directory(finished, "tester/my_model", "hf_expired")
    for token in ("hf_expired", False):
        with pytest.raises(InputError, match=r"--push_to_hub: the hub knows nobody by this token .*hf auth login"):
            hub_room.check_login(token)
    hub_room.push_directory(finished, "tester/my_model", GOOD_TOKEN)


def test_a_stream_stays_at_its_revision_and_is_patient(server):
    first = open_source(PAIRS, "train", streaming=True)
    assert len(list(first.rows)) == 5
    server.rules += [["/api/datasets/", 503, 1]]
    again = open_source(PAIRS, "train", streaming=True, revision=first.revision)
    assert again.origin == first.origin and len(list(again.rows)) == 5


def test_the_data_step_asks_for_what_it_needs_and_keeps_its_token(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    run_main("load_helpsteer_dataset", monkeypatch, "--model", MODEL, "--output", tmp_path / "data")
    assert not [path for path in downloads(server) if path.endswith(".safetensors")]
    assert {token for _, path, token in server.log if path.startswith("/api/")} == {f"Bearer {GOOD_TOKEN}"}
    written = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert written and not any(GOOD_TOKEN.encode() in content for content in written)
    metadata = json.loads((tmp_path / "data" / "metadata.json").read_text())
    assert metadata["source"].startswith(f"hub {PAIRS}, average_rating_split, revision ")

    # Later, without a network and without the cache: the sample does not take the place of these pairs.
    shutil.rmtree(tmp_path / "home" / "datasets")
    offline(monkeypatch)
    with pytest.raises(SystemExit, match=r"data: holds pairs of hub tester/pairs.*--source sample does so"):
        run_main("load_helpsteer_dataset", monkeypatch, "--model", MODEL, "--output", tmp_path / "data")
    assert json.loads((tmp_path / "data" / "metadata.json").read_text()) == metadata
