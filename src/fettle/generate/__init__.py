"""Text out of a model: sampling, batches, streams, and a conversation in the terminal."""

from fettle.generate.prompts import Prompter as Prompter
from fettle.generate.prompts import prompter as prompter
from fettle.generate.sample import Completion as Completion
from fettle.generate.sample import Sampling as Sampling
from fettle.generate.sample import context_length as context_length
from fettle.generate.sample import end_tokens as end_tokens
from fettle.generate.sample import generate as generate
from fettle.generate.sample import stream as stream
