"""The example of a docstring, run in the current folder."""

from __future__ import annotations

import doctest
from collections.abc import Callable


def run_example(function: Callable[..., object]) -> None:
    """Run the example of ``function``; fail with what it printed where that is not as written."""
    (found,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__)
    said: list[str] = []
    result = doctest.DocTestRunner().run(found, out=said.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(said)
