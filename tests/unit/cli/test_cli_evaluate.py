"""What `convnext evaluate` shows and writes, and what it refuses before it works."""

import csv
import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from convnext_cli.cli import _console, evaluate
from convnext_cli.training.report import TIMM_COLUMNS, ClassRow, PairRow, Report

REPORT = Report(
    model="timm:convnext_tiny",
    checkpoint="weights/[draft].pth",
    weights="ema",
    parameters=28_589_128,
    image_px=224,
    crop="center",
    crop_frac=0.875,
    interpolation="bicubic",
    view_reason="as published",
    data="imagenet",
    split="val",
    precision="fp32",
    images=50_000,
    top1=82.066,
    top5=95.854,
    loss=0.8123,
    ece=0.0345,
    images_per_second=1234.5,
    worst_pairs=(PairRow(name="n01440764", taken_for="n01443537", images=12, share=0.24),),
    per_class=tuple(
        ClassRow(label=k, name=name, images=50, correct=38 + k, top1=2 * (38.0 + k))
        for k, name in enumerate(("n01440764", "n01443537", "n01484850", "d", "e", "f", "g"))
    ),
)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where the terminal's text goes."""
    sink = io.StringIO()
    screen = Console(file=sink, width=100, force_terminal=True, no_color=True, markup=False)
    monkeypatch.setattr(evaluate, "console", screen)
    monkeypatch.setattr(_console, "console", screen)
    return sink


def test_people_see_scores_classes_in_words_and_confused_pairs(shown: io.StringIO):
    evaluate.show_report(REPORT)

    text = shown.getvalue()
    for part in ("82.07%", "95.85%", "0.8123", "0.0345", "1,234 images/s", "50,000 images"):
        assert part in text
    assert "averaged (EMA) weights of weights/[draft].pth" in text
    assert "224 px, center crop 0.875, bicubic: as published" in text
    assert "tench" in text
    assert "goldfish" in text
    assert "24.0" in text


def test_few_classes_have_no_top5(shown: io.StringIO):
    evaluate.show_report(dataclasses.replace(REPORT, per_class=REPORT.per_class[:3]))

    assert "top-5" not in shown.getvalue()


def test_the_table_has_timms_columns():
    assert tuple(REPORT.to_timm_row()) == TIMM_COLUMNS
    assert REPORT.to_timm_row() == {
        "model": "convnext_tiny",
        "top1": "82.066",
        "top1_err": "17.934",
        "top5": "95.854",
        "top5_err": "4.146",
        "param_count": "28.59",
        "img_size": "224",
        "crop_pct": "0.875",
        "interpolation": "bicubic",
    }


def test_json_holds_the_scores_and_all_classes():
    plain = REPORT.to_json()

    assert plain.keys() >= {"top1", "top5", "loss", "images", "ece", "weights", "image_px", "crop"}
    assert plain["worst_pairs"][0]["taken_for"] == "n01443537"
    assert len(plain["per_class"]) == 7


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("--csv", "nowhere/table.csv", "nowhere is no writable folder"),
        ("--per-class", ".", "it is a folder"),
        ("--csv", "other.csv", "holds another table"),
    ],
)
def test_a_table_that_cannot_be_written_is_refused_first(
    run_cli, tmp_path: Path, flag: str, name: str, message: str
):
    (tmp_path / "other.csv").write_text("step,loss\n1,2\n")

    result = run_cli("evaluate", "no-such-checkpoint", "--data", "none", flag, name)

    assert result.exit_code == 2
    assert message in result.stderr
    assert (tmp_path / "other.csv").read_text() == "step,loss\n1,2\n"


def test_rows_are_added_to_a_table(tmp_path: Path):
    table = tmp_path / "results.csv"

    for _ in range(2):
        evaluate._append_row(table, REPORT)
    table.write_text(table.read_text().rstrip("\n"))  # as some editors leave it
    evaluate._append_row(table, REPORT)

    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["top1"] for row in rows] == ["82.066", "82.066", "82.066"]
    assert table.read_text().endswith("bicubic\n")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("missing.pth", "there is no file missing.pth"),
        ("timm:convnext_tinny", "no model of this name"),
        ("timm:convnext_tiny.nothing", "no weights called 'nothing'"),
        ("timm:convnext_tiny:missing.pth", "there is no file missing.pth"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(run_cli, checkpoint: str, message: str):
    result = run_cli("evaluate", checkpoint, "--data", "none", "--device", "cpu")

    assert result.exit_code == 2
    assert message in result.stderr
    assert "hint:" in result.stderr
    assert "Traceback" not in result.stderr


def test_weights_that_are_not_at_hand_are_not_downloaded(run_cli, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    result = run_cli("evaluate", "timm:test_convnext", "--data", "none", "--device", "cpu")

    assert result.exit_code == 2
    assert "nothing is downloaded" in result.stderr
    assert "timm:test_convnext:PATH" in result.stderr
