"""The update rules, a family a file. Importing this package fills `jaxsgd.RULES`."""

from jaxsgd.rules import adaptive, averaging, momentum, sign

__all__ = ["adaptive", "averaging", "momentum", "sign"]
