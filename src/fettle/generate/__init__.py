"""Text out of a model: sampling, batches, streams, and a conversation in the terminal."""

from fettle.generate.sample import Completion as Completion
from fettle.generate.sample import Sampling as Sampling
from fettle.generate.sample import generate as generate
from fettle.generate.sample import stream as stream
