"""Warnings point to the line of the user's code that led to them."""

import threading
import warnings

import pytest

from lightning_ntk.utilities.user_warnings import warn_user


@pytest.mark.parametrize("package", ["lightning", "lightning_ntk", "torch", "transformers", "contextlib"])
def test_code_that_the_user_has_not_written_is_passed_over(package: str) -> None:
    scope = {"__name__": f"{package}.module", "warn_user": warn_user}
    with pytest.warns(UserWarning, match=r"Careful\.") as record:
        exec(compile("warn_user('Careful.')", "library.py", "exec"), scope)
    assert record[0].filename == __file__


def test_the_innermost_line_of_the_user_counts() -> None:
    scope = {"__name__": "__main__", "warn_user": warn_user}
    with pytest.warns(UserWarning, match="Careful") as record:
        exec(compile("\nwarn_user('Careful.')", "script.py", "exec"), scope)
    assert (record[0].filename, record[0].lineno) == ("script.py", 2)


def test_without_a_line_of_the_user_the_place_of_the_call_is_named() -> None:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        thread = threading.Thread(target=warn_user, args=("Careful.",))
        thread.start()
        thread.join()
    assert record[0].filename == threading.__file__
