"""The one loop: optimizer, checkpoints, logs."""

from fettle.train.checkpoint import CheckpointSpec as CheckpointSpec
from fettle.train.log import Spent as Spent
from fettle.train.loop import Job as Job
from fettle.train.loop import Stopped as Stopped
from fettle.train.loop import fit as fit
from fettle.train.optim import OptimSpec as OptimSpec
from fettle.train.validation import Validation as Validation
from fettle.train.validation import ValidationSpec as ValidationSpec
