"""The API's pages, which pdoc makes of docstrings: every public name is there, and has something to say."""

import inspect
import warnings

import pytest

import rvi_fast

pdoc = pytest.importorskip("pdoc")
pytest.importorskip("sklearn")

PACKAGES = ("rvi_fast", "rvi_fast.sklearn", "rvi_fast.train")


def test_pages_are_made(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of types that it does not find
        pdoc.pdoc(*PACKAGES, output_directory=tmp_path)
    assert "RowTable" in (tmp_path / "rvi_fast" / "nn.html").read_text(encoding="utf-8")
    assert "RVIImputer" in (tmp_path / "rvi_fast" / "sklearn.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", rvi_fast.__all__)
def test_public_names_say_what_they_are(name):
    thing = getattr(rvi_fast, name)
    assert inspect.getdoc(thing)
    names = getattr(thing, "__all__", ()) if inspect.ismodule(thing) else ()
    for inside in names:
        assert inspect.getdoc(getattr(thing, inside)), f"{name}.{inside}"
