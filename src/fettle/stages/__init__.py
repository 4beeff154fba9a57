"""What a recipe runs."""

from fettle.stages.artifact import open_model as open_model
from fettle.stages.check import check as check
from fettle.stages.pipeline import Pipeline as Pipeline
from fettle.stages.pipeline import load_recipe as load_recipe
from fettle.stages.pipeline import run as run
from fettle.stages.pipeline import schema as schema
from fettle.stages.quantize import Quantize as Quantize
from fettle.stages.tune import Recipe as Recipe
