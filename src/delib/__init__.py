"""delib: align your own model to your own written policy, by deliberative alignment."""

__version__ = "0.1.0"
