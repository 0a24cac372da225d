"""Examples, and how they become batches: sources, the pipeline, host-side maps (`vision`) and device-side `augment`.

Light to import: grain, TFDS, scikit-learn and Pillow load when they are first used.
"""

from __future__ import annotations

from jkd.data.pipeline import Data, Map, Record, Source, check_batch, join
from jkd.data.sources import arrays, digits, source

__all__ = ["Data", "Map", "Record", "Source", "arrays", "check_batch", "digits", "join", "source"]
