"""What the images are made of, without Docker: their files, read as text."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_both_images_are_made_by_the_same_steps_and_run_as_nobody_special():
    for name, packages in (("Dockerfile", "requirements-cuda"), ("Dockerfile.cpu", "requirements")):
        text = (ROOT / "docker" / name).read_text()
        steps = re.findall(r"^RUN bash /opt/src/docker/install.sh (\S+) (\S+)", text, re.MULTILINE)
        assert steps == [("/opt/convnext", f"docker/{packages}.txt")]
        assert text.rindex("USER 10001") < text.index("ENTRYPOINT")


def test_what_the_base_image_brings_is_not_pinned_and_all_else_has_a_hash():
    pinned = {}
    for path in (ROOT / "docker").glob("*.txt"):
        if path.name == "in-base-image.txt":
            continue
        entries = re.split(r"\n(?=\S)", path.read_text().split("make lock\n", 1)[1].strip())
        assert all("==" in entry and "--hash=sha256:" in entry for entry in entries), path
        pinned[path.stem] = {entry.split("==")[0] for entry in entries}

    base = {"torch", "torchvision", "triton"}
    assert base <= pinned["requirements"]
    assert not base & pinned["requirements-cuda"]
    assert {"deepspeed", "lightning", "webdataset"} <= pinned["requirements-cuda"]
