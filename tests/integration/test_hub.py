"""Models on a hub: what is asked of it over HTTP. The hub is a folder, served by this process."""

import json
import re
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

from quailora.cli.app import main
from quailora.errors import CheckpointError
from quailora.modeling.checkpoint import INDEX, SINGLE, Checkpoint
from tests.helpers import tiny

URL = "/{repo_id}/resolve/{revision}/{filename}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as those of the model someone/tiny.

    asked: (method, file, whether a part of it was asked for), of the files that are there.
    broken: of the files that are there, those that cannot be had.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[tuple[str, str, bool]] = []
        self.broken: set[str] = set()

    def downloaded(self) -> set[str]:
        return {file for method, file, part in self.asked if method == "GET" and not part}


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match = re.fullmatch(r"/someone/tiny/resolve/main/([\w.-]+)", self.path)
        file = self.server.folder / match[1] if match else None
        if file is None or not file.is_file():
            self._answer(HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "EntryNotFound"})
            return
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.server.asked.append((self.command, file.name, part is not None))
        if file.name in self.server.broken:
            self._answer(HTTPStatus.FORBIDDEN, b"", {})
            return
        content = file.read_bytes()
        if part:
            self._answer(HTTPStatus.PARTIAL_CONTENT, content[int(part[1]) : int(part[2]) + 1], {})
        else:
            self._answer(HTTPStatus.OK, content, {"ETag": f'"{file.name}"'})

    def _answer(self, status: HTTPStatus, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["1GB", "100KB"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The only hub of huggingface_hub, and an empty cache."""
    tiny.model().save_pretrained(tmp_path / "model", max_shard_size=request.param)
    with Hub(tmp_path / "model") as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + URL)
        monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield hub
        hub.shutdown()
        thread.join()


def test_weights_are_downloaded_once_and_are_then_what_headers_are_read_from(hub: Hub) -> None:
    weights = {file.name for file in hub.folder.glob("*.safetensors")}
    fingerprint = Checkpoint("someone/tiny").fingerprint
    assert fingerprint == Checkpoint(hub.folder).fingerprint
    assert weights <= hub.downloaded()
    hub.asked.clear()
    assert Checkpoint("someone/tiny", headers_only=True).fingerprint == fingerprint
    assert not weights & {file for _, file, _ in hub.asked}


def plan(model: str | Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    settings = "--json --rank 4 --samples 4 --sequence-length 16 --device cpu --memory-budget 2GiB"
    monkeypatch.setattr(sys, "argv", ["quailora", "plan", str(model), *settings.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    return json.loads(capsys.readouterr().out) | {"seconds": None}


def test_a_plan_takes_headers_alone(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = plan("someone/tiny", capsys, monkeypatch)
    weights = {file.name for file in hub.folder.glob("*.safetensors")}
    assert {file for _, file, part in hub.asked if part} == weights
    assert not weights & hub.downloaded()
    assert remote == plan(hub.folder, capsys, monkeypatch)


@pytest.mark.parametrize("hub", ["100KB"], indirect=True)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no weights", f"someone/tiny has neither {SINGLE} nor {INDEX}"),
        ("no access", "the headers of 'someone/tiny' cannot be downloaded: .*403"),
        ("no safetensors", "the headers of 'someone/tiny' cannot be downloaded: "),
    ],
)
def test_headers_that_cannot_be_had_are_named(fault: str, said: str, hub: Hub) -> None:
    shards = sorted(hub.folder.glob("*.safetensors"))
    if fault == "no weights":
        (hub.folder / INDEX).unlink()
    elif fault == "no access":
        hub.broken = {shard.name for shard in shards}
    else:
        shards[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=said):
        Checkpoint("someone/tiny", headers_only=True)
