"""Hub ids, against a server of ours: what is fetched, cached, refused."""

import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import pytest
from conftest import make_model, save_retriever
from safetensors.torch import load_file
from test_train import together
from torch.multiprocessing import ProcessRaisedException

from revela import Retriever

SHA = {"main": "a" * 40, "v1": "b" * 40}
KNOWN = (*SHA, *SHA.values())
POOLED = ["1_Pooling/config.json", "pooling.safetensors"]
UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture
def hub(tmp_path):
    """(the variables that lead to a hub with org/tiny in two revisions, [file sent by it])"""
    for revision, seed in (("main", 0), ("v1", 1)):
        folder = make_model(tmp_path / "hub" / SHA[revision], seed=seed)
        for name in ("pytorch_model.bin", "original/model.safetensors", "README.md"):  # not needed
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
    save_retriever(folder, tmp_path / "mean", "mean")  # the second revision pools by its mean
    shutil.copy(tmp_path / "mean/pooling.safetensors", folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text('{"pooling_mode": "mean"}')
    sent = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = unquote(self.path.split("?")[0]).strip("/").split("/")
            if parts[:4] == ["api", "models", "org", "tiny"] and parts[5] in KNOWN:
                folder = tmp_path / "hub" / SHA.get(parts[5], parts[5])
                names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
                siblings = [{"rfilename": name} for name in names]
                answer = {"id": "org/tiny", "sha": folder.name, "siblings": siblings}
                if parts[4] == "tree":
                    answer = [{"type": "file", "path": n, "size": 1, "oid": n} for n in names]
                self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            elif parts[:3] == ["org", "tiny", "resolve"]:
                sha, file = SHA.get(parts[3], parts[3]), "/".join(parts[4:])
                raw = (tmp_path / "hub" / sha / file).read_bytes()
                self.answer(
                    200, raw, {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "X-Repo-Commit": sha}
                )
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
    home = {"HF_HOME": str(tmp_path / "home")}
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"} | home, sent
    server.shutdown()
    server.server_close()


def fetch(model, truth=None):
    """Read `model`, which is the one in the folder `truth`."""
    retriever = Retriever.from_pretrained(model)
    retriever.encode(["a text"])
    weights = load_file(f"{truth}/model.safetensors")
    assert retriever.llama.norm.weight.equal(weights["model.norm.weight"])
    if "@v1" in model:
        assert retriever.mean.equal(load_file(f"{truth}/pooling.safetensors")["mean"])
    assert retriever.pooling == ("mean" if "@v1" in model else "eos")


def test_a_hub_id_is_fetched_once_and_only_what_is_needed(hub, tmp_path):
    env, sent = hub
    main, v1 = (tmp_path / "hub" / SHA[revision] for revision in ("main", "v1"))
    needed = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for model, truth, files in (
        ("org/tiny", main, needed),
        ("org/tiny@v1", v1, sorted(["model.safetensors", *POOLED])),  # the rest is the same in both
        ("org/tiny", main, []),
    ):
        together(1, fetch, model, truth, **env)
        assert sorted(sent) == files
        sent.clear()
    together(1, fetch, "org/tiny", main, **env | UNREACHABLE, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(
    "model, more",
    [
        ("org/none", {}),
        ("org/tiny@none", {}),
        ("org/tiny", {"HF_HUB_OFFLINE": "1"}),
        ("org/tiny", UNREACHABLE),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence_with_the_way_out(hub, model, more):
    with pytest.raises(ProcessRaisedException) as error:
        together(1, fetch, model, **hub[0] | more)
    said = str(error.value).strip().splitlines()[-1]
    assert said.startswith(f"ValueError: {model} is no folder here")
    assert f"`hf download {model.split('@')[0]} --local-dir FOLDER`" in said
