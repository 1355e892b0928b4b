"""JSON objects read from a checkpoint's small files."""

import json
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from gpt2rt.errors import CheckpointError

# a tokenizer.json of 250 000 tokens has 20 MB; nothing honest comes near this
MAX_JSON_BYTES = 256 * 2**20
# of a config or an index: parsing can take 20 times the size of a file
MAX_SETTINGS_BYTES = 8 * 2**20


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary of a JSON object; ValueError if a name occurs twice, where parsers differ in what they take."""
    out = dict(pairs)
    if len(out) != len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"the name {reprlib.repr(names.most_common(1)[0][0])} occurs twice")
    return out


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: the file.
        max_bytes: larger files are refused unread.
    Raises:
        CheckpointError: the file is missing, unreadable, too large, not UTF-8, not JSON, not an object, or has a
            name twice in one object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {max_bytes}; is it the right file?")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start}); is it the right file?") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        value = json.loads(text, object_pairs_hook=no_repeats)
    # RecursionError: brackets nested deeper than the parser's stack
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} ({size} bytes) is not valid JSON: {error}; was the file cut short?") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value
