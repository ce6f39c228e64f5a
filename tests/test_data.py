"""Data sets: against scikit-learn's and torchvision's readers, Pillow, NumPy, and sources taken away."""

import dataclasses
import functools
import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets
from torchvision.transforms.v2 import functional

from nnc_utils import data


def rows(images) -> list[bytes]:
    """The pictures as sorted bytes: equal for two lists of the same pictures in any order."""
    return sorted(np.ascontiguousarray(image).tobytes() for image in images)


def everything(loaded: data.Data) -> tuple[np.ndarray, np.ndarray]:
    splits = (loaded.train, loaded.validation, loaded.test)
    return tuple(torch.cat([getattr(s, field) for s in splits]).numpy() for field in ("images", "labels"))


# --- Splits, moments, normalization, augmentation ---------------------------------------------------


def test_digits_are_scikit_learns_in_a_stratified_split():
    loaded = data.load("digits")
    assert [len(s) for s in (loaded.train, loaded.validation, loaded.test)] == [1197, 200, 400]
    assert (loaded.channels, loaded.size, loaded.classes, loaded.flip) == (1, 8, tuple("0123456789"), False)
    bundle = load_digits()
    images, labels = everything(loaded)
    assert images.dtype == np.uint8 and images.max() == 255
    labelled = np.concatenate([images.reshape(1797, -1), labels[:, None].astype(np.uint8)], axis=1)
    theirs = np.concatenate([np.rint(bundle.data * 255 / 16), bundle.target[:, None]], axis=1)
    assert rows(labelled) == rows(theirs.astype(np.uint8))
    for split in (loaded.train, loaded.validation, loaded.test):
        expected = np.bincount(bundle.target) * len(split) / 1797
        assert (np.abs(np.bincount(split.labels) - expected) < 1.5).all()


def test_a_split_is_the_same_for_ever():
    kept, held = data._hold_out(np.arange(30) % 3, 6)
    assert held.tolist() == [6, 8, 10, 11, 16, 24]
    assert sorted([*kept, *held]) == list(range(30))


@pytest.mark.parametrize("count", [1, 7, 50, 99])
def test_each_class_gives_its_share(count):
    labels = np.repeat([0, 1, 2], [120, 31, 49])
    kept, held = data._hold_out(labels, count)
    assert len(kept) + len(held) == len(labels) == len(set(kept) | set(held))
    taken = np.bincount(labels[held], minlength=3)
    assert (taken >= 1).all() and (np.abs(taken - np.array([120, 31, 49]) * count / 200) < 1.01).all()
    assert len(held) == count or count < 3


def test_moments_are_numpys():
    images = torch.randint(0, 256, (50, 3, 9, 9), dtype=torch.uint8)
    images[:, 2] = 7
    mean, std = data._moments(images)
    as_numpy = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, as_numpy.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], as_numpy.std((0, 2, 3))[:2], rtol=1e-12)
    assert std[2] == 1.0  # a constant channel must not divide by zero


def test_normalize_is_torchvisions():
    loaded = data.load("digits")
    ours = loaded.normalize(loaded.train.images)
    theirs = functional.normalize(
        functional.to_dtype(loaded.train.images, torch.float32, scale=True), loaded.mean, loaded.std
    )
    torch.testing.assert_close(ours, theirs)
    assert abs(ours.mean()) < 1e-5 and abs(ours.std() - 1) < 1e-4


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)])
def test_normalize_refuses_what_is_normalized_already_or_has_other_channels(images):
    with pytest.raises(data.DataError, match="is needed"):
        data.normalize(images, (0.5,), (0.5,))


def shifts(image: np.ndarray, padding: int) -> list[np.ndarray]:
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    height = image.shape[1]
    steps = range(2 * padding + 1)
    return [padded[:, top : top + height, left : left + height] for top in steps for left in steps]


@pytest.mark.parametrize(("size", "padding", "pixels"), [(8, None, 1), (28, None, 3), (16, 2, 2), (4, 0, 0)])
@pytest.mark.parametrize("flip", [True, False])
def test_augment_gives_every_shift_and_mirror_and_nothing_else(size, padding, pixels, flip):
    image = torch.randint(1, 256, (2, size, size), dtype=torch.uint8)
    batch = image.expand(3000, -1, -1, -1)
    made = data.augment(batch, torch.Generator().manual_seed(3), flip=flip, padding=padding)
    allowed = shifts(image.numpy(), pixels)
    allowed += [a[:, :, ::-1] for a in allowed] if flip else []
    assert {row.tobytes() for row in made.numpy()} == {np.ascontiguousarray(a).tobytes() for a in allowed}
    again = data.augment(batch, torch.Generator().manual_seed(3), flip=flip, padding=padding)
    assert torch.equal(made, again)


def test_a_data_set_says_how_far_its_pictures_may_move():
    digits = data.load("digits")
    assert (digits.shift, data.load("digits", size=16).shift) == (None, None)
    image = torch.randint(1, 256, (1, 1, 12, 12), dtype=torch.uint8).expand(2000, -1, -1, -1)
    moved = dataclasses.replace(digits, shift=2).augment(image, torch.Generator().manual_seed(1))
    allowed = {np.ascontiguousarray(a).tobytes() for a in shifts(image[0].numpy(), 2)}
    assert {row.tobytes() for row in moved.numpy()} == allowed  # two pixels, and digits have no mirror


def test_augment_keeps_each_picture_in_its_place():
    batch = torch.arange(1, 101, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    made = data.augment(batch, torch.Generator().manual_seed(0))
    assert torch.equal(made.amax((1, 2, 3)), batch.amax((1, 2, 3)))


@pytest.mark.parametrize("name", ["cifar11", "imagefolder", "imagefolder:", "digits:here", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(
        data.DataError, match="one of digits, fashion_mnist, cifar10, cifar100, imagefolder:P"
    ):
        data.load(name)


@pytest.mark.parametrize("size", [0, 2000, 8.0, True])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(data.DataError, match="whole number of pixels"):
        data.load("digits", size=size)


def test_size_resizes_every_split():
    loaded = data.load("digits", size=16)
    assert {s.images.shape[2:] for s in (loaded.train, loaded.validation, loaded.test)} == {(16, 16)}
    small = data.load("digits").test.images[0, 0]
    theirs = Image.fromarray(small.numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.abs(loaded.test.images[0, 0].numpy().astype(int) - np.asarray(theirs)).max() <= 1


def test_the_command_prints_what_it_is_and_errors_are_no_traces(tmp_path, capsys):
    assert data.main(["digits"]) == 0
    assert "1,197 train, 200 validation, 400 test; pictures 1 x 8 x 8" in capsys.readouterr().out
    command = [sys.executable, "-m", "nnc_utils.data", "nothing"]
    repository = Path(data.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 1 and done.stderr.startswith("unknown data set") and done.stdout == ""


# --- Fashion-MNIST: the real files, then the chain of sources on small ones ----------------------------


def test_fashion_mnist_is_what_torchvision_reads(tmp_path):
    try:
        loaded = data.load("fashion_mnist")
    except data.DataError as error:
        pytest.skip(f"not to be had here: {error}")
    assert [len(s) for s in (loaded.train, loaded.validation, loaded.test)] == [55_000, 5_000, 10_000]
    assert torch.bincount(loaded.validation.labels).tolist() == [500] * 10
    assert (loaded.flip, loaded.shift) == (True, 1)
    assert loaded.classes == tuple(datasets.FashionMNIST.classes)
    fetched = Path(os.environ.get("NNC_DATA", Path(data.__file__).parents[1] / "data"))
    folder = next(f for f in (fetched / "fashion_mnist", data.FASHION_INSTALLED) if f.is_dir())
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in data.FASHION_FILES:
        (raw / file.removesuffix(".gz")).write_bytes(gzip.decompress((folder / file).read_bytes()))
    theirs = datasets.FashionMNIST(tmp_path, train=False)
    assert torch.equal(loaded.test.images[:, 0], theirs.data)
    assert torch.equal(loaded.test.labels, theirs.targets)
    theirs = datasets.FashionMNIST(tmp_path, train=True)
    images = torch.cat([loaded.train.images, loaded.validation.images])
    labels = torch.cat([loaded.train.labels, loaded.validation.labels])
    for c in range(10):
        assert torch.equal(images[labels == c].sum((0, 1)), theirs.data[theirs.targets == c].sum(0))
    held = loaded.validation.images[:, 0]
    kept, index = data._hold_out(theirs.targets.numpy(), 5000)
    assert torch.equal(held, theirs.data[index]) and not set(kept) & set(index)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with small files in place of the four; every source but the data folder is taken away."""
    folder = tmp_path / "small"
    folder.mkdir()
    for part, n in (("train", 60_000), ("t10k", 10_000)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        contents = {
            f"{part}-images-idx3-ubyte.gz": idx(np.broadcast_to(labels[:, None, None], (n, 2, 2))),
            f"{part}-labels-idx1-ubyte.gz": idx(labels),
        }
        for file, content in contents.items():
            (folder / file).write_bytes(gzip.compress(content, 1))
            monkeypatch.setitem(data.FASHION_FILES, file, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data, "FASHION_INSTALLED", tmp_path / "usr" / "fashion")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [(tmp_path / "nowhere").as_uri() + "/"])
    return folder


def put(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in data.FASHION_FILES:
        (target / file).write_bytes((source / file).read_bytes())
    return target


def check_small(loaded: data.Data) -> None:
    assert [len(s) for s in (loaded.train, loaded.validation, loaded.test)] == [55_000, 5_000, 10_000]
    for split in (loaded.train, loaded.validation, loaded.test):
        assert torch.equal(split.images[:, 0, 1, 0].long(), split.labels)


def test_first_the_data_folder(small, tmp_path, monkeypatch):
    put(small, tmp_path / "data" / "fashion_mnist")
    check_small(data.load("fashion_mnist", root=tmp_path / "data"))
    monkeypatch.setenv("NNC_DATA", str(tmp_path / "data"))
    check_small(data.load("fashion_mnist"))


def test_then_the_installed_package_and_nothing_is_written(small, tmp_path):
    put(small, data.FASHION_INSTALLED)
    check_small(data.load("fashion_mnist", root=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


APT_GET = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *Dir::State::Lists=*update) exit 0 ;;
  *Dir::State::Lists=*download*) : > dataset-fashion-mnist_1_all.deb ;;
  *) echo "E: Unable to locate package dataset-fashion-mnist" >&2; exit 100 ;;
esac
"""
DPKG_DEB = """#!/bin/sh
[ -f "$2" ] || exit 2
/bin/mkdir -p "$3{installed}" && /bin/cp {small}/* "$3{installed}"
"""


@pytest.mark.skipif(sys.platform == "win32", reason="stands in for Debian's tools with shell scripts")
def test_then_apt_get_with_lists_of_its_own_where_the_machines_lack_the_package(small, tmp_path):
    log, bin_folder, root = tmp_path / "log", tmp_path / "bin", tmp_path / "data"
    bin_folder.mkdir()
    (bin_folder / "apt-get").write_text(APT_GET.format(log=log))
    (bin_folder / "dpkg-deb").write_text(DPKG_DEB.format(installed=data.FASHION_INSTALLED, small=small))
    for tool in bin_folder.iterdir():
        tool.chmod(0o755)
    (root / ".fetching-killed").mkdir(parents=True)
    check_small(data.load("fashion_mnist", root=root))
    assert [line.split()[-2:][0 if "download" in line else 1] for line in log.read_text().splitlines()] == [
        "download",
        "update",
        "download",
    ]
    assert {p.name for p in root.iterdir()} <= {"fashion_mnist", ".fetching.lock"}
    log.unlink()
    check_small(data.load("fashion_mnist", root=root))
    assert not log.exists(), "fetched twice"


@pytest.fixture
def serve(monkeypatch):
    """Make torchvision download from a folder of this machine."""
    servers = []

    def offer(folder: Path) -> None:
        handler = functools.partial(QuietHandler, directory=folder)
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        md5 = [(f, hashlib.md5((folder / f).read_bytes()).hexdigest()) for f in data.FASHION_FILES]
        monkeypatch.setattr(datasets.FashionMNIST, "resources", md5)
        mirror = f"http://127.0.0.1:{servers[-1].server_port}/"
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [mirror])

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield offer
    for server in servers:
        server.shutdown()
        server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


def test_last_torchvisions_download_and_a_damaged_file_is_replaced(small, tmp_path, serve):
    serve(small)
    folder = put(small, tmp_path / "data" / "fashion_mnist")
    damaged = folder / "t10k-labels-idx1-ubyte.gz"
    damaged.write_bytes(gzip.compress(idx(np.zeros(10_000, np.uint8))))
    with pytest.warns(UserWarning, match="t10k-labels-idx1-ubyte.gz is damaged"):
        check_small(data.load("fashion_mnist", root=tmp_path / "data"))
    assert damaged.read_bytes() == (small / damaged.name).read_bytes()


def test_what_a_source_gives_is_checked_too(small, tmp_path, serve):
    forged = put(small, tmp_path / "forged")
    (forged / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(10_000, np.uint8))))
    serve(forged)
    with pytest.raises(data.DataError, match="torchvision's download: t10k-labels.* is damaged"):
        data.load("fashion_mnist", root=tmp_path / "data")
    assert not (tmp_path / "data" / "fashion_mnist").exists()


@pytest.mark.parametrize("cut", [0, 5, 500])
def test_a_cut_file_is_named(small, tmp_path, cut):
    folder = put(small, tmp_path / "data" / "fashion_mnist")
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.warns(UserWarning), pytest.raises(data.DataError, match=f"{file.name} (cannot|is damaged)"):
        data.load("fashion_mnist", root=tmp_path / "data")


def test_when_all_fail_one_error_names_each_source_and_what_to_do(small, tmp_path):
    with pytest.raises(data.DataError) as caught:
        data.load("fashion_mnist", root=tmp_path / "data")
    message = str(caught.value)
    for part in (
        f"data folder ({tmp_path / 'data' / 'fashion_mnist'}): not there",
        "package dataset-fashion-mnist (",
        "apt-get download dataset-fashion-mnist: apt-get is not on this machine",
        "torchvision's download: ",
        "Put the files train-images-idx3-ubyte.gz",
        "NNC_DATA",
    ):
        assert part in message
    assert not [p for p in (tmp_path / "data").iterdir() if p.name != ".fetching.lock"]


def test_a_data_folder_that_cannot_be_made_is_said(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match="fetching into .*file"):
        data.load("fashion_mnist", root=tmp_path / "file" / "data")


# --- CIFAR: small archives in the original format ------------------------------------------------------


def write_cifar(root: Path, monkeypatch, name: str) -> dict[str, dict]:
    """Make the archive as its authors did and tell torchvision its checksums; the batches by name."""
    loader = getattr(datasets, name)
    random = np.random.RandomState(1)
    fine = name == "CIFAR100"
    batches = {}
    for file, _ in loader.train_list + loader.test_list:
        labels = np.tile(np.arange(100 if fine else 10), 10 if fine else 4).tolist()
        content = {
            "data": random.randint(0, 256, (len(labels), 3072)).astype(np.uint8),
            "fine_labels" if fine else "labels": labels,
        }
        batches[file] = content
    names = [f"class {i}" for i in range(100 if fine else 10)]
    pickles = {f: pickle.dumps(c, protocol=2) for f, c in batches.items()}
    pickles[loader.meta["filename"]] = pickle.dumps({loader.meta["key"]: names}, protocol=2)
    root.mkdir()
    with tarfile.open(root / loader.filename, "w:gz") as archive:
        for file, content in pickles.items():
            member = tarfile.TarInfo(f"{loader.base_folder}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    md5 = {f: hashlib.md5(c).hexdigest() for f, c in pickles.items()}
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(loader, attribute, [[f, md5[f]] for f, _ in getattr(loader, attribute)])
    meta = {**loader.meta, "md5": md5[loader.meta["filename"]]}
    monkeypatch.setattr(loader, "meta", meta)
    whole = hashlib.md5((root / loader.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(loader, "tgz_md5", whole)
    return batches


@pytest.mark.parametrize(("name", "n"), [("CIFAR10", 200), ("CIFAR100", 1000)])
def test_cifar_is_read_from_the_original_archive(tmp_path, monkeypatch, name, n):
    batches = write_cifar(tmp_path / "data", monkeypatch, name)
    loaded = data.load(name.lower(), root=tmp_path / "data")
    assert (len(loaded.train), len(loaded.validation)) == (n - n // 10, n // 10)
    assert (loaded.channels, loaded.size, loaded.classes[3]) == (3, 32, "class 3")
    images, labels = everything(loaded)
    # in the original, a row is the red plane, then the green, then the blue, each row by row
    assert rows(images) == rows(np.concatenate([b["data"] for b in batches.values()]))
    test = batches["test_batch" if name == "CIFAR10" else "test"]
    red = loaded.test.images[5, 0].flatten().numpy()
    assert (red == test["data"][5, :1024]).all()
    assert loaded.test.labels.tolist() == test.get("labels", test.get("fine_labels"))
    by_picture = {
        row.tobytes(): label
        for b in batches.values()
        for row, label in zip(b["data"], b.get("labels") or b["fine_labels"], strict=True)
    }
    for image, label in zip(images, labels, strict=True):
        assert by_picture[image.tobytes()] == label


def test_cifar_that_cannot_be_had_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "nowhere").as_uri())
    with pytest.raises(data.DataError, match=r"cifar-10-python\.tar\.gz into .*NNC_DATA"):
        data.load("cifar10", root=tmp_path / "data")


# --- Own pictures --------------------------------------------------------------------------------------


def paint(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 60), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], *channels)).astype(np.uint8)
    Image.fromarray(pixels, mode if mode == "LA" else None).save(path)


@pytest.fixture
def own(tmp_path):
    """Two classes of ten colour pictures of many sizes and kinds."""
    suffixes = (".png", ".jpg", ".bmp", ".PNG", ".webp")
    for i in range(10):
        for name in ("cat", "dog"):
            paint(tmp_path / "own" / name / f"{i}{suffixes[i % 5]}", size=(20 + 7 * i, 90 - 5 * i), seed=i)
    return tmp_path / "own"


def test_class_folders_are_split_by_class(own):
    (own / ".hidden").mkdir()
    (own / "cat" / "notes.txt").touch()
    (own / "cat" / "._0.png").write_text("not a picture")
    loaded = data.load(f"imagefolder:{own}", size=16)
    assert loaded.classes == ("cat", "dog") and loaded.flip
    assert (loaded.channels, loaded.size) == (3, 16)
    counts = {w: torch.bincount(getattr(loaded, w).labels).tolist() for w in ("train", "validation", "test")}
    assert counts == {"train": [7, 7], "validation": [1, 1], "test": [2, 2]}
    assert data.load(f"imagefolder:{own}").size == 32
    again = data.load(f"imagefolder:{own}", size=16)
    assert torch.equal(loaded.test.images, again.test.images)


@pytest.mark.parametrize("validation", ["validation", "valid", "val", None])
def test_split_folders_are_kept(tmp_path, validation):
    for which, n in (("train", 10), (validation, 3), ("test", 2)):
        for i in range(n if which else 0):
            for label, name in enumerate(("a", "b")):
                path = tmp_path / which / name / "deeper" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 100 * label + i).save(path)
    loaded = data.load(f"imagefolder:{tmp_path}", size=8)
    assert loaded.channels == 1
    assert loaded.test.images[:, 0, 4, 4].tolist() == [0, 1, 100, 101]
    assert len(loaded.validation) == (6 if validation else 2) and len(loaded.train) == (
        20 if validation else 18
    )
    for split in (loaded.train, loaded.validation, loaded.test):
        assert torch.equal(split.images[:, 0, 0, 0].long() // 100, split.labels)


def test_a_class_called_train_is_a_class(tmp_path):
    for name in ("train", "ship"):
        for i in range(4):
            paint(tmp_path / name / f"{i}.png", seed=i)
    assert data.load(f"imagefolder:{tmp_path}").classes == ("ship", "train")


def test_a_picture_is_reduced_with_antialias_and_its_middle_kept(tmp_path):
    stripes = np.zeros((64, 192), np.uint8)
    stripes[:, 64:128:2] = 255  # the middle third: one-pixel stripes that must become an even grey
    for name in ("a", "b"):
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(stripes).save(tmp_path / name / f"{i}.png")
    loaded = data.load(f"imagefolder:{tmp_path}", size=8)
    inside = loaded.train.images[0, 0, :, 1:-1].float()
    assert abs(inside.mean() - 127.5) < 8 and inside.std() < 8


def test_grey_transparent_turned_and_16_bit_pictures(tmp_path):
    for name in ("a", "b"):
        for i, mode in enumerate(("L", "LA", "L")):
            paint(tmp_path / name / f"{i}.png", mode, seed=i)
    assert data.load(f"imagefolder:{tmp_path}").channels == 1
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "a" / "0.png")
    assert (data._read_picture(tmp_path / "a" / "0.png", 4) == 40_000 // 256).all()
    half = np.zeros((32, 32, 3), np.uint8)
    half[:16] = 255  # bright above, and a note to turn it by a quarter
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half).save(tmp_path / "a" / "1.jpg", exif=exif, quality=95)
    turned = data._read_picture(tmp_path / "a" / "1.jpg", 8)
    assert turned[:, -1].mean() > 250 and turned[:, 0].mean() < 5
    assert data.load(f"imagefolder:{tmp_path}").channels == 3  # grey among colour becomes colour


def test_an_unreadable_picture_is_named(own):
    cut = own / "dog" / "0.png"
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(data.DataError, match=r"dog.0\.png cannot be read"):
        data.load(f"imagefolder:{own}")


def test_missing_folder_no_classes_too_few_pictures_and_unlike_splits(tmp_path, own):
    with pytest.raises(data.DataError, match="no folder"):
        data.load(f"imagefolder:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="0 class folders: at least 2"):
        data.load(f"imagefolder:{tmp_path / 'empty'}")
    for i in range(2, 10):
        next((own / "cat").glob(f"{i}.*")).unlink()
    with pytest.raises(data.DataError, match="cat holds 2 pictures: at least 3"):
        data.load(f"imagefolder:{own}")
    for which, name in (("train", "a"), ("train", "b"), ("test", "a")):
        for i in range(4):
            paint(tmp_path / "unlike" / which / name / f"{i}.png")
    with pytest.raises(data.DataError, match="every split needs the same class folders"):
        data.load(f"imagefolder:{tmp_path / 'unlike'}")
