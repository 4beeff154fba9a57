"""Text out of a model: an engine for many requests at once, streams, endpoints, and a conversation in the terminal."""

from fettle.generate.prompts import Prompter as Prompter
from fettle.generate.prompts import prompter as prompter
from fettle.generate.protocol import Engine as Engine
from fettle.generate.protocol import Local as Local
from fettle.generate.protocol import Prompt as Prompt
from fettle.generate.remote import Remote as Remote
from fettle.generate.request import Completion as Completion
from fettle.generate.request import Request as Request
from fettle.generate.request import Sampling as Sampling
from fettle.generate.request import end_tokens as end_tokens
from fettle.generate.request import limits as limits
from fettle.generate.sample import answered as answered
from fettle.generate.sample import context_length as context_length
from fettle.generate.sample import generate as generate
from fettle.generate.sample import stream as stream
