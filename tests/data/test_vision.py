"""Host-side maps against their definitions."""

import io

import numpy as np
import pytest

from jkd.data import vision
from jkd.errors import InputError


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(height, width, channels=3):
    return rng(7).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(
    ("each", "shape"),
    [
        (vision.random_crop(2), (20, 30, 3)),
        (vision.flip(), (20, 30, 3)),
        (vision.random_resized_crop(16), (16, 16, 3)),
        (vision.resize(10), (10, 15, 3)),
        (vision.resize((7, 9)), (7, 9, 3)),
        (vision.center_crop(12), (12, 12, 3)),
    ],
)
def test_shapes_and_repeatability(each, shape):
    record = {"image": noise(20, 30), "label": 4}
    out = each(record, rng(1))
    assert (out["image"].shape, out["image"].dtype, out["label"]) == (shape, np.uint8, 4)
    np.testing.assert_array_equal(out["image"], each(record, rng(1))["image"])
    np.testing.assert_array_equal(record["image"], noise(20, 30))
    assert eval(repr(each), vars(vision)) == each  # what a config prints makes it again


def test_random_crop_takes_every_window_of_the_padded_image():
    image = noise(5, 6)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {padded[top : top + 5, left : left + 6].tobytes() for top in range(3) for left in range(3)}
    seen = {vision.random_crop(1)({"image": image}, rng(seed))["image"].tobytes() for seed in range(200)}
    assert seen == windows


def test_flip():
    image = noise(4, 4)
    flipped = [np.array_equal(vision.flip()({"image": image}, rng(seed))["image"], image[:, ::-1]) for seed in range(400)]
    assert 0.4 < np.mean(flipped) < 0.6
    np.testing.assert_array_equal(vision.flip(1.0)({"image": image}, rng())["image"], image[:, ::-1])
    np.testing.assert_array_equal(vision.flip(0.0)({"image": image}, rng())["image"], image)


def test_random_resized_crop_keeps_area_and_ratio():
    # On a gradient image the value range across an axis tells the window's share of that axis.
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    image = np.stack([np.tile(ramp[:, None], (1, 256)), np.tile(ramp[None], (256, 1)), np.zeros((256, 256), np.uint8)], -1)
    for seed in range(60):
        out = vision.random_resized_crop(64)({"image": image}, rng(seed))["image"].astype(int)
        height, width = np.ptp(out[..., 0]) / 255, np.ptp(out[..., 1]) / 255
        assert 0.06 < height * width <= 1.0
        assert 0.72 < width / height < 1.39
    # Where no window fits, the largest central one with a ratio in range.
    assert vision.random_resized_crop(8, scale=(1.0, 1.0))({"image": noise(4, 100)}, rng())["image"].shape == (8, 8, 3)
    assert vision.random_resized_crop(8, scale=(1.0, 1.0))({"image": noise(100, 4)}, rng())["image"].shape == (8, 8, 3)


def test_resize_averages_when_it_shrinks():
    image = noise(8, 8, 1)
    small = vision.resize((1, 1))({"image": image}, rng())["image"]
    assert abs(int(small[0, 0, 0]) - image.mean()) < 25
    flat = np.full((9, 7, 3), 77, np.uint8)
    assert (vision.resize(20)({"image": flat}, rng())["image"] == 77).all()


@pytest.mark.parametrize(
    ("kind", "mode", "channels"), [("PNG", "RGB", 3), ("PNG", "L", 1), ("PNG", "RGBA", 4), ("PNG", "P", 3), ("JPEG", "CMYK", 3)]
)
def test_decode(kind, mode, channels):
    from PIL import Image

    content = io.BytesIO()
    picture = Image.fromarray(noise(6, 5)).convert(mode)
    picture.save(content, kind)
    out = vision.decode(channels)({"image": content.getvalue()}, rng())["image"]
    assert (out.shape, out.dtype) == ((6, 5, channels), np.uint8)
    if kind == "PNG" and mode != "P":
        np.testing.assert_array_equal(out, np.asarray(picture).reshape(6, 5, channels))


@pytest.mark.parametrize(
    ("orientation", "upright"), [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1))]
)
def test_a_camera_that_was_held_otherwise(orientation, upright):
    from PIL import Image

    stored = rng().integers(0, 255, (4, 6, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    for kind in ("PNG", "TIFF"):  # Pillow turns TIFF by itself
        content = io.BytesIO()
        Image.fromarray(stored).save(content, kind, exif=exif)
        np.testing.assert_array_equal(vision.decode_image(content.getvalue()), upright(stored), err_msg=kind)


def test_every_kind_of_broken_image_is_one(monkeypatch):
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(rng().integers(0, 255, (200, 200, 3)).astype(np.uint8)).save(content, "PNG")
    whole = content.getvalue()
    second = whole.rindex(b"IDAT")
    assert second > len(whole) // 3
    for broken, kind in (
        (whole[:-9000], OSError),
        (whole[:20], OSError),
        (whole[:second] + bytes(4) + whole[second + 4 :], SyntaxError),
    ):
        with pytest.raises(InputError, match="bytes cannot be decoded") as found:
            vision.decode_image(broken)
        assert isinstance(found.value.__cause__, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="exceeds limit of"):
        vision.decode_image(whole)
    with pytest.raises(InputError, match=r"channels=2: give 1 \(gray\), 3"):
        vision.decode_image(whole, 2)


def test_standard_stacks():
    record = {"image": noise(300, 400)}
    for maps, shape in [
        (vision.imagenet_train(), (224, 224, 3)),
        (vision.imagenet_eval(), (224, 224, 3)),
        (vision.cifar_train(), (300, 400, 3)),
    ]:
        out = record
        for each in maps:
            out = each(out, rng())
        assert out["image"].shape == shape
    assert vision.cifar_eval() == ()
    assert vision.imagenet_eval()[0] == vision.resize(256)


@pytest.mark.parametrize(
    ("each", "image", "message"),
    [
        (vision.center_crop(9), noise(8, 20), r"center_crop\(9\): the image is \[8, 20, 3\]"),
        (vision.resize(4), noise(8, 8).astype(np.float32), "needs uint8"),
        (vision.decode(), b"no image at all", "15 bytes cannot be decoded"),
    ],
)
def test_errors(each, image, message):
    with pytest.raises(InputError, match=message):
        each({"image": image}, rng())
