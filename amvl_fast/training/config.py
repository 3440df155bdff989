"""The YAML file of a run: read, checked and completed before anything else happens."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

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
REQUIRED = {"model": ["backbone"], "data": ["train"], "training": ["output_dir", "max_steps"]}
AT_LEAST_ONE = {
    "data": ["eval_rows", "max_new_tokens"],
    "training": ["max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"],
}
SCALARS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
# YAML 1.1 reads `no`, which these take, as false.
STRATEGIES = ("save_strategy", "eval_strategy", "logging_strategy")


def section_types() -> dict[str, dict[str, Any]]:
    """The annotation of every key that each section may hold."""
    from transformers import TrainingArguments

    return {
        "model": get_type_hints(ModelSection),
        "data": get_type_hints(DataSection),
        "objective": get_type_hints(Objective),
        "latents": {key: SCALARS[AMVLConfig.__annotations__[key]] for key in LATENT_KEYS},
        "training": {f.name: f.type for f in fields(TrainingArguments) if f.init},
    }


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file and apply ``section.key=value`` overrides.

    Raises:
        AMVLError: the file is missing or not YAML, a key is unknown (naming the nearest right one), a required key
            is missing, or a value is of the wrong type or out of its range.
    """
    path = Path(path)
    if not path.is_file():
        raise AMVLError(f"There is no configuration file {path}; give the path of a YAML file.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, dates that are none
        raise AMVLError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    known = section_types()
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
            if raw.get(name, {}).get(key) is None:
                raise AMVLError(f"{path} lacks {name}.{key}; add it under {name}:.")
    sections = {name: build(name, raw.get(name, {}), known[name]) for name in known}
    return RunConfig(
        model=ModelSection(**sections["model"]),
        data=DataSection(**sections["data"]),
        objective=Objective(**sections["objective"]),
        latents=sections["latents"],
        training=sections["training"],
    )


def require_known(key: str, known: Iterable[str], what: str) -> None:
    if key in (known := list(known)):
        return
    nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"use one of: {', '.join(known)}."
    raise AMVLError(f"Unknown {what}; {hint}")


def parse_override(text: str, known: dict[str, dict[str, Any]]) -> tuple[str, str, Any]:
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
    try:
        return section, key, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise AMVLError(f"The value of the override {text!r} is not valid YAML; correct it, or quote it.") from None


def build(section: str, values: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
    """The values of a section, each of its annotation's type and in its range."""
    built = {}
    for key, value in values.items():
        name = f"{section}.{key}"
        if key in STRATEGIES and value is False:
            value = "no"
        built[key] = value = convert(name, value, hints[key])
        if key in AT_LEAST_ONE.get(section, ()) and value < 1:
            raise AMVLError(f"{name} is {value}; it must be at least 1.")
        # An infinite training.max_grad_norm has a meaning, so of the trainer's numbers only one is looked at.
        if (section != "training" or key == "learning_rate") and is_number(value) and not abs(value) < math.inf:
            raise AMVLError(f"{name} is {value}; it must be a finite number.")
        if name == "training.learning_rate" and value < 0:
            raise AMVLError(f"{name} is {value}; it must be at least 0.")
    return built


def convert(name: str, value: Any, hint: Any) -> Any:
    """A value of YAML as the number, truth value or text that its annotation names.

    Anything goes where the annotation also names other kinds, such as a dictionary: the trainer looks at those.
    """
    named = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [kind for kind in named if not (isinstance(kind, type) and issubclass(kind, Enum))]  # YAML has none
    if not kinds or not all(kind in (*SCALARS.values(), types.NoneType) for kind in kinds):
        return value
    if isinstance(value, str) and str not in kinds and NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)
    if type(value) not in kinds and not (float in kinds and is_number(value)):
        names = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise AMVLError(f"{name} is {value!r}, but must be of type {names}.")
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
