import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as F

from rtk.data.images import common_size, decode, open_image, shorter_side, to_rgb, to_square
from rtk.errors import RtkError

ORIENTATION = 0x0112
# What a camera that was held so has stored: transposing it back gives the upright image.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def random_image(width=12, height=7, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def read(path):
    return np.asarray(open_image(str(path), to_rgb))


@pytest.mark.parametrize("orientation", STORED)
def test_a_cameras_orientation_is_applied(tmp_path, orientation):
    upright, turn = random_image(), STORED[orientation]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), np.asarray(upright))
    assert common_size([str(tmp_path / "a.png")]) == (12, 7)


def test_transparent_parts_become_white(tmp_path):
    rgba = random_image(channels=4)
    rgba.save(tmp_path / "a.png")
    pixels = np.asarray(rgba).astype(float)
    alpha = pixels[..., 3:] / 255
    expected = alpha * pixels[..., :3] + (1 - alpha) * 255
    assert np.abs(read(tmp_path / "a.png") - expected).max() <= 1
    grey = Image.merge("LA", (Image.new("L", (2, 2), 10), Image.new("L", (2, 2), 0)))
    grey.save(tmp_path / "b.png")
    assert (read(tmp_path / "b.png") == 255).all()


def test_a_transparent_colour_becomes_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "a.png", transparency=0)
    assert read(tmp_path / "a.png").tolist() == [[[255, 255, 255], [40, 50, 60]]]
    random_image().save(tmp_path / "b.png", transparency=(300, 0, 0))  # of no pixel
    assert np.array_equal(read(tmp_path / "b.png"), np.asarray(random_image()))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_other_modes_are_converted(tmp_path, mode):
    image = random_image().convert(mode)
    image.save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


def test_cmyk(tmp_path):
    Image.new("CMYK", (3, 2), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = read(tmp_path / "a.jpg").reshape(-1, 3).mean(0)
    assert red > 250 and green < 5 and blue < 5


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 40_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(RtkError, match=r"a\.png cannot be decoded .*more than 8 bits"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize(
    "size", [(300, 200), (200, 301), (224, 224), (50, 400), (1000, 7)], ids=str
)
def test_squares_are_torchvisions_resize_and_center_crop(size):
    image = random_image(*size)
    expected = F.center_crop(F.resize(image, 256), 224)
    assert np.array_equal(np.asarray(to_square(image, 256, 224)), np.asarray(expected))


def test_large_images_lose_their_margin():
    assert [shorter_side(size) for size in (224, 299, 65, 64, 32)] == [256, 342, 74, 64, 32]


def test_decode_keeps_the_order(tmp_path):
    images = [random_image(seed=i) for i in range(20)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    got = decode([str(tmp_path / f"{i}.png") for i in range(20)], 12, 7, None)
    for image, tensor in zip(images, got, strict=True):
        assert np.array_equal(tensor.permute(1, 2, 0).numpy(), np.asarray(image))
