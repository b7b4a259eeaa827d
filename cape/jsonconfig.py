"""Configuration as JSON: frozen dataclasses that survive the round trip, and hashes and seeds of JSON values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

from cape.errors import SpecError, did_you_mean

T = TypeVar("T", bound="JsonConfig")


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def stable_hash(value: Any, length: int = 16) -> str:
    """Return ``length`` hex digits of the BLAKE2b hash of a value's canonical JSON."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=32).hexdigest()[:length]


def derive_seed(*parts: Any) -> int:
    """Return a 63-bit seed that depends on all ``parts`` (JSON values) and on nothing else."""
    digest = hashlib.blake2b(canonical_json(list(parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniforms(*parts: Any) -> tuple[float, ...]:
    """Return eight numbers of [0, 1) that depend on all ``parts`` (JSON values) and on nothing else."""
    digest = hashlib.blake2b(canonical_json(list(parts)).encode(), digest_size=64).digest()
    return tuple((int.from_bytes(digest[i : i + 8], "big") >> 11) / 2**53 for i in range(0, 64, 8))


def parse_json(text: str, what: str) -> Any:
    """Return the value of a JSON text, or raise ``SpecError``, which says ``what`` it was to be."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # also a number of too many digits, brackets without end
        raise SpecError(f"{what} is not valid JSON: {error}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose keys are all different: of two alike, `json` would keep the last and say nothing."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"the key '{key}' is there {count} times; keep one of them")
    return dict(pairs)


@dataclass(frozen=True)
class JsonConfig:
    """Base of the configuration classes: strict ``from_dict`` and a lossless ``to_dict``.

    Attributes:
        LATER: fields that a class gained after its first release. They are left out of the JSON while they hold their
            default, so that whatever was named by its hash before they existed keeps its name.
    """

    LATER: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values (tuples become lists)."""
        return {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in self.LATER or getattr(self, f.name) != f.default
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return the configuration as JSON text."""
        if indent is None:
            return canonical_json(self.to_dict())
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
        """Build the configuration from plain JSON values.

        Raises:
            SpecError: an unknown or missing key, or a value of the wrong type.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"{cls.__name__} must be a JSON object, not {type(data).__name__}.")
        hints = _hints(cls)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise SpecError(f"Unknown key '{key}' in {cls.__name__}.{did_you_mean(key, known)}")
        for name, f in known.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in data:
                raise SpecError(f"{cls.__name__} needs the key '{name}'.")
        return cls(**{k: _coerce(v, hints[k], f"{cls.__name__}.{k}") for k, v in data.items()})

    @classmethod
    def from_json(cls: type[T], text: str) -> T:
        """Build the configuration from JSON text; raises ``SpecError`` where it is not valid."""
        return cls.from_dict(parse_json(text, cls.__name__))

    def _check_types(self) -> None:
        """Turn every field into what its annotation asks for, as ``from_dict`` does, or raise ``SpecError``."""
        hints = _hints(type(self))
        for f in dataclasses.fields(self):
            value = _coerce(getattr(self, f.name), hints[f.name], f"{type(self).__name__}.{f.name}")
            object.__setattr__(self, f.name, value)

    def replace(self: T, **changes: Any) -> T:
        """Return a copy with some fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)


_hints: Callable[[Any], dict[str, Any]] = lru_cache(maxsize=64)(typing.get_type_hints)


def _plain(value: Any) -> Any:
    if isinstance(value, JsonConfig):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Turn a JSON value (or NumPy's numbers and arrays) into what a type hint asks for, or raise ``SpecError``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple:
        if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
            raise SpecError(f"{where} must be a list, not {value!r}.")
        return tuple(_coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise SpecError(f"{where} must be an object, not {value!r}.")
        return {str(k): _coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, JsonConfig):
        return value if isinstance(value, hint) else hint.from_dict(value)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise SpecError(f"{where} must be a number, not {value!r}.")
        try:
            return float(value)
        except OverflowError as error:
            raise SpecError(f"{where} must be a number that a float64 holds.") from error
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise SpecError(f"{where} must be a whole number, not {value!r}.")
        return int(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise SpecError(f"{where} must be {hint.__name__}, not {value!r}.")
    return value
