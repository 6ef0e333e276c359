"""Text and images that others wrote: what is wrong is one error that names the file, nothing is taken for another thing."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from flexclear.analysis.report import write_report
from flexclear.common.reading import YAML_DEPTH, lines_of, parse_json, parse_yaml
from flexclear.evaluation.pictures import batches, read_captions, read_folder, read_picture
from flexclear.generation.parsing import read_prompts
from flexclear.highres.folder import Folder
from flexclear.highres.stages import Stage
from flexclear.images.files import png_bytes, read_settings
from flexclear.images.reading import image_size, png_text, read_image

from helpers.picture_bombs import bomb

ODD = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"


def test_lines_end_at_newlines_only(tmp_path):
    assert lines_of(f"{ODD}\r\na\rb\n") == [ODD, "a", "b", ""]
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"\ufeff# first\r\n{ODD}\r\n\n  b  \n".encode())
    assert read_prompts(file) == (ODD, "b")
    file.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"--prompts must be a UTF-8 text file: .*prompts\.txt is not UTF-8"):
        read_prompts(file)


def test_a_key_given_twice_is_an_error_in_json_and_yaml():
    assert parse_json('{"a": {"b": 1}, "b": {"b": 2}}') == {"a": {"b": 1}, "b": {"b": 2}}
    with pytest.raises(ValueError, match="the key 'b' is given twice"):
        parse_json('{"a": [{"b": 1, "c": 2, "b": 1}]}')
    with pytest.raises(ValueError, match="the key 'b' is given twice, in lines 2 and 4"):
        parse_yaml("a:\n  b: 1\n  c: 2\n  'b': 3\n")
    # What a merge key brings may be replaced, at any depth and in any order.
    merged = "x: {y: &b {<<: {p: 1}, p: 2}}\nz: {<<: *b, p: 3}\n"
    assert parse_yaml(merged) == {"x": {"y": {"p": 2}}, "z": {"p": 3}}
    assert parse_yaml("1: a\n'1': b\n") == {1: "a", "1": "b"}


def test_how_deep_a_document_may_be_does_not_depend_on_the_process():
    """Hypothesis and others raise the interpreter's own limit for the time of a test, or for good."""
    deep = "[" * YAML_DEPTH + "]" * YAML_DEPTH
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(20_000)
        assert str(parse_yaml(deep)) == deep
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_yaml(f"[{deep}]")
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_json, "[" * 100_000, "nested too deeply"),
        (parse_yaml, "[" * 1000, "nested too deeply"),
        (parse_json, "[1" + "0" * 5000 + "]", "4300 digits"),
        (parse_yaml, "[1" + "0" * 5000 + "]", "4300 digits"),
        (parse_json, "{", "Expecting property name"),
        (parse_yaml, "{", "it is not valid YAML"),
        (parse_yaml, "!!python/object:os.system {}", "it is not valid YAML: could not determine a constructor"),
        (parse_yaml, "a: 2026-13-45", "month must be in"),
    ],
)
def test_what_cannot_be_read_is_a_value_error(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", '{"a": "x", "a": "y"}', "the key 'a' is given twice"),
        ("p.json", '{"a": "x", "a.png": "y"}', "'a' is named twice"),
        ("p.json", "[" * 100_000, "nested too deeply"),
        ("p.json", '{"a": "\\ud800"}', "not valid Unicode"),
        ("p.jsonl", '{"file_name": "a", "text": "x"}\n{"file_name": "a.png", "text": "y"}', "'a' is named twice"),
        ("p.jsonl", '{"file_name": "a", "text": 5}', "the prompt of 'a' is not text"),
    ],
)
def test_prompts_by_name_must_be_clear(tmp_path, name, text, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} must hold names of images and their prompts.*{message}"):
        read_captions(tmp_path / name, read_folder(tmp_path))


def test_prompts_by_name_keep_their_unusual_characters(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    odd = ODD.translate({0x0B: None, 0x0C: None, 0x1C: None})  # not allowed in JSON
    line = json.dumps({"file_name": "a.png", "text": odd}, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read_captions(tmp_path / "p.jsonl", read_folder(tmp_path)) == {"a": odd}


DAMAGED = {
    "bomb": bomb(),
    "text": b"no picture",
    "empty": b"",
    "cut": png_bytes(Image.effect_noise((64, 64), 50), {"prompt": "p"}, {})[:2000],
    "header": bomb(4)[:20],
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_images_that_cannot_be_read_are_named_by_every_reader(tmp_path, kind):
    file = tmp_path / "a.png"
    file.write_bytes(DAMAGED[kind])
    readers = [read_image, read_picture]
    if kind != "cut":  # whose header is whole
        readers += [image_size, read_settings, lambda path: batches([(path,)], None, 1)]
    if kind == "bomb":  # whose text can be looked for without decoding it
        assert png_text(file, "flexclear") is None
    for reader in readers:
        with pytest.raises(ValueError, match=r"a\.png (cannot be read as an image: .|has no text chunk)"):
            reader(file)
    (tmp_path / "scores.md").write_text("scores\n")
    (tmp_path / "perturb.md").write_text("perturbed\n")
    (tmp_path / "perturb.png").write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match=r"perturb\.png cannot be read as an image"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "gone.png")


def test_own_images_may_be_larger_than_pillow_takes(tmp_path, monkeypatch):
    stage = Stage(1, "base", 32, 48, ("dense",), 2, None, None, None, 1.0, 1.0, False, 1, 0)
    picture = Image.effect_noise((48, 32), 50).convert("RGB")
    folder = Folder(tmp_path, {"prompt": "p", "method": "sdedit"}, [stage])
    folder.save(stage, picture)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    again = Folder(tmp_path, {"prompt": "p", "method": "sdedit"}, [stage])
    assert again.load(stage).tobytes() == picture.tobytes()
    assert read_settings(again.file(stage))["settings"]["height"] == 32
    with pytest.raises(ValueError, match="could be decompression bomb"):
        read_image(again.file(stage))


def test_a_damaged_text_chunk_is_named(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    for text, message in (
        ("{", "has a damaged text chunk"),
        ('{"a": 1}', "without settings"),
        ("[]", "without settings"),
    ):
        info = PngInfo()
        info.add_text("flexclear", text)
        Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
        with pytest.raises(ValueError, match=rf"a\.png has a .*{message}|a\.png {message}"):
            read_settings(tmp_path / "a.png")


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright_as_their_camera_says(tmp_path, ending, orientation):
    from PIL import ImageOps

    told = Image.Exif()
    told[0x0112] = orientation
    picture = Image.effect_noise((48, 32), 50).resize((480, 320)).convert("RGB")
    file = tmp_path / f"photo.{ending}"
    picture.save(file, exif=told)
    with Image.open(file) as opened:
        expected = ImageOps.exif_transpose(opened)
    read = read_image(file)
    assert (read.size, read.tobytes()) == (expected.size, expected.tobytes())
    assert image_size(file) == read.size == ((480, 320) if orientation < 5 else (320, 480))
    content = read_picture(file)
    assert tuple(content.shape) == (3, read.height, read.width)


def test_a_damaged_orientation_turns_nothing(tmp_path):
    file = tmp_path / "photo.jpg"
    Image.new("RGB", (48, 32)).save(file, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01")
    assert read_image(file).size == image_size(file) == (48, 32)
