"""Recipe files: found by name or path, extended, overridden, read and written as strict YAML 1.2.

```
recipes/in1k_small.yaml      extends: in1k_tiny      section.key=value
        |                          |                        |
        `--- its own keys over ----`------- under ----------'        -> Recipe
```
"""

import difflib
import functools
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    NodeEvent,
    ScalarEvent,
)
from ruamel.yaml.representer import SafeRepresenter

from convnext_cli.catalog.models import VARIANTS
from convnext_cli.errors import RecipeError, quote_path
from convnext_cli.recipe.schema import Recipe

MAX_BYTES = 1 << 20
"""A recipe is a page of text; anything larger is a mistake or an attack."""

_EXTENDS = 8
"""The longest chain of recipes that extend each other; the shipped ones need three."""

_REPORTED_FOR = ("model.name", "model.num_classes", "data.dataset", "data.image_px")
"""Keys that `published_top1` is about: where one changes, the number is another recipe's."""

_NESTING = 8
"""The deepest YAML that is read; a recipe needs three levels."""


def recipes_folder() -> Path:
    """The folder of the shipped recipes: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_recipes"
    return shipped if shipped.is_dir() else package.parent / "recipes"


def list_recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def find_recipe(name: str, *, beside: Path | None = None) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Args:
        name: Path of a YAML file, with or without its suffix, or the name of a shipped recipe.
        beside: Folder that relative paths start from; None: the working directory.

    Raises:
        RecipeError: There is no such file and no such name; the nearest name is the hint.
    """
    asked = Path(name).expanduser()
    path = asked if beside is None else beside / asked
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml")
    folders = [path.parent] if beside is not None else []
    # `recipes/in1k_tiny.yaml` is how the documentation writes it; it works from any folder.
    if asked.parent in {Path(), Path("recipes")}:
        folders.append(recipes_folder())
    for folder in folders:
        if (found := folder / f"{stem}.yaml").is_file():
            return found
    if path.is_dir():
        raise RecipeError(
            f"recipe {name}: this is a folder", hint="name a .yaml file or a shipped recipe"
        )
    near = difflib.get_close_matches(stem, list_recipes(), n=1)
    if (file := path.with_name(f"{path.name}.yaml")).is_file():
        near = [quote_path(file)]
    hint = f"did you mean {near[0]}?" if near else "see them all: convnext recipes list"
    raise RecipeError(f"no recipe {name}: neither a file nor a shipped recipe", hint=hint)


def read_yaml(text: str, *, where: str) -> Any:  # noqa: ANN401  # YAML holds any plain value
    """Plain values of one YAML 1.2 document; duplicate keys, anchors and tags are refused.

    Raises:
        RecipeError: The text is no such document; says the line.
    """
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise _too_large(where)
    yaml = YAML(typ="safe", pure=True)
    try:
        _check_events(text, where=where)
        return yaml.load(io.StringIO(text))
    except DuplicateKeyError as error:
        key = str(error.problem).split('"')[1]
        raise RecipeError(
            f"{where}{_line(error)}: the key {key} is written twice",
            hint="keep one of the two lines",
        ) from error
    except TypeError as error:  # such a key cannot be hashed
        raise RecipeError(
            f"{where}: a key is a word, found a list or a section as a key",
            hint="compare it with a shipped one: convnext recipes show in1k_tiny",
        ) from error
    except (YAMLError, ValueError) as error:
        parts = [getattr(error, "context", None), getattr(error, "problem", None)]
        problem = ": ".join(part for part in parts if part) or str(error).splitlines()[0]
        raise RecipeError(
            f"{where}{_line(error)}: not a YAML document: {problem}",
            hint="compare it with a shipped one: convnext recipes show in1k_tiny",
        ) from error


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark is not None else ""


def _too_large(where: str) -> RecipeError:
    return RecipeError(
        f"{where}: larger than a recipe can be ({MAX_BYTES} bytes)",
        hint="name a recipe; they are a page of text: convnext recipes list",
    )


def _check_events(text: str, *, where: str) -> None:
    """Refuse what would cost time or change meanings before any value is made."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
        line = event.start_mark.line + 1
        match event:
            case DocumentStartEvent() if event.version not in {None, (1, 2)}:
                raise RecipeError(
                    f"{where}, line {line}: a recipe is YAML 1.2, found another version",
                    hint="remove the line %YAML",
                )
            case NodeEvent() if event.anchor is not None:
                raise RecipeError(
                    f"{where}, line {line}: anchors and aliases are not part of a recipe",
                    hint="write the value out, or use `extends:`",
                )
            case ScalarEvent() | CollectionStartEvent() if event.tag is not None:
                raise RecipeError(
                    f"{where}, line {line}: tags are not part of a recipe, found {event.tag}",
                    hint="write plain words, numbers and lists, without a tag (!)",
                )
            case CollectionStartEvent():
                depth += 1
            case CollectionEndEvent():
                depth -= 1
        if depth > _NESTING:
            raise RecipeError(
                f"{where}, line {line}: nested deeper than a recipe can be",
                hint="a recipe has sections and keys: convnext recipes show in1k_tiny",
            )


@functools.lru_cache(maxsize=128)
def _read_once(text: str, *, where: str) -> Any:  # noqa: ANN401  # as read_yaml
    """Fifty recipes extend the same one; nobody changes the values."""
    return read_yaml(text, where=where)


def _read_layers(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a recipe file over those it extends."""
    path = path.resolve()
    chain = " -> ".join(step.name for step in (*seen, path))
    if path in seen:
        raise RecipeError(
            f"recipes extend each other in a circle: {chain}",
            hint=f"remove the line extends: from {path.name} or from one of the others",
        )
    if len(seen) >= _EXTENDS:
        raise RecipeError(
            f"more than {_EXTENDS} recipes extend each other: {chain}",
            hint=f"write out one of them: convnext recipes show {quote_path(seen[1])}",
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _too_large(path.name)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path.name}: not a text in UTF-8 (byte {error.start})",
            hint="name a recipe, which is a text: convnext recipes list",
        ) from error
    keys = _read_once(text, where=path.name)
    if not isinstance(keys, Mapping):
        raise RecipeError(
            f"{path.name}: a recipe is made of sections with keys, found {_word(keys)}",
            hint="start from a shipped one: convnext recipes show in1k_tiny",
        )
    keys = dict(keys)
    parent = keys.pop("extends", None)
    if parent is None:
        return keys
    if not isinstance(parent, str):
        raise RecipeError(
            f"{path.name}: extends: a recipe's name is wanted, found {parent!r}",
            hint="for example extends: in1k_tiny",
        )
    try:
        file = find_recipe(parent, beside=path.parent)
    except RecipeError as error:
        raise RecipeError(f"{path.name}: extends: {error}", hint=error.hint) from error
    return _lay_over(_read_layers(file, (*seen, path)), keys)


def _lay_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Keys over those of another recipe, whose published accuracy may stay behind."""
    merged = merge_keys(below, above)
    before, after = flatten_keys(below), flatten_keys(merged)
    if "published_top1" not in above and any(before.get(k) != after.get(k) for k in _REPORTED_FOR):
        merged["published_top1"] = None
    return merged


def merge_keys(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of `above` over those of `below`, section by section; neither is changed."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = {**old, **value}
        else:
            merged[key] = value
    return merged


def flatten_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Nested keys as `section.key`."""
    flat: dict[str, Any] = {}
    for name, value in keys.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def explain_fields() -> dict[str, str]:
    """The help of every key of a recipe, by `section.key`."""
    texts: dict[str, str] = {}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for key, inner in field.annotation.model_fields.items():
                texts[f"{name}.{key}"] = inner.description or ""
        else:
            texts[name] = field.description or ""
    return texts


def list_fields() -> list[str]:
    """Every key of a recipe as `section.key`."""
    return list(explain_fields())


def _hint_for(near: str | None) -> str:
    return f"did you mean {near}?" if near else "see all keys: convnext recipes show --fields"


def nearest_field(name: str) -> str | None:
    """The key or section that a mistyped one most likely means; None where none is near."""
    names = list_fields()
    section, dot, last = name.rpartition(".")
    same_key = [field for field in names if field.rpartition(".")[2] == last]
    if same_key:
        return same_key[0]
    if not dot:
        names = [*Recipe.model_fields, *names]
    inside = [field for field in names if field.startswith(f"{section}.")] if section else []
    near = difflib.get_close_matches(name, inside, n=1) or difflib.get_close_matches(
        name, names, n=1, cutoff=0.5
    )
    return near[0] if near else None


def parse_override(text: str) -> dict[str, Any]:
    """`section.key=value` as nested keys; the value is YAML.

    Raises:
        RecipeError: The text has another form, or the key is not one of a recipe's.
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    text = text if len(text) <= 80 else f"{text[:80]}..."  # for messages
    if not equals or not name:
        raise RecipeError(
            f"override {text}: section.key=value is wanted", hint="for example optim.lr=2e-3"
        )
    if name in Recipe.model_fields and name not in list_fields():
        raise RecipeError(
            f"override {text}: {name} is a section, not a key",
            hint=f"see its keys: convnext recipes show --fields {name}",
        )
    if name not in list_fields():
        raise RecipeError(
            f"override {text}: no key {name} in a recipe", hint=_hint_for(nearest_field(name))
        )
    try:
        parsed = read_yaml(value, where=f"override {text}") if value.strip() else None
    except RecipeError as error:
        raise RecipeError(
            str(error), hint="write the value as in a recipe, such as optim.betas=[0.9,0.999]"
        ) from error
    section, dot, key = name.partition(".")
    return {section: {key: parsed}} if dot else {name: parsed}


def render_override(name: str, value: str) -> str:
    """`section.key=value` that `parse_override` reads back as this very text, such as a path."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    shown = (c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped)
    return f'{name}="{"".join(shown)}"'


def _explain(error: ValidationError, where: str) -> RecipeError:
    """The first complaint of a validation as one sentence."""
    complaint = error.errors()[0]
    location = [str(part) for part in complaint["loc"]]
    # pydantic appends the tried member of a union to the path; a recipe's keys are two levels.
    dotted, known = ".".join(location[:2]), list_fields()
    name = dotted if dotted in known else location[0] if location else ""
    found = complaint["input"]
    match complaint["type"]:
        case "extra_forbidden" | "invalid_key":
            return RecipeError(
                f"{where}: no key {dotted} in a recipe", hint=_hint_for(nearest_field(dotted))
            )
        case "missing" if name == dotted and len(location) == 1:
            return RecipeError(
                f"{where}: the key {name} is missing",
                hint="add it, or extend a recipe that has it (extends: in1k_tiny)",
            )
        case "model_type":
            return RecipeError(
                f"{where}: {name} is a section with keys, found {_word(found)}",
                hint=f"see its keys: convnext recipes show --fields {name}",
            )
        case "missing" | "too_long":
            wanted = "another number of values is wanted"
        case _:
            same = [item for item in error.errors() if item["loc"][:2] == complaint["loc"][:2]]
            wanted = " or ".join(dict.fromkeys(_wanted(item["msg"]) for item in same))
    if name not in known:  # a rule between keys says itself which ones
        return RecipeError(
            f"{where}: {wanted}",
            hint=f"what the keys mean: convnext recipes show --fields {name}".rstrip(),
        )
    return RecipeError(
        f"{where}: {name}: {wanted}, found {_word(found)}", hint=_hint_for_value(name, found)
    )


def render_value(value: object) -> str:
    """The value of a key as an override would write it: null, true, 0.05, [0.4, 1]."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case tuple() | list():
            return f"[{', '.join(map(render_value, value))}]"
        case _:
            return str(value)


def _word(value: object) -> str:
    """A value for a message that says why it is not taken; text is marked as such."""
    match value:
        case None:
            return "nothing (null)"
        case str():
            shown = value if len(value) <= 60 else f"{value[:60]}..."
            return f"{shown!r} (text)"
        case tuple() | list():
            return repr(list(value)) if len(value) <= 4 else f"a list of {len(value)}"
        case Mapping():
            return "a section with keys"
        case _:
            return render_value(value)


def _hint_for_value(name: str, found: object) -> str:
    """One edit that mends a value of the wrong kind, or where its meaning stands."""
    match found:
        case str() if name == "model.name":
            near = difflib.get_close_matches(found, VARIANTS, n=1)
            return f"did you mean {near[0]}?" if near else "for example model.name=convnext_tiny"
        case str() if found.lower() in {"no", "off", "none", "n"} and bool in _kinds(name):
            return f"no is written false: {name}=false"
        case str() if found.lower() in {"yes", "on", "y"} and bool in _kinds(name):
            return f"yes is written true: {name}=true"
        case str() | int() | float() if found in _WORDS_FOR_OFF and NoneType in _kinds(name):
            return f"off is written null: {name}=null"
        case str() if _is_number(found):
            return f"a number has no quotes: {name}={found}"
        case _:
            return f"what it means: convnext recipes show --fields {name}"


_WORDS_FOR_OFF = {"no", "off", "Off", "none", "None", "never", "", "0ep", "0st", 0, -1}


def _kinds(name: str) -> tuple[object, ...]:
    """The types that a key's value may have."""
    section, _, key = name.rpartition(".")
    model = Recipe.model_fields[section].annotation if section else Recipe
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    kind = model.model_fields[key].annotation
    return get_args(kind) or (kind,)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _wanted(message: str) -> str:
    message = message.removeprefix("Value error, ")
    message = message.replace("Input should be", "should be").replace("valid tuple", "list")
    return message[:1].lower() + message[1:] if message[:1].isupper() else message


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or path, with its parents under it and the overrides over it.

    Args:
        name: Path of a YAML file, or the name of a shipped recipe.
        overrides: `section.key=value`, the value in YAML; later ones win.

    Raises:
        RecipeError: No such recipe, no YAML, an unknown key (with the nearest one), or a value of
            the wrong type or range.
    """
    path = find_recipe(str(name))
    written = _read_layers(path, ())
    asked: dict[str, Any] = {}
    where = path.name
    for override in overrides:
        asked = merge_keys(asked, parse_override(override))
        where = f"{path.name} with {' '.join(overrides)}"
    return check_recipe(_lay_over(written, asked), where=where)


def check_recipe(keys: Mapping[str, Any], *, where: str) -> Recipe:
    """A recipe from plain keys.

    Raises:
        RecipeError: As for `load_recipe`.
    """
    try:
        return Recipe.model_validate(keys)
    except ValidationError as error:
        raise _explain(error, where) from error


class _Representer(SafeRepresenter):
    """Writes null as a word, mappings in lines and lists in brackets."""

    def represent_null(self, value: None) -> Any:  # noqa: ANN401  # ruamel's node
        del value
        return self.represent_scalar("tag:yaml.org,2002:null", "null")

    def represent_brackets(self, value: Sequence[Any]) -> Any:  # noqa: ANN401  # as above
        return self.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Representer.add_representer(type(None), _Representer.represent_null)
_Representer.add_representer(list, _Representer.represent_brackets)


def render_recipe(recipe: Recipe) -> str:
    """A recipe as a whole YAML document: every key written out, nothing extended.

    `load_recipe` reads back the same recipe.
    """
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.width = 10_000
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # typed as None
    yaml.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()
