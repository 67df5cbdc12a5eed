import json
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import rvi_fast
from rvi_fast import RVI, VAD, VAE, cli, commands, data
from rvi_fast.train import Trainer

FEW = ["--epochs", "3", "--device", "cpu"]


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def cancer():
    """Breast cancer with 30 % holes, as text."""
    X, names = data.load_table("breast_cancer")
    observed = np.random.default_rng(0).random(X.shape) >= 0.3
    return pd.DataFrame(X, columns=names).astype(str).where(observed, "").iloc[:200]


@pytest.fixture(scope="module")
def model(cancer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    cancer.to_csv(folder / "cancer.csv")
    assert run("fit", folder / "cancer.csv", "-o", folder / "model", "--epochs", 30, "--missing=-9", "--quiet") == 0
    return folder / "model"


def read_text(path, **options):
    return pd.read_csv(path, index_col=0, dtype=str, keep_default_na=False, **options)


def test_demo_trains_compares_and_writes(tmp_path, capsys):
    assert cli.main(["demo", "-o", str(tmp_path / "out"), "--quiet"]) == 0
    lines = {line[:22].strip(): line[22:].split() for line in capsys.readouterr().out.splitlines()}
    errors = {name: float(lines[name][0]) for name in ("column means", "5 nearest neighbours", "low-rank EM", "RVI")}
    assert 0.9 < errors["column means"] < 1.1
    assert errors["RVI"] < errors["low-rank EM"] < errors["column means"]
    assert (tmp_path / "out" / "digits.png").read_bytes()[:4] == b"\x89PNG"
    model = RVI.load(tmp_path / "out" / "model")
    assert model.embed().shape[0] == len(data.digits()[0]) and np.isfinite(model.embed()).all()


def test_info_names_versions_backend_and_devices(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert rvi_fast.__version__ in out and "cpu" in out and "backend" in out and "torch" in out


@pytest.mark.parametrize("value", ["triton", "cuda"])
def test_info_works_where_the_chosen_backend_does_not(monkeypatch, capsys, value):
    monkeypatch.setenv("RVI_FAST_BACKEND", value)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["info"]) == 0
    assert "backend      unusable: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seed", "-1"], "argument --seed: must be at least 0; got -1"),
        (["--epochs", "0"], "argument --epochs: must be at least 1; got 0"),
        (["--epochs", "many"], "argument --epochs: must be a whole number; got 'many'"),
    ],
)
def test_bad_numbers_are_named(capsys, arguments, sentence):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", *arguments])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["impute", "x.csv", "--modle", "m"],
            "rvi-fast impute: error: there is no option --modle; did you mean --model?",
        ),
        (["fit", "x.csv", "-o", "m", "--epoch=3", "--sede=1"], "there is no option --sede; did you mean --seed?"),
        (["bench", "--devise", "cpu"], "there is no option --devise; did you mean --device?"),
        (["info", "--wherever"], "there is no option --wherever; --help lists them"),
        (["embed", "x.csv", "-o", "z.npy", "--device", "gpu"], "--device: must be auto, cpu, cuda, or one GPU such as"),
    ],
)
def test_misspelt_options_and_devices_are_refused_at_once(capsys, arguments, sentence):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert sentence in capsys.readouterr().err


def test_help_and_errors_are_for_people(tmp_path, capsys):
    for arguments in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
    assert "digits" in capsys.readouterr().out
    for arguments in ([], ["dance"], ["--helpp"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "-o", str(tmp_path / "file" / "x"), "--quiet"]) == 1
    assert "rvi-fast demo: " in capsys.readouterr().err


def test_the_module_runs_as_a_command():
    out = subprocess.run(
        [sys.executable, "-m", "rvi_fast.cli", "info"], capture_output=True, text=True, check=True
    ).stdout
    assert rvi_fast.__version__ in out


def test_importing_is_lazy_about_extras():
    extras = ("triton", "sklearn", "pandas", "pyarrow", "matplotlib")
    code = f"import sys, rvi_fast; print([m for m in {extras} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_impute_fills_the_holes_of_a_csv_alone(cancer, tmp_path, capsys):
    cancer.to_csv(tmp_path / "in.csv", sep=";", decimal=",", lineterminator="\r\n", index_label="")
    assert run("impute", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--epochs", 30) == 0
    filled = read_text(tmp_path / "out.csv", sep=";")
    assert list(filled.columns) == list(cancer.columns) and len(filled) == len(cancer)
    observed = (cancer != "").to_numpy()
    assert (filled.to_numpy()[observed] == cancer.to_numpy()[observed]).all()
    X = data.load_table("breast_cancer")[0][:200]
    error = (filled.astype(float).to_numpy() - X) / X.std(0)
    assert np.sqrt((error[~observed] ** 2).mean()) < 0.7
    captured = capsys.readouterr()
    assert captured.out == ""
    report = captured.err
    assert f"mean area                imputed {(cancer['mean area'] == '').sum()} cells" in report
    estimate = float(report.split("overall ")[1].split()[0])
    assert abs(estimate - np.sqrt((error[~observed] ** 2).mean())) < 0.15
    content = (tmp_path / "out.csv").read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") == 201


def test_impute_is_deterministic_and_seeded(cancer, tmp_path):
    cancer.to_csv(tmp_path / "in.csv")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / f"{name}.csv"
        assert run("impute", tmp_path / "in.csv", "-o", out, "--seed", seed, "--no-estimate", "--quiet", *FEW) == 0
    a, b, c = ((tmp_path / f"{name}.csv").read_bytes() for name in "abc")
    assert a == b != c


def test_samples_go_to_numbered_files(cancer, model, tmp_path):
    cancer[:5].to_csv(tmp_path / "in.csv")
    given = ["--samples", 2, "--model", model, "--device", "cpu", "--seed", 3, "--quiet"]
    assert run("impute", tmp_path / "in.csv", "-o", tmp_path / "o.csv", *given) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "o.1.csv", "o.2.csv"]
    one, two = (read_text(tmp_path / f"o.{i}.csv") for i in (1, 2))
    holes = (cancer[:5] == "").to_numpy()
    assert (one.to_numpy() == two.to_numpy())[~holes].all() and (one.to_numpy() != two.to_numpy())[holes].mean() > 0.9


def test_a_model_matches_columns_by_name(cancer, model, tmp_path, capsys):
    new = cancer[:8].copy()
    new["mean area"] = ""
    new.iloc[0, 0] = "-9"  # a marker that fit was given
    new.to_csv(tmp_path / "new.csv")
    other = new.iloc[:, ::-1].assign(more="1")
    other.to_csv(tmp_path / "other.csv", sep="\t")
    for name, extra in (("new", []), ("other", ["--delimiter", "tab"])):
        out = tmp_path / f"{name}.out.csv"
        assert run("impute", tmp_path / f"{name}.csv", "-o", out, "--model", model, "--no-estimate", *extra) == 0
    filled = read_text(tmp_path / "new.out.csv")
    assert (filled != "").all().all() and filled.iloc[0, 0] != "-9"
    assert read_text(tmp_path / "other.out.csv", sep="\t")[filled.columns].equals(filled)
    assert "more                     not known to the model, passed through" in capsys.readouterr().err
    kinds = {c["name"]: c["kind"] for c in json.loads((model / "table.json").read_text())["columns"]}
    assert kinds[""] == "index" and kinds["mean area"] == "number" and len(kinds) == 31


def test_the_error_is_estimated_on_rows_alone_that_the_model_has_not_seen(cancer, model, tmp_path, capsys):
    cancer.to_csv(tmp_path / "same.csv")
    cancer.iloc[::-3].to_csv(tmp_path / "some.csv")
    new = cancer[:50].mask(cancer[:50] == "", "1.25")
    pd.concat([cancer[:150], new]).to_csv(tmp_path / "more.csv")
    reports = {}
    for name in ("same", "some", "more"):
        assert run("impute", tmp_path / f"{name}.csv", "-o", tmp_path / "o.csv", "--model", model, "--seed", 1) == 0
        reports[name] = capsys.readouterr().err
    for name in ("same", "some"):
        assert "no estimate of the error: the model was trained on these rows" in reports[name]
        assert "leave out --model" in reports[name] and "error: root" not in reports[name]
    assert "10% of the observed cells in the 50 rows that the model was not trained on" in reports["more"]
    hidden = int(reports["more"].split("root mean square on ")[1].split()[0])
    assert abs(hidden - 0.1 * new.size) < 0.03 * new.size
    (tmp_path / "m").mkdir()
    for file in model.iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "m" / "rows.npy").write_bytes(b"damaged")
    assert run("impute", tmp_path / "same.csv", "-o", tmp_path / "o.csv", "--model", tmp_path / "m", "--quiet") == 1
    assert "rows.npy is damaged; delete it" in capsys.readouterr().err


def test_columns_that_do_not_fit_the_model_are_named(cancer, model, tmp_path, capsys):
    cancer.drop(columns="mean area").to_csv(tmp_path / "less.csv")
    cancer.assign(**{"mean area": "large"}).to_csv(tmp_path / "text.csv")
    cancer.iloc[:, :3].to_csv(tmp_path / "in.csv")
    for name, sentence in (("less", "lacks 'mean area', on which"), ("text", "'mean area' of"), ("in", "and more")):
        assert run("impute", tmp_path / f"{name}.csv", "-o", tmp_path / "o.csv", "--model", model) == 1
        assert sentence in capsys.readouterr().err
    cancer[:3].to_csv(tmp_path / "all.csv")
    assert run("embed", tmp_path / "all.csv", "-o", tmp_path / "o.csv", "--model", model, "--index", "mean area") == 1
    assert "'mean area' of" in (err := capsys.readouterr().err) and "leave out its --index" in err
    with pytest.raises(SystemExit, match="2"):
        run("impute", tmp_path / "in.csv", "-o", tmp_path / "o.csv", "--model", model, "--epochs", 3)
    assert "--epochs has no effect beside --model" in capsys.readouterr().err


def test_a_damaged_table_file_is_named(cancer, tmp_path, capsys):
    cancer[:20].to_csv(tmp_path / "in.csv")
    assert run("fit", tmp_path / "in.csv", "-o", tmp_path / "m", "--quiet", *FEW) == 0
    (tmp_path / "m" / "table.json").write_text("{")
    embed = ["embed", tmp_path / "in.csv", "-o", tmp_path / "o.csv", "--model", tmp_path / "m", "--quiet"]
    assert run(*embed) == 1
    assert "table.json is damaged or belongs to another model" in capsys.readouterr().err
    (tmp_path / "m" / "table.json").unlink()
    assert run(*embed) == 0


@pytest.mark.parametrize(("method", "cls"), [("rvi", RVI), ("vad", VAD), ("vae", VAE)])
def test_every_method_fits_and_embeds(cancer, tmp_path, method, cls):
    cancer[:50].to_csv(tmp_path / "in.tsv", sep="\t", index_label="id")
    fit = ["fit", tmp_path / "in.tsv", "-o", tmp_path / "m", "--method", method, "--latent-dim", 4, "--index", "id"]
    assert run(*fit, "--quiet", *FEW) == 0
    assert cls.load(tmp_path / "m").latent_dim_ == 4
    for name in ("z.csv", "z.tsv", "z.npy", "z.parquet"):
        embed = ["embed", tmp_path / "in.tsv", "-o", tmp_path / name, "--model", tmp_path / "m", "--index", "id"]
        assert run(*embed, "--quiet") == 0
    z = np.load(tmp_path / "z.npy")
    assert z.shape == (50, 4) and z.dtype == np.float32
    for table in (pd.read_csv(tmp_path / "z.csv"), pd.read_csv(tmp_path / "z.tsv", sep="\t")):
        assert list(table.columns) == ["id", "z0", "z1", "z2", "z3"] and list(table["id"]) == list(range(50))
        np.testing.assert_allclose(table.iloc[:, 1:], z, rtol=1e-6)
    np.testing.assert_array_equal(pd.read_parquet(tmp_path / "z.parquet"), z)


def test_parquet_with_all_kinds_of_columns(tmp_path, capsys):
    rng = np.random.default_rng(0)
    z, n = rng.normal(size=60), 60
    before = pd.DataFrame(
        {
            "name": [f"p{i}" for i in range(n)],
            "day": pd.date_range("2024-01-01", periods=n),
            "height": np.where(rng.random(n) < 0.2, np.nan, 170 + 8 * z).astype(np.float32),
            "age": pd.array(np.round(40 + 10 * z), dtype="Int64"),
            "smoker": pd.array(z > 0, dtype="boolean"),
            "site": 7,
            "notes": np.nan,
        },
        index=pd.Index([f"r{i}" for i in range(n)], name="id"),
    )
    before.loc[before.index[::5], ["age", "smoker", "name"]] = pd.NA
    before.to_parquet(tmp_path / "in.parquet")
    assert run("impute", tmp_path / "in.parquet", "-o", tmp_path / "out.parquet", *FEW) == 0
    after = pd.read_parquet(tmp_path / "out.parquet")
    assert after[["height", "age", "smoker"]].notna().all().all()
    pd.testing.assert_frame_equal(after.where(before.notna()), before.where(before.notna()), check_dtype=False)
    assert after.dtypes.equals(before.dtypes) and after["notes"].isna().all() and after["name"].isna().sum() == 12
    report = capsys.readouterr().err
    for line in ("name    text, passed through", "day     date, passed through", "site    constant, complete"):
        assert line in report
    for line in ("age     imputed 12 cells", "notes   empty, left empty", "id      index, passed through"):
        assert line in report


def test_images_with_a_mask(tmp_path, capsys):
    images = (data.digits()[0][:100] * 255).astype(np.uint8).reshape(-1, 8, 8)
    mask = np.random.default_rng(0).random(images.shape) < 0.7
    mask[:, 0, 0] = False
    np.save(tmp_path / "in.npy", images)
    np.savez(tmp_path / "in.npz", labels=np.arange(100), images=images)
    np.save(tmp_path / "mask.npy", mask)
    masked = ["--mask", tmp_path / "mask.npy", *FEW]
    assert run("impute", tmp_path / "in.npy", "-o", tmp_path / "out.npy", "--samples", 2, *masked) == 0
    report = capsys.readouterr().err
    assert f"imputed {(~mask).sum() - 100} of 6400 cells; left 100 empty" in report and "error: " in report
    assert run("impute", tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--key", "images", *masked) == 0
    out, one = np.load(tmp_path / "out.npy"), np.load(tmp_path / "out.npz")["images"]
    assert out.shape == (2, 100, 8, 8) and one.shape == images.shape and out.dtype == one.dtype == np.uint8
    for filled in (*out, one):
        assert (filled[mask] == images[mask]).all() and (filled[:, 0, 0] == images[:, 0, 0]).all()
    assert (one[~mask] != images[~mask]).any()


def test_idx_images_fit_and_embed(tmp_path):
    images = (data.digits()[0][:70] * 255).astype(np.uint8)
    header = bytes([0, 0, 8, 3]) + np.array([70, 8, 8], dtype=">u4").tobytes()
    (tmp_path / "some-idx3-ubyte").write_bytes(header + images.tobytes())
    assert run("fit", tmp_path / "some-idx3-ubyte", "-o", tmp_path / "m", "--quiet", *FEW) == 0
    assert not (tmp_path / "m" / "table.json").exists()
    embed = ["embed", tmp_path / "some-idx3-ubyte", "-o", tmp_path / "z.npy", "--model", tmp_path / "m", "--quiet"]
    assert run(*embed) == 0
    assert np.load(tmp_path / "z.npy").shape == (70, RVI.load(tmp_path / "m").latent_dim_)
    np.save(tmp_path / "mask.npy", np.ones((70, 8, 8), dtype=bool))
    impute = ["impute", tmp_path / "some-idx3-ubyte", "-o", tmp_path / "o.npy", "--mask", tmp_path / "mask.npy"]
    assert run(*impute, "--quiet") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), images.reshape(70, 8, 8))


@pytest.mark.parametrize(
    ("text", "report", "expected"),
    [
        ("a,b\n1,\n", "constant, complete", "a,b\n1,\n"),
        ("a,a\n1,\n,2\n3,4\n", "imputed 1 cell", None),
        ("a,b\n1,5\n,5\n2,\n", "constant, imputed 1 cell", "5"),
        ("a,b\n1e39,1\n,2\n3e39,3\n", "imputed 1 cell", None),
        ("a,b\n1,2\n3,4\n", "nothing is missing there", "a,b\n1,2\n3,4\n"),
        ("a,b\n1,5\n2,\n", "no estimate: too few", "5"),
        ("a,b,c,d\n1,x,,\n2,,,T\n", "columns of other kinds (empty, text) are never filled", "a,b,c,d\n1,x,,\n2,,,T\n"),
        ("a\n1\n", "1 row, 1 of 1 column holds numbers", "a\n1\n"),
        ("a,b\n1,2\n3,oops\n4,5\n,6\n", "--missing=oops", None),
    ],
)
def test_small_tables_end_in_a_right_result(tmp_path, capsys, text, report, expected):
    (tmp_path / "in.csv").write_text(text)
    assert run("impute", tmp_path / "in.csv", "-o", tmp_path / "out.csv", *FEW) == 0
    assert report in capsys.readouterr().err
    out = (tmp_path / "out.csv").read_text()
    assert len(out.splitlines()) == len(text.splitlines())
    if expected is not None:
        assert out == expected or out.splitlines()[-1].endswith("," + expected)


@pytest.mark.parametrize(
    ("command", "out", "sentence"),
    [
        ("impute", "in.csv", "would overwrite"),
        ("impute", "out.parquet", "must end in .csv"),
        ("impute", "in.csv/out.csv", "is a file, or lies under one"),
        ("impute", "folder.csv", "is a folder"),
        ("embed", "out.xls", "must end in .csv, .tsv, .parquet or .npy"),
        ("fit", "in.csv", "is a file"),
    ],
)
def test_bad_outputs_are_refused_before_any_work(tmp_path, monkeypatch, capsys, command, out, sentence):
    monkeypatch.setattr(commands, "_new_model", lambda *_: pytest.fail("a model was made"))
    (tmp_path / "in.csv").write_text("a,b\n1,2\n3,\n")
    (tmp_path / "folder.csv").mkdir()
    assert run(command, tmp_path / "in.csv", "-o", tmp_path / out) == 1
    assert sentence in capsys.readouterr().err
    assert (tmp_path / "in.csv").read_text() == "a,b\n1,2\n3,\n"


def test_missing_folders_are_made(cancer, model, tmp_path, capsys):
    cancer[:1].to_csv(tmp_path / "in.csv")
    for command, name in (("impute", "o.csv"), ("embed", "z.npy")):
        out = tmp_path / command / "deeper" / name
        assert run(command, tmp_path / "in.csv", "-o", out, "--model", model) == 0 and out.exists()
    assert "z.npy: 1 row, " in capsys.readouterr().err


def test_tables_without_numbers_and_bad_cells_are_one_sentence(tmp_path, capsys):
    for text, sentence in (
        ("a,b\nx,y\nz,\n", "has no column of numbers to learn from: 'a' (text), 'b' (text)"),
        ("a|b\n1|2\n3|\n", "give a table with the right --delimiter"),
        ("a,b\n1,inf\n2,\n", "holds 'inf'"),
        ("a,b\n1,2,3\n2,\n", "line 2 of"),
        ("a,b\n1e200,1\n-1e200,\n", "beyond float64"),
    ):
        (tmp_path / "in.csv").write_text(text)
        assert run("impute", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--quiet") == 1
        err = capsys.readouterr().err
        assert sentence in err and err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_fit_and_impute_stop_at_ctrl_c(cancer, tmp_path, monkeypatch, capsys, set_ctrl_c):
    set_ctrl_c(signal.default_int_handler)
    step = Trainer.step

    def interrupted_step(*batch):
        step(*batch)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    cancer[:20].to_csv(tmp_path / "in.csv")
    assert run("fit", tmp_path / "in.csv", "-o", tmp_path / "m", "--quiet") == 130
    assert "interrupted; " in capsys.readouterr().err and RVI.load(tmp_path / "m").n_steps_ == 1
    for command in ("impute", "embed"):
        assert run(command, tmp_path / "in.csv", "-o", tmp_path / "o.csv", "--quiet") == 130
        assert capsys.readouterr().err == f"rvi-fast {command}: interrupted; nothing was written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "m"]


def test_help_shows_an_example_of_every_command(capsys):
    for command in ("fit", "impute", "embed"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        out = capsys.readouterr().out
        assert f"rvi-fast {command} " in out.split("example:")[1] and "exit codes" in out


def test_quiet_says_nothing(cancer, tmp_path, capsys):
    cancer[:20].to_csv(tmp_path / "in.csv")
    assert run("impute", tmp_path / "in.csv", "-o", tmp_path / "out.csv", "--quiet", *FEW) == 0
    assert capsys.readouterr() == ("", "")
