"""Networks, published weights in and out (`from_pretrained`), and adapters that make a Model of any other network."""

from jkd.models import decoder as decoder
from jkd.models import encoder as encoder
from jkd.models import mlp as mlp
from jkd.models import resnet as resnet
from jkd.models import vit as vit
from jkd.models.adapt import from_function as from_function
from jkd.models.adapt_linen import from_linen as from_linen
from jkd.models.adapt_nnx import from_nnx as from_nnx
from jkd.models.compose import ensemble as ensemble
from jkd.models.compose import prepared as prepared
from jkd.models.pretrained import Pretrained as Pretrained
from jkd.models.pretrained import from_config as from_config
from jkd.models.pretrained import from_pretrained as from_pretrained
from jkd.models.pretrained import save_pretrained as save_pretrained
