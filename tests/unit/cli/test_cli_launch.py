"""`convnext launch`: what is refused before anything starts, and what a dry run shows."""

import pytest


def test_a_dry_run_writes_the_job_file_to_stdout_and_nothing_to_disk(run_cli, tmp_path):
    done = run_cli("launch", "slurm", "in1k_tiny", "--nodes", "4", "--partition", "gpu",
                   "--dry-run", "optim.lr=2e-3")  # fmt: skip

    assert done.exit_code == 0, done.stderr
    assert "#SBATCH --nodes=4\n" in done.stdout
    assert "#SBATCH --partition=gpu\n" in done.stdout
    assert "export EXTRA='optim.lr=2e-3 --device cuda'\n" in done.stdout
    assert "4 x 8 cuda" in done.stderr
    assert "93,600" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_sbatch_there_is_one_sentence_and_exit_code_2(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run_cli("launch", "slurm", "in1k_tiny")

    assert done.exit_code == 2
    assert "error: there is no sbatch on this machine" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("slurm", "in1k_tiny", "--time", "soon"), "--time soon"),
        (("slurm", "in1k_tiny", "--name", "a/b"), "--name a/b"),
        (("slurm", "in1k_tiny", "--name", ".."), "--name .."),
        (("slurm", "in1k_tiny", "--nodes", "3"), "do not split"),
        (("slurm", "in1k_tiny", "augment.rand_augment=rnd-m9"), "augment.rand_augment"),
        (("local", "in1k_tinny"), "in1k_tinny"),
        (("local", "in1k_tiny", "optim.lr=fast"), "optim.lr"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(run_cli, tmp_path, words, sentence):
    done = run_cli("launch", *words)

    assert done.exit_code == 2
    assert sentence in done.stderr
    assert "hint: " in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("in1k_tiny",), "the recipe names no data set to train on"),
        (("v2_in1k_atto", "data.dataset=quickstart", "model.num_classes=10"), "none are named"),
    ],
)
def test_a_job_that_could_not_begin_is_not_submitted(
    run_cli, tmp_path, monkeypatch, words, sentence
):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text("#!/bin/sh\ntouch submitted\necho 1\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))

    done = run_cli("launch", "slurm", *words)

    assert done.exit_code == 2
    assert sentence in done.stderr
    assert "hint: " in done.stderr
    assert list(tmp_path.iterdir()) == [folder]


def test_a_home_folder_that_no_shell_has_read_is_that_of_the_job(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    done = run_cli("launch", "slurm", "in1k_tiny", "--runs-dir=~/own", "--dry-run")

    assert f"export RUNS_DIR={tmp_path}/own\n" in done.stdout
