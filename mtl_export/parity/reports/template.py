"""A template of this folder and what it shows -> text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtl_export.parity.reports import facts


def rendered(name: str, *, shown: Callable[[str], str] | None = None, **values: Any) -> str:
    """Return the template ``name`` filled in; every text in it is escaped.

    Args:
        name: Its file in this folder.
        shown: How a text is escaped; as HTML where it is None.
        **values: What the template refers to, by name.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def escaped(value: object) -> object:
        # What is marked up was escaped already, when it was made.
        return value if shown is None or isinstance(value, Markup) else Markup(shown(str(value)))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {}
    return facts.clean(environment.get_template(name).render(facts=facts, **values))
