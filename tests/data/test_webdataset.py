import io
import json
import pickle
import tarfile
import threading

import numpy as np
import PIL.Image
import pytest

from nextstep_jax.data import files, webdataset
from nextstep_jax.data.faults import DocumentError
from nextstep_jax.data.schema import Image, Text
from nextstep_jax.data.webdataset import WebDatasetSource, walk_tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(number, size=(8, 12), kind="PNG"):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3)).astype(np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path, members, form=tarfile.GNU_FORMAT):
    """Members are (name, bytes, str, or an object for JSON)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            if not isinstance(content, bytes | str):
                content = json.dumps(content)
            content = content.encode() if isinstance(content, str) else content
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def outcomes(source):
    """The id of every good document, the reason of every other."""
    found = []
    for i in range(len(source)):
        try:
            found.append(source[i].id)
        except DocumentError as error:
            found.append(error.reason)
    return found


def shown(document):
    """Texts, and the bytes of images."""
    return [part.text if isinstance(part, Text) else part.encoded for part in document.parts]


def test_the_released_convention(tmp_path):
    a, b, c, d = (picture(n) for n in range(4))
    story = {"caption": "<image_1> A cat.\n<image_2>It sleeps. <image_3>", "source": [1, 2]}
    counted = {"caption": "one <image_0> two <image_1>"}
    members = [
        *(("x/story.json", story), ("x/story-1.jpg", a), ("x/story-2.png", b)),
        *(("x/story-3.jpg", c), ("y-1.json", counted), ("y-1-0.png", c), ("y-1-1.webp", d)),
        *(("text.json", {"caption": " Only words. "}), ("notes.md", "no part of this")),
        *(("pair.json", {"caption": "A dog <image_1>"}), ("pair-1.png", d)),
        *(("one.json", {"caption": "<image_1> a bird"}), ("one.jpg", a)),
    ]
    source = WebDatasetSource(write_tar(tmp_path / "a.tar", members))
    assert len(source) == 5
    story, counted, text, pair, one = (source[i] for i in range(5))
    assert (one.kind, shown(one)) == ("pair", [a, " a bird"])
    assert shown(story) == [a, " A cat.\n", b, "It sleeps. ", c]
    assert (story.kind, story.id, story.source) == ("interleaved", "a.tar/x/story", "tars")
    assert story.metadata == {"source": [1, 2]}
    assert shown(counted) == ["one ", c, " two ", d]
    assert (counted.kind, counted.id) == ("interleaved", "a.tar/y-1")
    assert (text.kind, shown(text)) == ("text", ["Only words."])
    assert (pair.kind, shown(pair)) == ("pair", ["A dog ", d])
    assert all(part.loss for document in (story, pair) for part in document.parts)


def test_plain_pairs(tmp_path):
    """Names with dots, numbers and other files beside them, as other people's tools write them."""
    images = [picture(n) for n in range(6)]
    downloaded = {"caption": None, "url": "http://a", "width": 512, "status": "success"}
    members = [
        *(("img-001.jpg", images[0]), ("img-001.txt", "\ufefffirst\n"), ("img-001.cls", "3")),
        *(("img-002.jpg", images[1]), ("img-002.json", {"caption": "second", "short": "2nd"})),
        *(("v1.5.jpg", images[2]), ("v1.5.txt", "third"), ("._v1.5.jpg", b"\0")),
        *(("000.jpg", images[3]), ("000.json", downloaded), ("000.txt", "fourth")),
        *(("m.jpg", images[4]), ("m.mask.png", images[5]), ("m.txt", "fifth")),
        ("alone.txt", "sixth"),
    ]
    source = WebDatasetSource(write_tar(tmp_path / "a.tar", members))
    documents = [source[i] for i in range(len(source))]
    words = ["first", "second", "third", "fourth", "fifth", "sixth"]
    assert [d.parts[0].text for d in documents] == words
    assert [d.kind for d in documents] == ["pair"] * 5 + ["text"]
    assert [d.images[0].encoded for d in documents[:5]] == images[:5]
    assert documents[1].parts[0].wordings == {"caption": "second", "short": "2nd"}
    assert documents[3].parts[0].wordings == {"caption": "fourth", "url": "http://a"} | {
        "status": "success"
    }
    assert documents[3].metadata == {"width": 512}
    assert documents[4].metadata == {"unused_images": 1}


def test_wordings_go_with_the_texts_between_the_same_tags(tmp_path):
    values = {
        "caption": "Before <image_1> after",
        "short": "b<image_1>a",
        "turned": "<image_1> after before",
        "other": "Before <image_2> after",
        "none": "no image",
    }
    image = picture(0)
    tar = write_tar(tmp_path / "a.tar", [("k.json", values), ("k-1.png", image)])
    first, middle, last = WebDatasetSource(tar)[0].parts
    assert first == Text("Before ", wordings={"caption": "Before ", "short": "b"})
    assert last == Text(" after", wordings={"caption": " after", "short": "a"})
    assert middle.encoded == image
    parts = WebDatasetSource(tar, caption_key="turned")[0].parts
    assert [getattr(part, "text", None) for part in parts] == [None, " after before"]
    assert parts[1].wordings == {}


def test_kinds(tmp_path):
    a, b = picture(0), picture(1)
    edit = "<image_1>make it red<image_2>"
    members = [
        *(("1.json", {"caption": edit, "type": "edit", "note": "x"}), ("1-1.png", a)),
        *(("1-2.png", b), ("2.json", {"caption": edit}), ("2-1.png", a), ("2-2.png", b)),
        *(("3.json", {"caption": "words", "kind": "text"}), ("3.png", a)),
        *(("4.json", {"caption": "words", "kind": "photo"}), ("4.png", a)),
        *(("5.json", {"caption": "<image_1><image_2><image_1>"}), ("5-1.png", a), ("5-2.png", b)),
    ]
    tar = write_tar(tmp_path / "a.tar", members)
    source = WebDatasetSource(tar)
    documents = [source[i] for i in range(5)]
    assert [d.kind for d in documents] == ["edit", "interleaved", "text", "pair", "interleaved"]
    assert [image.loss for image in documents[0].images] == [False, True]
    assert documents[0].parts[1] == Text("make it red", wordings={})
    assert documents[0].metadata == {"type": "edit"}
    assert documents[2].metadata == {"kind": "text", "unused_images": 1}
    assert shown(documents[4]) == [a, b, a]
    edits = WebDatasetSource(tar, kind="edit")
    assert outcomes(edits) == [
        *("a.tar/1", "a.tar/2", "a.tar/3", "bad_document", "empty_text"),
    ]
    assert [image.loss for image in edits[1].images] == [False, True]
    assert outcomes(WebDatasetSource(tar, kind="pair")) == [
        *("a.tar/1", "bad_document", "a.tar/3", "a.tar/4", "empty_text"),
    ]
    assert source.fingerprint != edits.fingerprint
    with pytest.raises(ValueError, match=r"kind='song'; choose from \['text', 'pair', "):
        WebDatasetSource(tar, kind="song")


def test_images_in_other_places_of_the_tar(tmp_path):
    """All texts first, then all images: a document is put together from its runs."""
    images = [picture(n) for n in range(6)]
    members = [
        *((f"{i}.json", {"caption": "<image_1>a<image_2>"}) for i in range(3)),
        *((f"{i}-{k}.png", images[2 * i + k - 1]) for i in range(3) for k in (1, 2)),
    ]
    source = WebDatasetSource(write_tar(tmp_path / "a.tar", members))
    assert [shown(source[i]) for i in range(3)] == [
        [images[2 * i], "a", images[2 * i + 1]] for i in range(3)
    ]


def test_a_folder_and_a_pattern(tmp_path):
    for name in ("b/2.tar", "a/10.tar", "a/9.tar", "b/.hidden.tar"):
        write_tar(tmp_path / name, [("k.txt", name), ("j.txt", "x")])
    (tmp_path / "a" / "list.csv").write_text("")
    source = WebDatasetSource(tmp_path)
    assert outcomes(source) == [
        f"{name}/{key}" for name in ("a/10.tar", "a/9.tar", "b/2.tar") for key in "kj"
    ]
    assert outcomes(WebDatasetSource(f"{tmp_path}/a/*.tar")) == outcomes(
        WebDatasetSource(tmp_path / "a")
    )
    assert [d.split("/")[0] for d in outcomes(WebDatasetSource(f"{tmp_path}/**/9.tar"))] == [
        "a"
    ] * 2
    with pytest.raises(ValueError, match=r"none\.tar is neither a file nor a folder"):
        WebDatasetSource(tmp_path / "none.tar")
    with pytest.raises(ValueError, match=r"holds no file of the kind \*\.tar"):
        WebDatasetSource(tmp_path / "*.tgz")
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert WebDatasetSource(moved).fingerprint == source.fingerprint
    write_tar(moved / "a" / "9.tar", [("k.txt", "9" * 20_000)])
    assert WebDatasetSource(moved).fingerprint != source.fingerprint


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_as_every_format_writes_them(tmp_path, form):
    long = "/".join(["folder" * 3] * 5) + "/" + "n" * 90
    names = [long, "short", "größe" if form != tarfile.USTAR_FORMAT else "groesse"]
    image = picture(0)
    members = [
        pair for n in names for pair in ((f"./{n}.json", {"caption": n}), (f"{n}.png", image))
    ]
    path = write_tar(tmp_path / "a.tar", members, form)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("short.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "short.png"
        tar.addfile(link)
        tar.add(tmp_path, "folder.png", recursive=False)
    source = WebDatasetSource(path)
    assert [(d.id, shown(d)) for d in (source[i] for i in range(len(source)))] == [
        (f"a.tar/{name}", [name, image]) for name in names
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_walk_is_that_of_tarfile(tmp_path, form):
    rng = np.random.default_rng(0)
    members = [
        ("d/" * int(rng.integers(70)) + f"{i}.bin", rng.bytes(int(rng.integers(2000))))
        for i in range(60)
    ]
    data = write_tar(tmp_path / "a.tar", members, form).read_bytes()
    found = list(walk_tar(lambda start, stop: data[start:stop], len(data)))
    with tarfile.open(tmp_path / "a.tar") as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar]
    assert [(m.name, m.start, m.data, m.size) for m in found] == expected
    assert [data[m.data : m.data + m.size] for m in found] == [content for _, content in members]


NUM = 12


@pytest.fixture
def stories(tmp_path):
    members = []
    for i in range(NUM):
        members += [(f"{i:02}.json", {"caption": f"no. {i} <image_1> and <image_2>"})]
        members += [(f"{i:02}-{k}.png", picture(2 * i + k, (9, 5 + i))) for k in (1, 2)]
    return write_tar(tmp_path / "a.tar", members), [name for name, _ in members]


def test_a_tar_that_was_cut_anywhere(tmp_path, stories):
    """All whole documents before the cut, and at most one bad one for the cut."""
    data = stories[0].read_bytes()
    with tarfile.open(stories[0]) as tar:
        content = [(m.name[:2], m.offset, m.offset_data + m.size) for m in tar]
    ids = [f"cut.tar/{i:02}" for i in range(NUM)]
    cuts = np.random.default_rng(0).integers(1, content[-1][2], 60)
    # Among them the ends of members and of their last blocks.
    for cut in map(int, [*cuts, *(c[1] for c in content[2:8]), *(c[2] for c in content[:6])]):
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        whole = [i for i in range(NUM) if content[3 * i + 2][2] <= cut]
        if not whole and cut < content[0][2]:
            continue
        found = outcomes(WebDatasetSource(tmp_path / "cut.tar"))
        assert found[: len(whole)] == ids[: len(whole)]
        rest = found[len(whole) :]
        begun = [c for c in content if c[1] < cut][-1]
        in_header = cut < begun[1] + 512
        inside = not in_header and cut < begun[2]
        if inside:
            assert rest == ["unreadable"], cut
        elif in_header:
            # Nobody knows whose header it was.
            assert rest in (["unreadable"], ["missing_image", "unreadable"]), cut
        else:
            assert rest in ([], ["missing_image"]), cut


def test_damage_inside_a_tar(tmp_path, stories):
    """A header that is overwritten costs its document, not those behind it."""
    path, _ = stories
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offsets = {m.name: m.offset for m in tar}
    data[offsets["03-2.png"] + 20] ^= 0xFF
    data[offsets["05.json"] : offsets["05.json"] + 512] = b"\xa5" * 512
    path.write_bytes(data)
    assert outcomes(WebDatasetSource(path)) == [
        *(f"a.tar/{i:02}" for i in range(3)),
        *("missing_image", "unreadable", "a.tar/04", "unreadable", "empty_text", "empty_text"),
        *(f"a.tar/{i:02}" for i in range(6, NUM)),
    ]
    with pytest.raises(DocumentError, match=r"^a\.tar: the tar is damaged or ends at byte \d+$"):
        WebDatasetSource(path)[4]


def test_tars_one_after_the_other_in_a_file(tmp_path):
    one, two = (
        write_tar(tmp_path / f"{k}.tar", [(f"{k}.txt", f"words {k}")]).read_bytes() for k in "ab"
    )
    (tmp_path / "both.tar").write_bytes(one + two)
    assert outcomes(WebDatasetSource(tmp_path / "both.tar")) == ["both.tar/a", "both.tar/b"]


def test_faults_of_documents(tmp_path):
    image = picture(0)
    members = [
        *(("good.txt", "words"), ("good.png", image)),
        *(("gone.json", {"caption": "see <image_1> and <image_2>"}), ("gone-1.png", image)),
        *(("blank.txt", " \n"), ("blank.png", image), ("alone.png", image)),
        *(("broken.json", "{'caption': 1}"), ("broken.png", image)),
        *(
            ("list.json", ["a"]),
            ("list.png", image),
            ("latin.txt", b"caf\xe9"),
            ("latin.png", image),
        ),
        *(("other.txt", "see <image_2>"), ("other-1.png", image)),
        *(("two.txt", "words"), ("two-1.png", image), ("two-2.png", image), ("empty.json", {})),
    ]
    source = WebDatasetSource(write_tar(tmp_path / "a.tar", members))
    assert outcomes(source) == [
        *("a.tar/good", "missing_image", "empty_text", "empty_text", "unreadable"),
        *("unreadable", "unreadable", "missing_image", "bad_document", "empty_text"),
    ]
    with pytest.raises(DocumentError, match="no tag of the text names any of 2 images"):
        source[8]
    with pytest.raises(DocumentError, match=r"^a.tar/gone: there is no image for <image_2>$"):
        source[1]
    with pytest.raises(DocumentError, match=r"^a.tar/alone: the caption is missing$"):
        source[3]
    with pytest.raises(IndexError):
        source[10]


def test_files_that_are_no_tars(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>" * 1000)
    with pytest.raises(ValueError, match=r"no \.json or \.txt text and no image in any"):
        WebDatasetSource(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", [("k.txt", "words")])
    (tmp_path / "c.tar").write_bytes(b"")
    assert outcomes(WebDatasetSource(tmp_path)) == ["unreadable", "b.tar/k"]


def test_a_scan_is_kept_until_the_file_changes(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(files, "_SMALLEST_CACHED", 0)
    scans = []
    monkeypatch.setattr(
        webdataset,
        "scan_tar",
        lambda path, scan=webdataset.scan_tar: scans.append(path) or scan(path),
    )
    path = write_tar(tmp_path / "a.tar", [("k.txt", "words"), ("k.png", picture(0))])
    first = WebDatasetSource(path)
    kept = list(cache.rglob("*.npz"))
    assert (len(scans), len(kept)) == (1, 1)
    assert kept[0].parent == cache / "nextstep_jax" / "scans"
    assert shown(WebDatasetSource(path)[0]) == shown(first[0])
    assert len(scans) == 1
    # Half a file in the cache, and a file that has changed, are scanned anew.
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    assert len(WebDatasetSource(path)) == 1
    assert len(scans) == 2
    write_tar(path, [("k.txt", "words"), ("j.txt", "x" * 100)])
    assert outcomes(WebDatasetSource(path)) == ["a.tar/k", "a.tar/j"]
    assert len(scans) == 3
    # A cache that cannot be written is none.
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    assert len(WebDatasetSource(path)) == 2
    assert len(scans) == 4


def test_read_by_threads_and_after_pickling(tmp_path, monkeypatch):
    """More tars than are held open at a time."""
    monkeypatch.setattr(files, "_MAX_OPEN", 2)
    for k in range(6):
        write_tar(tmp_path / f"{k}.tar", [(f"{i}.txt", f"{k} {i}") for i in range(10)])
    source = WebDatasetSource(tmp_path)
    expected = {n: f"{n // 10} {n % 10}" for n in range(60)}
    found = {}

    def read(thread):
        order = np.random.default_rng(thread).permutation(60)
        found[thread] = {int(i): source[int(i)].parts[0].text for i in order}

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[n] == expected for n in range(8))
    copy = pickle.loads(pickle.dumps(source))
    assert {i: copy[i].parts[0].text for i in range(60)} == expected
    assert copy.fingerprint == source.fingerprint
    # The file goes away.
    (tmp_path / "3.tar").unlink()
    copy = pickle.loads(pickle.dumps(source))
    assert [r for r in outcomes(copy) if "/" not in r] == ["unreadable"] * 10


def test_images_are_passed_on_as_they_are(tmp_path):
    image = picture(0, kind="JPEG")
    source = WebDatasetSource(write_tar(tmp_path / "a.tar", [("a.txt", "w"), ("a.jpg", image)]))
    assert source[0].images == (Image(encoded=image),)


def test_names_that_are_not_utf8(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name, content in (("café.txt", b"words"), ("café.png", b"any")):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    document = WebDatasetSource(path)[0]
    assert (document.id, shown(document)) == ("a.tar/caf\\xe9", ["words", b"any"])
