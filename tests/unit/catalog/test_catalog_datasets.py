import subprocess
import sys

from convnext_cli.catalog.datasets import (
    DATASETS,
    imagenet1k_wnids,
    imagenet22k_wnids,
    imagenet_class_names,
    map_classes,
)


def test_published_sizes():
    assert (DATASETS["imagenet1k"].train_images, DATASETS["imagenet1k"].val_images) == (
        1_281_167,
        50_000,
    )
    assert (DATASETS["imagenet22k"].train_images, DATASETS["imagenet22k"].num_classes) == (
        14_197_122,
        21_841,
    )
    cleaned = DATASETS["imagenet21k_p"]
    assert (cleaned.num_classes, cleaned.train_images, cleaned.val_images) == (
        11_221,
        11_797_632,
        561_052,
    )
    winter = DATASETS["imagenet21k_p_w21"]
    assert (winter.num_classes, winter.train_images, winter.val_images) == (
        10_450,
        11_060_223,
        522_500,
    )


def test_labels_count_through_the_sorted_wnids():
    assert len(imagenet1k_wnids()) == 1000
    assert len(imagenet22k_wnids()) == 21_841
    assert list(imagenet1k_wnids()) == sorted(imagenet1k_wnids())
    assert list(imagenet22k_wnids()) == sorted(imagenet22k_wnids())


def test_all_classes_of_1k_but_the_teddy_bear_are_in_22k():
    rows = map_classes(imagenet22k_wnids(), imagenet1k_wnids())

    assert (rows[0], rows[1], rows[999]) == (359, 368, 21_815)
    assert [label for label, row in enumerate(rows) if row is None] == [850]
    assert imagenet1k_wnids()[850] == "n04399382"
    assert len(set(rows)) == 1000


def test_classes_map_by_name():
    assert map_classes(["a", "b", "c"], ["c", "x", "a"]) == (2, None, 0)


def test_classes_have_words():
    assert imagenet_class_names()["n01440764"].startswith("tench")


def test_reading_the_lists_does_not_import_timm():
    program = (
        "import sys; from convnext_cli.catalog import datasets; datasets.imagenet22k_wnids();"
        "sys.exit('timm' in sys.modules or 'torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
