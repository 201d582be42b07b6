"""The card as the Hub reads it, and the upload through the real client to a server that speaks the Hub's API."""

import ast
import base64
import hashlib
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import train_dopsd_flux2
import train_dopsd_zimage
from dopsd.errors import InputError
from dopsd.publish import LORA_FILE, escape, licence_of, publish, published_files, write_card


KLEIN_4B = "black-forest-labs/FLUX.2-klein-4B"
KLEIN_9B = "black-forest-labs/FLUX.2-klein-9B"
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"
OTHER_TOKEN = "hf_ThisOneTheServerSays0123456789"
WEIGHTS = bytes(range(256)) * 40
NASTY_PROMPTS = [
    "plain",
    "it's \"quoted\" \\ and 'so on'",
    "first line\nsecond line\r\nthird\n\n\n# fifth",
    "a: b, c: [d, {e: f}] # g & *h !i %j @k",
    "---\nlicense: mit\n---\n",
    "x\n---\ny",
    "| a | b |\n|---|---|\n\\| c",
    "```python\n<script>alert(1)</script> </details> [x](y) ![x](y) `code` **bold** $x$ ~~s~~ &amp;",
    "'''\n\"\"\"",
    "- item",
    "null",
    "2024-01-01",
    " padded ",
    "柯基犬 🐕 ünï \u2028 \x85 \ufeff",
]


def write(folder: Path, **changed) -> ModelCard:
    """A card on disk, as the Hub would parse it."""
    arguments = {
        "model": train_dopsd_flux2.CARD_MODEL,
        "repo_id": "someone/corgi",
        "base_model": KLEIN_4B,
        "instance_prompt": "a photo of sks corgi",
        "gallery": [("a corgi on the moon", "images/validation_0.png")],
        "settings": {"num_inference_steps": 4, "max_sequence_length": 512, "learning_rate": 2e-5},
        "retention": 0.1234,
    }
    path = write_card(folder, **(arguments | changed))
    assert path == folder / "README.md"
    return ModelCard.load(path)


# Card


def test_card_of_4b(tmp_path):
    card = write(tmp_path)
    assert card.data.to_dict() == {
        "base_model": KLEIN_4B,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-image",
        "tags": [
            "text-to-image",
            "diffusers",
            "diffusers-training",
            "lora",
            "d-opsd",
            "template:sd-lora",
            "flux2",
            "flux2-klein",
        ],
        "instance_prompt": "a photo of sks corgi",
        "widget": [{"text": "a corgi on the moon", "output": {"url": "images/validation_0.png"}}],
    }
    for text in ("# corgi", "arxiv.org/abs/2605.05204", "<Gallery />", "**0.123**", "| `--learning_rate` | 2e-05 |"):
        assert text in card.text
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub"):
        assert re.search(rf"^\| {package} \| \d+\.\d+", card.text, re.MULTILINE)
    assert "story.png" not in card.text and "Non-Commercial" not in card.text


def test_card_of_9b_has_its_licence(tmp_path):
    card = write(tmp_path, base_model=KLEIN_9B)
    assert card.data.base_model == KLEIN_9B
    link = f"https://huggingface.co/{KLEIN_9B}/blob/main/LICENSE.md"
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        "other",
        "flux-non-commercial-license",
        link,
    )
    assert link in card.text and "apache" not in str(card).lower()


@pytest.mark.parametrize(
    ("base_model", "licence"),
    [
        (KLEIN_4B, "apache-2.0"),
        ("black-forest-labs/FLUX.2-klein-base-4B", "apache-2.0"),
        ("black-forest-labs/flux.2-klein-4b-fp8", "apache-2.0"),
        (KLEIN_9B, "flux-non-commercial-license"),
        ("black-forest-labs/FLUX.2-klein-base-9B", "flux-non-commercial-license"),
        ("black-forest-labs/FLUX.2-klein-40B", None),
        ("Tongyi-MAI/Z-Image-Turbo", "apache-2.0"),
        ("Tongyi-MAI/Z-Image", "apache-2.0"),
        ("Tongyi-MAI/Z-Image-Other", None),
        ("black-forest-labs/FLUX.2-dev", None),
        ("someone/FLUX.2-klein-4B", None),
        ("/models/black-forest-labs/FLUX.2-klein-4B", None),
    ],
)
def test_licence_follows_the_base_model(base_model, licence):
    fields = licence_of(base_model)
    assert fields.get("license_name", fields["license"]) == (licence or "other")
    assert ("license_link" in fields) == (licence == "flux-non-commercial-license")


def test_a_local_base_model_is_named_and_does_not_leak(tmp_path, monkeypatch):
    model = tmp_path / "secret_place" / "my-klein"
    model.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(model), "secret_place/my-klein", "./secret_place/my-klein/"):
        card = write(tmp_path, base_model=path)
        assert card.data.base_model is None and "base_model_relation" not in card.data
        assert card.data.license == "other" and card.data.license_name is None
        assert "The licence of the base model, my-klein, applies." in card.text
        assert '"path/to/my-klein"' in card.text
        assert "secret" not in str(card)


def test_secrets_and_paths_are_not_on_the_card(tmp_path):
    settings = {
        "num_inference_steps": 4,
        "hub_token": TOKEN,
        "hub_model_id": "private-name",
        "push_to_hub": True,
        "pretrained_model_name_or_path": "/private/klein",
        "instance_data_dir": "/private/photos",
        "output_dir": "/private/out",
        "cache_dir": "/private/cache",
        "context_cache_dir": "/private/context_cache",
        "logging_dir": "private-logs",
        "bnb_quantization_config_path": "/private/bnb.json",
        "resume_from_checkpoint": "/private/out/checkpoint-5",
        "dataset_name": "/private/my_pictures",
        "init_lora": "someone/earlier-lora",
        "center_crop": False,
        "random_flip": True,
        "revision": None,
        "rank": 64,
        "retention_prompts": ["a | b", "c"],
    }
    card = write(tmp_path, settings=settings)
    assert TOKEN not in str(card) and "private" not in str(card)
    rows = re.findall(r"^\| `--(\w+)` \| (.*) \|$", card.text, re.MULTILINE)
    assert rows == [
        ("num_inference_steps", "4"),
        ("dataset_name", r"my\_pictures"),
        ("init_lora", "someone/earlier-lora"),
        ("random_flip", "yes"),
        ("rank", "64"),
        ("retention_prompts", r'\["a \| b", "c"\]'),
    ]


@pytest.mark.parametrize("prompt", NASTY_PROMPTS)
def test_any_prompt_survives(tmp_path, prompt):
    gallery = [(prompt, "images/validation_0.png"), ("a: b", "images/validation_1.png")]
    settings = {"num_inference_steps": 4, "validation_prompt": [prompt], "teacher_prompt_suffix": prompt, "rank": 8}
    card = write(tmp_path, instance_prompt=prompt, gallery=gallery, settings=settings)
    assert card.data.instance_prompt == prompt
    assert [(entry["text"], entry["output"]["url"]) for entry in card.data.widget] == gallery
    assert card.data.license == "apache-2.0"
    assert [line for line in card.text.splitlines() if line.startswith("#")] == [
        "# corgi",
        "## Use it",
        "## Retention",
        "## Training",
        "## Licence",
    ]
    # The table goes on after the prompt, and each of its rows has two cells.
    rows = re.findall(r"^\| `--\w+`.*$", card.text, re.MULTILINE)
    assert len(rows) == 4 and "--rank" in rows[-1]
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows)
    assert prompt_of(card) == prompt


def example(card: ModelCard) -> ast.Module:
    return ast.parse(re.search(r"^```python\n(.*?)^```$", card.text, re.MULTILINE | re.DOTALL)[1])


def pipe_arguments(card: ModelCard) -> dict:
    calls = [node for node in ast.walk(example(card)) if isinstance(node, ast.Call)]
    call = next(call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "pipe")
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def prompt_of(card: ModelCard) -> str:
    return pipe_arguments(card)["prompt"]


def test_escape_keeps_one_line_and_no_markup():
    assert escape("a\n | b\\|  <i>*x*_y_`z`[u](v)") == r"a \| b\\\| \<i\>\*x\*\_y\_\`z\`\[u\](v)"


def test_example_samples_as_the_run_did(tmp_path):
    usual = {"num_inference_steps": 4, "max_sequence_length": 512, "text_encoder_out_layers": [9, 18, 27]}
    expected = {"prompt": "a photo of sks corgi", "num_inference_steps": 4, "guidance_scale": 1.0}
    assert pipe_arguments(write(tmp_path, settings=usual)) == expected
    other = {"num_inference_steps": 8, "max_sequence_length": 128, "text_encoder_out_layers": [1, 2, 3]}
    assert pipe_arguments(write(tmp_path, settings=other)) == expected | other
    card = write(tmp_path)
    assert f'from_pretrained("{KLEIN_4B}", dtype=torch.bfloat16)' in card.text
    assert 'load_lora_weights("someone/corgi")' in card.text
    assert 'load_lora_weights("ACCOUNT/corgi")' in write(tmp_path, repo_id="corgi").text


@pytest.mark.parametrize("script", [train_dopsd_flux2, train_dopsd_zimage])
def test_the_defaults_that_a_card_leaves_out_are_the_stock_pipelines(script):
    parameters = inspect.signature(script.StockPipeline.__call__).parameters
    for name, expected in script.CARD_MODEL.sampling_defaults.items():
        default = parameters[name].default
        assert (list(default) if isinstance(default, tuple) else default) == expected


def test_card_of_z_image(tmp_path):
    settings = {"num_inference_steps": 8, "max_sequence_length": 512, "vlm_model_name_or_path": "/home/me/Qwen3-VL-4B"}
    card = write(
        tmp_path, model=train_dopsd_zimage.CARD_MODEL, base_model="Tongyi-MAI/Z-Image-Turbo", settings=settings
    )
    assert card.data.license == "apache-2.0" and card.data.base_model == "Tongyi-MAI/Z-Image-Turbo"
    assert "z-image" in card.data.tags and "flux2" not in card.data.tags
    expected = {"prompt": "a photo of sks corgi", "num_inference_steps": 8, "guidance_scale": 0.0}
    assert pipe_arguments(card) == expected
    assert 'ZImagePipeline.from_pretrained("Tongyi-MAI/Z-Image-Turbo", dtype=torch.bfloat16)' in card.text
    assert "| `--vlm_model_name_or_path` | Qwen3-VL-4B |" in card.text
    assert "klein" not in str(card).lower() and "/home" not in card.text


def test_a_bare_run_has_a_card_without_empty_parts(tmp_path):
    (tmp_path / "README.md").write_text("an earlier card")
    card = write(tmp_path, instance_prompt=None, gallery=[], retention=None)
    assert "instance_prompt" not in card.data and "widget" not in card.data
    assert "Gallery" not in card.text and "Retention" not in card.text and "Trained with the prompt" not in card.text
    assert prompt_of(card) == "your prompt"


def test_sheets_are_shown_where_they_are(tmp_path):
    (tmp_path / "story.png").touch()
    text = write(tmp_path).text
    assert "](story.png)" in text and "curves.png" not in text


# Upload


class Hub:
    """The part of the Hub's API that an upload uses, on a port of this machine.

    Attributes:
        url: HF_ENDPOINT for the client.
        repositories: id -> {"private": bool, "files": {path: bytes}}.
        refusals: regular expression for a request's path -> (status, answer) instead.
        requests: (method, path, Authorization header) of all requests.
    """

    def __init__(self):
        self.repositories, self.objects, self.lfs_files = {}, {}, set()
        self.refusals, self.requests, self.verified = {}, [], []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                hub.requests.append((self.command, path, self.headers.get("Authorization")))
                status, answer = hub.respond(self.command, path, body, self.headers.get("Authorization"))
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def respond(self, method: str, path: str, body: bytes, authorization: str | None) -> tuple[int, dict | str]:
        for where, refusal in self.refusals.items():
            if re.search(where, path):
                return refusal
        if path.startswith("/objects/"):  # the store, whose addresses are signed: no token belongs there
            assert authorization is None
            self.objects[path.removeprefix("/objects/")] = body
            return 200, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        sent = json.loads(body) if body and not path.endswith("/commit/main") else None
        if path == "/api/repos/create":
            name = f"{sent['organization'] or 'someone'}/{sent['name']}"
            status = 409 if name in self.repositories else 200
            self.repositories.setdefault(name, {"private": sent.get("visibility") == "private", "files": {}})
            return status, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/verify":
            assert len(self.objects[sent["oid"]]) == sent["size"]
            self.verified.append(sent["oid"])
            return 200, {}
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            assert match[1] in self.repositories
            return 200, {"objects": [self.upload_actions(wanted) for wanted in sent["objects"]]}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/preupload/main|/commit/main)?", path):
            repository = self.repositories.get(match[1])
            if repository is None:
                return 404, {"error": "Repository not found"}
            if match[2] is None:
                return 200, {"id": match[1], "private": repository["private"], "tags": [], "siblings": []}
            if match[2] == "/preupload/main":
                return 200, {"files": [self.upload_mode(repository, file) for file in sent["files"]]}
            self.commit(repository, [json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.url}/{match[1]}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": f"no such thing: {method} {path}"}

    def upload_mode(self, repository: dict, file: dict) -> dict:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        known = repository["files"].get(file["path"])
        oid = hashlib.sha256(known).hexdigest() if known and mode == "lfs" else None
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def upload_actions(self, wanted: dict) -> dict:
        if wanted["oid"] in self.objects:
            return wanted
        upload = {"href": f"{self.url}/objects/{wanted['oid']}?X-Signature=SIGNED"}
        return wanted | {"actions": {"upload": upload, "verify": {"href": f"{self.url}/verify"}}}

    def commit(self, repository: dict, lines: list[dict]) -> None:
        assert lines[0]["key"] == "header" and lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                self.lfs_files.add(value["path"])
                repository["files"][value["path"]] = self.objects[value["oid"]]
            else:
                assert (line["key"], value["encoding"]) == ("file", "base64")
                repository["files"][value["path"]] = base64.b64decode(value["content"])


@contextmanager
def serving(hub: Hub):
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        hub.server.shutdown()
        thread.join()
        hub.server.server_close()


@pytest.fixture
def hub():
    hub = Hub()
    with serving(hub):
        yield hub


@pytest.fixture
def run_folder(tmp_path):
    """A finished run with all that lies in an output folder."""
    folder = tmp_path / "corgi lora"
    for name in (
        "preview.png",
        "story.png",
        "curves.png",
        "images/validation_0.png",
        "images/validation_1.png",
        "images/notes.txt",
        "images/deeper/x.png",
        *(f"{kind}-{step}.png" for kind in ("validation", "rollout", "retention") for step in (250, 1000, 750)),
        "validation-final.png",
        "metrics.jsonl",
        "logs/events",
        "context_cache/ab/ab.safetensors",
        f"checkpoint-500/{LORA_FILE}",
        f".{LORA_FILE}.tmp",
        "other.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{name}\0\xff".encode("latin-1"))
    (folder / LORA_FILE).write_bytes(WEIGHTS)
    write(folder)
    return folder


PUBLISHED = {
    LORA_FILE,
    "README.md",
    "preview.png",
    "story.png",
    "curves.png",
    "validation-1000.png",
    "rollout-1000.png",
    "retention-1000.png",
    "images/validation_0.png",
    "images/validation_1.png",
}

# The client waits between its tries, 23 s in all.
CLIENT = """
import json, sys, time
time.sleep = lambda seconds: None
from pathlib import Path
from dopsd.errors import InputError
from dopsd.publish import publish
arguments = json.loads(sys.argv[1])
try:
    result = {"url": publish(Path(arguments.pop("folder")), **arguments)}
except InputError as error:
    result = {"error": str(error), "context": repr([error.__cause__, error.__context__])}
print("RESULT" + json.dumps(result))
"""


def call_publish(endpoint: str, folder: Path, environment: dict | None = None, **changed) -> dict:
    """`publish` in a process of its own, since the client reads its settings on import. No login is at hand."""
    arguments = {"folder": str(folder), "repo_id": "someone/corgi", "private": False, "token": TOKEN} | changed
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder.parent / "hf_home"),
    }
    kept = {name: value for name, value in os.environ.items() if "TOKEN" not in name and "proxy" not in name.lower()}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(arguments)],
        env=kept | settings | (environment or {}),
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for known in (TOKEN, OTHER_TOKEN):
        assert known not in done.stdout + done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])


def check_refused(result: dict, folder: Path, *expected: str, repo_id: str = "someone/corgi") -> None:
    """One line, which says how to publish later; nothing is lost."""
    message = result["error"]
    assert len(message.splitlines()) == 1 and len(message) < 1000
    assert message.startswith(f"--hub_model_id {repo_id}: could not be published (")
    assert f"the weights are in {folder}, " in message
    assert f"--push_only --output_dir '{folder}' --hub_model_id {repo_id}" in message
    for text in expected:
        assert text in message
    assert "SIGNED" not in message and "hf_" not in message.replace(str(folder), "")
    assert result["context"] == "[None, None]"
    assert (folder / LORA_FILE).read_bytes() == WEIGHTS


def test_publishes_these_files_and_no_others(hub, run_folder):
    assert set(published_files(run_folder)) == PUBLISHED
    result = call_publish(hub.url, run_folder)
    assert result == {"url": f"{hub.url}/someone/corgi"}
    repository = hub.repositories["someone/corgi"]
    assert repository["files"] == {name: (run_folder / name).read_bytes() for name in PUBLISHED}
    assert not repository["private"]
    assert hub.lfs_files == {LORA_FILE}
    assert hub.verified == [hashlib.sha256(WEIGHTS).hexdigest()]
    assert sum(path.endswith("/commit/main") for _, path, _ in hub.requests) == 1
    assert {key for _, path, key in hub.requests if path.startswith(("/api/repos/", "/api/models/"))} == {
        f"Bearer {TOKEN}"
    }


def test_publishes_again_to_the_same_repository(hub, run_folder):
    call_publish(hub.url, run_folder)
    (run_folder / LORA_FILE).write_bytes(WEIGHTS[::-1])
    hub.repositories["someone/corgi"]["files"]["mine.txt"] = b"kept"
    assert call_publish(hub.url, run_folder) == {"url": f"{hub.url}/someone/corgi"}
    files = hub.repositories["someone/corgi"]["files"]
    assert files[LORA_FILE] == WEIGHTS[::-1] and files["mine.txt"] == b"kept" and len(files) == len(PUBLISHED) + 1


def test_a_private_repository_in_the_tokens_account(hub, run_folder):
    folder = run_folder.rename(run_folder.with_name("corgi-lora"))
    result = call_publish(hub.url, folder, {"HF_TOKEN": f"{TOKEN}\n"}, repo_id=None, token=None, private=True)
    assert result == {"url": f"{hub.url}/someone/corgi-lora"}
    assert hub.repositories["someone/corgi-lora"]["private"]
    assert set(hub.repositories["someone/corgi-lora"]["files"]) == PUBLISHED
    assert call_publish(hub.url, folder, repo_id="corgi-lora", private=True) == result


def test_a_public_repository_is_not_taken_for_a_private_one(hub, run_folder):
    hub.repositories["someone/corgi"] = {"private": False, "files": {}}
    result = call_publish(hub.url, run_folder, private=True)
    check_refused(result, run_folder, "it exists and is public")
    assert result["error"].endswith("--hub_private_repo")
    assert not hub.repositories["someone/corgi"]["files"]


@pytest.mark.parametrize(
    ("where", "status", "answer", "expected"),
    [
        ("/repos/create", 403, {"error": "You don't have the rights"}, "403 Forbidden"),
        ("/repos/create", 404, {"error": "No such account"}, "No such account"),
        ("/repos/create", 500, "down\nfor maintenance", "down for maintenance"),
        ("/repos/create", 200, "<html>log in to the network first</html>", "Expecting value"),
        ("/validate-yaml", 400, {"errors": [{"message": "license is unknown"}]}, "license is unknown"),
        ("/preupload/", 503, "x" * 5000, "503"),
        ("/batch$", 200, {"objects": [{"oid": "0", "size": 1, "error": {"code": 507, "message": "full"}}]}, "full"),
        ("^/objects/", 403, f"signature of {OTHER_TOKEN} expired", "signature of [token] expired"),
        ("/verify", 500, "corrupt", "corrupt"),
        ("/commit/", 412, {"error": "A commit has happened since"}, "A commit has happened since"),
        ("/commit/", 500, f"echo: Bearer {TOKEN}", "echo: Bearer [token]"),
    ],
)
def test_a_hub_that_refuses_is_one_line(hub, run_folder, where, status, answer, expected):
    hub.refusals[where] = (status, answer)
    check_refused(call_publish(hub.url, run_folder), run_folder, expected)
    assert any(re.search(where, path) for _, path, _ in hub.requests)
    assert not any(repository["files"] for repository in hub.repositories.values())


def test_publishing_later_works(hub, run_folder):
    hub.refusals["/commit/"] = (503, "busy")
    check_refused(call_publish(hub.url, run_folder), run_folder, "503")
    hub.refusals.clear()
    call_publish(hub.url, run_folder)
    assert set(hub.repositories["someone/corgi"]["files"]) == PUBLISHED


def test_a_wrong_token_is_one_line_without_it(hub, run_folder):
    wrong = OTHER_TOKEN[::-1]  # without the usual beginning
    result = call_publish(hub.url, run_folder, token=wrong)
    check_refused(result, run_folder, "401", "Invalid username or password")
    assert wrong not in result["error"]
    # No client can send it, and the error quotes what was to be sent.
    check_refused(call_publish(hub.url, run_folder, token=f"{OTHER_TOKEN}\n{wrong}"), run_folder, "[token]")
    assert not hub.repositories


def test_all_of_a_token_with_dots_is_hidden(hub, run_folder):
    token = "hf_oauth_0123456789abcdef.SECRET.PART"
    hub.refusals["/repos/create"] = (403, {"error": f"{token} may not do that"})
    result = call_publish(hub.url, run_folder, token=token)
    check_refused(result, run_folder, "[token] may not do that")
    assert "SECRET" not in result["error"] and "PART" not in result["error"]


def test_a_token_in_the_wrong_place_is_not_repeated(hub, run_folder):
    hub.refusals["/repos/create"] = (403, {"error": "no"})
    message = call_publish(hub.url, run_folder, repo_id=f"someone/{TOKEN}")["error"]
    assert message.startswith("--hub_model_id someone/[token]: could not be published (")


def test_a_hub_that_is_not_there_is_one_line(run_folder):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nothing listens
        result = call_publish(f"http://127.0.0.1:{unused.getsockname()[1]}", run_folder)
    check_refused(result, run_folder, "Connection refused")


def test_offline_is_one_line(run_folder):
    check_refused(
        call_publish("http://127.0.0.1:9", run_folder, {"HF_HUB_OFFLINE": "1"}), run_folder, "HF_HUB_OFFLINE"
    )


def test_without_a_token_is_one_line(hub, run_folder):
    for token in (None, "", " "):
        check_refused(call_publish(hub.url, run_folder, token=token), run_folder, "hf auth login", "--hub_token")
    assert not hub.requests


def test_a_bad_name_is_one_line(hub, run_folder):
    result = call_publish(hub.url, run_folder, repo_id="a/b/c")
    check_refused(result, run_folder, "Repo id must be", repo_id="a/b/c")
    # The folder's name where no other is given; it has a space.
    result = call_publish(hub.url, run_folder, repo_id=None)
    assert result["error"].startswith("--hub_model_id corgi lora: could not be published (Repo id must")
    assert not hub.requests


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(InputError, match=r"^--output_dir .*: holds no pytorch_lora_weights.safetensors; --push_only"):
        publish(tmp_path, repo_id="someone/corgi", private=False, token=TOKEN)
