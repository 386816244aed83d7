"""A TOML file -> its table. The one place that parses TOML."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.small_file import (
    nested,
    refuse_nesting,
    refuse_unspeakable,
    text_of,
)
from mtl_export.errors import MtlExportError, UsageError

# People write these files by hand; the parser takes quadratic time for long dotted keys.
MOST_BYTES = 2**16


def read_toml(path: Path, option: str) -> dict[str, Any]:
    """Return the table in the file ``path``.

    Args:
        path: The file.
        option: What names it, for messages.

    Raises:
        UsageError: It cannot be read, is too large, no UTF-8 or no TOML, or nests too deep.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    def refused(found: str) -> MtlExportError:
        fix = f"Correct {option}, or that file"
        return UsageError(f"{path}: {found}", expected="a TOML file", fix=fix)

    text = text_of(path, refused, MOST_BYTES)
    try:
        document = tomllib.loads(text)
    except RecursionError as error:
        raise refused(nested()) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{path}: not TOML: {error}",
            expected="lines such as checkpoint = 'adapter'",
            fix="Correct that line",
        ) from error
    except ValueError as error:  # Python's limit, 4,300 digits; dates that no calendar has
        raise refused(f"a value that cannot be read ({error})") from error
    refuse_nesting(document, refused)
    refuse_unspeakable(document, refused)
    return document
