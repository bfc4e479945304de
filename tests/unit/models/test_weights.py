import argparse
import dataclasses
import io
import json
import pickle
import random
import resource
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from convnext_cli.catalog.datasets import imagenet1k_wnids, imagenet22k_wnids, map_classes
from convnext_cli.catalog.models import find_variant
from convnext_cli.errors import CheckpointError, WriteError
from convnext_cli.models.convnext import build_convnext
from convnext_cli.models.layouts import from_official
from convnext_cli.models.weights import (
    ModelCard,
    Weights,
    load_into,
    map_head_to_imagenet1k,
    read_weights,
    write_weights,
)

CARD = ModelCard(
    variant="convnextv2_atto",
    num_classes=3,
    image_px=32,
    classes=("a", "b", "c"),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    crop="center",
    crop_frac=0.875,
)


def atto(num_classes: int = 3, seed: int = 0):
    torch.manual_seed(seed)
    return build_convnext(find_variant("convnextv2_atto"), num_classes=num_classes)


def our_checkpoint(path: Path) -> tuple[dict, dict]:
    raw, ema = atto(seed=1).state_dict(), atto(seed=2).state_dict()
    state = {f"model.{k}": v for k, v in raw.items()} | {
        f"ema_model.{k}": v for k, v in ema.items()
    }
    torch.save({"state_dict": state, "convnext": CARD.to_dict() | {"step": 12}}, path)
    return raw, ema


def test_a_card_survives_being_plain_values():
    assert ModelCard.from_dict(CARD.to_dict()) == CARD


def test_our_checkpoint_gives_the_averaged_weights_unless_raw_ones_are_asked(tmp_path):
    raw, ema = our_checkpoint(tmp_path / "last.ckpt")

    auto = read_weights(tmp_path / "last.ckpt")
    asked = read_weights(tmp_path / "last.ckpt", prefer="raw")

    assert (auto.source, asked.source) == ("ema", "raw")
    assert all(torch.equal(auto.state[k], ema[k]) for k in ema)
    assert all(torch.equal(asked.state[k], raw[k]) for k in raw)
    assert auto.card is not None
    assert (auto.card.step, auto.card.classes) == (12, ("a", "b", "c"))


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_the_usual_containers_and_prefixes_are_unpacked(key, tmp_path):
    state = {f"module._orig_mod.{k}": v for k, v in atto().state_dict().items()}
    torch.save({key: state, "epoch": 3}, tmp_path / "x.pth")

    found = read_weights(tmp_path / "x.pth")

    assert (found.container, found.variant.name, found.num_classes) == (key, "convnextv2_atto", 3)


def test_official_training_checkpoints_hold_both_weights(tmp_path):
    raw, ema = atto(seed=1).state_dict(), atto(seed=2).state_dict()
    torch.save({"model": raw, "model_ema": ema, "epoch": 3}, tmp_path / "checkpoint-best.pth")

    assert torch.equal(
        read_weights(tmp_path / "checkpoint-best.pth").state["head.bias"], ema["head.bias"]
    )
    raw_found = read_weights(tmp_path / "checkpoint-best.pth", prefer="raw")
    assert torch.equal(raw_found.state["head.weight"], raw["head.weight"])
    assert raw_found.has_ema


def test_shards_of_safetensors_are_read_together(tmp_path):
    state = atto().state_dict()
    keys = list(state)
    names = {key: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({k: state[k].contiguous() for k in keys if names[k] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    found = read_weights(tmp_path)

    assert all(torch.equal(found.state[k], v) for k, v in state.items())


def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    canary = tmp_path / "canary"

    class Attack:
        def __reduce__(self):
            return Path.touch, (canary,)

    torch.save({"model": Attack()}, tmp_path / "evil.pth")
    with (tmp_path / "plain.pth").open("wb") as file:
        pickle.dump({"model": Attack()}, file)

    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(CheckpointError) as refusal:
            read_weights(tmp_path / name)
        assert "refused" in str(refusal.value) or "cannot be read" in str(refusal.value)
        assert "safetensors" in str(refusal.value.hint) or "again" in str(refusal.value.hint)
    assert not canary.exists()


@pytest.mark.parametrize("key", ["model", "state_dict"])  # the official code's, timm's
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_the_arguments_of_its_program_is_read(key, zipped, tmp_path):
    state = atto().state_dict()
    arguments = argparse.Namespace(
        lr=4e-3, model="convnextv2_atto", betas=[0.9, 0.999], resume="", output_dir=Path("runs/7")
    )
    content = {key: state, "args": arguments, "epoch": 299}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)

    found = read_weights(tmp_path / "x.pth")

    assert found.container == key
    assert all(torch.equal(found.state[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"args": SimpleNamespace(lr=4e-3)}, "types.SimpleNamespace"),
        ({"args": argparse.Namespace(output=PurePosixPath("x"))}, "pathlib.PurePosixPath"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_refusal_names_what_would_have_to_be_run(content, named, zipped, tmp_path):
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)

    with pytest.raises(
        CheckpointError, match=rf"refused: to read it, {named} would have to be run"
    ):
        read_weights(tmp_path / "x.pth")


def test_damaged_pickles_of_every_kind_get_a_sentence(tmp_path):
    whole = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(2, 3)}}, whole, _use_new_zipfile_serialization=False)
    chance = random.Random(0)

    for _ in range(300):
        damaged = bytearray(whole.getvalue())
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / "x.pth").write_bytes(damaged)

        with pytest.raises(CheckpointError):
            read_weights(tmp_path / "x.pth")


def test_a_cut_file_another_file_and_no_file_get_a_sentence(tmp_path):
    our_checkpoint(tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:100_000])
    (tmp_path / "page.pth").write_text("<html>404</html>")
    (tmp_path / "page.safetensors").write_text("<html>404 not found, and some more</html>")

    for name in ("cut.ckpt", "page.pth", "page.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            read_weights(tmp_path / name)
    with pytest.raises(CheckpointError, match="there is no file"):
        read_weights(tmp_path / "nothing.pth")


def test_safetensors_are_read_under_any_ending(tmp_path):
    state = atto().state_dict()
    save_file(state, tmp_path / "x.pth", metadata={"convnext_weights": "ema"})
    (tmp_path / "cut.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:100_000])

    read = read_weights(tmp_path / "x.pth")

    assert read.source == "ema"
    assert all(torch.equal(read.state[key], weight) for key, weight in state.items())
    with pytest.raises(CheckpointError, match="it is cut, or no checkpoint"):
        read_weights(tmp_path / "cut.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved_is_read_under_the_ending_of_safetensors(tmp_path, zipped):
    state = atto().state_dict()
    torch.save(state, tmp_path / "x.safetensors", _use_new_zipfile_serialization=zipped)

    assert read_weights(tmp_path / "x.safetensors").state.keys() == state.keys()


@pytest.mark.parametrize("name", ["x.pkl", "x.safetensors"])
def test_a_pickle_of_somebody_else_is_called_one(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"head.bias": [0.0]}))

    with pytest.raises(CheckpointError, match=r"it is a pickle that torch\.save did not write"):
        read_weights(tmp_path / name)


def test_another_network_is_no_convnext(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, tmp_path / "resnet.pth")

    with pytest.raises(CheckpointError, match=r"is not a ConvNeXt: its weights begin with conv1"):
        read_weights(tmp_path / "resnet.pth")


@pytest.mark.parametrize("change", ["head.pre_logits.fc.weight", "stem.2.weight"])
def test_a_classifier_that_timm_alone_has_is_sent_to_timm(change, tmp_path):
    state = from_official(atto().state_dict(), "timm") | {change: torch.zeros(3, 3)}
    torch.save(state, tmp_path / "x.pth")

    with pytest.raises(CheckpointError, match=f"the key {change} has no place") as refused:
        read_weights(tmp_path / "x.pth")

    assert "convnext evaluate timm:NAME:PATH" in (refused.value.hint or "")


def test_a_head_of_another_size_starts_afresh_and_is_said_to(tmp_path):
    our_checkpoint(tmp_path / "x.ckpt")
    model = atto(num_classes=5, seed=9)
    fresh = model.head.weight.clone()

    told = load_into(model, read_weights(tmp_path / "x.ckpt"))

    assert "its head has 3 classes and 5 are wanted, so the head starts afresh" in told
    assert torch.equal(model.head.weight, fresh)


@pytest.mark.parametrize(
    ("classes", "kept"), [(("a", "b", "c"), True), ((), True), (("a", "b", "d"), False)]
)
def test_a_head_is_kept_only_for_the_classes_that_it_names(classes, kept, tmp_path):
    our_checkpoint(tmp_path / "x.ckpt")
    found = read_weights(tmp_path / "x.ckpt")
    model = atto(seed=9)

    told = load_into(model, found, target_classes=classes)

    assert torch.equal(model.head.weight, found.state["head.weight"]) is kept
    assert told.endswith(
        "its head of 3 classes was kept"
        if kept
        else "its head of 3 classes tells others apart, so the head starts afresh"
    )


def test_self_supervised_weights_without_norm_and_head_are_taken(tmp_path):
    state = {k: v for k, v in atto().state_dict().items() if not k.startswith(("norm.", "head."))}
    torch.save({"model": state}, tmp_path / "fcmae.pt")
    model = atto(seed=5)

    found = read_weights(tmp_path / "fcmae.pt")
    told = load_into(model, found)

    assert found.num_classes is None
    assert "it has no head" in told
    assert torch.equal(model.stages[0][0].dwconv.weight, state["stages.0.0.dwconv.weight"])


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    our_checkpoint(tmp_path / "x.ckpt")
    model = build_convnext(find_variant("convnextv2_femto"), num_classes=3)

    with pytest.raises(
        CheckpointError, match=r"is convnextv2_atto, but the model is convnextv2_femto"
    ):
        load_into(model, read_weights(tmp_path / "x.ckpt"))


def test_a_22k_head_is_mapped_by_class_and_the_missing_one_is_named(tmp_path):
    source = atto(num_classes=21_841, seed=1)
    torch.save({"model": source.state_dict()}, tmp_path / "atto_22k.pth")
    model = atto(num_classes=1000, seed=2)
    fresh = model.head.weight.clone()

    told = load_into(model, read_weights(tmp_path / "atto_22k.pth"), head="map")

    rows = map_classes(imagenet22k_wnids(), imagenet1k_wnids())
    assert "999 of 1000 rows; n04399382 starts afresh" in told
    for label in (0, 1, 500, 999):
        assert torch.equal(model.head.weight[label], source.head.weight[rows[label]])
    missing = imagenet1k_wnids().index("n04399382")
    assert torch.equal(model.head.weight[missing], fresh[missing])


@pytest.mark.parametrize(
    ("rows", "classes"), [(7, range(5)), (21_841, [f"part {number}" for number in range(1000)])]
)
def test_a_head_without_known_classes_cannot_be_mapped(tmp_path, rows, classes):
    torch.save({"model": atto(num_classes=rows).state_dict()}, tmp_path / "x.pth")
    names = [str(name) for name in classes]

    with pytest.raises(CheckpointError, match="cannot be mapped"):
        load_into(
            atto(num_classes=len(names)),
            read_weights(tmp_path / "x.pth"),
            head="map",
            target_classes=names,
        )


def test_the_sparse_kernels_of_pre_training_become_dense_ones(tmp_path):
    dense = atto().state_dict()
    sparse = {}
    for key, value in dense.items():
        if key.startswith(("norm.", "head.")):
            continue
        name = f"encoder.{key}"
        if key.endswith("dwconv.weight"):
            columns = value[:, 0].transpose(2, 1).reshape(len(value), -1)  # (C, positions)
            sparse[name.replace("weight", "kernel")] = columns.T.contiguous()
        elif (
            value.ndim == 4
            and "downsample_layers" in key
            and not key.startswith("downsample_layers.0")
        ):
            columns = value.transpose(3, 2).reshape(*value.shape[:2], -1)
            sparse[name.replace("weight", "kernel")] = columns.permute(2, 1, 0).contiguous()
        elif "pwconv" in key:
            sparse[name.replace(".weight", ".linear.weight").replace(".bias", ".linear.bias")] = (
                value
            )
        elif "grn" in key or (key.endswith("bias") and "dwconv" in key):
            sparse[name] = value.reshape(1, -1)
        else:
            sparse[name] = value
    torch.save(
        {"model": sparse | {"mask_token": torch.zeros(1), "pred.bias": torch.zeros(3)}},
        tmp_path / "p.pth",
    )

    found = read_weights(tmp_path / "p.pth")

    assert (found.layout, found.variant.name, found.num_classes) == (
        "minkowski",
        "convnextv2_atto",
        None,
    )
    for key, value in found.state.items():
        assert torch.equal(value, dense[key]), key


def weights_of(model: torch.nn.Module, card: ModelCard | None = CARD) -> Weights:
    return Weights(
        path=Path("memory"),
        state=model.state_dict(),
        layout="official",
        container="",
        source="raw",
        has_ema=False,
        variant=find_variant("convnextv2_atto"),
        num_classes=model.head.out_features,
        card=card,
    )


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "x.safetensors"])
@pytest.mark.parametrize("layout", ["official", "timm"])
def test_a_card_travels_with_what_is_written(layout, name, tmp_path):
    model = atto()
    write_weights(weights_of(model), tmp_path / name, layout=layout)

    found = read_weights(tmp_path / name)

    assert (found.layout, found.card) == (layout, CARD)
    assert all(torch.equal(found.state[key], value) for key, value in model.state_dict().items())


def test_a_card_travels_into_the_folder_for_transformers(tmp_path):
    write_weights(weights_of(atto()), tmp_path / "folder", layout="huggingface")

    config = json.loads((tmp_path / "folder" / "config.json").read_text())

    assert read_weights(tmp_path / "folder").card == CARD
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert (config["layer_norm_eps"], config["image_size"]) == (1e-6, 32)


@pytest.mark.parametrize("card", [CARD, None])
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("official", "x.pth"),
        ("official", "x.safetensors"),
        ("timm", "x.pt"),
        ("timm", "x.safetensors"),
        ("huggingface", "folder"),
    ],
)
def test_averaged_weights_are_still_known_as_such_in_another_layout(layout, name, card, tmp_path):
    averaged = dataclasses.replace(weights_of(atto(), card), source="ema")
    write_weights(averaged, tmp_path / name, layout=layout)

    found = [read_weights(tmp_path / name, prefer=prefer).source for prefer in ("auto", "ema")]

    assert found == ["ema", "ema"]
    with pytest.raises(CheckpointError, match="holds averaged weights only") as refused:
        read_weights(tmp_path / name, prefer="raw")
    assert refused.value.hint == "use them: --weights ema, in a recipe init.source=ema"


def test_raw_weights_that_say_so_are_not_taken_for_averaged_ones_by_their_name(tmp_path):
    write_weights(weights_of(atto(), None), tmp_path / "no_ema.pth", layout="official")

    assert read_weights(tmp_path / "no_ema.pth").source == "raw"
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        read_weights(tmp_path / "no_ema.pth", prefer="ema")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": "convnext_nine"}, "it names a model 'convnext_nine'"),
        ({"variant": "convnextv2_femto"}, "it says convnextv2_femto, and the weights are"),
        ({"num_classes": 9, "classes": []}, "it says 9 classes, and the head 3"),
        ({"classes": ["a"]}, "it names 1 of 3 classes"),
    ],
)
def test_a_card_that_contradicts_the_weights_is_refused(change, said, tmp_path):
    plain = CARD.to_dict() | change
    torch.save({"model": atto().state_dict(), "convnext": plain}, tmp_path / "x.pth")

    with pytest.raises(CheckpointError, match=rf"its model card is damaged: {said}"):
        read_weights(tmp_path / "x.pth")


def test_a_card_that_is_no_card_or_from_the_future_is_refused(tmp_path):
    state = atto().state_dict()
    torch.save({"model": state, "convnext": torch.zeros(3)}, tmp_path / "tensor.pth")
    save_file(state, tmp_path / "text.safetensors", metadata={"convnext": "{not json"})
    torch.save({"model": state, "convnext": CARD.to_dict() | {"format": 2}}, tmp_path / "new.pth")

    for name in ("tensor.pth", "text.safetensors"):
        with pytest.raises(CheckpointError, match="its model card is damaged"):
            read_weights(tmp_path / name)
    with pytest.raises(CheckpointError, match="has format 2, and this version reads 1"):
        read_weights(tmp_path / "new.pth")


def test_a_released_file_that_is_named_ema_is_averaged_whatever_is_preferred(tmp_path):
    path = tmp_path / "convnextv2_atto_1k_224_ema.pt"
    torch.save({"model": atto().state_dict()}, path)

    assert [read_weights(path, prefer=p).source for p in ("auto", "raw", "ema")] == ["ema"] * 3


def test_weights_that_a_file_does_not_have_are_not_replaced_by_others(tmp_path):
    torch.save({"model": atto().state_dict()}, tmp_path / "raw.pth")
    torch.save({"model_ema": atto().state_dict()}, tmp_path / "averaged.pth")

    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        read_weights(tmp_path / "raw.pth", prefer="ema")
    with pytest.raises(CheckpointError, match="holds averaged weights only"):
        read_weights(tmp_path / "averaged.pth", prefer="raw")


def test_a_module_around_the_network_is_looked_through(tmp_path):
    state = {f"model.{key}": value for key, value in atto().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "lightning.ckpt")

    assert read_weights(tmp_path / "lightning.ckpt").num_classes == 3


@pytest.mark.parametrize(
    "index", ["[1]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', "<html>"]
)
def test_a_damaged_index_of_shards_gets_a_sentence(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)

    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_weights(tmp_path)


def test_a_shard_that_is_missing_or_lies_outside_is_not_read(tmp_path):
    (tmp_path / "folder").mkdir()
    save_file(atto().state_dict(), tmp_path / "x.safetensors")
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"head.bias": "../x.safetensors"}}))

    with pytest.raises(CheckpointError, match=r"there is no file .*folder/x\.safetensors"):
        read_weights(tmp_path / "folder")


def test_an_official_file_with_foreign_keys_is_refused_by_the_first(tmp_path):
    foreign = {"norm0.weight": torch.zeros(40)}
    torch.save({"model": atto().state_dict() | foreign}, tmp_path / "x.pth")

    with pytest.raises(CheckpointError, match=r"the key norm0\.weight has no place"):
        read_weights(tmp_path / "x.pth")


def test_a_v2_with_layer_scale_is_not_written_where_it_would_be_lost(tmp_path):
    model = build_convnext(find_variant("convnextv2_atto"), num_classes=3, layer_scale_init=0.5)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    found = read_weights(tmp_path / "x.pth")

    with pytest.raises(CheckpointError, match=r"no name for stages\.0\.0\.gamma"):
        write_weights(found, tmp_path / "folder", layout="huggingface")
    write_weights(found, tmp_path / "timm.pth", layout="timm")

    assert not (tmp_path / "folder").exists()
    assert torch.all(read_weights(tmp_path / "timm.pth").state["stages.0.0.gamma"] == 0.5)


def test_a_head_without_its_bias_is_not_taken_for_whole(tmp_path):
    state = {key: value for key, value in atto().state_dict().items() if key != "head.bias"}
    torch.save({"model": state}, tmp_path / "x.pth")

    with pytest.raises(CheckpointError, match=r"head\.bias is missing there"):
        load_into(atto(), read_weights(tmp_path / "x.pth"))


@pytest.mark.parametrize(("there", "here"), [(None, 1e-6), (1e-6, None)])
def test_weights_with_another_layer_scale_are_told_what_builds_theirs(there, here, tmp_path):
    atto_v2 = find_variant("convnextv2_atto")
    model, other = (
        build_convnext(atto_v2, num_classes=3, layer_scale_init=init) for init in (there, here)
    )
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")

    with pytest.raises(CheckpointError, match=r"gamma is .* there") as caught:
        load_into(other, weights)

    value = str(caught.value.hint).partition("model.layer_scale_init=")[2]
    assert value == ("null" if there is None else "1e-6")


@pytest.mark.parametrize(("image_px", "crop"), [(224, "center"), (384, "warp")])
def test_a_folder_of_transformers_says_how_images_are_prepared(image_px, crop, tmp_path):
    frac = 0.9 if crop == "center" else 1.0
    card = dataclasses.replace(
        CARD, image_px=image_px, classes=(), interpolation="bilinear", crop=crop, crop_frac=frac
    )
    write_weights(weights_of(atto(), card=card), tmp_path, layout="huggingface")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file), file)  # as transformers itself writes it: our own card is gone

    assert read_weights(tmp_path).card == card
    assert read_weights(file).card == card


def test_a_published_preparation_in_its_older_form_is_read(tmp_path):
    write_weights(weights_of(atto(), card=None), tmp_path, layout="huggingface")
    said = {"size": 384, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | {"crop_pct": None}))

    card = read_weights(tmp_path).card

    assert card is not None
    assert (card.image_px, card.crop, card.interpolation) == (384, "warp", "bicubic")
    assert (card.mean, card.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_the_configuration_of_timm_beside_weights_is_read(tmp_path):
    write_weights(weights_of(atto(), card=None), tmp_path / "model.safetensors", layout="timm")
    view = {"input_size": [3, 384, 384], "crop_pct": 1.0, "crop_mode": "squash"}
    view |= {"interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architecture": "convnextv2_atto", "pretrained_cfg": view}))

    card = read_weights(tmp_path).card

    assert card is not None
    assert (card.image_px, card.crop, card.interpolation) == (384, "warp", "bilinear")
    assert (card.mean, card.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    config.write_text('{"of": "another program"}')
    assert read_weights(tmp_path).card is None
    config.write_text(json.dumps({"pretrained_cfg": view | {"interpolation": "random"}}))
    with pytest.raises(CheckpointError, match="does not say how images are prepared"):
        read_weights(tmp_path)


@pytest.mark.parametrize("said", ["<html>", "{}", "[]", '{"size": {"height": 224, "width": 224}}'])
def test_a_preparation_of_another_kind_is_not_passed_over(said, tmp_path):
    write_weights(weights_of(atto(), card=None), tmp_path, layout="huggingface")
    (tmp_path / "preprocessor_config.json").write_text(said)

    with pytest.raises(CheckpointError, match="does not say how images are prepared"):
        read_weights(tmp_path)


def test_layer_scale_is_built_as_the_weights_have_it():
    tiny = find_variant("convnext_tiny")
    with torch.device("meta"):
        scaled = build_convnext(tiny, num_classes=3)
        plain = build_convnext(tiny, num_classes=3, layer_scale_init=None)

    said = [
        dataclasses.replace(weights_of(model, card=None), variant=tiny).layer_scale_init
        for model in (scaled, plain, atto())
    ]

    assert said == [1e-6, None, None]


def test_a_mapped_head_is_the_same_every_time_and_keeps_its_precision():
    weights = weights_of(atto(num_classes=21_841).half(), card=None)

    (first, told), (second, _) = (map_head_to_imagenet1k(weights) for _ in range(2))

    assert "999 of 1000 rows; n04399382 starts afresh" in told
    assert first.state["head.weight"].shape == (1000, 320)
    assert first.state["head.weight"].dtype == torch.float16
    assert torch.equal(first.state["head.weight"], second.state["head.weight"])
    assert torch.equal(first.state["head.weight"][0], weights.state["head.weight"][359])


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_disk_that_takes_no_more_is_told_and_leaves_nothing(tmp_path, name):
    weights, before = weights_of(atto()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(WriteError, match=f"cannot write .*{name}: File too large"):
            write_weights(weights, tmp_path / name, layout="official")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address", ["https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224.pth", "s3://runs/a"]
)
def test_an_address_is_told_that_nothing_is_downloaded(address):
    with pytest.raises(CheckpointError, match="there is no file") as caught:
        read_weights(Path(address))

    assert caught.value.hint == "nothing is downloaded: fetch the file first, and name where it is"
