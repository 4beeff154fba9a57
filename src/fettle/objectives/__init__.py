"""What a model is trained towards; one file an objective."""

from fettle.core.families import Objective
from fettle.core.spec import one_of
from fettle.objectives.classify import Classify as Classify
from fettle.objectives.sft import SFT as SFT
from fettle.objectives.tag import Tag as Tag

AnyObjective = one_of(Objective)
