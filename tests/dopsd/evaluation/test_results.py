"""results.json, results.csv and the tables as text."""

import csv
import json

import pytest

from dopsd.errors import InputError, OutputError
from dopsd.evaluation.columns import CLIP, COPIES, DINO, LIKENESS, RETENTION, SHARPNESS, column
from dopsd.evaluation.comparison import Comparison, Figure, Prompt
from dopsd.evaluation.results import markdown_table, read_results, table_text, write_results


def comparison() -> Comparison:
    columns = [column(LIKENESS, DINO, "dino"), column(LIKENESS, CLIP, "clip"), column(COPIES)]
    columns += [column(SHARPNESS), column(RETENTION, DINO, "dino"), column("leakage_words", DINO, "dino")]
    figures = {
        "base": {"likeness/dino": Figure(0.25, 0.1, 0.02, 8), "sharpness": Figure(1.0, None, None, 2)},
        "a|b": {
            "likeness/dino": Figure(0.5, None, 0.02, 8),
            "copies": Figure(0.125, 0.2, None, 8),
            "leakage_words/dino": Figure(0.0625, None, None, 4),
        },
    }
    reference = {"likeness/dino": Figure(0.625, 0.1, None, 5)}
    prompts = [Prompt("a sks dog 犬", "a dog", "concept"), Prompt("a boat", "a boat", "unrelated", 0)]
    return Comparison({"seed": 0, "lora": ["a.safetensors"]}, prompts, columns, figures, reference, ["a note"])


def test_what_is_written_is_read_again(tmp_path):
    write_results(tmp_path, comparison())
    assert read_results(tmp_path / "results.json") == comparison()


def test_the_csv_file_has_one_model_per_column(tmp_path):
    write_results(tmp_path, comparison())
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        base, other, training = csv.DictReader(file)
    assert [row["name"] for row in (base, other, training)] == ["base", "a|b", "(training pictures)"]
    assert base["likeness/dino [dino]"] == "0.25" and base["likeness/dino over prompts [dino]"] == "0.1"
    assert base["likeness/dino over seeds [dino]"] == "0.02" and base["likeness/dino count [dino]"] == "8"
    assert base["sharpness"] == "1.0" and other["sharpness"] == "" and base["likeness/clip [clip]"] == ""
    assert training["likeness/dino [dino]"] == "0.625" and training["copies"] == ""


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[:50], lambda text: "[]", lambda text: text.replace('"format": 1', '"format": 0')],
)
def test_another_file_is_refused_in_one_line(damage, tmp_path):
    write_results(tmp_path, comparison())
    path = tmp_path / "results.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match="results.json: is not the results.json of a comparison"):
        read_results(path)
    with pytest.raises(InputError):
        read_results(tmp_path / "nowhere.json")


def test_results_that_are_not_numbers_are_never_written(tmp_path):
    wrong = comparison()
    wrong.figures["base"]["sharpness"] = Figure(float("nan"), None, None, 1)
    with pytest.raises(ValueError):
        write_results(tmp_path, wrong)
    assert not (tmp_path / "results.json").exists()
    (tmp_path / "results.json").mkdir()
    with pytest.raises(OutputError, match="results.json could not be written"):
        write_results(tmp_path, comparison())


def test_the_terminals_table_has_the_main_figures():
    lines = table_text(comparison()).splitlines()
    rows = [line.split() for line in lines]
    heading = " ".join(" ".join(row) for row in rows[:3])
    assert "likeness" in heading and "↑" in heading and "copies" in heading and "clip" not in heading.casefold()
    assert rows[-3:] == [
        ["base", "0.250", "1.00"],
        ["a|b", "0.500", "12", "%", "+0.062"],
        ["(training", "pictures)", "0.625"],
    ]
    assert not any(line.endswith(" ") for line in lines)
    ends = {line.index(text) + len(text) for line in lines for text in ("0.250", "0.500", "0.625") if text in line}
    assert len(ends) == 1  # aligned


def test_the_cards_table_is_markdown():
    first, rule, base, other, _ = markdown_table(comparison()).splitlines()
    assert first.startswith("|  | likeness (DINO) ↑ | copies ↓ | sharpness |") and rule.count("---:") == 5
    assert base == "| base | 0.250 |  | 1.00 |  |  |" and other.startswith("| a\\|b | 0.500 | 12 % |")


def test_results_are_plain_json(tmp_path):
    write_results(tmp_path, comparison())
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["figures"]["base"]["likeness/dino"]["mean"] == 0.25 and content["prompts"][0]["text"].endswith("犬")
