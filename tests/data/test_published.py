"""A real TFDS data set, written here with TFDS's own writer and no TensorFlow, read by name."""

import io
import sys

import numpy as np
import pytest

from jkd import data
from jkd.data import published, vision
from jkd.errors import InputError

TRAIN, TEST = 50, 15


def encoded(pixels, kind="PNG"):
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    content.seek(0)
    return content


def write(folder, name, version, features, splits, file_format="array_record"):
    """Prepared as ``tfds build`` leaves it: the same layout, metadata and encodings."""
    import tensorflow_datasets as tfds

    where = folder / name / version
    where.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(name=name, version=tfds.core.Version(version), data_dir=str(where), module_name="")
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=20, file_format=file_format)
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (TRAIN + TEST, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, pixels):
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    for name, labels in (("cifar10", {"label": 10}), ("cifar100", {"label": 100, "coarse_label": 20})):
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3)),
            **{key: tfds.features.ClassLabel(num_classes=count) for key, count in labels.items()},
        }

        def example(row, labels=labels):
            return {"id": f"train_{row}", "image": encoded(pixels[row]), **{key: row % n for key, n in labels.items()}}

        splits = {"train": [example(row) for row in range(TRAIN)], "test": [example(row) for row in range(TRAIN, TRAIN + TEST)]}
        write(folder, name, "3.0.2", features, splits)

    # Pictures of many sizes and encodings, as ImageNet has them: JPEG in RGB, gray and CMYK, and a PNG.
    rng = np.random.default_rng(1)

    def picture(row):
        from PIL import Image

        height, width = rng.integers(40, 90, size=2)
        smooth = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((int(width), int(height)))
        content = io.BytesIO()
        mode, kind = (("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"))[row % 4]
        smooth.convert(mode).save(content, kind)
        content.seek(0)
        return {"file_name": f"{row}.JPEG", "image": content, "label": row % 1000}

    features = {
        "file_name": tfds.features.Text(),
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=1000),
    }
    splits = {"train": [picture(row) for row in range(24)], "validation": [picture(row) for row in range(10)]}
    write(folder, "imagenet2012", "5.1.0", features, splits)
    return folder


def first(batches):
    try:
        return next(batches)
    finally:
        batches.close()


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("name", "label", "classes"), [("cifar10", "label", 10), ("cifar100", "label", 100), ("cifar100", "coarse_label", 20)]
)
def test_cifar(prepared, pixels, name, label, classes, in_memory):
    made = data.tfds(name, label=label, data_dir=prepared, in_memory=in_memory)
    assert (made.train_size, made.eval_size, made.classes) == (TRAIN, TEST, classes)
    batch = first(made.batches(TRAIN, seed=0))
    np.testing.assert_array_equal(batch["image"], pixels[batch["index"]])
    np.testing.assert_array_equal(batch["label"], batch["index"] % classes)
    assert {key: (array.shape, array.dtype) for key, array in batch.items()} == {
        key: (spec.shape, spec.dtype) for key, spec in made.spec(TRAIN).items()
    }
    evaluated = list(made.eval_batches(8))
    np.testing.assert_array_equal(np.concatenate([each["image"] for each in evaluated])[:TEST], pixels[TRAIN:])
    assert sum(each["weight"].sum() for each in evaluated) == TEST


def test_imagenet(prepared):
    made = data.tfds(
        "imagenet2012",
        eval_split="validation",
        data_dir=prepared,
        train_maps=vision.imagenet_train(32),
        eval_maps=vision.imagenet_eval(32),
    )
    assert (made.train_size, made.eval_size, made.classes) == (24, 10, 1000)
    batch = first(made.batches(24, seed=0))
    assert batch["image"].shape == (24, 32, 32, 3)
    assert made.spec(24)["image"].shape == (24, 32, 32, 3)
    gray = batch["image"][batch["index"] % 4 == 1]
    assert (gray == gray[..., :1]).all()
    assert [each["image"].shape for each in made.eval_batches(8)] == [(8, 32, 32, 3)] * 2


def test_hosts_and_restarts(prepared):
    made = data.tfds("cifar10", data_dir=prepared, train_maps=vision.cifar_train(), threads=3)
    batches = made.batches(8, seed=4)
    whole = [next(batches) for _ in range(9)]
    batches.close()
    for host in range(2):
        shard = first(made.batches(8, seed=4, start=8, process=(host, 2)))
        for key, array in shard.items():
            np.testing.assert_array_equal(array, whole[8][key][4 * host : 4 * host + 4])


def test_slices_and_labelled(prepared):
    made = data.tfds("cifar10", split="train[10:]", eval_split=None, data_dir=prepared, labelled=0.25)
    assert (made.train_size, made.has_eval, made.eval_size) == (40, False, 0)
    batch = first(made.batches(40, seed=0))
    assert batch["labelled"].sum() == 10
    np.testing.assert_array_equal(batch["label"], np.where(batch["labelled"] > 0, (batch["index"] + 10) % 10, 0))


def test_a_set_that_is_not_prepared_still_has_shapes(tmp_path):
    cifar = data.tfds("cifar100", data_dir=tmp_path)
    assert cifar.classes == 100
    assert cifar.spec(2)["image"].shape == (2, 32, 32, 3)
    imagenet = data.tfds("imagenet2012", eval_split="validation", data_dir=tmp_path, train_maps=vision.imagenet_train(64))
    assert (imagenet.classes, imagenet.spec(2)["image"].shape) == (1000, (2, 64, 64, 3))
    assert imagenet.eval.names[:2] == ("n01440764", "n01443537")
    noise = data.fake(imagenet, train_size=8, eval_size=4)
    assert first(noise.batches(4, seed=0))["image"].shape == (4, 64, 64, 3)


ERRORS = {
    "not prepared": (
        lambda made, empty: data.tfds("cifar100", data_dir=empty).train_size,
        r"'cifar100' is not prepared in .*pip install tensorflow .*: tfds build cifar100 --file_format=array_record ",
    ),
    "imagenet": (
        lambda made, empty: data.tfds("imagenet2012", data_dir=empty).batches(8, seed=0),
        r"tfds build imagenet2012 .*--manual_dir=<folder with ILSVRC2012_img_train\.tar",
    ),
    "name": (lambda made, empty: data.tfds("cifr10").train_size, "no data set 'cifr10'.*did you mean 'cifar10'"),
    "version": (lambda made, empty: data.tfds("cifar10:9.9.9").train_size, r"cannot be loaded at version 9\.9\.9"),
    "config": (lambda made, empty: data.tfds("cifar10/large").train_size, "large not found"),
    "split": (
        lambda made, empty: data.tfds("cifar10", split="trian", data_dir=made).train_size,
        "split 'trian'; did you mean 'train'",
    ),
    "label": (lambda made, empty: data.tfds("cifar10", label="lable").classes, "feature 'lable'; did you mean 'label'"),
    "sizes": (
        lambda made, empty: first(data.tfds("imagenet2012", data_dir=made).batches(24, seed=0)),
        r"image of record \d+ has shape .*; add a map that gives one size, such as vision\.random_resized_crop",
    ),
    "sizes in memory": (
        lambda made, empty: data.tfds("imagenet2012", data_dir=made, in_memory=True).train.columns(),
        "imagenet2012: in_memory needs one size, but image of record",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_that_helps(prepared, tmp_path, case, capfd):
    call, message = ERRORS[case]
    with pytest.raises(InputError, match=message) as raised:
        call(prepared, tmp_path)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_set_in_another_format_says_how_to_convert_it(tmp_path, prepared):
    import shutil

    shutil.copytree(prepared / "cifar10", tmp_path / "cifar10")
    described = tmp_path / "cifar10/3.0.2/dataset_info.json"
    described.write_text(described.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        InputError, match=r"is tfrecord, which has no random access; .*tfds convert_format --dataset_version_dir="
    ):
        data.tfds("cifar10", data_dir=tmp_path).train_size  # noqa: B018


def test_a_damaged_image_is_named(tmp_path):
    import tensorflow_datasets as tfds

    features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=2)}
    good = encoded(np.zeros((8, 8, 3), np.uint8))
    cut = io.BytesIO(good.getvalue()[:40])
    write(tmp_path, "tiny", "1.0.0", features, {"train": [{"image": good, "label": 0}, {"image": cut, "label": 1}]})
    made = data.tfds("tiny", eval_split=None, data_dir=tmp_path)
    assert made.classes == 2
    with pytest.raises(InputError, match="tiny train, record 1: an image of 40 bytes cannot be decoded"):
        first(made.batches(2, seed=0))


def test_tensorflow_is_not_needed(prepared):
    assert data.tfds("cifar10", data_dir=prepared).train_size == TRAIN
    assert "tensorflow" not in sys.modules
    assert published.Tfds(name="a", split="b") == published.Tfds(name="a", split="b")
