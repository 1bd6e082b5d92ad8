"""Errors between processes as JSON: class and facts, never pickled (pure)."""

import json
from typing import Any

from everstep.checkpoint import errors
from everstep.checkpoint.errors import EverstepError, KeeperError, RankFailures


def encode_error(error: BaseException) -> dict[str, Any]:
    """What ``decode_error`` makes the same error of, where it is one of ours or an OSError."""
    coded: dict[str, Any] = {"text": f"{type(error).__name__}: {error}".strip()}
    if isinstance(error, EverstepError):
        coded["text"] = str(error)
    if isinstance(error, OSError) and not isinstance(error, EverstepError):
        coded["os"] = [error.errno, error.strerror or str(error), _name(error.filename)]
    elif getattr(errors, type(error).__name__, None) is type(error):
        facts = list(error.args)
        if isinstance(error, RankFailures):  # keys of JSON objects are text
            facts[1] = sorted(error.causes.items())
        try:
            json.dumps(facts)
        except (TypeError, ValueError):
            return coded
        coded["class"], coded["facts"] = type(error).__name__, facts
    return coded


def decode_error(coded: dict[str, Any]) -> Exception:
    """Inverse of ``encode_error``; a KeeperError with the text for what cannot be rebuilt."""
    text = str(coded.get("text", "no reason given"))
    match coded:
        case {"os": [int() as number, str() as why, None | str() as name]}:
            return OSError(number, why) if name is None else OSError(number, why, name)
        case {"os": [_, str() as why, _]}:
            return OSError(why)
        case {"class": str() as name, "facts": list() as facts}:
            kind = getattr(errors, name, None)
            if isinstance(kind, type) and issubclass(kind, EverstepError):
                try:
                    if issubclass(kind, RankFailures):
                        facts = [facts[0], {int(r): str(c) for r, c in facts[1]}, *facts[2:]]
                    rebuilt: Exception = kind(*facts)
                    return rebuilt
                except (TypeError, ValueError, IndexError):
                    pass  # of another version: its text is all we have
    return KeeperError(text)


def _name(filename: object) -> str | None:
    return None if filename is None else str(filename)
