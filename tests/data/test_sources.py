"""From files to prepared data and back: sites, folders, bad input, the command."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cxai_jax import data
from cxai_jax.data import folder, prepare, sites, store
from cxai_jax.data.plan import Plan, Source, is_image
from cxai_jax.data.transforms import SUFFIXES


def picture(path, seed=0, size=(40, 30)):
    """Writes one noisy image and returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size[::-1], np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def make_site_a(root, count=6):
    for k, (name, stem) in enumerate((("COVID", "Covid"), ("non-COVID", "Non-Covid"))):
        for i in range(1, count + 1):
            picture(root / name / f"{stem} ({i}).png", seed=100 * k + i)
    return root


def make_site_b(root):
    for k, kind in enumerate(("COVID", "NonCOVID")):
        names = [f"{kind} 2020%{i}, a.png" for i in range(4)]
        for i, name in enumerate(names):
            picture(root / f"CT_{kind}" / name, seed=200 + 10 * k + i)
        lists = root / "Data-split" / kind
        lists.mkdir(parents=True)
        parts = {"train": names[:2], "val": names[2:3], "test": names[3:]}
        for part, listed in parts.items():
            text = "".join(f"{name}\n" for name in listed)
            (lists / f"{part}CT_{kind}.txt").write_text(text)
        file, key, value = sites.SITE_B_TABLES[f"CT_{kind}"]
        rows = "".join(f'"{name}",{kind} patient {i}\n' for i, name in enumerate(names))
        (root / "Meta-data").mkdir(exist_ok=True)
        (root / "Meta-data" / file).write_text(f"{key},{value}\n{rows}")
    return root


def make_folder(root, count=4):
    for k, name in enumerate(("healthy", "COVID positive")):
        for i in range(count):
            picture(root / name / f"größe 100%{i}.png", seed=300 + 10 * k + i)
    return root


def config(name, data_dir, split="", fold=""):
    fields = {"name": name, "data_dir": str(data_dir), "split": split}
    return ConfigDict(fields | {"fold": fold, "split_seed": 0})


def run(capsys, *options):
    """Exit code, stdout and stderr of the command."""
    code = prepare.main([str(option) for option in options])
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys, *options):
    """The one-line error of a command that must fail with code 2."""
    code, out, err = run(capsys, *options)
    lines = [line for line in err.splitlines() if not line.endswith("images")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Both sites in a tiny version, built by the library."""
    root = tmp_path_factory.mktemp("prepared")
    for plan in (
        sites.plan_site_a(make_site_a(root / "a")),
        sites.plan_site_b(make_site_b(root / "b")),
    ):
        store.build(plan, root / "data")
    return root


def test_site_a_reads_back_what_was_stored(prepared):
    dataset = data.load(config("site_a", prepared / "data"))
    assert dataset.split_scheme == "blocked"
    assert {k: len(r) for k, r in dataset.splits.items()} == {
        "train": 4,
        "val": 4,
        "test": 4,
    }
    for records in dataset.splits.values():
        for image, label, name in zip(
            records.images, records.labels, records.names, strict=True
        ):
            assert image.dtype == np.uint8 and image.shape == (256, 341, 1)
            assert dataset.class_names[label] == (
                "COVID-19" if name.startswith("COVID/") else "non-COVID-19"
            )
        assert (records.patients == "").all()
    assert dataset.leakage["verdict"].startswith("no patient ids")
    assert len(dataset.fingerprint) == 64


def test_site_b_has_the_official_split_and_patients(prepared):
    dataset = data.load(config("site_b", prepared / "data"))
    assert dataset.split_scheme == "official" and dataset.leakage["verdict"] == "clean"
    test = dataset.splits["test"]
    assert test.names.tolist() == [
        "CT_NonCOVID/NonCOVID 2020%3, a.png",
        "CT_COVID/COVID 2020%3, a.png",
    ]
    assert test.patients.tolist() == ["NonCOVID patient 3", "COVID patient 3"]
    assert test.labels.tolist() == [0, 1] and dataset.positive == 1


def test_stored_pixels_are_the_resized_source(prepared):
    from cxai_jax.data import transforms

    records = data.load(config("site_b", prepared / "data")).splits["train"]
    source = transforms.open_gray(prepared / "b" / str(records.names[0]))
    np.testing.assert_array_equal(records.images[0], transforms.short_side(source, 256))


def test_joint_pools_the_sites_as_0_and_1(prepared):
    joint = data.load(config("joint", prepared / "data"))
    assert joint.site_names == ("site_a", "site_b")
    train = joint.splits["train"]
    assert train.sites.tolist() == [0] * 4 + [1] * 4
    assert [image.shape for image in train.images] == [(256, 341, 1)] * 8
    alone = data.load(config("site_b", prepared / "data")).splits["train"]
    np.testing.assert_array_equal(train.images[5], alone.images[1])
    assert joint.split_scheme == "site_a: blocked, site_b: official"
    assert "site_b: clean" in joint.leakage["verdict"]


def test_prepared_data_fold_over_all_of_their_splits(prepared):
    tested = []
    for fold in ("1of2", "2of2"):
        found = data.load(config("site_b", prepared / "data", fold=fold))
        assert found.split_scheme == f"fold {fold[0]} of 2, patient-disjoint"
        tested += found.splits["test"].names.tolist()
    assert len(set(tested)) == 8
    with pytest.raises(ValueError, match="'9of9' of site_b: 9 folds of 8 patients"):
        data.load(config("site_b", prepared / "data", fold="9of9"))


def test_unprepared_and_unknown_splits_say_what_there_is(prepared):
    with pytest.raises(
        FileNotFoundError, match="of site_a: blocked.*--dataset=site_a --source"
    ):
        data.load(config("site_a", prepared / "data", "random"))
    with pytest.raises(FileNotFoundError, match="cxai-prepare"):
        data.load(config("folder:none", prepared / "data"))
    for name, known in (
        ("site_a", "blocked, random, wang"),
        ("site_b", "official, wang"),
    ):
        with pytest.raises(ValueError, match=f"unknown split 'odd'.*known: {known}"):
            data.load(config(name, prepared / "data", "odd"))


def test_nothing_imports_tensorflow(prepared):
    code = (
        "import sys; from ml_collections import ConfigDict; from cxai_jax import data;"
        "d = data.load(ConfigDict(dict(name='site_b', split='', fold='', "
        f"data_dir={str(prepared / 'data')!r}))); d.splits['train'].images[0];"
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_damaged_index_is_noticed(prepared, tmp_path):
    shutil.copytree(prepared / "data" / "site_b", tmp_path / "site_b")
    index = tmp_path / "site_b" / "official" / store.VERSION / "index.csv"
    index.write_text("\n".join(index.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match="2 records but 1 rows of index.csv in test"):
        data.load(config("site_b", tmp_path))


def test_command_prints_counts_and_verdict(tmp_path, capsys):
    source = make_folder(tmp_path / "my data")
    (source / "healthy" / "notes.txt").write_text("x")
    command = ("--dataset=folder", f"--source={source}", f"--data_dir={tmp_path / 'd'}")
    code, out, err = run(capsys, *command)
    assert code == 0 and not err
    assert "COVID positive       2       1       1       4" in out
    assert "leakage: no patient ids" in out and "random (image-level)" in out
    assert "healthy/notes.txt: not an image by its suffix" in out
    dataset = data.load(config("folder", tmp_path / "d"))
    assert dataset.class_names == ("COVID positive", "healthy")
    assert dataset.positive == 0
    assert "healthy/größe 100%0.png" in np.concatenate(
        [records.names for records in dataset.splits.values()]
    )
    # Building again replaces the data; a failing build leaves them as they are.
    picture(source / "healthy" / "new.png", seed=999)
    assert "is prepared already; add --overwrite" in fails(capsys, *command)
    command += ("--overwrite",)
    assert run(capsys, *command)[0] == 0
    rebuilt = data.load(config("folder", tmp_path / "d"))
    assert sum(map(len, rebuilt.splits.values())) == 9
    assert rebuilt.fingerprint != dataset.fingerprint
    (source / "healthy" / "bad.png").write_bytes(b"")
    assert "bad.png: the file is empty" in fails(capsys, *command)
    assert (
        data.load(config("folder", tmp_path / "d")).fingerprint == rebuilt.fingerprint
    )
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["folder"]


def test_skip_bad_lists_what_it_skipped(tmp_path, capsys):
    source = make_folder(tmp_path / "s", 20)
    whole = (source / "healthy" / "größe 100%1.png").read_bytes()
    (source / "healthy" / "half.png").write_bytes(whole[: len(whole) // 2])
    (source / "healthy" / "text.jpg").write_text("no image")
    command = ("--dataset=folder", "--name=x", f"--source={source}")
    command += (f"--data_dir={tmp_path / 'd'}",)
    assert "half.png: cannot be read as an image" in fails(capsys, *command)
    code, out, _ = run(capsys, *command, "--skip_bad")
    assert code == 0 and "left out: 2 files" in out
    summary = tmp_path / "d" / "x" / "default" / store.VERSION / "summary.json"
    skipped = dict(json.loads(summary.read_text())["skipped"])
    assert set(skipped) == {"healthy/half.png", "healthy/text.jpg"}
    dataset = data.load(config("folder:x", tmp_path / "d"))
    assert sum(map(len, dataset.splits.values())) == 40


def test_the_positive_class_can_be_named_and_is_shown(tmp_path, capsys):
    source = tmp_path / "s"
    for k, name in enumerate(("bacterial", "viral")):
        for i in range(4):
            picture(source / name / f"{i}.png", seed=10 * k + i)
    command = ("--dataset=folder", f"--source={source}", f"--data_dir={tmp_path / 'd'}")
    assert "name it with --positive=CLASS" in fails(capsys, *command)
    tell = fails(capsys, *command, "--positive=fungal")
    assert "--positive=fungal is none of the classes bacterial, viral" in tell
    code, out, _ = run(capsys, *command, "--positive=Bacterial")
    assert code == 0 and "positive class bacterial" in out
    assert data.load(config("folder", tmp_path / "d")).positive == 0


def test_a_split_without_a_class_or_a_test_split_is_an_error(tmp_path, capsys):
    source = make_folder(tmp_path / "s")
    names = [
        f"{c}/größe 100%{i}.png" for c in ("healthy", "COVID positive") for i in "0123"
    ]
    command = ("--dataset=folder", f"--source={source}", f"--data_dir={tmp_path / 'd'}")

    def listed(*parts):
        rows = "".join(f"{n},{s}\n" for n, s in zip(names, parts, strict=True))
        (source / "splits.csv").write_text("file,split\n" + rows, encoding="utf-8")
        return fails(capsys, *command)

    half = ["train"] * 3
    tell = listed(*half, "train", *half, "test")
    assert "split 'test' of folder has no image of the class 'healthy'" in tell
    assert "no image of the split 'test'" in listed(*half, "val", *half, "val")
    assert "no image of the split 'train'" in listed(*["test"] * 7, "val")
    (source / "splits.csv").unlink()
    bad = source / "healthy" / "größe 100%3.png"
    plan = folder.plan_folder(source)
    for one in plan.sources:
        if one.split == "test" and one.label == 1:
            bad = one.file
    bad.write_bytes(b"")
    tell = fails(capsys, *command, "--skip_bad")
    assert "no image of the class 'healthy' of the split 'test' can be read" in tell
    assert not (tmp_path / "d" / "folder").exists()


def test_another_hospital_is_all_for_testing(tmp_path, capsys):
    source = make_folder(tmp_path / "s")
    command = ("--dataset=folder", f"--source={source}", f"--data_dir={tmp_path / 'd'}")
    assert "give test" in fails(capsys, *command, "--split=odd")
    code, out, _ = run(capsys, *command, "--split=test", "--name=b")
    assert code == 0 and "all for testing" in out
    dataset = data.load(config("folder:b", tmp_path / "d"))
    assert {name: len(r) for name, r in dataset.splits.items()} == {"test": 8}


def test_no_single_file_stops_a_preparation(tmp_path, capsys):
    source = make_folder(tmp_path / "s")
    folder_ = source / "healthy"
    latin = folder_ / os.fsdecode(b"\xe4.png")  # As old archives have.
    latin.write_bytes((folder_ / "größe 100%1.png").read_bytes())
    os.mkfifo(folder_ / "fifo.png")
    (folder_ / "loop.png").symlink_to("loop.png")
    frames = [Image.new("L", (6, 4), level) for level in (9, 200)]
    frames[0].save(folder_ / "x.gif", save_all=True, append_images=frames[1:])
    (folder_ / os.fsdecode(b"\xe4.txt")).touch()
    command = ("--dataset=folder", "--name=x", f"--source={source}")
    command += (f"--data_dir={tmp_path / 'd'}", "--skip_bad")
    code, out, _ = run(capsys, *command)
    assert code == 0 and "left out: 4 files" in out
    assert "healthy/\\xe4.txt: not an image by its suffix" in out
    assert "healthy/fifo.png: " in out and "not a regular file" in out
    assert "loop.png: cannot be opened (Too many levels" in out
    assert "healthy/x.gif: all frames but the first" in out
    dataset = data.load(config("folder:x", tmp_path / "d"))
    names = np.concatenate([records.names for records in dataset.splits.values()])
    assert "healthy/\\xe4.png" in names and len(names) == 10
    (source / os.fsdecode(b"\xe4")).mkdir()
    assert "the class folder \\xe4 has a name that is not UTF-8" in fails(
        capsys, *command
    )


def test_given_splits_and_patients(tmp_path):
    source = make_folder(tmp_path)
    names = [
        f"{c}/größe 100%{i}.png" for c in ("healthy", "COVID positive") for i in "0123"
    ]
    parts = ["train", "train", "val", "test"] * 2
    rows = "".join(f"{n},{s}\n" for n, s in zip(names, parts, strict=True))
    (source / "splits.csv").write_text("file,split\n" + rows, encoding="utf-8-sig")
    rows = "".join(f"{n},p{i % 4}\n" for i, n in enumerate(names))
    (source / "patients.csv").write_text("file,patient\n" + rows)
    plan = folder.plan_folder(source)
    assert plan.split_scheme == "given (splits.csv)"
    by_name = {s.name: (s.split, s.patient) for s in plan.sources}
    assert by_name[names[3]] == ("test", "p3") and by_name[names[4]] == ("train", "p0")
    (source / "splits.csv").unlink()
    plan = folder.plan_folder(source)
    assert plan.split_scheme == "patient-disjoint"
    homes = {}
    for s in plan.sources:
        homes.setdefault(s.patient, set()).add(s.split)
    assert len(homes) == 4 and all(len(home) == 1 for home in homes.values())


@pytest.mark.parametrize(
    "table,text,message",
    [
        (
            "splits.csv",
            "file,split\nabsent.png,train\n",
            "splits.csv names 'absent.png'",
        ),
        ("splits.csv", "file,split\nhealthy/a.png,train\n", "a.png is not listed in"),
        ("splits.csv", "name,split\nx,train\n", "no rows with a column 'file'"),
        ("splits.csv", "file,split\na.png,train\n", "'a.png', which is in several"),
        ("splits.csv", "", "no rows with a column 'file'"),
        (
            "splits.csv",
            "file,split\nhealthy/a.png,train\nhealthy/a.png,test\n",
            "lists 'healthy/a.png' twice",
        ),
        (
            "splits.csv",
            "file,split\nhealthy/a.png,train\nsick/a.png,dev\n",
            "'sick/a.png' has the split 'dev', expected one of train, val, test",
        ),
        ("patients.csv", "file,patient\nb.png,1\n", "patients.csv names 'b.png'"),
    ],
)
def test_malformed_tables(tmp_path, table, text, message):
    for name in ("healthy", "sick"):
        picture(tmp_path / name / "a.png")
    (tmp_path / table).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        folder.plan_folder(tmp_path)


def test_wrong_folder_levels(tmp_path, capsys):
    where = f"--data_dir={tmp_path / 'd'}"
    source = make_folder(tmp_path / "outer" / "inner")
    tell = fails(capsys, "--dataset=folder", f"--source={tmp_path / 'outer'}", where)
    assert f"did you mean --source={source}?" in tell
    tell = fails(capsys, "--dataset=folder", f"--source={source / 'healthy'}", where)
    assert "holds images directly" in tell and "parent folder" in tell
    tell = fails(capsys, "--dataset=folder", f"--source={tmp_path / 'none'}", where)
    assert "none: no such folder" in tell
    (tmp_path / "outer" / "__MACOSX").mkdir()  # Of a zip; no class.
    tell = fails(capsys, "--dataset=folder", f"--source={tmp_path / 'outer'}", where)
    assert f"did you mean --source={source}?" in tell
    (source / "empty").mkdir()
    tell = fails(capsys, "--dataset=folder", f"--source={source}", where)
    assert "empty holds no image" in tell
    (source / "empty").rmdir()
    (source / "healthy" / "more").mkdir()
    tell = fails(capsys, "--dataset=folder", f"--source={source}", where)
    assert "holds the folder 'more'" in tell
    shutil.rmtree(source / "healthy")
    tell = fails(capsys, "--dataset=folder", f"--source={source}", where)
    assert "1 class folders, at least 2" in tell
    for name in ("site_a", "../x", ""):
        tell = fails(
            capsys, "--dataset=folder", f"--name={name}", f"--source={source}", where
        )
        assert "--name=" in tell


def test_images_beside_the_layout_are_refused_or_listed(tmp_path, capsys):
    where = f"--data_dir={tmp_path / 'd'}"
    source = tmp_path / "s"
    for k, name in enumerate(("healthy", "sick")):
        for i in range(4):
            picture(source / name / "images" / f"{i}.png", seed=10 * k + i)
            picture(source / name / "masks" / f"{i}.png", seed=20 * k + i)
    picture(source / "sick" / "more" / "deep" / "x.png")
    plan = folder.plan_folder(source)
    assert plan.left_out == [("sick/more/deep/x.png", "beside the folder images")]
    picture(source / "sick" / "loose.png")
    tell = fails(capsys, "--dataset=folder", f"--source={source}", where)
    assert "sick holds images (loose.png) beside its folder images" in tell


def test_split_folders_with_something_beside_them(tmp_path, capsys):
    for k, part in enumerate(("train", "val", "test")):
        make_folder(tmp_path / "s" / part, 2 + k)
    for junk in (".git", "__MACOSX"):
        picture(tmp_path / "s" / junk / "._x.png")
    plan = folder.plan_folder(tmp_path / "s")
    assert plan.split_scheme == "given (folders)" and len(plan.sources) == 18
    picture(tmp_path / "s" / "loose.png")
    where = f"--data_dir={tmp_path / 'd'}"
    tell = fails(capsys, "--dataset=folder", f"--source={tmp_path / 's'}", where)
    assert "holds images (loose.png) beside its split folders" in tell


def test_tables_compare_paths_as_paths(tmp_path):
    for name in ("healthy", "sick"):
        picture(tmp_path / name / f"{name}.png")
    table = tmp_path / "patients.csv"
    table.write_text("file,patient\n./healthy/healthy.png,1\n./sick.png,2\n")
    patients = [one.patient for one in folder.plan_folder(tmp_path).sources]
    assert patients == ["1", "2"]
    table.write_text("file,patient\nsick//sick.png,1\nsick/sick.png,2\n")
    with pytest.raises(ValueError, match="lists 'sick/sick.png' twice"):
        folder.plan_folder(tmp_path)


def test_site_b_lists_must_fit_the_images(tmp_path):
    source = make_site_b(tmp_path)
    listing = source / "Data-split" / "COVID" / "testCT_COVID.txt"
    good = listing.read_text()
    listing.write_text(good + "absent.png\n")
    with pytest.raises(FileNotFoundError, match="testCT_COVID.txt names .*absent.png"):
        sites.plan_site_b(source)
    listing.write_text(good + "COVID 2020%0, a.png\n")
    with pytest.raises(ValueError, match="already listed in train"):
        sites.plan_site_b(source)
    listing.write_text("")
    with pytest.raises(ValueError, match="testCT_COVID.txt is empty"):
        sites.plan_site_b(source)
    listing.write_text(good)
    picture(source / "CT_COVID" / "extra.png")
    with pytest.raises(ValueError, match="extra.png is in none of the lists"):
        sites.plan_site_b(source)
    listing.unlink()
    with pytest.raises(FileNotFoundError, match="testCT_COVID.txt: no such file"):
        sites.plan_site_b(source)


def test_site_a_by_the_lists_of_wang(tmp_path, capsys):
    source = make_site_a(tmp_path / "a", 3)
    train, test = tmp_path / "train_split.txt", tmp_path / "test_split.txt"
    train.write_text(
        "0 new data/COVID/Covid (1).png COVID-19\n1 x/Non-Covid (1).png normal\n"
        "2 Covid (2).png COVID-19\n3 Non-Covid (2).png normal\n"
    )
    good = "4 Covid (3).png COVID-19\n5 Non-Covid (3).png normal"
    test.write_text(good)
    plan = sites.plan_site_a(source, split_files=[train, test])
    assert plan.split == "wang" and not plan.unlisted
    assert {s.name for s in plan.sources if s.split == "test"} == {
        "COVID/Covid (3).png",
        "non-COVID/Non-Covid (3).png",
    }
    command = ("--dataset=site_a", f"--source={source}", f"--data_dir={tmp_path / 'd'}")
    lists = f"--split_files={train},{test}"
    for text, message in (
        (good + "\n9 Covid (9).png COVID-19", "names 'Covid (9).png', but there is no"),
        (good + "\nCOVID-19", "'COVID-19' is not `id path label`"),
        (good.replace("normal", "2"), "is not `id path label` with a label among"),
        (good.replace("normal", "COVID-19"), "lies in the other class folder"),
        (good + "\n4 Covid (1).png COVID-19", "already listed in train"),
        (good.splitlines()[0], "'non-COVID/Non-Covid (3).png' is in no split file"),
    ):
        test.write_text(text)
        assert message in fails(capsys, *command, lists)
    test.write_text(good)
    train.write_text(train.read_text().replace("3 Non-Covid (2).png normal\n", ""))
    code, out, _ = run(capsys, *command, lists, "--skip_bad")
    assert code == 0 and "left out: 1 files" in out
    assert "needs --split_files" in fails(capsys, *command, "--split=wang")
    picture(source / "COVID" / "unnumbered.png")
    assert "unnumbered.png: no number in brackets" in fails(capsys, *command)


def test_both_sites_by_the_lists_of_wang(tmp_path, capsys):
    a, b = make_site_a(tmp_path / "a", 3), make_site_b(tmp_path / "b")
    (b / "Data-split" / "COVID" / "testCT_COVID.txt").unlink()  # Not read.
    lists = {}
    for name, images in (
        ("a", [f"new {stem} ({{i}}).png" for stem in ("Covid", "Non-Covid")]),
        ("b", [f"{kind} 2020%{{i}}, a.png" for kind in ("COVID", "NonCOVID")]),
    ):
        lists[name] = []
        for part, numbers in (("train", (1, 2)), ("test", (3,))):
            lines = [
                f"{i} {image.format(i=i).removeprefix('new ')} {label}"
                for i in numbers
                for image, label in zip(images, ("COVID-19", "normal"), strict=True)
            ]
            listing = tmp_path / f"{name}_{part}_split.txt"
            # The published reader stops at such a line, whatever follows it.
            listing.write_text("\n".join([*lines, "9 data/ c o", "no such line"]))
            lists[name].append(listing)
    plan = sites.plan_site_b(b, split_files=lists["b"])
    assert plan.split == "wang" and plan.split_scheme == "wang (given split files)"
    assert {s.name: (s.split, s.patient) for s in plan.sources if s.label}[
        "CT_COVID/COVID 2020%3, a.png"
    ] == ("test", "COVID patient 3")
    assert [name for name, _ in plan.unlisted] == [
        "CT_NonCOVID/NonCOVID 2020%0, a.png",
        "CT_COVID/COVID 2020%0, a.png",
    ]
    for name, source in (("a", a), ("b", b)):
        listed = ",".join(map(str, lists[name]))
        code, _, err = run(
            capsys,
            f"--dataset=site_{name}",
            f"--source={source}",
            f"--data_dir={tmp_path / 'd'}",
            f"--split_files={listed}",
            "--skip_bad",
        )
        assert code == 0, err
    joint = data.load(config("joint", tmp_path / "d", "wang"))
    assert joint.split_scheme == ", ".join(
        f"site_{name}: wang (given split files)" for name in "ab"
    )
    assert {k: len(r) for k, r in joint.splits.items()} == {"train": 8, "test": 4}
    with pytest.raises(ValueError, match="--split=wang needs --split_files"):
        sites.plan_site_b(b, "wang")
    lists["b"][1].write_text("1 none.png normal")
    with pytest.raises(FileNotFoundError, match="names 'none.png', but there is no"):
        sites.plan_site_b(b, split_files=lists["b"])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"label": 2}, "a.png: label 2, expected 0 to 1"),
        ({"label": -1}, "label -1"),
        ({"split": "dev"}, "split 'dev', expected one of train, val, test"),
        ({"name": "b.png"}, "'b.png' occurs 2 times"),
        ({}, "no image of the split 'train' can be read"),
    ],
)
def test_plans_are_checked(tmp_path, change, message):
    file = tmp_path / "a.png"
    file.write_bytes(b"broken")
    picture(tmp_path / "b.png")
    first = {"file": file, "name": "a.png", "label": 0, "split": "train"} | change
    plan = Plan(
        name="x",
        split="y",
        split_scheme="given",
        class_names=("no", "yes"),
        site_names=("x",),
        positive=1,
        sources=[
            Source(**first),
            Source(tmp_path / "b.png", "b.png", 1, "test"),
        ],
    )
    with pytest.raises(ValueError, match=message):
        store.build(plan, tmp_path / "d", skip_bad=True)
    assert not list((tmp_path / "d").glob("*"))


def test_every_suffix_of_the_list_counts_as_an_image(tmp_path):
    for suffix in SUFFIXES:
        assert is_image(tmp_path / f"x{suffix.upper()}")
    assert not is_image(tmp_path / "Thumbs.db")


def test_dicom_counts_as_an_image_whatever_its_suffix(tmp_path):
    for name in ("a.dicom", "b.IMA", "c.v2", "IM-0001"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
        assert is_image(tmp_path / name)
    for name in ("DICOMDIR", "dicomdir", ".a.IMA"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
        assert not is_image(tmp_path / name)
    for content in (b"", b"file,patient\n" + b"x,1\n" * 99):
        (tmp_path / "patients.csv").write_bytes(content)
        assert not is_image(tmp_path / "patients.csv")


def test_real_sites_have_the_published_counts(shared):
    plan = sites.plan_site_a(shared / "data" / "site_a")
    labels = np.array([s.label for s in plan.sources])
    assert np.bincount(labels).tolist() == [1229, 1252]
    plan = sites.plan_site_b(shared / "data" / "site_b")
    counts = {
        (s, k): sum(x.split == s and x.label == k for x in plan.sources)
        for s in ("train", "val", "test")
        for k in (0, 1)
    }
    assert counts == {
        ("train", 0): 234,
        ("train", 1): 191,
        ("val", 0): 58,
        ("val", 1): 60,
        ("test", 0): 105,
        ("test", 1): 98,
    }
    assert all(s.patient for s in plan.sources)


def test_every_raw_original_is_read(shared, tmp_path):
    summary = store.build(
        folder.plan_folder(shared / "data" / "site_b_raw", "raw"), tmp_path
    )
    counts = [sum(split.values()) for split in summary["counts"].values()]
    assert sum(counts) == 53 and summary["skipped"] == []
