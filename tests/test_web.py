"""The page for browsers: in Chromium it says what the artifact says in eager, and what is missing or cut."""

import base64
import contextlib
import gzip
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from small_networks import network, saved

from nnc_utils import artifact, data, evaluation, export, images, models, web
from nnc_utils.web import WebError

pytestmark = pytest.mark.slow  # a browser
ROOT = Path(__file__).parents[1]
HEADLINE = ROOT / "results/standard/artifacts/c292fc39d365dd4d.safetensors"  # the pipeline's network, seed 1
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOW = """async (files) => {
  const answers = [];
  for (const file of files) {
    await show(new Blob([Uint8Array.from(atob(file), (character) => character.charCodeAt())]));
    answers.push(await classify());
  }
  return answers;
}"""
SEEN = (
    "() => Array.from($('seen').getContext('2d').getImageData(0, 0, $('seen').width, $('seen').height).data)"
)


@pytest.fixture(scope="module")
def sites(trained_digits, tmp_path_factory):
    """Folders as they are exported: two small networks, and the headline's."""
    out = tmp_path_factory.mktemp("web")
    files = [f"{name}={trained_digits / name}.safetensors" for name in ("base", "int8")]
    try:
        export.export_page(files, out=out / "digits", precision="both")
        export.export_page([str(HEADLINE)], out=out / "headline")
        spec = models.resnet(18, channels=3, size=16, classes=12, stem="small", width=1 / 8)
        saved(network(spec), out / "colour.safetensors")
        export.export_page([str(out / "colour.safetensors")], out=out / "colour")
    except WebError as error:
        pytest.skip(str(error))
    return out


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """``opened(folder)``: the page of a folder that a server serves, once it has loaded or complained."""
    failures = []
    with contextlib.ExitStack() as stack:

        def open_page(folder, **options):
            page = stack.enter_context(browser.new_page(**options))
            page.requests = []
            page.on("request", lambda request: page.requests.append(request.url))
            page.on("pageerror", lambda error: failures.append(str(error)))
            page.goto(stack.enter_context(web.served(folder)))
            page.locator("#measure:enabled, #message:visible").first.wait_for(timeout=60_000)
            return page

        yield open_page
    assert failures == []


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _agree(page, split, path, normalize):
    """The share of a split's images to which the page and eager give the same class."""
    answers = page.evaluate(SHOW, [_png(image[0].numpy()) for image in split.images])
    eager = evaluation.predict(artifact.load(path), split, normalize=normalize)
    return (np.argmax(answers, axis=1) == eager).mean()


def _first(dataset, count):
    return data.Split(dataset.test.images[:count], dataset.test.labels[:count])


def _expected(path, file, digits):
    """What an image file is for the network, uint8 (size, size), and eager's probabilities."""
    pixels = images.read_image(file, digits.size)
    pixels = pixels if pixels.shape[-1] == 1 else np.asarray(Image.open(file).convert("L"))[..., None]
    inputs = digits.normalize(torch.tensor(pixels).permute(2, 0, 1)[None])
    with torch.inference_mode():
        return pixels[..., 0], artifact.load(path)(inputs).softmax(1)[0].numpy()


def test_two_hundred_images_get_the_classes_of_eager(sites, opened, trained_digits):
    page, digits = opened(sites / "digits"), data.load("digits")
    for label, precision in (("base", "fp32"), ("int8", "int8")):
        page.get_by_role("row", name=f"{label} {precision}").get_by_role("radio").check()
        page.locator("#measure:enabled").wait_for()
        assert page.evaluate("`${chosen.label} ${chosen.precision}`") == f"{label} {precision}"
        path = trained_digits / f"{label}.safetensors"
        assert _agree(page, _first(digits, 200), path, digits.normalize) >= 0.995


def test_the_headline_network_says_what_it_says_in_eager_and_is_small(sites, opened):
    try:
        fashion = data.load("fashion_mnist")
    except data.DataError as error:
        pytest.skip(str(error))
    page = opened(sites / "headline")
    assert _agree(page, _first(fashion, 200), HEADLINE, fashion.normalize) >= 0.995
    assert "Ankle boot" in page.locator("#classes").inner_text()
    files = {file.name: file.stat().st_size for file in (sites / "headline").iterdir()}
    assert files["network1.onnx.gz"] <= 500_000 and sum(files.values()) <= 16e6


def test_an_image_is_read_as_training_reads_it(sites, opened, trained_digits, tmp_path):
    """Of another size, wide and high, in colour, transparent, turned: to the last bit where PNG keeps it."""
    page, digits, random = opened(sites / "digits"), data.load("digits"), np.random.default_rng(0)
    wide = Image.fromarray(random.integers(0, 256, (45, 67), np.uint8))
    cases = {"wide.png": wide, "high.png": wide.rotate(90, expand=True), "small.png": wide.resize((5, 3))}
    cases["turned.jpg"] = wide
    transparent = Image.merge("LA", (wide, Image.fromarray(random.integers(0, 2, (45, 67), np.uint8) * 255)))
    cases["transparent.png"] = transparent
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, picture in cases.items():
        file = tmp_path / name
        picture.save(file, **({"exif": exif, "quality": 95} if name == "turned.jpg" else {}))
        pixels, probabilities = _expected(trained_digits / "base.safetensors", file, digits)
        [answer] = page.evaluate(SHOW, [base64.b64encode(file.read_bytes()).decode()])
        seen = np.array(page.evaluate(SEEN), np.uint8).reshape(8, 8, 4)
        different = np.abs(seen[..., 0].astype(int) - pixels)
        assert different.max() <= (1 if name == "turned.jpg" else 0), name
        assert np.allclose(answer, probabilities, atol=1e-4 if not different.any() else 0.1), name


def test_a_coloured_image_becomes_grey_before_it_is_resized(sites, opened, tmp_path):
    page = opened(sites / "digits")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 33, 3), np.uint8))
    picture.save(tmp_path / "colour.png")
    page.locator("#file").set_input_files(tmp_path / "colour.png")
    page.locator("#seen-figure").wait_for()
    picture.convert("L").save(tmp_path / "grey.png")
    seen = np.array(page.evaluate(SEEN), np.uint8).reshape(8, 8, 4)
    assert np.array_equal(seen[..., 0], images.read_image(tmp_path / "grey.png", 8)[..., 0])


def test_a_network_for_colours_sees_them_and_its_ten_likeliest_classes_are_shown(sites, opened, tmp_path):
    page, file = opened(sites / "colour"), tmp_path / "colour.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 33, 3), np.uint8)).save(file)
    [answer] = page.evaluate(SHOW, [base64.b64encode(file.read_bytes()).decode()])
    pixels = images.read_image(file, 16)
    seen = np.array(page.evaluate(SEEN), np.uint8).reshape(16, 16, 4)
    assert np.array_equal(seen[..., :3], pixels)
    inputs = (torch.tensor(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    with torch.inference_mode():
        probabilities = artifact.load(sites / "colour.safetensors")(inputs).softmax(1)[0].numpy()
    assert np.allclose(answer, probabilities, atol=1e-4)
    shown = page.locator("#classes .name").all_inner_texts()
    assert shown == [str(which) for which in np.argsort(-probabilities)[:10]]
    page.get_by_label("Light background").check()
    page.locator("#pad").click()
    page.locator("#classes li.best").wait_for()
    seen = np.array(page.evaluate(SEEN), np.uint8).reshape(16, 16, 4)[..., :3]
    assert (seen[0] == 255).all() and (seen[8, 8] < 200).all()  # a dot, black on white


def test_a_drawing_gets_the_class_that_eager_gives_to_its_pixels(sites, opened, trained_digits, tmp_path):
    page, digits = opened(sites / "digits"), data.load("digits")
    assert "Draw something" in page.locator("#answer").inner_text()
    box = page.locator("#pad").bounding_box()
    corners = [(0.5, 0.1), (0.36, 0.3), (0.36, 0.7), (0.5, 0.9), (0.64, 0.7), (0.64, 0.3), (0.5, 0.1)]
    path = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*path[0])
    page.mouse.down()
    for place in path[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()
    page.locator("#classes li.best").wait_for()
    _check_drawing(page, trained_digits / "base.safetensors", digits, tmp_path)
    page.get_by_role("button", name="Clear").click()
    page.locator("#classes li").first.wait_for(state="detached")
    assert page.evaluate("image === null")


def test_the_keyboard_draws_and_switches(sites, opened, trained_digits, tmp_path):
    page, digits = opened(sites / "digits"), data.load("digits")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pad"
    for key in (*["ArrowUp"] * 10, "Space", *["ArrowDown"] * 20, "Space"):
        page.keyboard.press(key)
    page.locator("#classes li.best").wait_for()
    _check_drawing(page, trained_digits / "base.safetensors", digits, tmp_path)
    page.locator("input[type=radio]").first.focus()
    page.keyboard.press("ArrowDown")
    page.locator("#measure:enabled").wait_for()
    assert page.evaluate("chosen === networks[1] && chosen.session !== undefined")
    assert page.locator("tr.chosen").inner_text().split("\t")[0].strip() == "int8"


def _check_drawing(page, path, digits, folder):
    """What the page says about the drawing is what eager says about the drawing's own pixels."""
    answer = page.evaluate("classify()")
    drawing = page.evaluate("pad.canvas.toDataURL('image/png')").partition(",")[2]
    Image.open(io.BytesIO(base64.b64decode(drawing))).convert("L").save(folder / "drawing.png")
    pixels, probabilities = _expected(path, folder / "drawing.png", digits)
    assert pixels.max() > 100 and pixels.min() == 0
    seen = np.array(page.evaluate(SEEN), np.uint8).reshape(8, 8, 4)
    assert np.array_equal(seen[..., 0], pixels)
    assert np.allclose(answer, probabilities, atol=1e-4)
    best, share = digits.classes[probabilities.argmax()], 100 * probabilities.max()
    assert page.locator("#answer").inner_text() in (f"{best}, {share + d:.1f} %" for d in (-0.01, 0, 0.01))


def test_nothing_leaves_the_machine(sites, opened, tmp_path):
    """Once the network is there, an image makes no request at all; the page may not ask another host."""
    page = opened(sites / "digits")
    origin, before = page.url, len(page.requests)
    assert all(url.startswith((origin, "data:")) for url in page.requests)
    picture = Image.new("L", (9, 9), 128)
    ImageDraw.Draw(picture).line((0, 0, 9, 9), 255)
    picture.save(tmp_path / "a.png")
    page.locator("#file").set_input_files(tmp_path / "a.png")
    page.locator("#classes li.best").wait_for()
    page.evaluate("inTurn(() => measure([chosen]))")
    assert len(page.requests) == before
    other = opened(sites / "headline").url
    assert (
        page.evaluate(f"fetch('{other}', {{mode: 'no-cors'}}).then(() => 'sent', () => 'refused')")
        == "refused"
    )
    assert "leaves this machine" in page.locator("#private").inner_text()


def test_the_page_says_what_each_network_costs(sites, opened):
    page = opened(sites / "digits")
    page.get_by_role("button", name="Measure all").click()
    page.locator("#measure:enabled").wait_for(timeout=60_000)
    described = json.loads((sites / "digits/networks.json").read_text(encoding="utf-8"))["networks"]
    cells = [row.inner_text().split("\t") for row in page.locator("#networks tr").all()]
    assert [[cell.strip() for cell in row[:2]] for row in cells] == [
        ["base", "fp32"],
        ["int8", "fp32"],
        ["int8", "int8"],
    ]
    for told, row in zip(described, cells):
        content = gzip.decompress((sites / "digits" / told["file"]).read_bytes())
        assert told["bytes"] == len(content) and row[2] == f"{len(content) / 1e6:.3f} MB"
        assert float(row[4].removesuffix(" ms")) > 0
    assert cells[0][5] == "1.00×" and all(row[5].endswith("×") for row in cells)


def _missing(file):
    file.unlink()


def _cut(file):
    file.write_bytes(file.read_bytes()[:-2000])


def _other(file):
    file.write_text("<p>not found</p>")


@pytest.mark.parametrize(
    "name, harm, said",
    [
        (
            "network1.onnx.gz",
            _missing,
            "network1.onnx.gz is missing on the server (404). Put the whole folder",
        ),
        ("network1.onnx.gz", _cut, "network1.onnx.gz is cut off or damaged. Put the whole folder"),
        ("network1.onnx.gz", _other, "network1.onnx.gz is cut off or damaged"),
        (f"{web.WASM}.gz", _cut, f"{web.WASM}.gz is cut off or damaged"),
        ("networks.json", _missing, "networks.json is missing on the server"),
        ("ort.wasm.min.js", _missing, "ort.wasm.min.js is missing on the server"),
    ],
)
def test_what_is_missing_or_cut_is_said(name, harm, said, sites, opened, tmp_path):
    shutil.copytree(sites / "digits", tmp_path / "site")
    harm(tmp_path / "site" / name)
    page = opened(tmp_path / "site")
    assert said in page.get_by_role("alert").inner_text()
    if name == "network1.onnx.gz":  # the others still work
        page.get_by_role("radio").nth(1).check()
        page.locator("#measure:enabled").wait_for()
        assert page.evaluate("chosen.session !== undefined") and not page.get_by_role("alert").is_visible()


def test_a_server_that_unpacks_is_fine(sites, opened, tmp_path):
    shutil.copytree(sites / "digits", tmp_path / "site")
    for file in (tmp_path / "site").glob("*.gz"):
        file.write_bytes(gzip.decompress(file.read_bytes()))
    assert "Draw something" in opened(tmp_path / "site").locator("#answer").inner_text()


def test_a_file_that_is_no_image_is_said(sites, opened, tmp_path):
    page = opened(sites / "digits")
    (tmp_path / "notes.txt").write_text("no image")
    page.locator("#file").set_input_files(tmp_path / "notes.txt")
    page.get_by_role("alert").filter(has_text="notes.txt is no image that this browser can read").wait_for()
    assert page.locator("#classes li").count() == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(width, sites, opened):
    page = opened(sites / "digits", viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for button in page.locator("button:visible, .button").all():
        assert button.bounding_box()["height"] >= 44


def test_without_npm_one_line_says_what_to_do(trained_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    command = [str(trained_digits / "int8.safetensors"), "--to", "web", "--out", str(tmp_path / "site")]
    assert export.main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "install Node.js" in err and web.VERSION in err
    assert list(tmp_path.iterdir()) == []


def _npm(folder, monkeypatch, script):
    """An npm of our own."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    "script, said",
    [
        ("echo npm error code ENOTFOUND >&2; exit 1", "could not fetch .*ENOTFOUND.*npm config get registry"),
        ("echo another > onnxruntime-web-1.30.0.tgz", "has the checksum sha512-.*it is another file"),
    ],
)
def test_what_npm_does_wrong_is_said_and_nothing_is_written(
    script, said, trained_digits, tmp_path, monkeypatch
):
    _npm(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(WebError, match=said):
        export.export_page([str(trained_digits / "int8.safetensors")], out=tmp_path / "site")
    assert [file.name for file in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(
    "files, change, said",
    [
        (["int8"], {"out": "full"}, "is there already, and not empty"),
        (["int8"], {"out": "nowhere/site"}, "has to be a folder that may be written to"),
        (["int8"], {"precision": "int4"}, "unknown precision 'int4': one of fp32, int8, both"),
        (["base"], {"precision": "int8"}, "has no activation ranges"),
        (["int8", "int8"], {}, "two networks are called int8: give them names, NAME="),
        (["missing"], {}, "missing.safetensors"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_fetched(
    files, change, said, trained_digits, tmp_path, monkeypatch, capsys
):
    _npm(tmp_path / "bin", monkeypatch, f"touch {tmp_path}/called")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    given = {"out": "site", "precision": ""} | change
    paths = [str(trained_digits / f"{name}.safetensors") for name in files]
    command = [
        *paths,
        "--to",
        "web",
        "--out",
        str(tmp_path / given["out"]),
        "--precision",
        given["precision"],
    ]
    assert export.main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bin", "full"]
