"""Published methods as recipes: one frozen dataclass each, its fields the method's hyperparameters."""

from jkd.recipe import Combine as Combine
from jkd.recipes.features import FitNet as FitNet
from jkd.recipes.features import Match as Match
from jkd.recipes.logits import DKD as DKD
from jkd.recipes.logits import KD as KD
from jkd.recipes.logits import FunMatch as FunMatch
from jkd.recipes.logits import Supervised as Supervised
