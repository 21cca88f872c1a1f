"""From chains to a module whose training forward runs them as regions, and back."""

from memopt.rewrite.install import install, installed, own_forward, uninstall
from memopt.rewrite.splice import Region, Spliced, splice

__all__ = ["Region", "Spliced", "install", "installed", "own_forward", "splice", "uninstall"]
