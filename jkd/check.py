"""A whole experiment, resolved and traced before any of it trains."""

from __future__ import annotations

from jkd import teachers
from jkd.config import Experiment, Run
from jkd.errors import InputError
from jkd.recipe import Recipe
from jkd.resolve import make_context
from jkd.step import make_step
from jkd.types import Model


def check(experiment: Experiment) -> None:
    """Resolves every run and traces its step, with the earlier runs' networks, not yet weights, as teachers.

    Left out is what only training or a function between the runs can tell: runs after a function node, and runs whose teacher is
    what a recipe with a `Recipe.deploy` of its own makes.

    Raises:
        InputError: as the run itself would, with the run's name.
    """
    products: dict[str, Model] = {}
    for name, node in experiment.nodes.items():
        if not isinstance(node, Run):
            continue
        run = teachers.unweighted(node, products)
        if run is None:
            continue
        try:
            ctx = make_context(run)
            make_step(ctx)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if type(node.recipe).deploy is Recipe.deploy:
            products[name] = ctx.student
