"""Recipes: experiments as functions that return complete configurations."""

from rtk.recipes.demo import demo
from rtk.recipes.recipe import STAGES, Recipe, run, run_stage

__all__ = ["STAGES", "Recipe", "demo", "run", "run_stage"]
