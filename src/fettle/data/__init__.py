"""Data: read, format, render and mask, mix, pack."""

from fettle.data.build import content_hash as content_hash
from fettle.data.formats import Sample as Sample
from fettle.data.formats import detect as detect
from fettle.data.formats import to_sample as to_sample
from fettle.data.parse import BadRow as BadRow
from fettle.data.read import Row as Row
from fettle.data.read import read as read
from fettle.data.source import Corpus as Corpus
from fettle.data.source import Counts as Counts
from fettle.data.source import prepare as prepare
from fettle.data.spec import DataSpec as DataSpec
from fettle.data.template import Encoded as Encoded
from fettle.data.template import Encoder as Encoder
from fettle.data.template import encode as encode
from fettle.data.templates import Template as Template
from fettle.data.templates import chat_template as chat_template
