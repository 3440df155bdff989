"""The YAML file of a run: read, checked and completed before anything else happens."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from amvl_fast.configuration import AMVLConfig
from amvl_fast.errors import AMVLError
from amvl_fast.objective import Objective

# YAML 1.1 reads 1e-3 as text; people write it as a number.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class ModelSection:
    """`backbone`: directory or hub name. `dtype`, `attn_implementation`: as in transformers' ``from_pretrained``."""

    backbone: str
    freeze_vision: bool = True
    dtype: str = "auto"
    attn_implementation: str | None = None


@dataclass(frozen=True)
class DataSection:
    """Chat files. `eval_rows` of `test`, drawn with the run's seed, are looked at while training."""

    train: str
    test: str | None = None
    image_root: str | None = None
    eval_rows: int = 500
    max_new_tokens: int = 16


@dataclass(frozen=True)
class RunConfig:
    """One training run. `training` holds fields of ``transformers.TrainingArguments``, `latents` of `AMVLConfig`."""

    model: ModelSection
    data: DataSection
    objective: Objective
    latents: dict[str, Any]
    training: dict[str, Any]

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"])


LATENT_KEYS = sorted({f.name for f in fields(AMVLConfig)} & set(AMVLConfig.__annotations__) - {"backbone_config"})
# What each section may hold, and what it must.
REQUIRED = {"model": ["backbone"], "data": ["train"], "training": ["output_dir", "max_steps"]}


def training_keys() -> list[str]:
    from transformers import TrainingArguments

    return [f.name for f in fields(TrainingArguments) if f.init]


def section_keys() -> dict[str, list[str]]:
    ours = {"model": ModelSection, "data": DataSection, "objective": Objective}
    keys = {name: [f.name for f in fields(section)] for name, section in ours.items()}
    return {**keys, "latents": LATENT_KEYS, "training": training_keys()}


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file and apply ``section.key=value`` overrides.

    Raises:
        AMVLError: the file is missing or not YAML, a key is unknown (naming the nearest right one), a required key
            is missing, or a value is of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise AMVLError(f"There is no configuration file {path}; give the path of a YAML file.")
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise AMVLError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    known = section_keys()
    if not isinstance(raw, dict):
        raise AMVLError(f"{path} must hold the sections {', '.join(known)}, but holds {type(raw).__name__}.")
    for name, section in raw.items():
        require_known(name, known, f"section {name!r} of {path}")
        if not isinstance(section, dict):
            raise AMVLError(f"Section {name!r} of {path} must hold keys and values.")
    for override in overrides:
        name, key, value = parse_override(override, known)
        raw.setdefault(name, {})[key] = value
    for name, section in raw.items():
        for key in section:
            require_known(key, known[name], f"key {name}.{key} in {path}")
    for name, keys in REQUIRED.items():
        for key in keys:
            if key not in raw.get(name, {}):
                raise AMVLError(f"{path} lacks {name}.{key}; add it under {name}:.")
    sections = {name: {key: as_number(value) for key, value in raw.get(name, {}).items()} for name in known}
    return RunConfig(
        model=build(ModelSection, "model", sections["model"]),
        data=build(DataSection, "data", sections["data"]),
        objective=build(Objective, "objective", sections["objective"]),
        latents=sections["latents"],
        training=sections["training"],
    )


def require_known(key: str, known: Iterable[str], what: str) -> None:
    if key in (known := list(known)):
        return
    nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"use one of: {', '.join(known)}."
    raise AMVLError(f"Unknown {what}; {hint}")


def parse_override(text: str, known: dict[str, list[str]]) -> tuple[str, str, Any]:
    """``section.key=value``; the section may be left out where the key stands in one section only."""
    name, separator, value = text.partition("=")
    if not separator:
        raise AMVLError(f"The override {text!r} is not of the form section.key=value.")
    section, dot, key = name.partition(".")
    if not dot:
        homes = [home for home, keys in known.items() if name in keys]
        if len(homes) != 1:
            every = [f"{home}.{key}" for home, keys in known.items() for key in keys]
            require_known(name, every, f"key {name!r} in the override {text!r}")
        section, key = homes[0], name
    require_known(section, known, f"section {section!r} in the override {text!r}")
    require_known(key, known[section], f"key {name} in the override {text!r}")
    return section, key, yaml.safe_load(value)


def as_number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def build(cls: type, name: str, values: dict[str, Any]) -> Any:
    """A section's dataclass, its scalar values checked against their annotations."""
    kinds: dict[str, Any] = {
        "str": str,
        "int": int,
        "float": (int, float),
        "bool": bool,
        "str | None": (str, type(None)),
    }
    for field in fields(cls):
        if field.name not in values:
            continue
        value, expected = values[field.name], kinds[str(field.type)]
        if not isinstance(value, expected) or (isinstance(value, bool) and field.type != "bool"):
            raise AMVLError(f"{name}.{field.name} is {value!r}, but must be of type {field.type}.")
    return cls(**values)
