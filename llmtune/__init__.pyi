from llmtune.api.plan import plan as plan
from llmtune.api.run import load_run as load_run
from llmtune.api.train import train as train

__version__: str
