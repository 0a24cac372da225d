"""Examples, and how they become batches: sources, the pipeline, host-side maps (`vision`) and device-side `augment`.

Light to import: grain, TFDS, scikit-learn and Pillow load when they are first used.
"""

from __future__ import annotations

from jkd.data import augment, tokenizer, vision
from jkd.data.augment import At, Choose, Crop, CutMix, Flip, Mixup
from jkd.data.batch import Record, check_batch
from jkd.data.folders import image_folder
from jkd.data.masking import MaskTokens
from jkd.data.pipeline import Data, Map, Source
from jkd.data.published import tfds
from jkd.data.sources import arrays, digits, source
from jkd.data.text import documents, jsonl, parquet, stdlib_text, text_files, tfds_text
from jkd.data.views import fake, fixed_views, join, labelled_only, subset

__all__ = [
    "At", "Choose", "Crop", "CutMix", "Data", "Flip", "Map", "MaskTokens", "Mixup", "Record", "Source", "arrays", "augment",
    "check_batch", "digits", "documents", "fake", "fixed_views", "image_folder", "join", "jsonl", "labelled_only", "parquet",
    "source", "stdlib_text", "subset", "text_files", "tfds", "tfds_text", "tokenizer", "vision",
]  # fmt: skip
