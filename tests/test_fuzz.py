"""Whatever is handed in ends in a right result or in one clear sentence.

2,000 examples, the same ones each time; RVI_FAST_FUZZ=10000 draws so many new ones.
"""

import os
import re
import traceback
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rvi_fast
from rvi_fast import RVI

EXAMPLES = int(os.environ.get("RVI_FAST_FUZZ", "2000"))
TINY = dict(latent_dim=2, hidden=(4,), groups=(3,), batch_size=4, epochs=1, progress=False)
LIBRARY = str(Path(rvi_fast.__file__).parent)
MAX_EXACT = 1 << 53  # of an integer in float64
MAX_SQUARE = np.float64(1e150)  # what float64 can square

FLOATS = [np.float16, np.float32, np.float64, ">f4", ">f8"]
INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, ">i2", ">i8"]
OTHERS = [np.longdouble, np.complex64, np.complex128, "M8[s]", "m8[D]", "U4", "S3", object, [("a", "f8")], "V4"]

seeds = st.integers(0, 2**32 - 1)
few = st.sampled_from


def fuzz(share):
    on_request = "RVI_FAST_FUZZ" in os.environ
    return settings(max_examples=round(share * EXAMPLES), deadline=None, derandomize=not on_request)


# what must hold


def attempt(action):
    """What action returns; or None, if it raised one clear sentence of ours."""
    try:
        with warnings.catch_warnings(action="error"):
            return action()
    except (ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = str(error)
        assert last.filename.startswith(LIBRARY), f"raised in {last.filename}: {message}"
        assert re.search(r"\b(X|mask|column)\b", message), message
        assert "\n" not in message and 20 < len(message) < 300 and "0x" not in message, message
        return None


def check_filled(filled, cells, observed, output_dtype):
    """filled: [N, D] array; cells: what was given, observed ones of which must come back bit for bit."""
    assert filled.shape == observed.shape and filled.dtype == output_dtype
    assert np.isfinite(filled).all()
    given_cells = cells[observed].astype(output_dtype)
    assert filled[observed].tobytes() == given_cells.tobytes()


def output_dtype(dtype):
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return dtype
    return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)


def why_refused(cells, mask):
    """The first reason to refuse these cells (an array of numbers) and this mask (a bool array or None), or None."""
    observed = np.ones(cells.shape, dtype=bool) if mask is None else mask
    if cells.ndim != 2 or 0 in cells.shape:
        return "shape"
    if observed.shape != cells.shape:
        return "mask"
    if cells.dtype.kind == "f":
        if mask is None:
            observed = ~np.isnan(cells)
        if not np.isfinite(cells[observed]).all():
            return "not finite"
        if (np.abs(cells[observed]) > MAX_SQUARE).any():
            return "variance"
    elif cells.dtype.itemsize == 8 and any(abs(int(v)) > MAX_EXACT for v in cells[observed]):
        return "integers"
    if not observed.any(0).all():
        return "empty column"
    return None


def observed_of(cells, mask):
    if mask is not None:
        return mask
    return ~np.isnan(cells) if cells.dtype.kind == "f" else np.ones(cells.shape, dtype=bool)


# what is handed in


@st.composite
def cells_of(draw, dtype, shape):
    """Numbers of a dtype: small or large, constant or not, with extremes of their type."""
    rng = np.random.default_rng(draw(seeds))
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        low, high = draw(few([(0, 1), (0, 99), (info.min, info.max), (info.max - 3, info.max), (5, 5)]))
        return rng.integers(
            max(low, info.min), min(high, info.max), shape, dtype=dtype.newbyteorder("="), endpoint=True
        )
    values = rng.normal(size=shape)
    pattern = draw(few(["normal", "far", "huge", "tiny", "constant", "extremes", "integers", "outlier"]))
    info = np.finfo(dtype)
    with np.errstate(over="ignore"):
        if pattern == "far":
            values = values + 1e4
        elif pattern == "huge":
            values = values * 1e30
        elif pattern == "tiny":
            values = values * float(info.smallest_normal)
        elif pattern == "constant":
            values = np.full(shape, -0.0 if draw(st.booleans()) else values.sum())
        elif pattern == "extremes":
            edges = [0.0, -0.0, info.max, info.min, info.smallest_subnormal, info.eps, 1.0]
            values = rng.choice(np.array(edges, dtype=dtype.newbyteorder("=")), shape)
        elif pattern == "integers":
            values = values.round()
        elif pattern == "outlier":
            values = np.where(rng.random(shape) < 0.05, 6e4, values)
        return np.asarray(values, dtype=dtype.newbyteorder("="))


@st.composite
def holes(draw, shape):
    """Where cells are missing: none, some, whole rows, a column, everything, all but one."""
    rng = np.random.default_rng(draw(seeds))
    pattern = draw(few(["none", "some", "some", "rows", "column", "all", "all but one"]))
    missing = rng.random(shape) < (0.3 if pattern == "some" else 1.0 if pattern.startswith("all") else 0.0)
    if missing.size and missing.ndim and pattern != "some":
        if pattern == "rows":
            missing[rng.integers(shape[0])] = True
        elif pattern == "column" and len(shape) > 1:
            missing[:, rng.integers(shape[1])] = True
        elif pattern == "all but one":
            missing.flat[rng.integers(missing.size)] = False
    return missing


matrix_shapes = st.tuples(st.integers(1, 9), st.integers(1, 5))
shapes = st.one_of(
    matrix_shapes, matrix_shapes, matrix_shapes, few([(), (0,), (3,), (0, 3), (3, 0), (2, 3, 2), (1, 1)])
)


@st.composite
def arrays(draw, dtypes):
    """Numbers with holes and, at times, an infinity."""
    shape, dtype = draw(shapes), draw(few(dtypes))
    cells = draw(cells_of(dtype, shape))
    if cells.dtype.kind == "f":
        cells = np.where(draw(holes(shape)), np.asarray(np.nan, cells.dtype), cells)
        if cells.size and draw(st.integers(0, 9)) == 0:
            cells.flat[draw(st.integers(0, cells.size - 1))] = draw(few([np.inf, -np.inf]))
    return cells.astype(dtype)


def laid_out(array, how):
    """The same cells with other strides, alignment or ownership."""
    if how == "Fortran":
        return np.asfortranarray(array)
    if how == "reversed" and array.ndim:
        return array[::-1].copy()[::-1]
    if how == "reversed columns" and array.ndim == 2:
        return array[:, ::-1].copy()[:, ::-1]
    if how == "transposed":
        return array.T.copy().T
    if how == "every second" and array.ndim:
        return np.repeat(array, 2, axis=0)[::2]
    if how == "read-only":
        array = np.array(array)  # of a scalar too
        array.flags.writeable = False
    if how == "unaligned":
        shifted = np.empty(array.nbytes + 1, dtype=np.uint8)[1:].view(array.dtype).reshape(array.shape)
        shifted[...] = array
        return shifted
    if how == "np.matrix" and array.ndim == 2:
        return array.view(np.matrix)
    return array


layouts = few(
    [
        "C",
        "Fortran",
        "reversed",
        "reversed columns",
        "transposed",
        "every second",
        "read-only",
        "unaligned",
        "np.matrix",
    ]
)


@st.composite
def masks_for(draw, cells):
    """(mask as handed in, the bool array that it is, or None if it is none)."""
    kind = draw(few(["none", "none", "none", "right", "right", "NaN-aware", "shape", "dtype"]))
    if kind == "none":
        return None, None
    observed = ~draw(holes(cells.shape)) if cells.ndim else np.array(True)
    if kind == "NaN-aware" and cells.dtype.kind == "f":
        observed &= ~np.isnan(cells)
    if kind == "dtype":
        return observed.astype(draw(few([np.int8, np.float64, object, "U5"]))), None
    if kind == "shape":
        observed = draw(
            few([observed.T, observed[None], observed.ravel(), observed[:-1] if observed.ndim else observed])
        )
    handed = draw(
        few([observed, laid_out(observed, draw(layouts)), observed.tolist(), torch.from_numpy(observed.copy())])
    )
    if isinstance(handed, list) and observed.size == 0:
        return observed, observed  # an empty list has no dtype
    if observed.ndim == 2 and draw(st.integers(0, 4)) == 0:
        handed = pd.DataFrame(observed)
    return handed, observed


def fit(X, mask):
    return RVI(**TINY).fit(X, mask, max_steps=2)


def check_fit(X, mask, as_array, cells, observed, reason, dtype):
    """fit and impute X: right where there is no reason to refuse it, else refused."""
    model = attempt(lambda: fit(X, mask))
    assert (model is None) == (reason is not None), reason or "refused without a reason"
    if model is not None:
        filled = model.impute()
        check_filled(as_array(filled), cells, observed, dtype)
        assert model.embed().shape == (len(cells), 2) and np.isfinite(model.embed()).all()
    return None if model is None else filled


@fuzz(0.35)
@given(st.data())
def test_arrays_of_numbers(data):
    cells = data.draw(arrays([*FLOATS, *INTEGERS, bool]))
    handed, mask = data.draw(masks_for(cells))
    reason = "mask" if handed is not None and mask is None else why_refused(cells, mask)
    X = laid_out(cells, data.draw(layouts))
    before = X.tobytes()
    check_fit(X, handed, lambda filled: filled, cells, observed_of(cells, mask), reason, output_dtype(cells.dtype))
    assert X.tobytes() == before


@fuzz(0.05)
@given(st.data())
def test_broadcast_arrays(data):
    row = data.draw(cells_of(data.draw(few([*FLOATS, *INTEGERS])), (1, 4)))
    cells = np.broadcast_to(row, (data.draw(st.integers(1, 6)), 4))
    reason = why_refused(cells, None)
    check_fit(cells, None, lambda filled: filled, cells, observed_of(cells, None), reason, output_dtype(cells.dtype))


@fuzz(0.1)
@given(few(OTHERS), matrix_shapes, seeds, st.booleans())
def test_arrays_of_other_things(dtype, shape, seed, text):
    """Object arrays may hold anything; all of these must be made numbers first."""
    numbers = np.random.default_rng(seed).integers(0, 99, shape)
    X = np.zeros(shape, dtype) if np.dtype(dtype).kind == "V" else numbers.astype(dtype)
    if dtype is object and text:
        X.flat[0] = ["1,5", "größer", None, pd.NA, {}][seed % 5]
    assert attempt(lambda: fit(X, None)) is None


# DataFrames


COLUMNS = {
    "float64": lambda v, m: pd.Series(np.where(m, np.nan, v)),
    "float32": lambda v, m: pd.Series(np.where(m, np.nan, v).astype(np.float32)),
    "float16": lambda v, m: pd.Series(np.where(m, np.nan, v).astype(np.float16)),
    "int64": lambda v, m: pd.Series(v),
    "uint8": lambda v, m: pd.Series(v.astype(np.uint8)),
    "bool": lambda v, m: pd.Series(v > 50),
    "Int64": lambda v, m: pd.Series(v, dtype="Int64").mask(m),
    "UInt8": lambda v, m: pd.Series(v, dtype="UInt8").mask(m),
    "Float64": lambda v, m: pd.Series(v, dtype="Float64").mask(m),
    "Float32": lambda v, m: pd.Series(v, dtype="Float32").mask(m),
    "boolean": lambda v, m: pd.Series(v > 50, dtype="boolean").mask(m),
    "large": lambda v, m: pd.Series(v + (1 << 60) + 1),
    "Large": lambda v, m: pd.Series(v + (1 << 60) + 1, dtype="Int64").mask(m),
    "category": lambda v, m: pd.Series(v).astype("category"),
    "object": lambda v, m: pd.Series(v, dtype=object).mask(m),
    "text": lambda v, m: pd.Series([f"größe {i}" for i in v]).mask(m),
    "decimal comma": lambda v, m: pd.Series([f"{i},5" for i in v]),
    "date": lambda v, m: pd.Series(pd.to_datetime(v, unit="D")).mask(m),
    "difference": lambda v, m: pd.Series(pd.to_timedelta(v, unit="D")).mask(m),
    "period": lambda v, m: pd.Series(pd.period_range("2020", periods=len(v), freq="D")),
    "complex": lambda v, m: pd.Series(v * 1j),
    "infinite": lambda v, m: pd.Series(np.where(m, np.inf, v)),
    "sparse": lambda v, m: pd.Series(pd.arrays.SparseArray(np.where(m, np.nan, v))),
}
NUMBERS = ["float64", "float32", "float16", "int64", "uint8", "bool", "Int64", "UInt8", "Float64", "Float32", "boolean"]
HEADERS = [
    lambda n: list(range(n)),
    lambda n: [f"Größe {i} 🧪" for i in range(n)],
    lambda n: ["same"] * n,
    lambda n: [("a", i) for i in range(n)],
    lambda n: pd.MultiIndex.from_product([["a"], range(n)]),
    lambda n: [None, np.nan, 1.5, "", "\n", *range(n)][:n],
]
INDICES = [
    lambda n: pd.RangeIndex(n),
    lambda n: pd.Index([f"row {i}" for i in range(n)], name="key"),
    lambda n: pd.Index([7] * n),
    lambda n: pd.date_range("2020", periods=n),
    lambda n: pd.MultiIndex.from_product([["a"], range(n)]),
]


@fuzz(0.25)
@given(st.data())
def test_data_frames(data):
    rows = data.draw(st.integers(0, 8))
    usual = data.draw(st.integers(0, 2)) > 0
    kinds = data.draw(st.lists(few(NUMBERS if usual else list(COLUMNS)), min_size=int(usual), max_size=5))
    rng = np.random.default_rng(data.draw(seeds))
    missing = data.draw(holes((rows, len(kinds)))) if data.draw(st.booleans()) else np.zeros((rows, len(kinds)), bool)
    series = [COLUMNS[kind](rng.integers(0, 99, rows), missing[:, i]) for i, kind in enumerate(kinds)]
    X = pd.concat(series, axis=1) if series else pd.DataFrame(index=range(rows))
    X.columns, X.index = data.draw(few(HEADERS))(len(kinds)), data.draw(few(INDICES))(rows)
    before = X.copy(deep=True)
    lost = [kind for kind in kinds if kind not in NUMBERS and kind not in ("sparse", "infinite", "large", "Large")]
    observed = X.notna().to_numpy()
    infinite = any(missing[:, i].any() for i, kind in enumerate(kinds) if kind == "infinite")
    large = any(observed[:, i].any() for i, kind in enumerate(kinds) if kind.lower() == "large")
    reason = "dtype" if lost else "integers" if large else "not finite" if infinite else None
    if 0 in X.shape or not observed.any(0).all():
        reason = "empty"
    if reason is not None:
        assert attempt(lambda: fit(X, None)) is None, reason
        return
    filled = attempt(lambda: fit(X, None)).impute()
    assert isinstance(filled, pd.DataFrame) and filled.columns.equals(X.columns) and filled.index.equals(X.index)
    cells = X.to_numpy(dtype=np.float64, na_value=np.nan)
    check_filled(filled.to_numpy(np.float64), cells, observed, np.float64)
    pd.testing.assert_frame_equal(X, before)


# tensors


TORCH_NUMBERS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]
TORCH_OTHERS = [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]


@fuzz(0.12)
@given(st.data())
def test_tensors(data):
    dtype = data.draw(few([*TORCH_NUMBERS, *TORCH_NUMBERS, *TORCH_OTHERS]))
    shape = data.draw(shapes)
    X = torch.from_numpy(np.random.default_rng(data.draw(seeds)).integers(0, 2, shape).copy()).to(dtype)
    if dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        X = torch.where(torch.from_numpy(np.asarray(data.draw(holes(shape)))), torch.nan, X).to(dtype)
        X.requires_grad_(data.draw(st.booleans()))
    how = data.draw(few(["as it is", "transposed", "expanded", "strided", "negated view", "meta", "sparse"]))
    if how == "transposed" and X.dim() == 2:
        X = X.T.contiguous().T
    elif how == "expanded" and X.dim():
        X = X[:1].expand(X.shape)
    elif how == "strided" and X.dim():
        X = torch.cat((X, X))[::2] if X.dtype not in TORCH_OTHERS else X
    elif how == "negated view" and X.dtype in (torch.float32, torch.float64):
        X = torch.complex(X, X).conj().imag
    elif how == "meta":
        X = X.to("meta")
    elif how == "sparse" and dtype == torch.float32:
        X = X.to_sparse()
    if X.is_meta or X.is_sparse or dtype in TORCH_OTHERS:
        assert attempt(lambda: fit(X, None)) is None
        return
    plain = X.detach().resolve_neg()
    cells = (plain.float() if dtype == torch.bfloat16 else plain).numpy()
    filled = check_fit(
        X,
        None,
        lambda filled: (filled.float() if dtype == torch.bfloat16 else filled).numpy(),
        cells,
        observed_of(cells, None),
        why_refused(cells, None),
        output_dtype(cells.dtype),
    )
    if filled is not None:
        assert isinstance(filled, torch.Tensor) and not filled.requires_grad
        assert filled.dtype == (dtype if dtype.is_floating_point else filled.dtype)


# anything else


numbers = st.booleans() | st.integers() | st.floats()
things = numbers | st.none() | st.text(max_size=4) | st.binary(max_size=3) | st.complex_numbers()
anything = st.one_of(
    st.lists(st.tuples(numbers, numbers), max_size=4),
    st.lists(st.lists(things, max_size=3), max_size=4),
    st.recursive(things, lambda inner: st.lists(inner, max_size=4), max_leaves=9),
    st.dictionaries(st.text(max_size=2), st.lists(numbers, max_size=3), max_size=3),
    st.sets(numbers),
)


@fuzz(0.05)
@given(anything)
def test_anything(X):
    """Lists of numbers are as good as arrays; all else is refused."""
    model = attempt(lambda: fit(X, None))
    try:
        cells = np.asarray(X)
    except ValueError:
        cells = np.asarray(None)
    is_numbers = cells.dtype.kind in "biuf" and cells.dtype.itemsize <= 8
    reason = why_refused(cells, None) if is_numbers else "dtype"
    assert (model is None) == (reason is not None), reason or "refused without a reason"
    if model is not None:
        check_filled(model.impute(), cells, observed_of(cells, None), output_dtype(cells.dtype))


# new rows


@pytest.fixture(scope="module")
def fitted():
    X = np.random.default_rng(0).normal(size=(20, 3))
    return RVI(**TINY).fit(X), RVI(**TINY).fit(pd.DataFrame(X, columns=["ä", "b", "c"]))


@fuzz(0.08)
@given(data=st.data())
def test_new_rows(fitted, data):
    cells = data.draw(arrays([*FLOATS, *INTEGERS, bool]))
    handed, mask = data.draw(masks_for(cells))
    model = fitted[0]
    filled = attempt(lambda: model.impute(cells, handed, steps=1))
    reason = "mask" if handed is not None and mask is None else why_refused(cells, mask)
    if reason is None and cells.shape[1] != 3:
        reason = "columns"
    if filled is None:
        small = cells.ndim == 2 and not (np.abs(cells[np.isfinite(cells)].astype(float)) > 1e37).any()
        assert reason is not None or not small
        return
    assert reason in (None, "empty column")
    check_filled(filled, cells, observed_of(cells, mask), output_dtype(cells.dtype))
    embedding = model.embed(cells, handed, steps=1)
    assert embedding.shape == (len(cells), 2) and np.isfinite(embedding).all()


# what earlier examples found

LARGE = (1 << 53) + 1
FOUND = {
    "subnormal spread": np.array([[5e-324], [0.0]]),
    "spread below float32": np.array([[1e-45]] + [[0.0]] * 9, np.float32),
    "range above float32": np.array([[3e38], [3e38], [3e38], [-3e38]], np.float32),
    "negated view": torch.complex(torch.ones(3, 2), torch.ones(3, 2)).conj().imag,
}
REFUSED = {
    "beyond squaring": (np.array([[1e200], [0.0]]), "the variance of X's column 0 is beyond float64"),
    "meta": (torch.ones(3, 2, device="meta"), "X must be a dense array, .* got a tensor on the meta device"),
    "float8": (torch.ones(3, 2).to(torch.float8_e5m2), "X must hold bool, integer or float numbers .* torch.float8"),
    "ragged bytes": ([("",), [b"\x80"]], "X must be rectangular"),
    "mixed integers": (pd.DataFrame({"a": [LARGE], "b": [0.5]}), "X's column 'a' holds integers beyond"),
    "nullable integers": (pd.DataFrame({"a": [LARGE, None]}, dtype="Int64"), "X's column 'a' holds integers beyond"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_wrong_is_right(name):
    X = FOUND[name]
    filled = attempt(lambda: fit(X, None)).impute()
    assert torch.equal(torch.as_tensor(filled), torch.as_tensor(X))


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_unclear_is_clear(name):
    X, match = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=match):
        fit(X, None)


@pytest.mark.parametrize("how", ["reversed", "reversed columns", "read-only"])
def test_masks_of_any_layout(how):
    X = np.random.default_rng(0).normal(size=(6, 3))
    mask = laid_out(np.random.default_rng(1).random((6, 3)) < 0.7, how)
    model = attempt(lambda: fit(X, mask))
    check_filled(attempt(lambda: model.impute(X, mask, steps=1)), X, mask, X.dtype)


def test_no_infinity_is_filled_in():
    X = np.array([[6e4], [-6e4], [np.nan], [6e4]], np.float16)
    model = fit(X, None)
    model.units_.shift[:] = 1e6
    assert model.impute()[2] == np.finfo(np.float16).max
