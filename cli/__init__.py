"""The command `memopt`. Installed as `memopt_cli`, so that no module called `cli` is."""

import warnings

# torch says so while it is imported, which the modules beside this one do. The command needs no NumPy.
warnings.filterwarnings("ignore", "Failed to initialize NumPy: No module named 'numpy'", UserWarning)
