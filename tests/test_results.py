"""What is written of a run that is done: with the names of its classes where the data know them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from PIL import Image

from jkd import data, results
from jkd.evaluate import Evaluation


class Listed(list):
    """Examples that say of their labels what a Hugging Face ``Dataset`` says."""

    features = {"label": SimpleNamespace(num_classes=2, names=["no", "yes"])}


EXAMPLES = [{"image": np.zeros((2, 2, 1), np.uint8), "label": 1}] * 4


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (lambda folder: data.image_folder(folder, eval=0.5), ["cat", "dog"]),
        (lambda folder: data.image_folder(folder), ["cat", "dog"]),
        (lambda folder: data.source(Listed(EXAMPLES), labelled=0.5, eval=Listed(EXAMPLES)), ["no", "yes"]),
        (lambda folder: data.digits(), None),
    ],
    ids=["held out", "no evaluation", "labels that say", "digits"],
)
def test_names_of_classes(made, names, tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / "images" / name / f"{number}.png")
    ctx = SimpleNamespace(run=SimpleNamespace(data=made(tmp_path / "images")))
    results.write(epath.Path(tmp_path), ctx, {"accuracy": 0.5}, Evaluation({"accuracy": 0.5}, {}))
    found = json.loads((tmp_path / "result.json").read_text())
    assert found.pop("classes", None) == names
    assert found == {"summary": {"accuracy": 0.5}, "metrics": {"accuracy": 0.5}, "details": {}}
