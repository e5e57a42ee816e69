"""The tree of errors: one root, the built-in classes that callers know, and messages that name the next step."""

from __future__ import annotations

import inspect

import pytest

import pagoda.errors as errors

BUILT_IN = {
    errors.ConfigError: ValueError,
    errors.DataError: ValueError,
    errors.ShapeError: ValueError,
    errors.ArtifactError: RuntimeError,
    errors.ResourceError: RuntimeError,
    errors.TrainingError: RuntimeError,
    errors.MissingExtraError: ImportError,
}
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]


def test_every_error_has_the_one_root_and_its_built_in_parent() -> None:
    assert {*CLASSES} == {errors.PagodaError, *BUILT_IN}
    for error, parent in BUILT_IN.items():
        assert issubclass(error, errors.PagodaError)
        assert issubclass(error, parent)


@pytest.mark.parametrize("error", CLASSES)
def test_the_tree_in_the_docstring_names_every_error(error: type[Exception]) -> None:
    assert error.__doc__
    assert error.__name__ in (errors.__doc__ or "")


def test_near_names_are_suggested_and_far_ones_listed() -> None:
    known = ["batch_size", "learning_rate"]
    assert errors.did_you_mean("batchsize", known) == "Did you mean `batch_size`?"
    assert errors.did_you_mean("xyz", known) == "Known: `batch_size`, `learning_rate`."
    assert errors.did_you_mean("batchsize", (name for name in known)) == "Did you mean `batch_size`?"


def test_installed_packages_are_imported() -> None:
    assert errors.import_extra("json", "hub").__name__ == "json"


def test_missing_packages_are_named_with_the_line_that_installs_them() -> None:
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'pagoda\[hub\]'") as caught:
        errors.import_extra("a_package_that_nobody_wrote", "hub")
    assert isinstance(caught.value.__cause__, ImportError)
    assert "a_package_that_nobody_wrote" in str(caught.value)
