"""``phd-megatron evaluate`` on two pipeline stages of which the second has the head alone; ``--layout`` has no word for
that. The arguments are the command's.
"""

import sys

from phd_megatron.cli import evaluate
from phd_megatron.config import layouts as parity_layouts

FIELDS = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Etttt|L"}
parity_layouts.parse_layout = lambda name: parity_layouts.Layout(name, FIELDS, ranks=2)  # type: ignore[assignment]
raise SystemExit(evaluate.run([*sys.argv[1:], "--layout", "lone head"]))
