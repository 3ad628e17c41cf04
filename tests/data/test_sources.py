import shutil

import numpy as np
import PIL.Image
import pytest
import skimage.data

from nextstep_jax.data import images, sources
from nextstep_jax.data.schema import Document, Text

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


def test_missing_captions_are_listed(folder):
    (folder / "astronaut.txt").unlink()
    (folder / "drinks/coffee.txt").unlink()
    with pytest.raises(ValueError, match=r"2 of 3 images: astronaut\.png, drinks/coffee\.JPG$"):
        sources.ImageFolderSource(folder)
    for i in range(12):
        (folder / f"b{i:02}.png").touch()
    with pytest.raises(ValueError, match=r"14 of 15 images: astronaut\.png, .*b08\.png and 4 more"):
        sources.ImageFolderSource(folder)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no image \(\.png, \.jpg, \.jpeg, \.webp\)"):
        sources.ImageFolderSource(tmp_path)
    with pytest.raises(ValueError, match="none is not a folder"):
        sources.ImageFolderSource(tmp_path / "none")


def test_bad_files_are_named(folder):
    (folder / "drinks/coffee.JPG").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"coffee\.JPG: cannot decode the image"):
        sources.ImageFolderSource(folder, image_size=64)[2]
    (folder / "astronaut.txt").write_text(" \n")
    (folder / "drinks/coffee.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match=r"empty: 2 of 3 captions: astro.*, drinks/coffee\.txt$"):
        sources.ImageFolderSource(folder)
    (folder / "cats/chelsea.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"not UTF-8: 1 of 3 captions: cats/chelsea\.txt$"):
        sources.ImageFolderSource(folder)


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
