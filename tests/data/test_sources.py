import json
import os
import pickle
import shutil

import numpy as np
import PIL.Image
import pytest
import skimage.data

from nextstep_jax.data import images, sources
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Document, Text
from nextstep_jax.data.shapes import ShapesSource

PHOTOGRAPHS = {
    "astronaut.png": "a woman in an orange suit",
    "cats/chelsea.webp": "a ginger cat\n",
    "drinks/coffee.JPG": "  a cup of coffee",
}


@pytest.fixture
def folder(tmp_path):
    for name, caption in PHOTOGRAPHS.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pixels = getattr(skimage.data, path.stem)()
        PIL.Image.fromarray(pixels).save(path, **({"lossless": True} if "webp" in name else {}))
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    (tmp_path / "notes.md").write_text("not an image")
    return tmp_path


def test_photographs_become_pairs(folder):
    source = sources.ImageFolderSource(folder)
    assert isinstance(source, sources.DocumentSource)
    assert len(source) == 3
    documents = [source[i] for i in range(3)]
    assert [d.id for d in documents] == ["astronaut.png", "cats/chelsea.webp", "drinks/coffee.JPG"]
    assert [d.parts[0].text for d in documents] == [
        "a woman in an orange suit",
        "a ginger cat",
        "a cup of coffee",
    ]
    assert {(d.kind, d.source) for d in documents} == {("pair", "folder")}
    decoded = [images.pixels_of(d.images[0]) for d in documents]
    np.testing.assert_array_equal(decoded[0], skimage.data.astronaut())
    np.testing.assert_array_equal(decoded[1], skimage.data.chelsea())
    with PIL.Image.open(folder / "drinks/coffee.JPG") as coffee:
        np.testing.assert_array_equal(decoded[2], np.asarray(coffee))


def test_images_can_be_fitted_at_once(folder):
    for size, expected in ((64, (64, 64)), ((32, 96), (32, 96))):
        source = sources.ImageFolderSource(folder, image_size=size, name="photos")
        document = source[1]
        assert document.source == "photos"
        np.testing.assert_array_equal(
            document.images[0].pixels, images.resize_cover(skimage.data.chelsea(), *expected)
        )


def faults(source):
    """(id or fault) of every document."""
    found = []
    for i in range(len(source)):
        try:
            found.append(source[i].id)
        except DocumentError as error:
            found.append((error.reason, str(error)))
    return found


def test_damaged_documents_say_so_when_they_are_asked_for(folder):
    (folder / "astronaut.txt").unlink()
    (folder / "cats/chelsea.txt").write_text(" \n")
    (folder / "drinks/coffee.txt").write_bytes(b"\xff\xfe\x00")
    source = sources.ImageFolderSource(folder)
    found = faults(source)
    assert found[:2] == [
        ("empty_text", "astronaut.png: the caption is missing"),
        ("empty_text", "cats/chelsea.webp: the caption is blank"),
    ]
    assert found[2][0] == "unreadable"
    assert found[2][1].startswith("drinks/coffee.JPG: the caption is not UTF-8: ")
    (folder / "drinks/coffee.txt").write_text("a cup")
    (folder / "cats/chelsea.txt").unlink()
    reason, message = faults(source)[1]
    assert (reason, message) == (
        "unreadable",
        "cats/chelsea.webp: No such file or directory (cats/chelsea.txt)",
    )
    assert faults(source)[2] == "drinks/coffee.JPG"
    with pytest.raises(IndexError):
        source[3]


def test_a_folder_without_any_caption_is_a_mistake(folder):
    for path in folder.glob("**/*.txt"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"none of 3 images has a caption, a \.txt or \.json .* astronaut\.png$"
    ):
        sources.ImageFolderSource(folder)


def test_json_captions(folder):
    """Strings are wordings, the rest is metadata; .txt serves where an object has no caption."""
    values = {
        "short": " a cat ",
        "caption": "a ginger cat on a chair",
        "blank": " ",
        "kind": "photo",
        "size": [512, 512],
        "none": None,
    }
    (folder / "cats/chelsea.json").write_text(json.dumps(values))
    (folder / "drinks/coffee.json").write_text('\ufeff{"url": "http://a/b"}', encoding="utf-8")
    (folder / "astronaut.json").write_text('{"alt": "a suit", "title": "space"}')
    (folder / "astronaut.txt").unlink()
    source = sources.ImageFolderSource(folder)
    astronaut, chelsea, coffee = (source[i] for i in range(3))
    assert chelsea.parts[0] == Text(
        "a ginger cat on a chair",
        wordings={"short": "a cat", "caption": "a ginger cat on a chair"},
    )
    assert chelsea.metadata == {"kind": "photo", "size": [512, 512]}
    assert coffee.parts[0] == Text(
        "a cup of coffee", wordings={"url": "http://a/b", "caption": "a cup of coffee"}
    )
    assert astronaut.parts[0] == Text("a suit", wordings={"alt": "a suit", "title": "space"})
    source = sources.ImageFolderSource(folder, caption_key="title")
    assert source[0].parts[0].text == "space"
    assert faults(source)[1] == ("empty_text", "cats/chelsea.webp: the caption 'title' is missing")


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        ("{", "unreadable", "not JSON: "),
        ("[1]", "unreadable", "a JSON list, not an object"),
        ('{"caption": 3}', "unreadable", "the caption 'caption' is no string but a int"),
        ('{"caption": ""}', "empty_text", "the caption 'caption' is blank"),
        ("{}", "empty_text", "the caption is missing"),
        ('{"caption": "\\ud800"}', "unreadable", "is no valid Unicode"),
        ('{"caption": "a", "b": "\\udc00"}', "unreadable", "the wording 'b' is no valid Unicode"),
        ("[" * 100_000, "unreadable", "not JSON: "),
    ],
)
def test_bad_json_captions(folder, content, reason, message):
    (folder / "astronaut.txt").unlink()
    (folder / "astronaut.json").write_text(content)
    with pytest.raises(DocumentError) as caught:
        sources.ImageFolderSource(folder)[0]
    assert caught.value.reason == reason
    assert str(caught.value).startswith("astronaut.png: ")
    assert message in str(caught.value)


def test_other_kinds_of_image_files(folder):
    for suffix in (".bmp", ".tif", ".TIFF", ".gif", ".avif"):
        (folder / f"chart{suffix}").write_bytes(b"any")
        (folder / "chart.txt").write_text("a chart")
    (folder / "chart.psd").write_bytes(b"any")
    assert len(sources.ImageFolderSource(folder)) == 3 + 5


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no image \(\.png, \.jpg, .*\.gif, \.avif\)$"):
        sources.ImageFolderSource(tmp_path)
    with pytest.raises(ValueError, match="none is not a folder"):
        sources.ImageFolderSource(tmp_path / "none")


def test_bad_images_are_named(folder):
    (folder / "drinks/coffee.JPG").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DocumentError, match=r"^drinks/coffee\.JPG: cannot decode the image") as e:
        sources.ImageFolderSource(folder, image_size=64)[2]
    assert e.value.reason == "bad_image"
    # Without a size the bytes are nobody's business yet.
    assert sources.ImageFolderSource(folder)[2].images[0].encoded == b"\xff\xd8\xff"


def test_captions_of_other_systems(folder):
    (folder / "astronaut.txt").rename(folder / "astronaut.TXT")
    (folder / "cats/chelsea.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n")
    source = sources.ImageFolderSource(folder)
    texts = [source[i].parts[0].text for i in range(2)]
    assert texts == ["a woman in an orange suit", "a cat"]


def test_hidden_files_are_passed_over(folder):
    (folder / "._astronaut.png").write_bytes(b"\0")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails/astronaut.png").write_bytes(b"\0")
    assert len(sources.ImageFolderSource(folder)) == 3


@pytest.mark.parametrize("size", [0, -8, (32, 0)])
def test_bad_sizes_are_refused(size, folder):
    with pytest.raises(ValueError, match=r"image_size=.* must be a side or a"):
        sources.ImageFolderSource(folder, image_size=size)


def test_a_list_is_a_source():
    documents = [Document((Text("a"),), "0", "s", "text")]
    assert isinstance(documents, sources.DocumentSource)


def test_images_without_captions(folder):
    """Judging an image tokenizer needs no words: missing captions are no fault then."""
    for path in folder.glob("**/*.txt"):
        path.unlink()
    source = sources.ImageFolderSource(folder, captions=False, name="images")
    documents = [source[i] for i in range(len(source))]
    assert [len(document.parts) for document in documents] == [1] * len(documents)
    assert all(document.images and document.source == "images" for document in documents)


def test_the_fingerprint_is_that_of_the_content(folder, tmp_path):
    first = sources.ImageFolderSource(folder).fingerprint
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert sources.ImageFolderSource(moved).fingerprint == first
    assert sources.ImageFolderSource(moved, image_size=16).fingerprint != first
    caption = next(iter(sorted(moved.glob("**/*.txt"))))
    caption.write_text("another caption")
    assert sources.ImageFolderSource(moved).fingerprint != first


def test_the_fingerprint_goes_by_names_and_sizes(folder):
    first = sources.ImageFolderSource(folder).fingerprint
    (folder / "astronaut.txt").write_text("a Woman in an orange suit")
    assert sources.ImageFolderSource(folder).fingerprint == first
    (folder / "new.txt").write_text("of no image")
    assert sources.ImageFolderSource(folder).fingerprint == first
    (folder / "astronaut.json").write_text("{}")
    assert sources.ImageFolderSource(folder).fingerprint != first
    assert sources.ImageFolderSource(folder, captions=False).fingerprint != first


def test_a_folder_is_read_after_pickling(folder):
    source = sources.ImageFolderSource(folder)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i].parts[0] for i in range(3)] == [source[i].parts[0] for i in range(3)]
    assert copy.fingerprint == source.fingerprint


def test_names_that_are_not_utf8(folder):
    """They are read, and their ids can be written anywhere."""
    for suffix, content in ((b".png", b"any"), (b".txt", b"words")):
        (folder / os.fsdecode(b"caf\xe9" + suffix)).write_bytes(content)
    source = sources.ImageFolderSource(folder)
    assert source[1].id == "caf\\xe9.png"
    assert source[1].images[0].encoded == b"any"
    assert len(source.fingerprint) == len("folder ") + 16


def test_fingerprints_of_any_source(folder):
    source = sources.ImageFolderSource(folder)
    assert sources.source_fingerprint(source) == f"ImageFolderSource {source.fingerprint}"
    assert sources.source_fingerprint([]) == "list"
    world = ShapesSource("pair", num_documents=7)
    assert sources.source_fingerprint(world) == repr(world)
