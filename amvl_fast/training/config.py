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
from amvl_fast.lora import LoraSection
from amvl_fast.objective import Objective

# YAML 1.1 reads 1e-3 as text; people write it as a number.
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class ModelSection:
    """`freeze`: parts that are not trained, see `amvl_fast.training.parts.PARTS`.

    `backbone` is a directory or hub name; the others are as in transformers' ``from_pretrained``.
    """

    backbone: str
    freeze: tuple[str, ...] = ("vision_tower",)
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.freeze, list | tuple) or not all(isinstance(part, str) for part in self.freeze):
            raise AMVLError(f"model.freeze is {self.freeze!r}; write a list of parts, such as [vision_tower].")

    @property
    def hub(self) -> dict[str, Any]:
        """For ``from_pretrained``: which of a name's versions, and whether code that comes with it may run."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class DataSection:
    """What is trained on and looked at.

    Attributes:
        train, test: a file, folder, pattern or hub name, or a list of them; see `amvl_fast.data.ChatDataset`.
        train_split, test_split: of hub datasets, and of folders whose file names tell one.
        image_root, max_rows, visual_thoughts: as for `ChatDataset`; the latter two of `train`.
        streaming: read `train` front to back without converting it; takes `training.max_steps`.
        shuffle_buffer: how many rows of a stream are shuffled among each other.
        on_bad_sample, max_bad_share: as for `ChatDataset`, of `train`; rows that are left out are named in
            skipped.jsonl in the run's directory.
        eval_rows: how many rows of `test`, drawn with the run's seed, are looked at while training.
        max_new_tokens: for their answers.
        vision_cache: a directory for the outputs of the frozen vision tower; see `amvl_fast.vision_cache`.
    """

    train: str | list[str]
    test: str | list[str] | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_root: str | None = None
    max_rows: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    visual_thoughts: str = "drop"
    on_bad_sample: str = "error"
    max_bad_share: float = 0.01
    eval_rows: int = 500
    max_new_tokens: int = 16
    vision_cache: str | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """How `train` is read, for `ChatDataset` and `ChatStream`."""
        same = ("image_root", "max_rows", "visual_thoughts", "on_bad_sample", "max_bad_share")
        return {name: getattr(self, name) for name in same} | {"split": self.train_split}


@dataclass(frozen=True)
class RunConfig:
    """One training run. `training` holds fields of `AMVLTrainingArguments`, `latents` of `AMVLConfig`."""

    model: ModelSection
    data: DataSection
    objective: Objective
    latents: dict[str, Any]
    training: dict[str, Any]
    lora: LoraSection | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"])


LATENT_KEYS = sorted({f.name for f in fields(AMVLConfig)} & set(AMVLConfig.__annotations__) - {"backbone_config"})
REQUIRED = {"model": ["backbone"], "data": ["train"], "training": ["output_dir"]}
AT_LEAST_ONE = {
    "data": ["eval_rows", "max_new_tokens", "max_rows", "shuffle_buffer"],
    "training": ["max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"],
}
SCALARS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
# Arguments of the trainer that have a place of their own in the file.
ELSEWHERE = ("objective", "max_new_tokens", "resume_from_checkpoint")
# YAML 1.1 reads `no`, which these take, as false.
STRATEGIES = ("save_strategy", "eval_strategy", "logging_strategy")


def section_types() -> dict[str, dict[str, Any]]:
    """The annotation of every key that each section may hold."""
    from amvl_fast.training.arguments import AMVLTrainingArguments

    hints = get_type_hints(AMVLTrainingArguments)
    training = {f.name: hints[f.name] for f in fields(AMVLTrainingArguments) if f.init and f.name not in ELSEWHERE}
    return {
        "model": get_type_hints(ModelSection),
        "data": get_type_hints(DataSection),
        "objective": get_type_hints(Objective),
        "latents": {key: SCALARS[AMVLConfig.__annotations__[key]] for key in LATENT_KEYS},
        "lora": get_type_hints(LoraSection),
        "training": training | {"fsdp": bool | str | None},  # transformers takes both and declares one
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
    training = raw["training"]
    if training.get("max_steps") is None and training.get("num_train_epochs") is None:
        raise AMVLError(f"{path} lacks training.max_steps; add it, or num_train_epochs, under training:.")
    if (raw["data"].get("streaming") or False) and training.get("max_steps") is None:
        raise AMVLError(f"{path} lacks training.max_steps, which data.streaming takes; add it under training:.")
    sections = {name: build(name, raw.get(name) or {}, known[name]) for name in known}
    return RunConfig(
        model=ModelSection(**sections["model"]),
        data=DataSection(**sections["data"]),
        objective=Objective(**sections["objective"]),
        latents=sections["latents"],
        training=sections["training"],
        lora=LoraSection(**sections["lora"]) if raw.get("lora") is not None else None,
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
        if key in AT_LEAST_ONE.get(section, ()) and value is not None and value < 1:
            raise AMVLError(f"{name} is {value}; it must be at least 1.")
        # An infinite training.max_grad_norm has a meaning, so of the trainer's numbers only one is looked at.
        if (section != "training" or key == "learning_rate") and is_number(value) and not abs(value) < math.inf:
            raise AMVLError(f"{name} is {value}; it must be a finite number.")
        if name == "training.learning_rate" and value < 0:
            raise AMVLError(f"{name} is {value}; it must be at least 0.")
        if name == "training.num_train_epochs" and not value > 0:
            raise AMVLError(f"{name} is {value}; it must be more than 0.")
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
