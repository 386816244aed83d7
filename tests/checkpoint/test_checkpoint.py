from __future__ import annotations

import pytest

from mtl_export.checkpoint.checkpoint import Task, check_task_names, task_named
from mtl_export.errors import CheckpointError, TaskNotFoundError
from tests.checkpoint.messages import assert_whole

TASKS = (Task("ads_rel", 0), Task("sentiment", 1), Task("spam", 2))


def test_a_task_is_found_by_name() -> None:
    """The name decides, not the position."""
    assert task_named(TASKS, "spam").index == 2


def test_an_unknown_task_names_the_nearest() -> None:
    """A misspelt task is answered with the one that was meant, and all that exist."""
    with pytest.raises(TaskNotFoundError) as caught:
        task_named(TASKS, "sentimnet")
    assert_whole(
        caught.value, where="'sentimnet'", found="no task of that name", expected="ads_rel"
    )
    assert caught.value.fix == "Did you mean --task sentiment?"


def test_a_task_like_no_other_lists_them() -> None:
    """Without a near name the fix says what to pass."""
    with pytest.raises(TaskNotFoundError) as caught:
        task_named(TASKS, "zzzzzz")
    assert "--task" in caught.value.fix
    assert "Did you mean" not in caught.value.fix


@pytest.mark.parametrize(
    "names",
    [
        [],
        [""],
        ["a", "b", "a"],
        ["../etc"],
        ["a/b"],
        [".hidden"],
        ["-flag"],
        ["two words"],
        ["ünïcode"],
        ["a" * 129],
    ],
    ids=repr,
)
def test_names_that_are_no_folder_names_are_refused(names: list[str]) -> None:
    """Empty, repeated and unsafe names are refused together."""
    with pytest.raises(CheckpointError) as caught:
        check_task_names("here", names)
    assert_whole(caught.value, where="here", found="task names", expected="each different")


@pytest.mark.parametrize("names", [["a"], ["ads_rel", "Spam-2", "v1.2", "0"], ["a" * 128]])
def test_plain_names_are_accepted(names: list[str]) -> None:
    """Letters, digits, underscore, dash and dot make a task name."""
    check_task_names("here", names)
