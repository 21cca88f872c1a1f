"""The command `memopt`. Installed as `memopt_cli`, so that no module called `cli` is."""
