"""Edits that choose what trains; one file a method."""

from fettle.core.families import Edit
from fettle.core.spec import one_of
from fettle.peft.freeze import Freeze as Freeze
from fettle.peft.full import Full as Full
from fettle.peft.lora import LoRA as LoRA

AnyEdit = one_of(Edit)
