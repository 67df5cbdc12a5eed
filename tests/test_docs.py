"""The README's and the pages' examples run as they stand, and their figures are the ones measured."""

import contextlib
import csv
import re

import numpy as np
import pages
import pytest
import torch
import torch.nn.functional as F

from rvi_fast.nn import RowTable
from rvi_fast.optim import RowAdam

pytest.importorskip("sklearn")
pd = pytest.importorskip("pandas")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def printed(output: str) -> dict[str, float]:
    """The numbers of lines like "name: 0.12"."""
    return {name: float(number) for name, number in re.findall(r"^([\w ]+): (\d+\.\d+)$", output, flags=re.MULTILINE)}


def test_readme(capsys):
    assert len(pages.blocks("README.md")) == 3
    names = pages.run("README.md")
    error = float(re.search(r"hidden cells: (\d+\.\d+)", capsys.readouterr().out)[1])
    assert error < 0.3
    assert names["draws"].shape == (20, 5, 30)
    assert names["again"].get_params() == names["model"].get_params()


def test_quick_start(capsys):
    names = pages.run("docs/quick-start.md")
    errors = printed(capsys.readouterr().out)
    assert errors["RVI"] < 0.6 * errors["column means"]
    assert names["embedding"].shape == (500, names["model"].latent_dim_) and names["imagined"].shape == (10, 30)
    hidden = ~names["observed"][:500]
    spread = names["high"] - names["low"]
    assert (spread[hidden] > 0).all() and not spread[~hidden].any()
    assert np.isfinite(names["filled_new"]).all() and len(names["odd"]) == 5
    frames = names["model"].impute(pd.DataFrame(names["new"]), n_samples=2, steps=5)
    assert [type(frame) for frame in frames] == [pd.DataFrame] * 2


def test_images(capsys):
    names = pages.run("docs/images.md")
    errors = printed(capsys.readouterr().out)
    assert errors["RVI"] < 0.8 * errors["pixel means"]
    observed, images = names["observed"], names["images"]
    assert np.array_equal(names["filled"][observed], images[observed])
    assert names["picture"].dtype == np.uint8
    assert -100 < names["filled"].min() < 0 and 255 < names["filled"].max() < 355
    assert names["probability"].min() >= 0 and names["probability"].max() <= 1


def test_images_of_fashion_mnist(capsys):
    pages.skip_without("fashion_mnist")
    pages.run("docs/images.md", "fashion_mnist")
    errors = printed(capsys.readouterr().out)
    assert errors["RVI"] < 0.8 * errors["pixel means"]


@pytest.fixture(scope="module")
def names_of_tables():
    return pages.run("docs/tables.md")


def test_tables(names_of_tables):
    names = names_of_tables
    assert names["pipeline"].score(names["X_test"], names["y_test"]) > 0.85
    assert names["draws"].shape == (50, 45, 13) and names["Z"].shape == (45, 8)


@pytest.mark.parametrize("need", ["anndata", "polars"])
def test_tables_with(need, names_of_tables):
    pages.skip_without(need)
    names = pages.run("docs/tables.md", need, names_of_tables)
    filled = names["cells"].layers["filled"] if need == "anndata" else names["filled"].to_numpy()
    observed = names["X_train"].notna().to_numpy()
    assert filled.shape == (133, 13) and np.isfinite(filled).all()
    assert np.array_equal(filled[observed], names["X_train"].to_numpy()[observed])


def test_data():
    h5py, zarr, _ = map(pytest.importorskip, ("h5py", "zarr", "pyarrow"))
    cells = np.random.default_rng(0).normal(size=(300, 3))
    cells[::3, 1] = np.nan
    np.save("cells.npy", cells)
    pd.DataFrame(cells, columns=["age", "height", "dose"]).to_parquet("cells.parquet")
    with h5py.File("cells.h5", "w") as file:
        file["x"] = cells
    zarr.save_array("cells.zarr", cells)
    names: dict = {}
    for block in pages.blocks("docs/data.md")[:2]:  # the third converts a file that only its owner has
        exec(block, names)
    assert np.array_equal(names["out"][~np.isnan(cells)], cells[~np.isnan(cells)])
    assert np.isfinite(names["out"]).all()
    for name in ("in_parquet", "in_hdf5", "in_zarr"):
        np.testing.assert_array_equal(names[name][0:300], cells)


def test_inference(capsys):
    pages.run("docs/inference.md")
    shares = [float(word) for word in capsys.readouterr().out.split()]
    assert len(shares) == 2 and all(0 <= share <= 1 for share in shares)


def test_performance(capsys):
    pages.run("docs/performance.md")
    assert len(eval(capsys.readouterr().out)) == 5


@pytest.fixture(scope="module")
def names_of_pytorch(tmp_path_factory):
    with contextlib.chdir(tmp_path_factory.mktemp("pytorch")):
        return pages.run("docs/pytorch.md")


def test_pytorch(names_of_pytorch):
    target, loss = names_of_pytorch["target"], names_of_pytorch["loss"]
    assert loss < 0.5 * target.square().mean()
    names = names_of_pytorch
    saved, loaded = names["model"].state_dict(), names["again"].state_dict()
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    saved, loaded = names["optimizer"].state_dict(), names["its_optimizer"].state_dict()
    torch.testing.assert_close(loaded["state"], saved["state"], rtol=0, atol=0)


def test_rows_by_the_weight_train_as_rows_by_the_module():
    curves = []
    for read in (lambda table, rows: table(rows), lambda table, rows: F.embedding(rows, table.weight)):
        table, generator = RowTable(50, 4), torch.Generator().manual_seed(0)
        optimizer = RowAdam(table.parameters(), lr=0.1)
        for _ in range(20):
            loss = (read(table, torch.randint(50, (5,), generator=generator)) - 1).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curves.append(table.weight.detach())
        table.weight.detach().zero_()
        assert torch.equal(table.weight, curves[-1])  # it was a copy
    torch.testing.assert_close(*curves)


@pytest.mark.parametrize("need", ["torch.compile", "accelerate", "lightning"])
def test_pytorch_with(need, names_of_pytorch):
    pages.skip_without(need)
    names = pages.run("docs/pytorch.md", need, names_of_pytorch)
    model = {"torch.compile": "model", "accelerate": "prepared", "lightning": "module"}[need]
    decoded = getattr(names[model], "model", names[model])(torch.arange(names["num_rows"]))
    assert (decoded - names["target"]).square().mean() < 0.5 * names["target"].square().mean()


def test_the_tables_of_pytorch():
    """They are what the examples print, and show what the page says of them."""
    page = pages.text("docs/pytorch.md")
    header = re.search(r'HEADER = """\\\n(.*?)"""', pages.text("examples/compare.py"), flags=re.DOTALL)[1]
    tables = page.split(header + "\n")[1:]
    assert len(tables) == 3
    for table in tables:
        few, _, many = ([float(c.replace(",", "")) for c in line.split("|")[1:-1]] for line in table.splitlines()[:3])
        assert few[0] == 2_000 and 0.3 < few[5] < 1
        assert many[0] == 200_000 and min(many[4:6]) >= 5 and many[6] < 0.8 * many[7] and many[8] < 1e-5


def test_when_not(capsys):
    names = pages.run("docs/when-not.md")
    errors = printed(capsys.readouterr().out)
    assert set(errors) == {"RVIImputer", "KNNImputer", "IterativeImputer"} and max(errors.values()) < 1.1
    assert names["row_lr"] == pytest.approx(0.0034, abs=5e-5)


def test_the_figures_of_when_not():
    page = " ".join(pages.text("docs/when-not.md").split())
    with open(pages.ROOT / "bench/results/cpu/inference.csv", encoding="utf-8") as file:
        rows = {(row["way"], row["steps"]): row for row in csv.DictReader(file) if row["model"] == "default"}
    default, encoder, short = rows["default", "250"], rows["encoder", "1"], rows["linear", "25"]
    assert f"`infer` does {float(default['rows_per_s']):,.0f} test images" in page
    assert f"does {float(encoder['rows_per_s']):,.0f}." in page
    assert f"off by {float(encoder['missing_error']):.3f}" in page
    assert f"RVI is by {float(default['missing_error']):.3f}" in page
    assert f"get {float(short['missing_error']):.3f} at {float(short['rows_per_s']):,.0f} rows" in page


def test_the_test_command_is_what_ci_runs():
    command = next(line for line in pages.text("README.md").splitlines() if line.endswith("&& pytest"))
    ci = pages.text(".ci/run")
    install = command.split(" && ")[2]
    assert install.removeprefix("pip install ") in ci and "\npytest" in ci


def anchors(page: str) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", pages.text(page), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in pages.ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", pages.text(page)):
        path, _, anchor = link.partition("#")
        target = (pages.ROOT / page).parent / path if path else pages.ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(str(target.resolve().relative_to(pages.ROOT.resolve()))), link
