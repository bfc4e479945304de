"""Recipe files: how they are found, extended, overridden, refused and written."""

import contextlib
import shlex
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from convnext_cli.errors import RecipeError
from convnext_cli.recipe.files import (
    MAX_BYTES,
    find_recipe,
    flatten_keys,
    list_fields,
    list_recipes,
    load_recipe,
    merge_keys,
    nearest_field,
    parse_override,
    read_yaml,
    recipes_folder,
    render_override,
    render_recipe,
)


@pytest.fixture
def write(tmp_path: Path, monkeypatch):
    """Write a recipe into the working directory; gives its path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    "name", ["in1k_tiny", "in1k_tiny.yaml", "recipes/in1k_tiny.yaml", "recipes/in1k_tiny"]
)
def test_a_shipped_recipe_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert find_recipe(name) == recipes_folder() / "in1k_tiny.yaml"


def test_a_file_goes_before_a_shipped_recipe_of_that_name(write):
    write("extends: in1k_small\nabout: my own tiny", "in1k_tiny.yaml")

    assert load_recipe("in1k_tiny.yaml").about == "my own tiny"
    assert load_recipe("in1k_tiny").about.startswith("ConvNeXt-T")


def test_a_name_that_does_not_exist_gets_the_nearest_one():
    with pytest.raises(RecipeError, match="no recipe in1k_tinny") as caught:
        find_recipe("in1k_tinny")

    assert caught.value.hint == "did you mean in1k_tiny?"


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="this is a folder"):
        find_recipe(str(tmp_path))


def test_own_keys_go_over_those_of_the_extended_recipe(write):
    mine = write("extends: in1k_tiny\nabout: mine\noptim:\n  lr: 1e-3\n")

    recipe = load_recipe(mine)

    assert (recipe.about, recipe.optim.lr) == ("mine", 1e-3)
    assert (recipe.optim.weight_decay, recipe.model.drop_path) == (0.05, 0.1)


@pytest.mark.parametrize(
    ("changes", "published"),
    [
        (["model.name=convnext_base"], None),
        (["data.image_px=288"], None),
        (["model.num_classes=10"], None),
        (["published_top1=83", "model.name=convnext_base"], 83),
        (["model.name=convnext_tiny", "optim.lr=2e-3", "data.path=/x"], 82.1),
    ],
)
def test_a_published_accuracy_stays_with_its_model_data_set_and_size(changes, published, write):
    keys = [change.replace(".", ":\n  ").replace("=", ": ") for change in changes]
    own = write("\n".join(["extends: in1k_tiny", *keys]))

    assert load_recipe("in1k_tiny", changes).published_top1 == published
    assert load_recipe(own).published_top1 == published


def test_a_recipe_is_extended_relative_to_its_own_folder(write):
    write("extends: in1k_tiny\nabout: below\nseed: 7\n", "base/below.yaml")
    top = write("extends: ../base/below.yaml\nabout: above\n", "own/above.yaml")
    bare = write("extends: below\nabout: beside\n", "base/beside.yaml")

    assert (load_recipe(top).seed, load_recipe(top).about) == (7, "above")
    assert load_recipe(bare).seed == 7


def test_recipes_that_extend_each_other_are_refused(write):
    write("extends: two\nabout: one\n", "one.yaml")
    write("extends: one\nabout: two\n", "two.yaml")

    with pytest.raises(RecipeError, match=r"one\.yaml -> two\.yaml -> one\.yaml"):
        load_recipe("one.yaml")


def test_a_recipe_that_extends_itself_is_refused(write):
    with pytest.raises(RecipeError, match="in a circle"):
        load_recipe(write("extends: mine\nabout: me\n"))


def test_a_long_chain_is_not_called_a_circle_and_the_hint_shortens_it(write):
    for number in range(9):
        write(f"extends: r{number + 1}\nabout: x\n", f"r{number}.yaml")
    last = write("about: x\n", "r9.yaml")

    with pytest.raises(RecipeError, match="more than 8 recipes extend each other") as caught:
        load_recipe("r0.yaml")

    assert (
        caught.value.hint == f"write out one of them: convnext recipes show {last.parent}/r1.yaml"
    )
    load_recipe("r2.yaml")


def test_a_file_that_is_named_without_its_suffix_is_the_hint(write):
    write("extends: in1k_tiny\nabout: x\n", "my own.yaml")

    with pytest.raises(RecipeError, match="no recipe my own") as caught:
        load_recipe("my own")

    assert caught.value.hint == "did you mean 'my own.yaml'?"


def test_text_that_is_no_finite_number_is_not_said_to_need_no_quotes():
    with pytest.raises(RecipeError, match=r"optim\.lr: should be a valid number") as caught:
        load_recipe("in1k_tiny", ["optim.lr=nan"])

    assert caught.value.hint == "what it means: convnext recipes show --fields optim.lr"


def test_the_file_that_extends_nothing_known_is_named(write):
    with pytest.raises(RecipeError, match=r"mine\.yaml: extends: no recipe in1k_tiiny") as caught:
        load_recipe(write("extends: in1k_tiiny\nabout: me\n"))

    assert caught.value.hint == "did you mean in1k_tiny?"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("about: x\noptim:\n  lr: 1e-3\n  lr: 2e-3\n", "line 4: the key lr is written", "one"),
        ("about: x\nopitm:\n  lr: 1e-3\n", "no key opitm", "did you mean optim?"),
        ("about: x\noptim:\n  bettas: 3\n", "no key optim.bettas", "did you mean optim.betas?"),
        ("about: x\nlr: 1e-3\n", "no key lr", "did you mean optim.lr?"),
        ("about: x\n1: 2\n", "no key 1", "convnext recipes show --fields"),
        ("about: x\noptim:\n  lr: '4e-3'\n", "found '4e-3' (text)", "a number has no quotes"),
        ("about: x\noptim:\n  clip_norm: off\n", "found 'off' (text)", "optim.clip_norm=null"),
        ("about: x\nseed: true\n", "seed: should be a valid integer, found true", "--fields seed"),
        ("about: x\nseed: {a: 1}\n", "found a section with keys", "--fields seed"),
        ("about: x\nseed: [1, 2, 3, 4, 5]\n", "found a list of 5", "--fields seed"),
        ("about: x\ncompute:\n  channels_last: no\n", "found 'no' (text)", "channels_last=false"),
        ("about: x\ncompute:\n  channels_last: yes\n", "found 'yes' (text)", "channels_last=true"),
        ("about: x\noptim:\n", "optim is a section with keys, found nothing", "--fields optim"),
        ("about: x\noptim: 3\n", "optim is a section with keys, found 3", "--fields optim"),
        ("optim:\n  lr: 1e-3\n", "the key about is missing", "extends: in1k_tiny"),
        ("about: x\ndata:\n  mean: [0.5]\n", "data.mean: another number of values", "data.mean"),
        ("about: x\nmodel:\n  name: convnext_tinny\n", "no such architecture", "convnext_tiny?"),
        ("about: x\ninit:\n  head: map\n", "mine.yaml: init.head: map needs", "--fields"),
        ("extends: [in1k_tiny]\nabout: x\n", "a recipe's name is wanted", "extends: in1k_tiny"),
        ("", "a recipe is made of sections", "convnext recipes show in1k_tiny"),
        ("just text\n", "a recipe is made of sections", "convnext recipes show in1k_tiny"),
        ("about: one\n---\nabout: two\n", "found another document", "convnext recipes show"),
        ("about: [1\n", "not a YAML document", "convnext recipes show"),
        ("\tabout: x\n", "line 1: not a YAML document", "convnext recipes show"),
        ("about: &a x\nlog: *a\n", "line 1: anchors and aliases", "extends:"),
        ("about: !!python/name:os.abort x\n", "line 1: tags are not part", "without a tag"),
        ("about: x\nseed: !!float ''\n", "line 2: tags are not part", "without a tag"),
        ("? - a: b\n: x\n", "mine.yaml: a key is a word", "convnext recipes show"),
        ("about: !mine x\n", "line 1: tags are not part", "without a tag"),
        ("%YAML 1.1\n---\nabout: x\n", "YAML 1.2", "remove the line %YAML"),
        ("about: " + "[" * 3000 + "]" * 3000, "nested deeper", "convnext recipes show"),
        ("about: x\nseed: 1" + "0" * 5000 + "\n", "mine.yaml", "convnext recipes show"),
        ("about: " + "x" * (MAX_BYTES + 1), "larger than a recipe can be", "convnext recipes list"),
    ],
)  # fmt: skip
def test_a_bad_file_is_told_by_place_and_value_with_a_hint(write, text, message, hint):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text))

    assert "mine.yaml" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_a_file_that_is_no_text_is_refused(write):
    write("").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(RecipeError, match="not a text in UTF-8"):
        load_recipe("mine.yaml")


def test_a_bomb_of_aliases_is_refused_at_once(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]

    with pytest.raises(RecipeError, match="line 1: anchors"):
        load_recipe(write("\n".join(lines)))


@given(st.text(st.sampled_from("[]{}:,&*!%|>-?#~'\" \n\tabe01.+_=<@\x00\u2028"), max_size=40))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(RecipeError):
        read_yaml(text, where="it")


def test_numbers_and_words_are_those_of_yaml_1_2():
    text = "[4e-3, 1e-08, no, off, yes, 010, null, ~, true]"

    assert read_yaml(text, where="it") == [
        4e-3, 1e-8, "no", "off", "yes", 10, None, None, True,
    ]  # fmt: skip


def test_overrides_go_over_the_file_and_later_ones_win():
    recipe = load_recipe(
        "in1k_tiny", ["optim.lr=1e-3", "optim.lr=2e-3", "ema.decay=null", "seed=3"]
    )

    assert (recipe.optim.lr, recipe.ema.decay, recipe.seed) == (2e-3, None, 3)
    assert recipe.optim.weight_decay == 0.05


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("optim.lr", "section.key=value is wanted", "optim.lr=2e-3"),
        ("=3", "section.key=value is wanted", "optim.lr=2e-3"),
        ("optim=3", "optim is a section, not a key", "--fields optim"),
        ("lr=3", "no key lr", "did you mean optim.lr?"),
        ("optim.rl=3", "no key optim.rl", "did you mean optim.lr?"),
        ("opitm.lr=3", "no key opitm.lr", "did you mean optim.lr?"),
        ("extends=in1k_base", "no key extends", "convnext recipes show --fields"),
        ("about=" + "x" * (MAX_BYTES + 1), "larger than", "optim.betas"),
        ("optim.lr=[1", "not a YAML document", "optim.betas=[0.9,0.999]"),
    ],
)
def test_an_override_of_another_form_is_refused(override, message, hint):
    with pytest.raises(RecipeError) as caught:
        parse_override(override)

    assert override[:80] in str(caught.value)
    assert len(str(caught.value)) < 200
    assert message in str(caught.value)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("override", "then"),
    [
        ("optim.clip_norm=off", "optim.clip_norm=null"),
        ("schedule.warmup=off", "schedule.warmup=null"),
        ("schedule.warmup=0ep", "schedule.warmup=null"),
        ("mix.mixup=0", "mix.mixup=null"),
        ("mix.cutmix=-1", "mix.cutmix=null"),
        ("optim.clip_norm=false", "optim.clip_norm=null"),
        ("compute.channels_last=no", "compute.channels_last=false"),
        ("optim.lr='2e-3'", "optim.lr=2e-3"),
    ],
)
def test_the_edit_that_a_hint_names_mends_the_value(override, then):
    with pytest.raises(RecipeError) as caught:
        load_recipe("in1k_tiny", [override])

    assert caught.value.hint is not None
    assert shlex.split(caught.value.hint)[-1] == then
    load_recipe("in1k_tiny", [then])


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example('a "b" \\ *c # d: [e')
@example("\U0001f600 \udcff \x7f \ufeff")
def test_any_path_can_be_given_as_an_override(path):
    assert parse_override(render_override("data.path", path)) == {"data": {"path": path}}


def test_spaces_around_a_key_and_its_value_are_none_of_theirs():
    assert parse_override("optim.lr = 1e-3") == {"optim": {"lr": 1e-3}}


def test_an_empty_value_is_null():
    assert parse_override("ema.decay=") == {"ema": {"decay": None}}


@pytest.mark.parametrize("name", list_recipes())
def test_a_written_recipe_is_read_back_as_it_was(name, write):
    recipe = load_recipe(name)

    assert load_recipe(write(render_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    "override",
    [
        "about='null'",
        "about='1e-3: # not a comment'",
        'about="two\\nlines"',
        "data.path='*.tar'",
        "data.path='off'",
        "schedule.length=0.1234567890123ep",
        "optim.lr=0.00123456789012345",
        "log.trackers=[csv, tensorboard]",
        "checkpoint.every=30min",
    ],
)  # fmt: skip
def test_odd_values_survive_being_written(override, write):
    recipe = load_recipe("in1k_tiny", [override])

    assert load_recipe(write(render_recipe(recipe))) == recipe


def test_a_written_recipe_says_null_and_a_key_a_line():
    lines = render_recipe(load_recipe("in1k_tiny")).splitlines()

    assert "  clip_norm: null" in lines
    assert "  betas: [0.9, 0.999]" in lines
    assert "  length: 300ep" in lines


def test_merging_changes_neither_side():
    below, above = {"optim": {"lr": 1, "eps": 2}, "seed": 0}, {"optim": {"lr": 3}}

    merged = merge_keys(below, above)

    assert merged == {"optim": {"lr": 3, "eps": 2}, "seed": 0}
    assert (below["optim"], above) == ({"lr": 1, "eps": 2}, {"optim": {"lr": 3}})


def test_flat_keys_are_the_fields_of_a_recipe():
    flat = flatten_keys(load_recipe("in1k_tiny").model_dump(mode="json"))

    assert list(flat) == list_fields()
    assert flat["optim.lr"] == 4e-3


def test_what_is_like_no_key_has_no_nearest_one():
    assert nearest_field("zzzzzzzz") is None
