"""Which images a data set may name, and which of them are read."""

import io
import struct
import zlib

import pytest
from chat_rows import ROW, refusal, write
from PIL import Image, ImageFile

from amvl_fast.data import ChatDataset, images
from amvl_fast.data.images import confined, peek_image, read_image


def png(size=(8, 4), colour="red", **options):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG", **options)
    return file.getvalue()


URLS = [
    "http://127.0.0.1/red.png",
    "HTTPS://host/red.png",
    "s3://bucket/red.png",
    "file:///red.png",
    "file:red.png",
    "hf://datasets/org/name/red.png",
    "data:image/png;base64,iVBORw0KGgo=",
    "zip://red.png::https://host/a.zip",
]


@pytest.mark.parametrize("url", URLS)
def test_urls_are_refused(folder, url):
    (folder / url.partition(":")[0]).mkdir()
    dataset = ChatDataset(write(folder, [ROW | {"images": [url]}]))
    for call in (dataset.validate, lambda: dataset[0]):
        message = refusal(call)
        assert f"Image {url} of row 0" in message
        assert "it is a URL" in message


OUTSIDE = [
    "../red.png",
    "sub/../../red.png",
    "sub/../blue.png",
    "sub/..",
    "{parent}/red.png",
    "/etc/hostname",
    "//red.png",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_cannot_leave_the_root(folder, name):
    root = folder / "root"
    (root / "sub").mkdir(parents=True)
    for place in (root, root / "sub"):
        (place / "blue.png").write_bytes(png())
    dataset = ChatDataset(write(folder, [ROW | {"images": [name.format(parent=folder)]}]), image_root=root)
    for call in (dataset.validate, lambda: dataset[0]):
        message = refusal(call)
        assert "has a part '..'" in message if ".." in name else "lies outside of image_root" in message


def test_paths_within_the_root_are_read(folder, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "linked.png").write_bytes(png(colour="lime"))
    (folder / "link").symlink_to(elsewhere)  # the user's own, and so the user's wish
    (folder / "a..b.png").write_bytes(png())
    names = ["red.png", "./red.png", str(folder / "red.png"), "a..b.png", "link/linked.png"]
    rows = [ROW | {"images": [name]} for name in names]
    dataset = ChatDataset(write(folder, rows))
    dataset.validate()
    assert dataset[4]["images"][0].getpixel((0, 0)) == (0, 255, 0)
    monkeypatch.chdir(folder.parent)
    assert len(ChatDataset(dataset.path, image_root=folder.name)[2]["images"]) == 1
    assert confined("red.png", folder) == folder / "red.png"


def test_a_path_next_to_the_root_is_outside(folder):
    (folder / "images").mkdir()
    (folder / "images2").mkdir()
    with pytest.raises(ValueError, match="outside"):
        confined(str(folder / "images2" / "red.png"), folder / "images")
    with pytest.raises(ValueError, match="no image_root"):
        confined("red.png", None)


def bomb(width, height):
    """A PNG whose header claims a size that its few bytes of pixels do not have."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


# Where Pillow only warns, and where it refuses.
@pytest.mark.parametrize("side", [10_000, 20_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_they_are_decoded(folder, side, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    (folder / "red.png").write_bytes(bomb(side, side))
    dataset = ChatDataset(write(folder, [ROW]))
    for call in (dataset.validate, lambda: dataset.validate(decode_images=False), lambda: dataset[0]):
        assert "Image" in (message := refusal(call))
        assert "pixels" in message


def test_the_limit_is_in_pixels(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 32)
    assert read_image(png((8, 4))).size == (8, 4)
    for read in (read_image, peek_image):
        with pytest.raises(ValueError, match="11 x 3 pixels"):
            read(png((11, 3)))


def test_truncated_images_are_refused():
    whole = png((64, 64))
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "JPEG")
    for content in (whole[: len(whole) // 2], whole[:20], file.getvalue()[:-200], b"", b"text"):
        with pytest.raises(images.UNREADABLE):
            read_image(content)


def test_programs_are_not_started_for_an_image():
    with pytest.raises(OSError, match="cannot identify"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        file = io.BytesIO()
        frames[0].save(
            file, kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        image = read_image(file.getvalue())
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 0, 0))
