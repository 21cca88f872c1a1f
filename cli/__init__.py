"""The command `memopt`. Installed as `memopt_cli`, so that no module called `cli` is."""

import os
import warnings

# torch says so while it is imported, which the modules beside this one do. The command needs no NumPy.
warnings.filterwarnings("ignore", "Failed to initialize NumPy: No module named 'numpy'", UserWarning)

# In each of several processes, torch would advise against an option that is chosen on purpose (see train/group.py).
# It reads this while it is imported.
if "RANK" in os.environ:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
