"""Fake tensors, quickly: what the commonest operators make of them is known from shapes alone.

A fake operator of torch's runs the operator's decomposition, a batch norm's dozen steps of which take milliseconds, and
looks its result up under all that it reads, a concat's whole list. A network of thousands of layers calls them
thousands of times. Here are the few that dense networks are made of, where tensors lie as they mostly do; of anything
else torch is asked itself.
"""

from memopt.fake.forward import shape_rule
from memopt.fake.making import make_fake, strides_of

__all__ = ["make_fake", "shape_rule", "strides_of"]
