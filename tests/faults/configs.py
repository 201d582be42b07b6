"""YAML files for --config."""

from pathlib import Path

import yaml

from .cases import Case, kind
from .damage import ODD_VALUES, block, damage_file
from .lab import Scene


GOOD = {
    "rank": 4,
    "learning_rate": 0.01,
    "lr_scheduler": "cosine",
    "center_crop": True,
    "retention_prompts": ["a", "b"],
}


def case(scene: Scene, what: str, config: Path, **rest) -> Case:
    return Case(f"--config: {what}", scene.subject(), {"rank": None, "config": config}, **rest)


def write(scene: Scene, content: str | bytes) -> Path:
    path = scene.folder / "config.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


@kind
def config_bytes(scene: Scene) -> Case:
    path = write(scene, yaml.safe_dump(GOOD))
    return case(scene, damage_file(scene.rng, path), path)


@kind
def config_values(scene: Scene) -> Case:
    rng = scene.rng
    name = rng.choice([*GOOD, "seed", "instance_prompt", "use_8bit_adam", "no_context_cache", "validation_prompt"])
    value = rng.choice(
        [*ODD_VALUES, {"a": [1, {"b": None}]}, [1, 2], ["a", ["b"]], "2026-01-01", 0o17, "yes", "no", "~"]
    )
    path = write(scene, yaml.safe_dump(GOOD | {name: value}, allow_unicode=False).replace("\\uD83D", "x"))
    return case(scene, f"{name} = {value!r}", path)


@kind
def config_text(scene: Scene) -> Case:
    rng = scene.rng
    good = yaml.safe_dump(GOOD)
    texts = {
        "tabs": "rank:\t4\n\tlearning_rate: 1\n",
        "duplicate keys": good + "rank: 8\n",
        "an anchor": "rank: &r 4\nseed: *r\n",
        "an unknown alias": "rank: *nowhere\n",
        "an alias of itself": "retention_prompts: &a [*a, *a]\n",
        "a merge key": "<<: {rank: 4}\n",
        "a merge of itself": "&a\n<<: *a\n",
        "100,000 brackets": "rank: " + "[" * 100_000,
        "100,000 nested maps": "{a: " * 100_000,
        "100,000 nested lists": "- " * 100_000 + "x",
        "a NUL": "rank: 4\0\n",
        "an escaped NUL": 'instance_prompt: "a\\0b"\n',
        "an escaped half emoji": 'instance_prompt: "\\ud83d"\n',
        "UTF-16": good.encode("utf-16"),
        "a byte order mark": "\ufeff" + good,
        "Latin-1": "instance_prompt: café\n".encode("latin-1"),
        "nothing": "",
        "only a comment": "# nothing\n",
        "a list": "- rank\n- 4\n",
        "a text": "rank 4\n",
        "a number": "4\n",
        "two documents": good + "---\n" + good,
        "an unknown flag": good + "lerning_rate: 1\n",
        "no text as a key": good + "1: 2\n? [a, b]\n: c\n",
        "a key of null": good + "~: 1\n",
        "itself": good + f"config: {scene.folder / 'config.yaml'}\n",
        "help": good + "help: true\n",
        "dashes": good + "--rank: 4\n",
        "hyphens": good + "max-train-steps: 2\n",
        "a value that looks like a flag": "instance_prompt: --rank\n",
        "values that look like flags": "retention_prompts: [--rank, '8']\n",
        "a number of 5,000 digits": "rank: " + "9" * 5000 + "\n",
        "a caption of 1 MB": "instance_prompt: " + "a " * 500_000 + "\n",
        "several lines in a value": "instance_prompt: |\n  a\n  b\n",
        "a line of 1,000 values": "validation_prompt: [" + "a, " * 1000 + "]\n",
        "an open quote": 'instance_prompt: "a ball\n',
        "JSON": '{"rank": 4, "learning_rate": 0.01}',
        "a token": "hub_tokn: hf_" + "a" * 34 + "\n",
        "an unknown directive": "%YAML 9.9\n---\nrank: 4\n",
    }
    what = rng.choice(list(texts))
    return case(scene, what, write(scene, texts[what]))


@kind
def config_bomb(scene: Scene) -> Case:
    """Aliases that expand to 10^n values."""
    depth = scene.rng.choice([3, 9, 30])
    lists = ["&a0 [x, x, x, x, x, x, x, x, x, x]"]
    lists += [f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    name = scene.rng.choice(["validation_prompt", "rank", "x"])
    return case(scene, f"aliases {depth} deep in {name}", write(scene, f"{name}: [{', '.join(lists)}]\n"))


@kind
def config_tags(scene: Scene) -> Case:
    payload = scene.folder / "executed"
    tag = scene.rng.choice(
        [
            f"!!python/object/apply:os.system ['touch {payload}']",
            f"!!python/object/new:os.system ['touch {payload}']",
            f"!!python/object/apply:subprocess.check_output [['touch', '{payload}']]",
            "!!python/name:os.system",
            "!!python/tuple [1, 2]",
            "!!binary aGVsbG8=",
            "!!int x",
            "!!timestamp x",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "!unknown x",
            "!<tag:x,2000:y> x",
        ]
    )
    name = scene.rng.choice(["rank", "instance_prompt", "x"])
    return case(scene, f"{name}: {tag:.40}", write(scene, f"{name}: {tag}\n"), payload=payload)


@kind
def config_blocked(scene: Scene) -> Case:
    path = write(scene, "")
    return case(scene, block(scene.rng, path), path)
