"""Reads a YAML recipe (with one `extends:`) and `key=value` overrides into one plain mapping, remembering where each key was set."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import configs
from cluster.config_check import Problem, Source
from cluster.errors import ConfigError

EXTENDS = "extends"


def read_settings(file: str | Path | None, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Source]]:
    """Merge the base recipe, the recipe and the overrides, later ones over earlier ones.

    Returns the plain nested values with `${...}` references resolved, and for each dotted key where it was last set.
    Raises ConfigError for a file that is missing or not YAML and for an override that is not `key=value`; what the
    keys and values mean is checked by `config_check`.
    """
    merged, sources = OmegaConf.create({}), {}
    for values, found in _recipe_files(file) if file is not None else []:
        _drop_empty_sections(values, merged)
        merged = OmegaConf.merge(merged, values)
        sources.update(found)
    for key, value, text in _parse_overrides(overrides):
        merged = OmegaConf.merge(merged, value)
        sources[key] = Source(f"override '{key}={text}'", text)
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        where = sources.get(key, Source("")).where
        raise config_error([Problem(key, str(error).splitlines()[0], "${...} must name another key", where)]) from error
    plain.pop(EXTENDS, None)
    return plain, sources


def config_error(problems: Sequence[Problem], command: str = "videoseg config") -> ConfigError:
    """One error that lists every problem; the command is the one that prints the settings."""
    first = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "".join(f"\n  {p}" for p in problems)
    return ConfigError(f"the configuration has {first}:{lines}", f"mend the file or the override; `{command}` prints every key with its meaning")


def find_recipe(name: str | Path) -> Path:
    """The file that `name` stands for: a path as given, or the name of a recipe that comes with the project."""
    given = Path(name)
    if given.is_file():
        return given
    known = configs.path(str(name))
    if known is not None:
        return known
    close = difflib.get_close_matches(given.stem, configs.names(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"there is no configuration file '{name}'", f"{hint}the project's own recipes are {', '.join(configs.names())}")


def _recipe_files(file: str | Path, above: tuple[Path, ...] = ()) -> list[tuple[DictConfig, dict[str, Source]]]:
    """Values and sources of the recipe's base, if it names one by `extends:` (which may have a base too), then of the recipe itself."""
    path = find_recipe(file)
    recipe = _read_yaml(path)
    base = recipe[0].get(EXTENDS)
    if base is None:
        return [recipe]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be the name of one file, got {base!r}", "write `extends: other.yaml`")
    base_path = path.parent / base
    if not base_path.is_file():
        raise ConfigError(f"{path}: extends '{base}', but there is no file {base_path}", "the name is relative to the file that holds it")
    if base_path.resolve() in (*above, path.resolve()):
        raise ConfigError(f"{path} extends {base_path}, which extends it", "a recipe's bases must end somewhere")
    return [*_recipe_files(base_path, (*above, path.resolve())), recipe]


def _read_yaml(path: Path) -> tuple[DictConfig, dict[str, Source]]:
    try:
        text = path.read_text(encoding="utf-8")
        values = OmegaConf.create(text)
        nodes = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file: {error}", "a recipe is YAML in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}", "check indentation, quotes and keys set twice") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}", "check indentation and quotes") from error
    if not isinstance(values, DictConfig) or not isinstance(nodes, yaml.MappingNode | None):
        raise ConfigError(f"{path} holds no settings by name", "a recipe is a YAML mapping such as `learner: {lr: 1e-6}`")
    return values, {key: Source(f"{path}:{line}") for key, line in _key_lines(nodes)}


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _key_lines(value, f"{name}.")


def _parse_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, DictConfig, str]]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")) or key != key.strip():
            raise ConfigError(f"'{override}' is not a setting", "write key=value without spaces, for example learner.lr=1e-6")
        try:
            yield key, OmegaConf.from_dotlist([override]), text
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{override}': the value is not valid YAML", "quote it, for example 'rollout.stop=[\"</answer>\"]'") from error


def _drop_empty_sections(values: DictConfig, base: Mapping[str, Any]) -> None:
    """A section whose keys are all commented out reads as null; it must not wipe out the base's section."""
    for key in list(values):
        inner = OmegaConf.to_container(values).get(key)
        if isinstance(base.get(key) if key in base else None, Mapping):
            if inner is None:
                del values[key]
            elif isinstance(inner, dict):
                _drop_empty_sections(values[key], base[key])
