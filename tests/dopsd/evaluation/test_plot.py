"""The plot of likeness against retention."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text
from PIL import Image

from dopsd.evaluation.columns import DINO, LIKENESS, MASKED, RETENTION, column
from dopsd.evaluation.comparison import Comparison, Contender, Figure, LoRA
from dopsd.evaluation.plot import likeness_key, plot_likeness, widened


LORAS = [LoRA(name, Path(name), name) for name in ("$a_b$", "größer", "x" * 80)]
CONTENDERS = [Contender(), *(Contender((lora,), strength) for lora in LORAS for strength in (0.5, 1.0, 1.5))]


def comparison(columns=(LIKENESS, RETENTION), spread=0.1) -> Comparison:
    figures = {
        one.name: {f"{name}/dino": Figure(0.5 + spread * number / 10, 0.1, None, 4) for name in columns}
        for number, one in enumerate(CONTENDERS)
    }
    reference = {"likeness/dino": Figure(0.7, 0.1, None, 4)}
    return Comparison({}, [], [column(name, DINO, "dino") for name in columns], figures, reference, [])


@pytest.fixture
def written(monkeypatch):
    """The texts beside the points, each with its place in pixels."""
    found = []
    annotate = Axes.annotate

    def watching(axes, text, xy, **options):
        found.append((text, annotate(axes, text, xy, **options)))
        return found[-1][1]

    monkeypatch.setattr(Axes, "annotate", watching)
    return found


@pytest.mark.parametrize("spread", [3, 0.0])
def test_every_contender_is_a_labelled_point_and_no_label_hides_another(spread, written, tmp_path):
    assert plot_likeness(comparison(spread=spread), CONTENDERS, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (1045, 660)
    texts = [text for text, _ in written]
    assert sorted(texts) == sorted(["base", "$a_b$", "größer", "x" * 39 + "…", *["x0.5", "x1.5"] * 3])
    boxes = [Text.get_window_extent(label) for _, label in written]  # without the lines to the points
    # The lines of labels are 15 pixels apart at 100 dots per inch; descenders may touch the line below.
    middles = [(box.x0, box.x1, (box.y0 + box.y1) / 2) for box in boxes]
    for number, (left, right, height) in enumerate(middles):
        for other_left, other_right, other in middles[:number]:
            assert left >= other_right or other_left >= right or abs(height - other) > 10


def test_without_both_figures_there_is_no_plot(tmp_path):
    assert not plot_likeness(comparison(columns=(LIKENESS,)), CONTENDERS, tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_the_masked_likeness_is_plotted_if_there_is_one():
    assert likeness_key(comparison()) == "likeness/dino"
    masked = f"{LIKENESS}_{MASKED}"
    assert likeness_key(comparison(columns=(LIKENESS, masked, RETENTION))) == "likeness_masked/dino"


def test_differences_without_a_meaning_do_not_look_large():
    assert widened(0.999, 1.001) == pytest.approx((0.975, 1.025))
    assert widened(0.2, 0.9) == (0.2, 0.9)
