"""The lab: a small generated world, its corpus, its instruction tasks and its tokenizer."""

from .corpus import document as document
from .corpus import documents as documents
from .corpus import write_corpus as write_corpus
from .families import FAMILIES as FAMILIES
from .families import HELD_OUT as HELD_OUT
from .families import Family as Family
from .tasks import TRAINED as TRAINED
from .tasks import UNSEEN as UNSEEN
from .tasks import evaluation as evaluation
from .tasks import instruction as instruction
from .tokenizer import CHAT_TEMPLATE as CHAT_TEMPLATE
from .tokenizer import SPECIAL_TOKENS as SPECIAL_TOKENS
from .tokenizer import lab_tokenizer as lab_tokenizer
from .tokenizer import save_tokenizer as save_tokenizer
from .tokenizer import train_tokenizer as train_tokenizer
from .world import Entity as Entity
from .world import Triple as Triple
from .world import World as World
from .write import write_instructions as write_instructions
from .write import write_lab as write_lab
from .write import write_tasks as write_tasks
