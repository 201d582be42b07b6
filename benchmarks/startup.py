"""Measures how long a run takes until its cache of encodings is ready, on the shipped miniature FLUX.2-klein.

The training script itself is run, once with an empty cache and once with a full one, first with a picture for each
caption, then with 5 pictures for all. Imports are not measured. Run it with `python -m benchmarks.startup`.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it

import argparse
import importlib.util
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.klein import KLEIN
from dopsd.command_line import parse_settings
from dopsd.contexts import Contexts, batches


# Stages of `main`, in its order; what comes between them is "other".
STAGES = {
    "pictures and captions": "load_training_data",
    "lengths of prompts": "resolve_prompts",
    "resume contract": "resume_contract",
    "fingerprint of the encoders": "encoder_fingerprints",
    "context cache": "fill_cache",
}
AFTER_START = "load_transformer"
MAX_SEQUENCE_LENGTH = 160
NUM_COMPARED = 200  # prompts that are encoded one at a time and in batches


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--captions", type=positive_int, default=5000, help="Number of captions.")
    return parser.parse_args()


class Started(Exception):
    """Ends the script where its start ends."""


def load_script(path: Path = KLEIN.script) -> ModuleType:
    """A training script as a module: benchmarks do not import scripts."""
    spec = importlib.util.spec_from_file_location("training_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def write_data(folder: Path, num_captions: int, num_pictures: int, *, side: int = 64) -> list[str]:
    """Writes square pictures of noise and a metadata.jsonl. Returns its caption columns."""
    rng = random.Random(0)
    words = [word for appearance in world.all_appearances() for word in appearance.words.split()]
    folder.mkdir()
    columns = [f"text{number}" for number in range(num_captions // num_pictures)]
    rows = []
    for number in range(num_pictures):
        Image.effect_noise((side, side), 50).convert("RGB").save(folder / f"{number}.png")
        captions = {column: f"{number} {column} " + " ".join(rng.choices(words, k=12)) for column in columns}
        rows.append({"file_name": f"{number}.png"} | captions)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return columns


def measure_start(script: ModuleType, flags: list[str]) -> tuple[dict[str, float], Contexts]:
    """Seconds of each stage of a start, their sum as "total", and the run's contexts."""
    seconds: dict[str, float] = defaultdict(float)
    stages = {name: getattr(script, name) for name in (*STAGES.values(), AFTER_START)}
    contexts = []

    def timed(label: str, stage: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            contexts.extend(one for one in args if isinstance(one, Contexts))
            began = time.perf_counter()
            try:
                return stage(*args, **kwargs)
            finally:
                seconds[label] += time.perf_counter() - began

        return wrapper

    def stop(*args: Any) -> None:
        raise Started

    for label, name in STAGES.items():
        setattr(script, name, timed(label, stages[name]))
    setattr(script, AFTER_START, stop)
    began = time.perf_counter()
    try:
        script.main(parse_settings(script.MODEL, "", flags))
    except Started:
        total = time.perf_counter() - began
    for name, stage in stages.items():
        setattr(script, name, stage)
    return {**seconds, "other": total - sum(seconds.values()), "total": total}, contexts[-1]


def compare_batches(contexts: Contexts) -> float:
    """How many times faster prompts are encoded in batches than one at a time."""
    prompts = [encoding for caption in contexts.data.captions for encoding in contexts.student_encodings(caption)]
    prompts = prompts[:NUM_COMPARED]
    contexts.attach_text_encoder({encoding.encoder for encoding in prompts})
    seconds = []
    for groups in ([[encoding] for encoding in prompts], list(batches(prompts))):
        contexts.encode_batch(groups[0])
        began = time.perf_counter()
        for batch in groups:
            contexts.encode_batch(batch)
        seconds.append(time.perf_counter() - began)
    contexts.free_text_encoder()
    return seconds[0] / seconds[1]


def measure(num_captions: int) -> tuple[dict[str, dict[str, float]], float]:
    """Seconds of each stage by kind of start, and what `compare_batches` returns."""
    script, starts = load_script(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for num_pictures in (num_captions, min(5, num_captions)):
            label, data = f"{num_pictures:,} pictures", folder / str(num_pictures)
            captions = write_data(data, num_captions, num_pictures)
            flags = ["--pretrained_model_name_or_path", str(MODEL), "--instance_data_dir", str(data)]
            flags += ["--caption_column", *captions, "--context_cache_dir", str(data.with_suffix(".cache"))]
            flags += ["--max_sequence_length", str(MAX_SEQUENCE_LENGTH), "--resolution", "64", "--report_to", "none"]
            flags += ["--with_prior_preservation", "false"]  # captions are what is counted
            for cache in ("empty", "full"):
                output_dir = data.with_suffix(f".{cache}")
                result = measure_start(
                    script, [*flags, "--output_dir", str(output_dir), "--validation_steps", "0", "--seed", "0"]
                )
                starts[f"{label}, {cache} cache"], contexts = result
        return starts, compare_batches(contexts)


def main() -> None:
    args = parse_args()
    starts, ratio = measure(args.captions)
    print(f"Seconds to start with {args.captions:,} captions")
    for label, seconds in starts.items():
        print(f"\n{label}")
        for stage in (*STAGES, "other", "total"):
            print(f"  {stage:28}{seconds[stage]:8.2f}")
    print(f"\nPrompts are encoded {ratio:.1f} times as fast in batches as one at a time")


if __name__ == "__main__":
    run(main)
