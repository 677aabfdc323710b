"""What hiddenkey costs: `python -m benchmarks.{attention,dropout,step,startup} --out FILE.json`. Not installed."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints two lines for each use
