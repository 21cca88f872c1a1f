"""The command `memopt train`: data, options, where results are kept. The loop is `densenet_models/train.py`."""
