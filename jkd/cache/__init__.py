"""Teacher answers on disk: run the teacher once, train many students.

`Writer`, `key` and the codecs need NumPy alone (and array_record, once files are written or read), so that any program may fill a
cache: a loop around vLLM or PyTorch, an API's client. `Cache` is what a config gives as ``Run.teacher``.
"""

from jkd.cache.config import Cache as Cache
from jkd.cache.dense import Dense as Dense
from jkd.cache.keys import key as key
from jkd.cache.manifest import seal as seal
from jkd.cache.manifest import verify as verify
from jkd.cache.reader import Reader as Reader
from jkd.cache.sampled import Sampled as Sampled
from jkd.cache.topk import TopK as TopK
from jkd.cache.writer import Writer as Writer
