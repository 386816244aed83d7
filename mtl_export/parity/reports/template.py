"""A template of this folder and what it shows -> text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtl_export.parity.reports import facts


def rendered(name: str, **values: Any) -> str:
    """Return the template ``name`` filled in; every text in it is escaped as HTML.

    Args:
        name: Its file in this folder.
        **values: What the template refers to, by name.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {}
    return facts.clean(environment.get_template(name).render(facts=facts, **values))
