"""``python -m titans_graph.cli``, which is also what ``torchrun -m`` starts."""

import sys

from titans_graph.cli.main import main

sys.exit(main())
