"""Recipe files: found by name or path, extended, overridden, read and written as strict YAML 1.2.

```
recipes/in1k_small.yaml      extends: in1k_tiny      section.key=value
        |                          |                        |
        `--- its own keys over ----`------- under ----------'        -> Recipe
```
"""

import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from convnext_cli.errors import RecipeError
from convnext_cli.recipe.schema import Recipe

MAX_BYTES = 1 << 20
"""A recipe is a page of text; anything larger is a mistake or an attack."""

_DEPTH = 8


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

    Raises:
        RecipeError: There is no such file and no such name; the nearest name is the hint.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml")
    folders = [recipes_folder()] if beside is None else [beside, recipes_folder()]
    # `recipes/in1k_tiny.yaml` is how the documentation writes it; it works from any folder.
    if path.parent in {Path(), Path("recipes")}:
        for folder in folders:
            if (found := folder / f"{stem}.yaml").is_file():
                return found
    if path.is_dir():
        raise RecipeError(
            f"recipe {name}: this is a folder", hint="name a .yaml file or a shipped recipe"
        )
    near = difflib.get_close_matches(stem, list_recipes(), n=1)
    hint = f"did you mean {near[0]}?" if near else "see them all: convnext recipes list"
    raise RecipeError(f"no recipe {name}: neither a file nor a shipped recipe", hint=hint)


def read_yaml(text: str, *, where: str) -> Any:  # noqa: ANN401  # YAML holds any plain value
    """Plain values of one YAML 1.2 document; duplicate keys, anchors and tags are refused.

    Raises:
        RecipeError: The text is no such document; says the line.
    """
    if len(text.encode()) > MAX_BYTES:
        raise RecipeError(
            f"{where}: larger than a recipe can be ({MAX_BYTES} bytes)",
            hint="name a recipe; they are a page of text: convnext recipes list",
        )
    yaml = YAML(typ="safe", pure=True)
    try:
        events = list(YAML(typ="safe", pure=True).parse(io.StringIO(text)))
        for event in events:
            if getattr(event, "anchor", None) is not None:
                line = event.start_mark.line + 1
                raise RecipeError(
                    f"{where}, line {line}: anchors and aliases are not part of a recipe",
                    hint="write the value out, or use `extends:`",
                )
        return yaml.load(io.StringIO(text))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise RecipeError(f"{where}{line}: not a YAML document: {problem}") from error


def _read_layers(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a recipe file over those it extends."""
    path = path.resolve()
    if path in seen or len(seen) >= _DEPTH:
        chain = " -> ".join(step.name for step in (*seen, path))
        raise RecipeError(
            f"recipes extend each other in a circle: {chain}",
            hint=f"remove the line extends: from {path.name} or from one of the others",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from error
    keys = read_yaml(text, where=path.name)
    if not isinstance(keys, dict):
        raise RecipeError(
            f"{path.name}: a recipe is a mapping of sections, found {type(keys).__name__}",
            hint="start from a shipped one: convnext recipes show in1k_tiny",
        )
    parent = keys.pop("extends", None)
    if parent is None:
        return keys
    if not isinstance(parent, str):
        raise RecipeError(
            f"{path.name}: extends: a recipe's name is wanted, found {parent!r}",
            hint="for example extends: in1k_tiny",
        )
    below = _read_layers(find_recipe(parent, beside=path.parent), (*seen, path))
    return merge_keys(below, keys)


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


def list_fields() -> list[str]:
    """Every key of a recipe as `section.key`."""
    names: list[str] = []
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += [f"{name}.{key}" for key in field.annotation.model_fields]
        else:
            names.append(name)
    return names


def _hint_for(near: str | None) -> str:
    return f"did you mean {near}?" if near else "see all keys: convnext recipes show --fields"


def _nearest_field(name: str) -> str | None:
    names = list_fields()
    last = name.rpartition(".")[2]
    same_key = [field for field in names if field.rpartition(".")[2] == last]
    near = same_key or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return near[0] if near else None


def parse_override(text: str) -> dict[str, Any]:
    """`section.key=value` as nested keys; the value is YAML.

    Raises:
        RecipeError: The text has another form, or the key is not one of a recipe's.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RecipeError(
            f"override {text}: section.key=value is wanted", hint="for example optim.lr=2e-3"
        )
    if name not in list_fields():
        near = _nearest_field(name)
        raise RecipeError(
            f"override {text}: no key {name} in a recipe",
            hint=_hint_for(near),
        )
    parsed = read_yaml(value, where=f"override {text}") if value.strip() else None
    section, dot, key = name.partition(".")
    return {section: {key: parsed}} if dot else {name: parsed}


def _explain(error: ValidationError, where: str) -> RecipeError:
    """The first complaint of a validation as one sentence."""
    complaint = error.errors()[0]
    location = [str(part) for part in complaint["loc"]]
    names = list_fields()
    # pydantic appends the tried member of a union to the path; a recipe's keys are two levels.
    name = ".".join(location[:2]) if ".".join(location[:2]) in names else ".".join(location[:1])
    found = complaint["input"]
    match complaint["type"]:
        case "extra_forbidden":
            name = ".".join(location[:2])
            near = _nearest_field(name)
            return RecipeError(
                f"{where}: no key {name} in a recipe",
                hint=_hint_for(near),
            )
        case "missing":
            return RecipeError(
                f"{where}: the key {'.'.join(location)} is missing",
                hint="add it, or extend a recipe that has it (extends: in1k_tiny)",
            )
        case "model_type":
            return RecipeError(
                f"{where}: {name} is a section with keys, found {found!r}",
                hint=f"see its keys: convnext recipes show --fields {name}",
            )
        case _:
            same = [item for item in error.errors() if item["loc"][:2] == complaint["loc"][:2]]
            wanted = " or ".join(dict.fromkeys(_wanted(item["msg"]) for item in same))
            at = f"{name}: " if name else ""
            shown = f", found {found!r}" if name else ""
            kind = " (text)" if isinstance(found, str) and name else ""
            return RecipeError(
                f"{where}: {at}{wanted}{shown}{kind}",
                hint=f"what it means: convnext recipes show --fields {name}".rstrip(),
            )


def _wanted(message: str) -> str:
    message = message.removeprefix("Value error, ")
    message = message.replace("Input should be", "should be")
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
    keys = _read_layers(path, ())
    where = path.name
    for override in overrides:
        keys = merge_keys(keys, parse_override(override))
        where = f"{path.name} with {' '.join(overrides)}"
    return check_recipe(keys, where=where)


def check_recipe(keys: Mapping[str, Any], *, where: str) -> Recipe:
    """A recipe from plain keys.

    Raises:
        RecipeError: As for `load_recipe`.
    """
    try:
        return Recipe.model_validate(keys)
    except ValidationError as error:
        raise _explain(error, where) from error


def render_recipe(recipe: Recipe) -> str:
    """A recipe as a whole YAML document: every key written out, nothing extended."""
    stream = io.StringIO()
    yaml = YAML()
    yaml.width = 100
    yaml.default_flow_style = None
    yaml.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()
