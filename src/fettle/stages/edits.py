"""Every edit there is, for the recipe's `edits:`."""

import fettle.peft
import fettle.quantize  # noqa: F401 - importing a family makes its edits known
from fettle.core.families import Edit
from fettle.core.spec import one_of

AnyEdit = one_of(Edit)
