"""What a model is trained towards; one file an objective."""

from fettle.core.families import Objective
from fettle.core.spec import one_of
from fettle.objectives.best_of import BestOf as BestOf
from fettle.objectives.cdpo import CDPO as CDPO
from fettle.objectives.classify import Classify as Classify
from fettle.objectives.distill import Distill as Distill
from fettle.objectives.dpo import DPO as DPO
from fettle.objectives.grpo import GRPO as GRPO
from fettle.objectives.hinge import Hinge as Hinge
from fettle.objectives.ipo import IPO as IPO
from fettle.objectives.kto import KTO as KTO
from fettle.objectives.orpo import ORPO as ORPO
from fettle.objectives.policy import PolicyGradient as PolicyGradient
from fettle.objectives.ppo import PPO as PPO
from fettle.objectives.reinforce import REINFORCE as REINFORCE
from fettle.objectives.reward import Reward as Reward
from fettle.objectives.rloo import RLOO as RLOO
from fettle.objectives.robust import Robust as Robust
from fettle.objectives.sft import SFT as SFT
from fettle.objectives.simpo import SimPO as SimPO
from fettle.objectives.tag import Tag as Tag

AnyObjective = one_of(Objective)
