"""Published weights in and out: directories of the Hugging Face kind, read into sharded arrays and written back."""

from jkd.models.pretrained.families import FAMILIES as FAMILIES
from jkd.models.pretrained.families import describing as describing
from jkd.models.pretrained.family import Family as Family
from jkd.models.pretrained.reading import Pretrained as Pretrained
from jkd.models.pretrained.reading import from_config as from_config
from jkd.models.pretrained.reading import from_pretrained as from_pretrained
from jkd.models.pretrained.writing import save_pretrained as save_pretrained
