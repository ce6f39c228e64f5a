"""image_layout.py, images.py: each layout against what it is, and what is held out."""

import os
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nnc_utils import data, image_layout, images

SMALL = dict.fromkeys(("cat", "dog"), 10)


# --- Which files -------------------------------------------------------------------------------------


def paint(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 60), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], *channels)).astype(np.uint8)
    Image.fromarray(pixels, mode if mode == "LA" else None).save(path)


def fill(root, counts=SMALL, first=0):
    """Different small images: so many in each folder; the seeds that were used end before the result."""
    for name, count in counts.items():
        for number in range(count):
            paint(root / name / f"{number}.png", size=(6, 6), seed=first)
            first += 1
    return first


@pytest.fixture
def own(tmp_path):
    """Two classes of ten colour images of many sizes and kinds."""
    suffixes = (".png", ".jpg", ".bmp", ".PNG", ".webp")
    for i in range(10):
        for seed, name in enumerate(("cat", "dog")):
            size = (60 + 4 * i, 90 - 3 * i)
            paint(tmp_path / "own" / name / f"{i}{suffixes[i % 5]}", size=size, seed=2 * i + seed)
    return tmp_path / "own"


def load(root, size=8):
    return data.load(f"imagefolder:{root}", size=size)


def labels(loaded):
    return {w: torch.bincount(getattr(loaded, w).labels).tolist() for w in data.SPLITS}


def read_files(loaded):
    return [file for by_class in loaded.folder.files.values() for file in sum(by_class.values(), [])]


def test_class_folders_are_split_by_class(own):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is nothing to tell
        loaded = load(own, 16)
    assert loaded.classes == ("cat", "dog") and loaded.flip
    assert (loaded.channels, loaded.size) == (3, 16)
    assert labels(loaded) == {"train": [7, 7], "validation": [1, 1], "test": [2, 2]}
    assert data.load(f"imagefolder:{own}").size == 32
    assert torch.equal(loaded.test.images, load(own, 16).test.images)
    assert loaded.folder.files == data.load(f"imagefolder:{own}").folder.files  # whatever the size


def test_every_file_is_read_or_left_out_with_a_reason(own):
    seed = 100
    for hidden in (".x", "__MACOSX", "@eaDir", "deep/.git"):  # copies that must not be read
        seed = fill(own / "cat" / hidden, {"": 2, "inner": 1}, seed)
    fill(own, {".trash": 1, "cat/deep/deeper": 1}, 200)
    for name in ("cat/notes.txt", "cat/._0.png", "dog/Thumbs.db", "dog/IMG_0001", "labels.csv"):
        (own / name).write_text("no image")
    paint(own / "cover.png", seed=300)
    paint(own / "dog" / "old.png" / "a.png", seed=301)  # a folder
    (own / "cat" / "more").symlink_to(own.parent)
    (own / "dog" / "gone.png").symlink_to(own / "nowhere.png")
    with pytest.warns(UserWarning) as told:
        loaded = load(own)
    left = {reason: len(files) for reason, files in loaded.folder.left_out.items()}
    assert left == {
        image_layout.HIDDEN: 4 * 3 + 1 + 2,
        image_layout.OTHER_SUFFIX: 3,
        image_layout.NO_CLASS: 1,
        image_layout.LINKED: 1,
        image_layout.NO_FILE: 1,
    }
    [message] = [str(w.message) for w in told]
    lines = message.splitlines()[1:]
    assert len(lines) == 6 and "in folders inside class folders, read as of the class: 2, such as" in message
    assert "left out: 3, no suffix of an image, such as labels.csv" in message
    everything = {Path(place) / name for place, _, names in os.walk(own) for name in names}
    everything.add(own / "cat" / "more")
    accounted = read_files(loaded) + sum(loaded.folder.left_out.values(), [])
    assert sorted(accounted) == sorted(everything)
    read = {str(file.relative_to(own)) for file in read_files(loaded)}
    assert len(read) == 22 and {"cat/deep/deeper/0.png", "dog/old.png/a.png"} <= read


def test_linked_class_folders_and_files_are_followed(own, tmp_path):
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(own / name)
    paint(tmp_path / "elsewhere.png", seed=99)
    (own / "dog" / "one.png").symlink_to(tmp_path / "elsewhere.png")
    assert len(read_files(load(tmp_path / "linked"))) == 21


def test_a_class_may_be_called_anything_that_is_visible(tmp_path):
    fill(tmp_path, dict.fromkeys(("__none__", "train", "été #1", "contest"), 4))
    assert load(tmp_path).classes == ("__none__", "contest", "train", "été #1")


@pytest.mark.parametrize(
    "train, validation, test",
    [
        ("train", "val", "test"),
        ("Train", "valid", "TEST"),
        ("training", "Validation", "testing"),
        ("training_set", "eval", "test_images"),
        ("images-train", "dev", "TestData"),
        ("train2017", "val2017", "test2017"),
    ],
)
def test_splits_have_many_names(tmp_path, train, validation, test):
    first = 0
    for name, count in ((train, 5), (validation, 2), (test, 3)):
        first = fill(tmp_path / name, dict.fromkeys(("a", "b/deeper"), count), first)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").touch()
    with pytest.warns(UserWarning, match="left out: 1, no suffix"):
        loaded = load(tmp_path)
    assert labels(loaded) == {"train": [5, 5], "validation": [2, 2], "test": [3, 3]}
    assert str(tmp_path / test) in loaded.folder.origin["test"]
    for split in ("validation", "test"):
        for file in sum(loaded.folder.files[split].values(), []):
            assert file.is_relative_to(tmp_path / (validation if split == "validation" else test))


def test_a_split_without_a_folder_is_taken_from_train(tmp_path):
    fill(tmp_path / "test", SMALL, fill(tmp_path / "train"))
    loaded = load(tmp_path)
    assert labels(loaded) == {"train": [9, 9], "validation": [1, 1], "test": [10, 10]}
    assert loaded.folder.origin["validation"].startswith("1 in 10")


@pytest.mark.parametrize(
    "folders",
    [
        ("train/a", "train/b", "holdout/a", "holdout/b"),
        ("train/a", "train/b", "cat"),
        ("train/a", "train/b", "val/a", "val/b", "valid/a", "valid/b"),  # which one?
        ("Test/a", "Test/b", "eval/a", "eval/b"),  # no train
        ("train_v2/a", "train_v2/b", "test_v2/a", "test_v2/b"),
        ("train/a", "train/b", "test"),  # images without labels
        ("train", "test"),
        ("cat", "dog", "test"),
        ("trainset/a", "trainset/b", "rest/a", "rest/b"),
        ("cat_train", "cat_test", "dog_train", "dog_test"),
        ("trainA", "trainB", "testA", "testB"),
    ],
)
def test_splits_that_are_none_are_refused_with_what_to_rename(tmp_path, folders):
    fill(tmp_path, dict.fromkeys(folders, 4))
    top = [path.name for path in sorted(tmp_path.iterdir())]
    with pytest.raises(data.DataError, match="mixes splits with something else") as refused:
        load(tmp_path)
    assert all(f"{name} (" in str(refused.value) for name in top) and "name its folders" in str(refused.value)


@pytest.mark.parametrize("second", ["b", "other"])
def test_classes_that_may_be_splits_are_told(tmp_path, second):
    fill(tmp_path, dict.fromkeys(("imagesTr/a", "imagesTr/b", "imagesTs/a", f"imagesTs/{second}"), 4))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert load(tmp_path).classes == ("imagesTr", "imagesTs")
    [message] = [str(w.message) for w in told]
    assert ("most classes hold the folders a, b" in message) is (second == "b")
    assert "in folders inside class folders, read as of the class: 16, such as" in message


@pytest.mark.parametrize(
    "folders",
    [
        ("a/test", "b/test", "a", "b"),  # its own test images would be trained on
        ("a/train", "a/test", "b/train", "b/test"),
        ("a", "b", "b/deeper/Validation"),
        ("train/a", "train/b", "train/b/val"),
    ],
)
def test_splits_inside_classes_are_refused(tmp_path, folders):
    fill(tmp_path, dict.fromkeys(folders, 4))
    with pytest.raises(data.DataError, match="hold folders that are called like splits: .*train/CLASS"):
        load(tmp_path)


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines"])
def test_a_class_whose_name_is_no_text_is_refused(tmp_path, name):
    fill(tmp_path, SMALL)
    os.rename(tmp_path / "cat", os.fsencode(tmp_path) + b"/" + name)
    with pytest.raises(data.DataError, match=r"names of classes .*'(caf.udce9|two.nlines)'. Rename"):
        load(tmp_path)


def test_an_empty_split_is_not_replaced_in_silence(tmp_path):
    fill(tmp_path / "train")
    (tmp_path / "val").mkdir()
    with pytest.raises(data.DataError, match=r"val \(validation, without class folders\)"):
        load(tmp_path)


def test_too_few_images_or_classes_and_unlike_splits_are_refused(tmp_path, own):
    fill(tmp_path / "classes", {"train": 1, "ship": 1})
    with pytest.raises(data.DataError, match="classes needs.*there are ship: 1, train: 1"):
        load(tmp_path / "classes")
    with pytest.raises(data.DataError, match="no folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="empty needs 2 to 256 class folders.*there are none"):
        load(tmp_path / "empty")
    for i in range(2, 10):
        next((own / "cat").glob(f"{i}.*")).unlink()
    with pytest.raises(data.DataError, match="at least 3 images each.*there are cat: 2, dog: 10"):
        load(own)
    fill(tmp_path / "unlike", {"train/a": 4, "train/b": 4, "test/a": 4})
    with pytest.raises(data.DataError, match="test needs.*the same in every split.*there are a: 4"):
        load(tmp_path / "unlike")


def test_names_of_another_system_are_explained(tmp_path):
    fill(tmp_path / "train", {"chêne": 4, "dog": 4})
    fill(tmp_path / "test", {unicodedata.normalize("NFD", "chêne"): 2, "dog": 2}, 50)
    with pytest.raises(data.DataError, match="in the code of their letters"):
        load(tmp_path)
    paint(tmp_path / "flat" / "cat\\0.jpg")
    with pytest.raises(data.DataError, match="there are none.*holds a folder in its name"):
        load(tmp_path / "flat")


def test_more_classes_than_a_byte_holds_are_refused_before_any_image_is_opened(tmp_path):
    for number in range(257):
        for name in "012":
            (tmp_path / str(number)).mkdir(exist_ok=True)
            (tmp_path / str(number) / f"{name}.png").touch()
    with pytest.raises(data.DataError, match="2 to 256 class folders.*and 237 more"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["HEIC", "tga", "jp2"])
def test_formats_that_pillow_does_not_open_or_misreads_are_refused(own, suffix):
    (own / "cat" / f"photo.{suffix}").touch()
    with pytest.raises(
        data.DataError, match=rf"\.{suffix} cannot be read here: 1 files, .*photo.*pillow-heif"
    ):
        load(own)


def test_unreadable_images_are_named_together(own):
    for name in ("cat", "dog"):
        for file in sorted((own / name).iterdir())[:4]:
            file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(data.DataError, match="8 of 20 images cannot be read") as refused:
        load(own)
    lines = str(refused.value).splitlines()
    assert len(lines) == 1 + image_layout.NAMED + 1 and "0.png" in lines[1] and lines[-1].strip() == "…"


def test_an_image_that_lost_its_contents_is_told(own):
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16)).save(
        own / "cat" / "dark.png"
    )  # 8 bits in 16: nearly black
    with pytest.warns(UserWarning, match="nearly one colour: 1 images, .*dark.png"):
        load(own)


# --- The splits that are held out ----------------------------------------------------------------------


def test_two_classes_of_twenty_images_are_enough(tmp_path):
    fill(tmp_path, dict.fromkeys(("a", "b"), 20))
    assert labels(load(tmp_path)) == {"train": [14, 14], "validation": [2, 2], "test": [4, 4]}
    fill(tmp_path / "least", dict.fromkeys(("a", "b"), 3))
    assert labels(load(tmp_path / "least")) == {w: [1, 1] for w in data.SPLITS}


def places(loaded):
    files = {which: sum(by_class.values(), []) for which, by_class in loaded.folder.files.items()}
    return {file.name: which for which, own in files.items() for file in own}


def test_an_image_more_moves_few_others_and_names_do_not_matter(tmp_path):
    for number in range(100):
        paint(tmp_path / "ab"[number % 2] / f"{number}.png", size=(6, 6), seed=number)
    before = places(load(tmp_path))
    for number in range(100, 104):
        paint(tmp_path / "ab"[number % 2] / f"0{number}.png", size=(6, 6), seed=number)  # sorts first
    after = places(load(tmp_path))
    moved = [name for name in before if before[name] != after[name]]
    assert len(moved) <= 8  # each pushes one image at most out of test and one out of validation
    test = load(tmp_path).test.images
    for file in list(tmp_path.rglob("*.png")):
        file.rename(file.with_name(f"{hash(file.name) % 1000}_{file.name}"))
    renamed = load(tmp_path).test.images
    assert sorted(i.numpy().tobytes() for i in test) == sorted(i.numpy().tobytes() for i in renamed)


def test_identical_images_stay_in_one_split_and_are_told(tmp_path):
    fill(tmp_path, dict.fromkeys(("a", "b"), 4))
    for number in range(4):
        for copy in range(3):  # other bytes, the same pixels
            with Image.open(tmp_path / "a" / f"{number}.png") as image:
                image.save(tmp_path / "a" / f"{number}_{copy}.bmp")
    Image.open(tmp_path / "a" / "0.png").save(tmp_path / "b" / "same.png")
    with pytest.warns(UserWarning, match="identical images: 17 files of 4, .*(?s:.)*in two classes: 1,"):
        loaded = load(tmp_path)
    seen = {w: {i.numpy().tobytes() for i in getattr(loaded, w).images} for w in data.SPLITS}
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["validation"])
    assert not seen["test"] & seen["validation"]


def test_too_few_different_images_are_refused_with_the_number_needed(tmp_path):
    fill(tmp_path, {"a": 4, "b": 2})
    for copy in range(6):
        Image.open(tmp_path / "b" / "0.png").save(tmp_path / "b" / f"copy{copy}.png")
    with pytest.raises(data.DataError, match="no image is left for b in train.*at least 3 different ones"):
        load(tmp_path)


def test_identical_images_in_two_split_folders_are_refused(tmp_path):
    fill(tmp_path / "test", SMALL, fill(tmp_path / "train"))
    for number in range(7):
        with Image.open(tmp_path / "train" / "cat" / f"{number}.png") as image:
            image.save(tmp_path / "test" / "cat" / f"again{number}.bmp")
    with pytest.raises(data.DataError, match="images, 7 pairs, .*keep each in one split") as refused:
        load(tmp_path)
    assert str(refused.value).count(" and ") == image_layout.NAMED


# --- What is passed on ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:imagefolder")  # random opacity
def test_grey_among_colour_becomes_colour(tmp_path):
    for number, name in enumerate(("a", "b")):
        for i, mode in enumerate(("L", "LA", "L")):
            paint(tmp_path / name / f"{i}.png", mode, seed=2 * i + number)
    assert load(tmp_path).channels == 1
    paint(tmp_path / "a" / "colour.png", seed=9)
    loaded = load(tmp_path)
    assert loaded.channels == 3
    assert torch.equal(loaded.test.images[1, 0], loaded.test.images[1, 1])  # of b, where all are grey


def test_digests_tell_which_images_they_are(own):
    before = load(own).digests()
    assert before == load(own).digests() and before.keys() == set(data.SPLITS)
    (own / "cat").rename(own / "wolf")  # the last label, no longer the first
    assert all(before[which] != digest for which, digest in load(own).digests().items())


def test_labels_need_no_second_reading(own, monkeypatch):
    loaded = load(own, 12)
    monkeypatch.setattr(images, "decode", None)
    assert torch.equal(data.test_labels(f"imagefolder:{own}"), loaded.test.labels)


def test_the_command_prints_what_it_found(own, tmp_path):
    (own / "cat").rename(own / "猫")
    (own / "dog" / "notes.txt").touch()
    command = [sys.executable, "-m", "nnc_utils.data", f"imagefolder:{own}"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "14 train, 2 validation, 4 test; images 3 x 32 x 32; 2 classes: dog, \\u732b" in done.stdout
    assert "class \\u732b: 7 train, 1 validation, 2 test" in done.stdout
    assert "test: 1 in 5 of each class" in done.stdout and f"train: the folder {own}" in done.stdout
    assert "left out: 1, no suffix of an image, such as dog/notes.txt" in done.stdout
