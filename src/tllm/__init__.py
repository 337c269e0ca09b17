"""Together-LLM: one large language model across the machines a person has.

Importing this package does nothing but name its version.
"""

__version__ = "0.1.0"
