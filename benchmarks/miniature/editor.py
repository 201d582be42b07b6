"""The editor: a miniature that also edits pictures, shipped as the weights of its transformer.

python -m benchmarks.miniature.editor --output_dir editor                  # writes it as a pipeline
python -m benchmarks.miniature.editor --output_dir editor --count 192      # and measures it, in about ten minutes
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.miniature import world
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.edit_tasks import editor_tasks, measure_placed
from benchmarks.miniature.evaluate import sample
from benchmarks.miniature.files import MODEL, make_folder, replacing, write_pipeline
from benchmarks.miniature.metrics import PictureReader
from benchmarks.miniature.tables import markdown
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


WEIGHTS = Path(__file__).resolve().parent / "editor" / "transformer.safetensors"  # bfloat16
FIGURES = ("exact", "background", "place", "residual", "detail", "poses")  # of the table


def save_editor(transformer: torch.nn.Module, path: Path) -> None:
    """Writes the transformer's weights in bfloat16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.bfloat16().contiguous() for name, weight in transformer.state_dict().items()}
    with replacing(path) as partial:
        save_file(weights, partial)


def assemble_editor(folder: Path) -> Path:
    """Writes the editor as a whole pipeline in float32, with the miniature's other components. Returns the folder."""
    weights = {name: weight.float() for name, weight in load_file(WEIGHTS).items()}
    return write_pipeline(MODEL, folder, weights)


def measured(folder: Path, count: int) -> str:
    """A table of what the pipeline draws, `count` pictures of each task."""
    pipeline = Flux2KleinDOPSDPipeline.from_pretrained(folder)
    reader = PictureReader(world.all_appearances())
    rows = []
    for name, task in editor_tasks(count).items():
        figures = measure_placed(sample(pipeline, task), task, reader)
        rows.append([name, *(str(figures.get(figure, "-")) for figure in FIGURES)])
    return markdown(list(FIGURES), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the pipeline.")
    parser.add_argument(
        "--count", type=positive_int, help="Pictures to measure per task. Default: it is not measured."
    )
    args = parser.parse_args()
    make_folder(args.output_dir, flag="--output_dir")
    folder = assemble_editor(args.output_dir.resolve())
    if args.count is not None:
        print(measured(folder, args.count))


if __name__ == "__main__":
    run(main)
