"""What `jkd export` wrote, asked twice: as a program for JAX alone, then as a directory for `transformers`.

    python tests/transformers/exported.py program DIR…        # in the environment of the tests: keeps inputs and answers beside DIR
    python tests/transformers/exported.py transformers DIR…   # in one that has PyTorch and transformers: must answer the same

tests/transformers/run.sh makes the directories and calls both.
"""

import json
import sys
from pathlib import Path

import numpy as np

BATCH = 3


def program(folder):
    """Answers of the StableHLO program to drawn inputs."""
    import jax
    from safetensors.numpy import load_file

    card = json.loads((folder / "card.json").read_text())
    rng = np.random.default_rng(0)
    inputs = {}
    for name, about in card["program"]["inputs"].items():
        shape = [BATCH if size == "batch" else size for size in about["shape"]]
        most = {"image": 256, "mask": 2, "token_type": 2, "segment": 2}.get(name, 32)  # every vocabulary here is larger
        inputs[name] = rng.integers(0, most, shape).astype(about["dtype"])
    if "mask" in inputs:
        inputs["mask"] = np.sort(inputs["mask"])[:, ::-1].copy()  # padding on the right
        inputs["mask"][:, 0] = 1
    if "segment" in inputs:
        inputs["segment"] = inputs["mask"].astype(inputs["segment"].dtype)  # one document, which is all that transformers knows
    exported = jax.export.deserialize(bytearray((folder / card["program"]["file"]).read_bytes()))
    answers = jax.jit(exported.call)(load_file(folder / "model.safetensors"), inputs)
    np.savez(folder.with_suffix(".npz"), **inputs, **{f"answer/{name}": value for name, value in answers.items()})


def transformers(folder):
    """The same inputs through the class that the directory's config names, its tokenizer and image processor loaded too."""
    import torch
    import transformers

    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, told = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    kept = np.load(folder.with_suffix(".npz"))
    if "image" in kept:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        arguments = processor(list(kept["image"]), return_tensors="pt")
    else:
        if (folder / "tokenizer.json").exists():
            text = transformers.PreTrainedTokenizerFast.from_pretrained(folder)  # the stand-ins are all of one kind, BERT's too
            assert text.decode(text("this")["input_ids"]) == "this"
        names = {"tokens": "input_ids", "mask": "attention_mask", "token_type": "token_type_ids"}
        arguments = {names[name]: torch.from_numpy(kept[name]).long() for name in kept if name in names}
    with torch.no_grad():
        out = model.float().eval()(**arguments)
    counted = kept["mask"].astype(bool) if "mask" in kept else slice(None)
    compared = 0
    for name, ours in ((name.removeprefix("answer/"), kept[name]) for name in kept if name.startswith("answer/")):
        theirs = {"logits": "logits", "hidden": "last_hidden_state", "pooled": "pooler_output"}[name]
        if theirs in out:
            rows = counted if ours.ndim == 3 else slice(None)
            found = out[theirs].numpy()[
                ..., : ours.shape[-1]
            ]  # rows of the head that only pad a vocabulary are no classes here
            np.testing.assert_allclose(found[rows], ours[rows], atol=1e-4, rtol=1e-4, err_msg=name)
            compared += 1
    assert compared, f"{sorted(kept)} and {sorted(out)} have nothing in common"
    print(f"transformers {transformers.__version__}: {kind.__name__} answers as the exported program does")


if __name__ == "__main__":
    what, *folders = sys.argv[1:]
    for folder in map(Path, folders):
        {"program": program, "transformers": transformers}[what](folder)
