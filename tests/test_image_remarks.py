"""image_remarks.py: what is told of folders that are read well and would still mislead."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance
from test_images import fill, load

from nnc_utils import data, image_remarks

TWO = ("cat", "dog")
COPIED = {
    "recoded": lambda image: image,
    "smaller": lambda image: image.resize((40, 40)),
    "grey": lambda image: image.convert("L"),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.05),
}


def told(root, size=16):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "\n".join(load(root, size).folder.remarks)


def photo(seed, size=(64, 64)):
    """Smooth colours, as photographs have."""
    corners = np.random.RandomState(seed).randint(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(corners).resize(size, Image.Resampling.BICUBIC)


def drawing(colour):
    """One shape in the same place."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((14, 16, 50, 52), fill=colour)
    return image


def keep(root, images, suffix=".png", **options):
    """Save images into classes by turns."""
    for number, image in enumerate(images):
        folder = root / TWO[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:03}{suffix}", **options)


def test_of_a_plain_folder_nothing_is_told(tmp_path):
    keep(tmp_path, map(photo, range(40)))
    assert told(tmp_path) == ""


@pytest.mark.parametrize("form", ["{}_{}", "COCO_{}2014_{}", "cat-{}.{}"])
def test_names_of_files_that_speak_of_splits_are_told(tmp_path, form):
    keep(tmp_path, map(photo, range(24)))
    assert told(tmp_path) == ""
    for number, file in enumerate(sorted(tmp_path.glob("cat/*"))):
        file.rename(file.with_name(form.format("test" if number % 3 == 0 else "train", file.name)))
    assert "names of files speak of splits, which only folders make: 1 class folders" in told(tmp_path)


def test_copies_by_their_names_are_told(tmp_path):
    for number, which in enumerate(("train", "test")):
        keep(tmp_path / which, map(photo, range(40 * number, 40 * number + 8)))
        file = tmp_path / which / "cat/000.png"
        file.rename(file.with_name(f"img_jpg.rf.{number}{number}.png"))
    assert "names as of copies of one image, in two splits: 1 images, img_jpg" in told(tmp_path)


@pytest.mark.parametrize("end", ["-edited", " (1)", "_aug_2", "~2"])
def test_edited_copies_beside_their_image_are_told(tmp_path, end):
    keep(tmp_path, map(photo, range(40)))
    for file in sorted(tmp_path.glob("*/*")):
        photo(1000 + int(file.stem)).save(file.with_stem(f"{file.stem}{end}"))
    assert "names as of copies of one image, in two splits: " in told(tmp_path)


def test_a_cut_out_beside_its_photograph_is_told(tmp_path):
    keep(tmp_path, map(photo, range(40)), ".jpg")
    for file in sorted(tmp_path.glob("*/*")):
        photo(1000 + int(file.stem)).save(file.with_suffix(".png"))
    assert "names as of copies of one image, in two splits: " in told(tmp_path)


def test_deep_images_of_one_class_that_are_darker_are_told(tmp_path):
    for which, most in (("cat", 65_535), ("dog", 16_383)):
        (tmp_path / which).mkdir()
        for seed in range(8):
            values = np.random.RandomState(seed + most).randint(0, most + 1, (16, 16)).astype(np.uint16)
            Image.fromarray(values).save(tmp_path / which / f"{seed}.png")
    assert "16 bits of which at most 15 are used, so read darker: class dog" in told(tmp_path)
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "dog/of_8_bits.png")
    for file in tmp_path.glob("dog/?.png"):  # 65535 where a device saw nothing
        values = np.array(Image.open(file))
        values[:2] = 65_535
        Image.fromarray(values).save(file)
    assert "so read darker: class dog" in told(tmp_path)


def test_drawings_of_one_shape_in_other_colours_are_no_copies_but_theirs_are(tmp_path):
    keep(tmp_path / "train", map(drawing, ("crimson", "seagreen", "royalblue", "orchid")))
    keep(tmp_path / "test", map(drawing, ("teal", "goldenrod")))
    assert told(tmp_path) == ""
    copy = COPIED["brighter"](drawing("seagreen"))
    keep(tmp_path / "test", [COPIED["smaller"](copy)], ".jpg", quality=50)
    assert f"such as {tmp_path}/test/cat/000.jpg and {tmp_path}/train/dog/001.png" in told(tmp_path)


@pytest.mark.parametrize("how", COPIED)
def test_copies_across_splits_are_told(tmp_path, how):
    images = [photo(seed) for seed in range(20)]
    keep(tmp_path / "train", images)
    keep(tmp_path / "test", map(COPIED[how], images[:6]), ".jpg", quality=50)
    keep(tmp_path / "test" / "cat", [photo(99)])
    remark = told(tmp_path)
    assert "nearly identical images in two splits: 6, such as " in remark
    assert f"{tmp_path}/test/cat/000.jpg and {tmp_path}/train/cat/000.png" in remark


def test_copies_are_found_among_more_images_than_are_compared_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(image_remarks, "AT_ONCE", 4)
    keep(tmp_path / "train", [photo(seed) for seed in range(20)])
    keep(tmp_path / "test", [photo(seed) for seed in (50, 51, 52, 53, 54, 55, 7, 56, 57, 58)], ".jpg")
    assert "two splits: 1, such as " in told(tmp_path) and "test/cat/006.jpg" in told(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_grey_stored_as_colour_is_the_same_image(tmp_path, mode):
    fill(tmp_path / "train", dict.fromkeys(TWO, 6))
    for name in TWO:
        (tmp_path / "test" / name).mkdir(parents=True)
        for file in (tmp_path / "train" / name).iterdir():
            image = Image.open(file).convert("L")
            image.save(file)
            image.convert(mode).save(tmp_path / "test" / name / file.name)
    with pytest.raises(data.DataError, match="share identical images, 12 pairs"):
        load(tmp_path)


def test_what_the_middle_square_cuts_off_is_told(tmp_path):
    keep(tmp_path, [photo(seed) for seed in range(12)])
    lost = Image.new("RGB", (130, 40), "white")
    lost.paste(photo(1, (30, 30)), (5, 5))
    lost.save(tmp_path / "cat" / "lost.png")
    Image.fromarray(np.arange(250, dtype=np.uint8)[None]).save(tmp_path / "dog" / "row.png")
    photo(2, (64, 128)).save(tmp_path / "dog" / "half.png")  # just not too long
    remark = told(tmp_path)
    assert "nearly one colour: 2 images" in remark and "long: 2 images" in remark
    assert "lost.png" in remark and "row.png" in remark and "half.png" not in remark


def test_frames_that_are_not_read_are_told(tmp_path):
    keep(tmp_path, [photo(seed) for seed in range(12)])
    several = {"save_all": True, "append_images": [photo(20), photo(21)]}
    for suffix in ("gif", "webp", "mpo.jpg"):  # the last: what a camera shows as a preview
        format = "MPO" if suffix == "mpo.jpg" else None
        photo(30 + len(suffix)).save(tmp_path / "cat" / f"several.{suffix}", format, **several)
    assert "the first is read: 2 images" in told(tmp_path) and "mpo" not in told(tmp_path)


def test_one_class_above_all_is_told(tmp_path):
    fill(tmp_path, {"cat": 60, "dog": 3})
    assert "92.3 % of the test images are of class cat" in told(tmp_path)
    fill(tmp_path / "even", {"cat": 30, "dog": 10})
    assert told(tmp_path / "even") == ""


def test_names_that_look_alike_are_told(tmp_path):
    fill(tmp_path, dict.fromkeys(("Cat", "cat", "café", "cafe\u0301", "dog"), 4))
    remark = told(tmp_path)
    assert r"'Cat' and 'cat'" in remark and r"'cafe\u0301' and 'caf\xe9'" in remark and "dog" not in remark


@pytest.mark.parametrize("mask", ["{}_mask", "mask_{}", "{}-GT"])
def test_masks_beside_their_images_are_told(tmp_path, mask):
    fill(tmp_path)
    for file in list(tmp_path.glob("cat/*.png")):
        Image.new("L", (6, 6), int(file.stem) * 20).save(file.with_stem(mask.format(file.stem)))
    assert "named as masks of an image beside them, read as images: 10 files" in told(tmp_path)


def test_classes_that_are_none_are_told(tmp_path):
    fill(tmp_path / "a", {"images": 5, "masks": 5})
    assert "the parts of a data set: images, masks" in told(tmp_path / "a")
    fill(tmp_path / "b", {"cat": 5, "cat 2": 5, "dog": 5, "dog (1)": 5, "type 1": 5, "type 2": 5})
    assert "named as a copy of another: cat 2, dog (1)\n" in told(tmp_path / "b") + "\n"


def test_deep_images_that_use_a_part_of_their_range_are_told(tmp_path):
    """Two detectors in one class, and temperatures in hundredths of a kelvin."""
    for number in range(6):
        deep = np.random.RandomState(number).randint(0, 65_536, (6, 6)).astype(np.uint16)
        for name in TWO:
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(deep[:: 1 - 2 * (name == "cat")]).save(tmp_path / name / f"{number}.png")
    assert "less than a quarter" not in told(tmp_path)
    Image.fromarray(deep // 4).save(tmp_path / "cat" / "14.png")
    Image.fromarray(29_315 + deep // 13).save(tmp_path / "cat" / "warm.png")
    assert "16 bits of which less than a quarter is used, so few greys: 2 images" in told(tmp_path)


def test_a_fourth_channel_that_is_no_opacity_is_told(tmp_path):
    fill(tmp_path)
    bands = np.random.RandomState(0).randint(1, 255, (6, 6, 4)).astype(np.uint8)
    Image.fromarray(bands).save(tmp_path / "cat" / "infrared.png")
    bands[1:, :, 3] = 0  # a cut-out with a soft edge
    Image.fromarray(bands).save(tmp_path / "cat" / "logo.png")
    assert "mostly half-transparent, read on white: 1 images, " in told(tmp_path)


def test_a_split_of_another_detector_is_told(tmp_path):
    for split, most in (("train", 65_535), ("test", 32_767)):
        for number in range(12):
            (folder := tmp_path / split / TWO[number % 2]).mkdir(parents=True, exist_ok=True)
            values = np.random.RandomState(number).randint(0, most + 1, (16, 16)).astype(np.uint16)
            Image.fromarray(values).save(folder / f"{split}{number}.png")
    assert "at most 15 are used, so read darker: test" in told(tmp_path)


def test_names_of_cameras_that_begin_with_a_sign_are_read(tmp_path):
    keep(tmp_path, [photo(seed) for seed in range(12)])
    for number, file in enumerate(sorted(tmp_path.rglob("*.png"))):
        file.rename(file.with_name(f"{'_-(#'[number % 4]}MG_{number}.png"))
    assert told(tmp_path) == ""
