"""The ground floor: specs, configuration, batches, files."""

from fettle.core.errors import FettleError as FettleError
from fettle.core.spec import Spec as Spec
from fettle.core.spec import one_of as one_of
