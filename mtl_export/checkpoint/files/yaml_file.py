"""A YAML file -> its value, of YAML's own types only. The one place that parses YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtl_export.checkpoint.files.small_file import (
    DAMAGED,
    nested,
    refuse_nesting,
    refuse_unspeakable,
    text_of,
)
from mtl_export.errors import CheckpointError, MtlExportError

# The training configurations that are read have some kilobytes; the parser is slow.
MOST_BYTES = 2**18


def read_yaml(path: Path) -> Any:
    """Return the value in the file ``path``.

    Raises:
        UsageError: The system does not let this user read it.
        CheckpointError: It is too large, no UTF-8, no YAML, asks for other types, merges
            mappings, or nests too deep.
    """
    import yaml  # type: ignore[import-untyped]  # transformers depends on it

    def refused(found: str) -> MtlExportError:
        return CheckpointError(
            f"{path}: {found}", expected="the training configuration", fix=DAMAGED
        )

    text = text_of(path, refused, MOST_BYTES)
    try:
        value = yaml.load(text, _plain_loader(yaml))
    except RecursionError as error:
        raise refused(nested()) from error
    except Exception as error:  # its constructors of dates, numbers and sets raise anything
        reason = str(error).splitlines() or [type(error).__name__]
        raise refused(f"no YAML ({reason[0]})") from error
    refuse_nesting(value, refused)
    refuse_unspeakable(value, refused)
    return value


def _plain_loader(yaml: Any) -> Any:
    """Return the safe loader without merge keys: nine of them in nine lists make 9**9 pairs."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def flatten_mapping(self, node: Any) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.constructor.ConstructorError(None, None, "merge keys (<<)")

    return Loader
