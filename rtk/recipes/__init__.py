"""Recipes: experiments as functions that return complete configurations."""

from rtk.recipes.demo import demo
from rtk.recipes.figures import FIGURES
from rtk.recipes.keep import keep
from rtk.recipes.recipe import STAGES, Recipe, run, run_stage
from rtk.recipes.reproduce import list_figures, reproduce, summary
from rtk.recipes.scale import SCALES, Scale

__all__ = [
    "FIGURES",
    "SCALES",
    "STAGES",
    "Recipe",
    "Scale",
    "demo",
    "keep",
    "list_figures",
    "reproduce",
    "run",
    "run_stage",
    "summary",
]
