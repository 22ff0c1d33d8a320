"""Hub ids, against a server on this machine that speaks the hub's protocol: what is fetched, cached, pinned, refused."""

import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import pytest
import torch
from conftest import command, make_model
from safetensors.torch import load_file

SHA = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, holding org/tiny in two revisions; yields the list of the files that were sent."""
    for revision, seed in (("main", 0), ("v1", 1)):
        folder = make_model(tmp_path / "hub" / SHA[revision], seed=seed)
        for name in ("pytorch_model.bin", "original/model.safetensors", "README.md"):  # what nobody needs
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = unquote(self.path.split("?")[0]).strip("/").split("/")
            if parts[:3] == ["api", "models", "org"] and parts[3:4] == ["tiny"] and parts[5] in (*SHA, *SHA.values()):
                sha = SHA.get(parts[5], parts[5])
                files = [p for p in sorted((tmp_path / "hub" / sha).rglob("*")) if p.is_file()]
                names = [str(p.relative_to(tmp_path / "hub" / sha)) for p in files]
                if parts[4] == "tree":
                    oid = lambda p: hashlib.sha1(p.read_bytes()).hexdigest()
                    answer = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": oid(p)} for n, p in zip(names, files)]
                else:
                    answer = {"id": "org/tiny", "sha": sha, "siblings": [{"rfilename": n} for n in names]}
                self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            elif parts[:3] == ["org", "tiny", "resolve"]:
                sha, file = SHA.get(parts[3], parts[3]), "/".join(parts[4:])
                content = (tmp_path / "hub" / sha / file).read_bytes()
                self.answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha})
                if self.command == "GET":
                    sent.append(file)
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def answer(self, code, body, headers):
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield sent
    server.shutdown()
    server.server_close()


def fetch(tmp_path, model, code=0):
    """Let a command of ours use `model`; its weights as it read them."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    _, stderr = command("eval.py", "--model", model, "--export", "out", "--device", "cpu", cwd=tmp_path, code=code)
    return load_file(tmp_path / "out/model.safetensors") if code == 0 else stderr


def test_a_hub_id_is_fetched_once_and_only_what_is_needed(hub, tmp_path, monkeypatch):
    same = lambda weights, revision: torch.equal(
        weights["norm.weight"], load_file(tmp_path / "hub" / SHA[revision] / "model.safetensors")["model.norm.weight"]
    )
    assert same(fetch(tmp_path, "org/tiny"), "main")
    assert sorted(hub) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    hub.clear()
    assert same(fetch(tmp_path, "org/tiny@v1"), "v1") and hub == ["model.safetensors"]  # the rest is the same in both
    hub.clear()
    assert same(fetch(tmp_path, "org/tiny"), "main") and hub == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert same(fetch(tmp_path, "org/tiny"), "main")


@pytest.mark.parametrize("model, env", [("org/none", {}), ("org/tiny@none", {}), ("org/tiny", {"HF_HUB_OFFLINE": "1"}),
                                        ("org/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"})])  # fmt: skip
def test_what_cannot_be_fetched_is_one_sentence_with_the_way_out(hub, tmp_path, monkeypatch, model, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    stderr = fetch(tmp_path, model, code=1)
    lines = [line for line in stderr.splitlines() if line.startswith("eval.py: ")]
    assert len(lines) == 1 and lines[0].startswith(f"eval.py: {model} is no folder here") and "Traceback" not in stderr
    assert f"`hf download {model.split('@')[0]} --local-dir FOLDER`" in lines[0]
