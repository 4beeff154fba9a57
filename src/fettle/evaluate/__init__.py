"""Scores: tasks by generation and likelihood, perplexity, intervals, comparisons."""

from fettle.core.spec import one_of
from fettle.evaluate.labels import Labels as Labels
from fettle.evaluate.labels import Tags as Tags
from fettle.evaluate.perplexity import Perplexity as Perplexity
from fettle.evaluate.preference import Preferences as Preferences
from fettle.evaluate.results import Results as Results
from fettle.evaluate.results import compare as compare
from fettle.evaluate.run import evaluate as evaluate
from fettle.evaluate.run import find as find
from fettle.evaluate.run import problems as problems
from fettle.evaluate.run import require_evaluations as require_evaluations
from fettle.evaluate.run import scored as scored
from fettle.evaluate.tasks import Evaluation as Evaluation
from fettle.evaluate.tasks import TaskFile as TaskFile

EvalSpec = one_of(Evaluation, default="task")  # the type of an item of `evaluate:`
