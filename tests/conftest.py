"""What every test may rely on: no network, no cache of the developer's, few threads, the same in subprocesses.

The libraries read these switches when they are imported, so they are set before anything else.
"""

import os
import tempfile


hub_cache = tempfile.TemporaryDirectory(prefix="unitok-hf-tests-")
os.environ |= {
    "HF_HOME": hub_cache.name,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
}
