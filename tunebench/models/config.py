"""Reads a checkpoint's config.json into one normalised config, from which both sides build their model.

Every key of the file is mapped to a field, is known to have no effect, or is refused by name and value. Otherwise a key
that one framework reads and the other ignores would give two different models.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunebench.errors import BadInput
from tunebench.models.families import FAMILIES, ROTARY_NAMES, ROTARY_TABLES, Family

SHOWN = 80  # characters of a refused value
# The options that each kind of rotary scaling needs. A `rope_type` of None means "default".
ROTARY_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROTARY_OPTIONS = ("rope_theta", "partial_rotary_factor", "rope_type", *ROTARY_KINDS["llama3"])


def read_config(folder: Path) -> dict[str, Any]:
    """The normalised config of a checkpoint folder: the fields of its family. Raises `BadInput`."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except FileNotFoundError:
        raise BadInput(f"{path} is missing; a checkpoint folder has config.json beside its safetensors files") from None
    except RecursionError:
        raise BadInput(f"{path} is not readable JSON (its brackets are nested too deep)") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} is not readable JSON ({error})") from None
    try:
        return normalise(raw)
    except ValueError as fault:
        raise BadInput(f"{path}: {fault}") from None


def normalise(raw: Any) -> dict[str, Any]:
    """The normalised fields of a config.json's content. Raises ValueError with the key, its value and the reason."""
    if isinstance(raw, dict) and raw.get("model_type") == "mistral":
        raw = _llama_of_mistral(raw)
    name = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(name, str) or name not in FAMILIES:
        hint = "; PaddleNLP has no Qwen3" if name == "qwen3" else ""
        raise ValueError(f"model_type {_shown(name)} is not offered; use one of {', '.join(FAMILIES)} or mistral{hint}")
    family, raw = FAMILIES[name], dict(raw)
    _check_architectures(raw.pop("architectures", None), family)
    fields: dict[str, tuple[str, Any]] = {}  # for each field the key that gave it, and its value
    rotary = {key: raw.pop(key) for key in (*ROTARY_TABLES, *ROTARY_NAMES) if key in raw and family.rotates}
    for key, value in raw.items():
        field = family.aliases.get(key, key)
        if field in family.shape.model_fields:
            _put(fields, field, key, value)
        elif key in family.only:
            values = value if key == "layer_types" and isinstance(value, list) else [value]
            if not all(any(_same(each, allowed) for allowed in (None, *family.only[key])) for each in values):
                raise ValueError(_not_offered(key, value, family.only[key]))
        elif key not in family.unused:
            raise ValueError(
                f"{key if key.isprintable() else repr(key)} {_shown(value)} is not offered: it is not known what this "
                "key does to the model; remove it if it does nothing"
            )
    if family.rotates:
        fields |= _rotary(rotary)
    try:
        given = {field: value for field, (_, value) in fields.items()}
        _check_kinds(fields)
        optional = ("num_key_value_heads", "head_dim")  # their null means a default that depends on other fields
        shape = family.shape.model_validate({k: v for k, v in given.items() if v is not None or k in optional})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if not first["loc"]:
            raise ValueError(first["msg"].removeprefix("Value error, ")) from None
        field = str(first["loc"][0])
        key, value = fields.get(field, (field, None))
        raise ValueError(f"{key} {_shown(value)} is not offered: {first['msg']}") from None
    return shape.model_dump()


def _llama_of_mistral(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of the Llama that computes what a Mistral computes: both have the same layers and tensors.

    A Mistral's token attends to the last `sliding_window` tokens. Samples of at most so many tokens, with which the
    window does nothing, are what the Llama takes. Raises ValueError. The defaults are transformers' MistralConfig's.
    """
    raw = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096} | raw
    if raw.get("architectures") not in (None, [], ["MistralForCausalLM"]):
        raise ValueError(f"architectures {_shown(raw['architectures'])} is not offered; use MistralForCausalLM")
    window, positions = raw.pop("sliding_window"), raw["max_position_embeddings"]
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"sliding_window {_shown(window)} is not offered: it has to be a count of tokens or null")
        if isinstance(positions, int) and not isinstance(positions, bool):
            raw["max_position_embeddings"] = min(positions, window)
    return raw | {"model_type": "llama", "architectures": None}


def _rotary(given: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """The fields `rope_theta`, `rope_scaling` and `partial_rotary_factor`, from all keys that describe them."""
    found: dict[str, tuple[str, Any]] = {}
    for table in ROTARY_TABLES:
        content = given.get(table)
        if content is None:
            continue
        if not isinstance(content, dict):
            raise ValueError(f"{table} {_shown(content)} is not offered: it has to be an object")
        for key, value in content.items():
            name = "rope_type" if key == "type" else key
            if name not in ROTARY_OPTIONS and value is not None:
                raise ValueError(f"{table}.{key} {_shown(value)} is not offered; kinds are {', '.join(ROTARY_KINDS)}")
            _put(found, name, f"{table}.{key}", value)
    for key, name in ROTARY_NAMES.items():
        if key == "rope_scaling_factor" and given.get("rope_scaling_type") is None and _same(given.get(key), 1):
            continue  # PaddleNLP's default
        if key in given:
            _put(found, name, key, given[key])
    kind_key, kind = found.pop("rope_type", ("rope_scaling.rope_type", None))
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in ROTARY_KINDS:
        raise ValueError(f"{kind_key} {_shown(kind)} is not offered; use one of {', '.join(ROTARY_KINDS)}")
    fields = {name: found.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in found}
    scaling: dict[str, Any] = {"rope_type": kind}
    for name in ROTARY_KINDS[kind]:
        key, value = found.pop(name, (name, None))
        if value is None:
            raise ValueError(f"{kind_key} {_shown(kind)} needs {name}, which is missing")
        least = 1 if name == "factor" else 1e-9
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e9:
            raise ValueError(f"{key} {_shown(value)} is not offered: use a number of {least:g} to 1e9")
        scaling[name] = value
    # A config without scaling may also give the length that the model was trained for.
    key, value = found.pop("original_max_position_embeddings", ("", None))
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
        raise ValueError(f"{key} {_shown(value)} is not offered: it has to be a number above 0")
    for key, value in found.values():
        if value is not None:
            raise ValueError(f"{key} {_shown(value)} is not offered without a kind of scaling that has it")
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError(
            f"low_freq_factor {scaling['low_freq_factor']} is not offered: it has to be below high_freq_factor "
            f"{scaling['high_freq_factor']}"
        )
    return fields | ({} if kind == "default" else {"rope_scaling": (kind_key, scaling)})


def _check_kinds(fields: dict[str, tuple[str, Any]]) -> None:
    """Raises ValueError where a number is given for true or false, or the reverse: Python treats them as equal."""
    for field, kind in (("tie_word_embeddings", "true or false"), ("partial_rotary_factor", "a number")):
        key, value = fields.get(field, (field, None))
        if value is not None and isinstance(value, bool) != (kind == "true or false"):
            raise ValueError(f"{key} {_shown(value)} is not offered: it has to be {kind}")


def _check_architectures(value: Any, family: Family) -> None:
    """Raises ValueError where the config belongs to another task or model. Older class names are accepted."""
    named = [] if value is None else value
    if not isinstance(named, list) or not all(name in family.architectures for name in named):
        raise ValueError(
            f"architectures {_shown(value)} is not offered; use {' or '.join(family.architectures)}, or leave it out"
        )


def _put(fields: dict[str, tuple[str, Any]], field: str, key: str, value: Any) -> None:
    """Keeps the value of a field. Raises ValueError where another key gave it another value."""
    before, known = fields.get(field, (key, None))
    if known is not None and value is not None and not _same(known, value):
        raise ValueError(f"{key} {_shown(value)} contradicts {before} {_shown(known)}; keep one of them")
    if value is not None or field not in fields:
        fields[field] = key, value


def _same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal. False is not 0, but 1 equals 1.0."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _not_offered(key: str, value: Any, allowed: Sequence[Any]) -> str:
    use = f"use {' or '.join(map(_shown, allowed))}, or leave it out" if allowed else "leave it out"
    return f"{key} {_shown(value)} is not offered; {use}"


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _without_twins(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found
