"""The upload, by the real client to a local server that speaks the Hub's API."""

import hashlib
import importlib
import json
import os
import re
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest

from dopsd.errors import InputError, OutputError
from dopsd.model_card import CARD_FILE
from dopsd.output import LORA_FILE
from dopsd.publish import publish, published_files
from loopback_hub import TOKEN, Hub, serving


OTHER_TOKEN = "hf_ThisOneTheServerSays0123456789"
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub():
    hub = Hub()
    with serving(hub):
        yield hub


@pytest.fixture
def run_folder(tmp_path):
    """Output folder of a finished run, with files that are not published."""
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
        "report.html",
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
    (folder / CARD_FILE).write_text("---\nlicense: apache-2.0\n---\n\n# corgi\n")
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


def publish_in_child(environment: dict[str, str], log: str, arguments: dict) -> None:
    """Prints what `publish` returns or raises. The client reads its settings again, as a new process does."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)
    time.sleep = lambda seconds: None  # the client waits between its attempts, 23 seconds in total
    try:
        result = {"url": publish(Path(arguments.pop("folder")), **arguments)}
    except OutputError as error:
        result = {"error": str(error), "context": repr([error.__cause__, error.__context__])}
    print("RESULT" + json.dumps(result), flush=True)


@pytest.fixture
def call_publish(forkserver):
    """Runs `publish` in a new process: (endpoint, folder, environment, **arguments). Nobody is logged in."""

    def call(endpoint: str, folder: Path, environment: dict | None = None, **changed) -> dict:
        arguments = {"folder": str(folder), "repo_id": "someone/corgi", "private": False, "token": TOKEN} | changed
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder.parent / "hf_home"),
        }
        kept = {
            name: value for name, value in os.environ.items() if "TOKEN" not in name and "proxy" not in name.lower()
        }
        log = forkserver.new_log()
        process = forkserver.start(publish_in_child, kept | settings | (environment or {}), str(log), arguments)
        process.join(timeout=120)
        printed = log.read_text(errors="replace")
        assert process.exitcode == 0, printed
        for known in (TOKEN, OTHER_TOKEN):
            assert known not in printed
        return json.loads(printed.rpartition("RESULT")[2])

    return call


def check_refused(result: dict, folder: Path, *expected: str, repo_id: str = "someone/corgi") -> None:
    """The error is one line that says how to publish later and has no token, and the weights are still there."""
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


def test_these_files_and_no_others_are_published(hub, run_folder, call_publish):
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


MODEL_PARTS = {
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
}
OTHER_PARTS = {
    "model_index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "tokenizer/more/a.jinja",
}


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_whole_model_is_published_with_its_other_parts_if_it_has_them(hub, run_folder, call_publish, is_whole):
    (run_folder / LORA_FILE).unlink()
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": True}
    index |= {name: ["diffusers", "Some"] for name in ("transformer", "vae", "tokenizer", "scheduler", "../other")}
    hidden = {"transformer/.cache", ".transformer.tmp/config.json", "checkpoint-500/transformer/config.json"}
    for name in MODEL_PARTS | OTHER_PARTS | hidden | {"../other/secret", "unknown/file"}:
        (run_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run_folder / name).write_text(json.dumps(index) if name == "model_index.json" else name)
    if not is_whole:
        (run_folder / "model_index.json").unlink()
    expected = PUBLISHED - {LORA_FILE} | MODEL_PARTS | (OTHER_PARTS if is_whole else set())
    assert set(published_files(run_folder)) == expected
    assert call_publish(hub.url, run_folder) == {"url": f"{hub.url}/someone/corgi"}
    repository = hub.repositories["someone/corgi"]
    assert repository["files"] == {name: (run_folder / name).read_bytes() for name in expected}
    assert hub.lfs_files == {name for name in expected if name.endswith(".safetensors")}
    assert sum(path.endswith("/commit/main") for _, path, _ in hub.requests) == 1


def test_a_run_can_be_published_again_to_the_same_repository(hub, run_folder, call_publish):
    call_publish(hub.url, run_folder)
    (run_folder / LORA_FILE).write_bytes(WEIGHTS[::-1])
    hub.repositories["someone/corgi"]["files"]["mine.txt"] = b"kept"
    assert call_publish(hub.url, run_folder) == {"url": f"{hub.url}/someone/corgi"}
    files = hub.repositories["someone/corgi"]["files"]
    assert files[LORA_FILE] == WEIGHTS[::-1] and files["mine.txt"] == b"kept" and len(files) == len(PUBLISHED) + 1


def test_the_default_repository_is_in_the_tokens_account_and_can_be_private(hub, run_folder, call_publish):
    folder = run_folder.rename(run_folder.with_name("corgi-lora"))
    result = call_publish(hub.url, folder, {"HF_TOKEN": f"{TOKEN}\n"}, repo_id=None, token=None, private=True)
    assert result == {"url": f"{hub.url}/someone/corgi-lora"}
    assert hub.repositories["someone/corgi-lora"]["private"]
    assert set(hub.repositories["someone/corgi-lora"]["files"]) == PUBLISHED
    assert call_publish(hub.url, folder, repo_id="corgi-lora", private=True) == result


def test_a_public_repository_is_refused_if_a_private_one_is_wanted(hub, run_folder, call_publish):
    hub.repositories["someone/corgi"] = {"private": False, "files": {}}
    result = call_publish(hub.url, run_folder, private=True)
    check_refused(result, run_folder, "the repository exists and is public")
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
def test_errors_of_the_hub_are_one_line(hub, run_folder, where, status, answer, expected, call_publish):
    hub.refusals[where] = (status, answer)
    check_refused(call_publish(hub.url, run_folder), run_folder, expected)
    assert any(re.search(where, path) for _, path, _ in hub.requests)
    assert not any(repository["files"] for repository in hub.repositories.values())


def test_a_run_can_be_published_after_a_failure(hub, run_folder, call_publish):
    hub.refusals["/commit/"] = (503, "busy")
    check_refused(call_publish(hub.url, run_folder), run_folder, "503")
    hub.refusals.clear()
    call_publish(hub.url, run_folder)
    assert set(hub.repositories["someone/corgi"]["files"]) == PUBLISHED


def test_the_error_for_a_wrong_token_is_one_line_without_the_token(hub, run_folder, call_publish):
    wrong = OTHER_TOKEN[::-1]  # does not start with hf_
    result = call_publish(hub.url, run_folder, token=wrong)
    check_refused(result, run_folder, "401", "Invalid username or password")
    assert wrong not in result["error"]
    # A token with a line break cannot be sent, and the client's error quotes it.
    check_refused(call_publish(hub.url, run_folder, token=f"{OTHER_TOKEN}\n{wrong}"), run_folder, "[token]")
    assert not hub.repositories


def test_a_token_with_dots_is_hidden_completely(hub, run_folder, call_publish):
    token = "hf_oauth_0123456789abcdef.SECRET.PART"
    hub.refusals["/repos/create"] = (403, {"error": f"{token} may not do that"})
    result = call_publish(hub.url, run_folder, token=token)
    check_refused(result, run_folder, "[token] may not do that")
    assert "SECRET" not in result["error"] and "PART" not in result["error"]


def test_a_token_that_was_passed_as_the_repository_is_hidden(hub, run_folder, call_publish):
    hub.refusals["/repos/create"] = (403, {"error": "no"})
    message = call_publish(hub.url, run_folder, repo_id=f"someone/{TOKEN}")["error"]
    assert message.startswith("--hub_model_id someone/[token]: could not be published (")


def test_the_error_for_an_unreachable_hub_is_one_line(run_folder, call_publish):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening
        result = call_publish(f"http://127.0.0.1:{unused.getsockname()[1]}", run_folder)
    check_refused(result, run_folder, "Connection refused")


def test_the_error_in_offline_mode_is_one_line(run_folder, call_publish):
    check_refused(
        call_publish("http://127.0.0.1:9", run_folder, {"HF_HUB_OFFLINE": "1"}), run_folder, "HF_HUB_OFFLINE"
    )


def test_the_error_for_a_missing_token_is_one_line(hub, run_folder, call_publish):
    for token in (None, "", " "):
        check_refused(call_publish(hub.url, run_folder, token=token), run_folder, "hf auth login", "--hub_token")
    assert not hub.requests


def test_the_error_for_an_invalid_name_is_one_line(hub, run_folder, call_publish):
    result = call_publish(hub.url, run_folder, repo_id="a/b/c")
    check_refused(result, run_folder, "Repo id must be", repo_id="a/b/c")
    # The default is the folder's name, which has a space here.
    result = call_publish(hub.url, run_folder, repo_id=None)
    assert result["error"].startswith("--hub_model_id corgi lora: could not be published (Repo id must")
    assert not hub.requests


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "README.md").touch()
    expected = r"^--output_dir .*: has no pytorch_lora_weights.safetensors and no transformer; --push_only"
    with pytest.raises(InputError, match=expected):
        publish(tmp_path, repo_id="someone/corgi", private=False, token=TOKEN)
