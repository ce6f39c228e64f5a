"""Which files of a folder of images are of which split and class, and which are left out, with the reason."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, features

SUFFIXES = {  # of image formats, with what Pillow calls them
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".jp2", ".j2k"), "JPEG2000"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **{".bmp": "BMP", ".webp": "WEBP", ".gif": "GIF", ".tga": "TGA", ".avif": "AVIF"},
    **dict.fromkeys((".heic", ".heif"), "HEIF"),
    **{".jxl": "JXL", ".dng": "DNG", ".cr2": "CR2", ".nef": "NEF", ".arw": "ARW"},
}
MISREAD = {"TGA", "JPEG2000"}  # Pillow loses their opacity or their deep colours without a word
CODECS = {"WEBP": "webp", "AVIF": "avif"}  # that Pillow may have been built without
SYSTEM = {  # names, in small letters, of what systems and programs leave in folders
    *("__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information"),
    *("lost+found", "__pycache__", "thumbs.db", "desktop.ini"),
}
MOST_CLASSES = 256  # predictions are kept as unsigned bytes
HELD_OUT = {"test": 5, "validation": 10}  # where they have no folder: one image in so many of each class
SPLITS = ("train", *reversed(HELD_OUT))
NAMED = 5  # files that an error names


HIDDEN = "hidden, or of a system"
LINKED = "linked folders inside a class"
NO_FILE = "links that lead nowhere, or no regular files"
OTHER_SUFFIX = "no suffix of an image"
NO_CLASS = "in no class folder"

SPLIT_WORDS = {
    "train": "train|training|trn",
    "validation": "val|valid|validation|eval|evaluation|dev|development",
    "test": "test|testing|tst",
}
SEPARATORS, ADDED = r"[\W\d_]*", r"(images?|imgs?|data|dataset|set|split|folder)?"
HAS_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_WORDS.values())})(?![a-z])")
SMALL_THEN_LARGE = re.compile(r"(?<=[a-z])(?=[A-Z])")


class FolderError(RuntimeError):
    """A folder that is no data set; the message says what to do."""


@dataclass(frozen=True)
class Layout:
    """Where the files of a folder belong. Each is in `images` or in `left_out`.

    `folders`: split -> its folder, those that there are. `images`: split -> class -> image files.
    `left_out`: reason -> files.
    """

    folders: dict[str, Path]
    images: dict[str, dict[str, list[Path]]]
    left_out: dict[str, list[Path]]


def layout(path: Path) -> Layout:
    """Look through a folder of images; no image is opened.

    Its folders are the classes, or else the splits (`SPLIT_WORDS`, in any case), with the classes in them.

    Raises
    ------
    FolderError
        The folder is missing, or it is not clear what is a split and what a class; a class has too few
        images, or a name that is no text; or images are in a format that Pillow does not open.
    """
    if not path.is_dir():
        raise FolderError(f"no folder {path}: give imagefolder:PATH of a folder with one sub-folder a class")
    left_out: dict[str, list[Path]] = defaultdict(list)
    try:
        folders = _split_folders(path)
        images = {which: _by_class(folder, left_out) for which, folder in folders.items()}
        if path not in folders.values():
            left_out[NO_CLASS] += _images(path, left_out, but=folders.values())
    except OSError as error:
        raise FolderError(f"{path} cannot be looked through: {error}") from None
    found = Layout(folders, images, {reason: files for reason, files in left_out.items() if files})
    _check_formats(found)
    _check_counts(found)
    _check_names(found)
    return found


def inside(found: Layout) -> list[str]:
    """A remark on folders inside class folders; where most hold the same, those may be the classes."""
    if not (deeper := _deeper(found)):
        return []
    told = f"in folders inside class folders, read as of the class: {len(deeper)}, such as {deeper[0][0]}"
    folders = [_subfolders(found.folders["train"] / name) for name in found.images["train"]]
    counts = Counter(folder.name for own in folders for folder in own)
    shared = [name for name, count in counts.items() if count > len(folders) / 2]
    if len(shared) > 1:
        told += (
            f"; most classes hold the folders {', '.join(sorted(shared)[:NAMED])}: if those are the classes, "
            "name the folders above them train, validation and test"
        )
    return [told]


def _deeper(found: Layout) -> list[tuple[Path, tuple[str, ...]]]:
    """Images that are not in a class folder itself, each with the names of the folders between."""
    return [
        (file, between)
        for which, by_class in found.images.items()
        for name, files in by_class.items()
        for file in files
        if (between := file.relative_to(found.folders[which] / name).parts[:-1])
    ]


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in SYSTEM


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not _is_hidden(entry)]


def _below(entry: Path) -> list[Path]:
    """All files below a folder, or the file itself; a linked folder stands for itself."""
    if entry.is_symlink() or not entry.is_dir():
        return [entry]
    return [file for inner in sorted(entry.iterdir()) for file in _below(inner)]


def _reason(entry: Path) -> str:
    """Why a file or folder is left out; empty where it is not."""
    if _is_hidden(entry):
        return HIDDEN
    if entry.is_dir():
        return LINKED if entry.is_symlink() else ""
    if not entry.is_file():
        return NO_FILE
    return "" if entry.suffix.lower() in SUFFIXES else OTHER_SUFFIX


def _images(folder: Path, left_out: dict[str, list[Path]], but: Collection[Path] = ()) -> list[Path]:
    """The image files at any depth, without the folders `but`; all others are put into `left_out`."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry in but:
            continue
        if reason := _reason(entry):
            left_out[reason] += _below(entry)
        elif entry.is_dir():
            found += _images(entry, left_out)
        else:
            found.append(entry)
    return found


def _by_class(folder: Path, left_out: dict[str, list[Path]]) -> dict[str, list[Path]]:
    classes = _subfolders(folder)
    left_out[NO_CLASS] += _images(folder, left_out, but=classes)
    return {sub.name: _images(sub, left_out) for sub in classes}


def _has_images(folder: Path) -> bool:
    return bool(_images(folder, defaultdict(list)))


def split_of(name: str) -> str:
    """The split that a folder's name stands for, in any case and with words around it; or empty."""
    for which, words in SPLIT_WORDS.items():
        if re.fullmatch(rf"{ADDED}{SEPARATORS}({words}){SEPARATORS}{ADDED}{SEPARATORS}", name.casefold()):
            return which
    return ""


def _split_folders(path: Path) -> dict[str, Path]:
    """Split -> its folder; ``{"train": path}`` where the folders in `path` are the classes.

    A split's folder holds class folders. A class may be called train, if it holds its images itself.
    """
    folders = [f for f in _subfolders(path) if _has_images(f) or split_of(f.name)]
    # nested: holds class folders. like: speaks of a split. clear: each is one split, and no split is twice
    nested = [f for f in folders if any(map(_has_images, _subfolders(f)))]
    words = {f: HAS_SPLIT_WORD.search(SMALL_THEN_LARGE.sub(" ", f.name).casefold()) for f in folders}
    several = len({split_of(word[0]) for word in words.values() if word}) > 1
    like = several or any(split_of(f.name) or words[f] for f in nested)
    if not like and not any(split_of(f.name) in HELD_OUT for f in folders):
        return {"train": path}
    splits = {split_of(f.name): f for f in folders}
    clear = all(f in nested and split_of(f.name) for f in folders) and len(splits) == len(folders)
    if clear and "train" in splits:
        return splits
    listed = ", ".join(
        f"{f.name} ({split_of(f.name) or 'no split'}, {'with' if f in nested else 'without'} class folders)"
        for f in folders
    )
    raise FolderError(
        f"{path} mixes splits with something else: {listed}. Either name its folders train, validation and "
        "test (train is needed), one each and with a folder for each class in it, and take the others out; "
        "or, where they are classes, rename those that are called like a split"
    )


def _check_formats(found: Layout) -> None:
    listed = [file for by_class in found.images.values() for files in by_class.values() for file in files]
    listed, known = listed + found.left_out.get(NO_CLASS, []), openable()
    if foreign := [file for file in listed if file.suffix.lower() not in known]:
        suffixes = ", ".join(sorted({file.suffix for file in foreign}))
        raise FolderError(
            f"{suffixes} cannot be read here: {some(foreign, 'files')}. Convert them to .jpg or .png "
            "(.heic with the package pillow-heif), or take them out"
        )


def _check_counts(found: Layout) -> None:
    classes, missing = found.images["train"].keys(), HELD_OUT.keys() - found.folders
    for which, by_class in found.images.items():
        least = 1 + len(missing) if which == "train" else 1
        enough = by_class.keys() == classes and min(map(len, by_class.values()), default=0) >= least
        if not enough or not 2 <= len(classes) <= MOST_CLASSES:
            counts = [f"{name}: {len(files)}" for name, files in by_class.items()]
            normal = [{unicodedata.normalize("NFC", name) for name in names} for names in (by_class, classes)]
            if by_class.keys() != classes and normal[0] == normal[1]:
                counts.append("names that differ from train's in the code of their letters (NFC, NFD) only")
            more = [f"and {len(counts) - 20} more"] if len(counts) > 20 else []
            raise FolderError(
                f"{found.folders[which]} needs 2 to {MOST_CLASSES} class folders, the same in every split, "
                f"with at least {least} images each ({', '.join(sorted(openable()))}); there are "
                f"{', '.join([*counts[:20], *more]) or 'none'}{_unpacked_wrong(found)}"
            )


def _unpacked_wrong(found: Layout) -> str:
    """What to do where names hold the folders of an archive that another system made."""
    names = [file.name for files in found.left_out.values() for file in files if "\\" in file.name]
    return f". {names[0]} holds a folder in its name: unpack the archive by another program" if names else ""


def _check_names(found: Layout) -> None:
    if odd := [name for name in found.images["train"] if not _is_text(name)]:
        raise FolderError(
            f"names of classes with control characters, or not in UTF-8: {', '.join(map(ascii, odd))}. "
            f"Rename their folders in {found.folders['train']}"
        )
    if mixed := [file for file, between in _deeper(found) if any(map(split_of, between))]:
        raise FolderError(
            f"class folders hold folders that are called like splits: {some(mixed, 'images')}. Put the "
            "splits above the classes, as train/CLASS and test/CLASS; or, where they are none, rename them"
        )


def _is_text(name: str) -> bool:
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def openable() -> set[str]:
    """The suffixes of `SUFFIXES` that Pillow opens, as it was built here, and reads right."""
    Image.init()
    without = MISREAD | {
        name for name, codec in CODECS.items() if name in Image.OPEN and not features.check(codec)
    }
    return {suffix for suffix, name in SUFFIXES.items() if name in Image.OPEN.keys() - without}


def some(things: Sequence, what: str) -> str:
    """Their number and the first of them."""
    more = ", …" if len(things) > NAMED else ""
    return f"{len(things)} {what}, {', '.join(map(str, things[:NAMED]))}{more}"
