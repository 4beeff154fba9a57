"""Edits that hold weights in fewer bits; one file a method, over the grids of grid.py."""

from fettle.quantize.grid import Grid as Grid
from fettle.quantize.loftq import LoftQ as LoftQ
from fettle.quantize.nf4 import NF4 as NF4
from fettle.quantize.rtn import RTN as RTN
