"""Measures how a run scales with its number of pictures, on the shipped miniature FLUX.2-klein and a CPU.

The training script is started on small pictures by one process and by two, each time with an empty cache of its own:

1. `--encode_only`, killed (SIGKILL) when half of the encodings are there
2. the same flags again
3. three steps of training with the complete cache, with a checkpoint after the second one
4. two more steps from that checkpoint

Of each start, the table gives seconds and peak memory of each stage, for the slower or larger process, and how much
work each process did. It needs Linux. Run it with `python -m benchmarks.many_pictures`.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it

import argparse
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from PIL import Image

from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.files import MODEL, make_folder
from benchmarks.step_report import environment, markdown
from dopsd.errors import DOPSDError


SOURCES = ("txt", "metadata", "dataset")
POLL_SECONDS = 1.0
FLAGS = {
    "pretrained_model_name_or_path": str(MODEL),
    "max_sequence_length": "64",
    "resolution": "64",
    "teacher_prompt_suffix": "",  # one encoding of each caption serves student and teacher
    "with_prior_preservation": "true",
    "trigger_word": "thing",
    "validation_steps": "0",
    "report_to": "none",
    "seed": "0",
}


@dataclass
class Start:
    """What was measured of one start.

    Attributes:
        name: what was started.
        num_processes: how many processes.
        seconds, cpu_seconds: of each stage, of the slowest process.
        peak_bytes: resident memory during each stage, of the largest process.
        counts: what was read, verified or encoded -> how often by each process.
    """

    name: str
    num_processes: int
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)

    def cell(self, stage: str) -> str:
        """ "SECONDS (PROCESSOR SECONDS) s, PEAK MB" of a stage; "-" if it has not been completed."""
        if stage not in self.seconds:
            return "-"
        peak = self.peak_bytes[stage] / 1e6
        return f"{self.seconds[stage]:.1f} ({self.cpu_seconds[stage]:.1f}) s, {peak:.0f} MB"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--num_pictures", type=positive_int, default=20_000, help="Number of captioned pictures.")
    parser.add_argument("--side", type=positive_int, default=64, help="Height and width of the pictures in pixels.")
    parser.add_argument("--source", choices=SOURCES, default="txt", help="Where the captions are.")
    parser.add_argument("--num_processes", type=positive_int, nargs="+", default=[1, 2], help="Processes of the runs.")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-output"), help="Folder for the results.")
    return parser.parse_args()


def make_pictures(folder: Path, count: int, side: int, source: str) -> list[str]:
    """Writes JPEG files with captions; returns the flags that read them."""
    rows = []
    for number in range(count):
        name = f"{number // 1000:03}/{number:06}.jpg"
        caption = f"thing {number} on a {('red', 'green', 'blue', 'grey')[number % 4]} table"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((side, side), 50).convert("RGB").save(folder / name)
        if source == "txt":
            (folder / name).with_suffix(".txt").write_text(caption)
        rows.append({"file_name": name, "text": caption})
    if source == "txt":
        return ["--instance_data_dir", str(folder)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if source == "metadata":
        return ["--instance_data_dir", str(folder), "--caption_column", "text"]
    return ["--dataset_name", str(parquet(folder)), "--caption_column", "text"]


def parquet(folder: Path) -> Path:
    """The pictures of a folder as a data set with the pictures in it."""
    import datasets

    target = folder.with_name("parquet")
    target.mkdir()
    read = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.with_name("datasets")))
    read.cast_column("image", datasets.Image(decode=False)).map(
        lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}}
    ).to_parquet(target / "train.parquet")
    return target


def measure_start(
    name: str, num_processes: int, flags: list[str], kill_when: Callable[[], bool] | None = None
) -> Start:
    """Runs the script until it ends or, if `kill_when` is given, until it is true.

    Raises:
        DOPSDError: it fails, or ends before it is killed.
    """
    command = [sys.executable, "-m"]
    if num_processes > 1:
        command += ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(num_processes), "-m"]
    with tempfile.TemporaryDirectory() as records, tempfile.TemporaryFile("w+") as log:
        command += ["benchmarks.many_pictures_run", records, *flags]
        variables = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables)
        while process.poll() is None and not (kill_when and kill_when()):
            time.sleep(POLL_SECONDS)
        was_running = process.poll() is None
        if was_running:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.send_signal(signal.SIGKILL)
            process.wait()
        if was_running != (kill_when is not None) or (not was_running and process.returncode):
            log.seek(0)
            raise DOPSDError(f"{name}: the run ended with status {process.returncode}: {log.read()[-2000:]}")
        return read_records(name, num_processes, Path(records))


def read_records(name: str, num_processes: int, folder: Path) -> Start:
    start = Start(name, num_processes)
    for path in sorted(folder.glob("*.jsonl")):
        seconds, cpu_seconds, last = defaultdict(float), defaultdict(float), {}
        for line in path.read_text().splitlines():
            last = json.loads(line)
            seconds[last["stage"]] += last["seconds"]
            cpu_seconds[last["stage"]] += last["cpu_seconds"]
            start.peak_bytes[last["stage"]] = max(last["peak_bytes"], start.peak_bytes.get(last["stage"], 0))
        for own, all_own in ((seconds, start.seconds), (cpu_seconds, start.cpu_seconds)):
            all_own |= {stage: max(value, all_own.get(stage, 0)) for stage, value in own.items()}
        for what, count in last["counts"].items():
            start.counts.setdefault(what, []).append(count)
    return start


def measure(folder: Path, num_processes: int, data: list[str], num_encodings: int) -> list[Start]:
    """The four starts, see above.

    Args:
        folder: for cache and output.
        data: flags that name the pictures.
        num_encodings: of all pictures and captions.
    """
    cache = folder / "cache"
    flags = [*data, *itertools.chain.from_iterable((f"--{name}", value) for name, value in FLAGS.items())]
    flags += ["--output_dir", str(folder / "run"), "--context_cache_dir", str(cache)]
    flags += ["--cache_dir", str(folder / "downloads"), "--checkpointing_steps", "2", "--max_train_steps"]
    resuming = ["--resume_from_checkpoint", "latest"]

    def is_half_done() -> bool:
        return sum(1 for _ in cache.glob("??/*.safetensors")) >= num_encodings / 2

    encoding = [*flags, "3", "--encode_only"]
    return [
        measure_start("killed half-way", num_processes, encoding, is_half_done),
        measure_start("again", num_processes, encoding),
        measure_start("training", num_processes, [*flags, "3", *resuming]),
        measure_start("from a checkpoint", num_processes, [*flags, "4", *resuming]),
    ]


def table(starts: list[Start]) -> str:
    """A row for each stage and for each kind of work."""
    headings = [f"{start.name}, {start.num_processes} process{'es' * (start.num_processes > 1)}" for start in starts]
    stages = dict.fromkeys(stage for start in starts for stage in start.seconds if stage != "all")
    rows = [[stage, *(start.cell(stage) for start in starts)] for stage in stages]
    counts = dict.fromkeys(what for start in starts for what in start.counts)
    rows += [[f"{what}, count", *(" + ".join(map(str, start.counts[what])) for start in starts)] for what in counts]
    return markdown(headings, rows)


def main() -> None:
    args = parse_args()
    make_folder(args.output_dir, flag="--output_dir")
    starts = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_pictures(folder / "pictures", args.num_pictures, args.side, args.source)
        for num_processes in args.num_processes:
            starts += measure(folder / str(num_processes), num_processes, data, 2 * args.num_pictures)
    machine = environment()
    heading = f"# {args.num_pictures:,} pictures of {args.side} x {args.side} pixels, captions: {args.source}"
    versions = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = "\n\n".join([heading, versions, table(starts)]) + "\n"
    path = args.output_dir / "many-pictures"
    results = {"environment": machine, "num_pictures": args.num_pictures, "source": args.source, "side": args.side}
    results["starts"] = list(map(asdict, starts))
    path.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
