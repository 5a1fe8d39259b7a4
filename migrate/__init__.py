"""vmferry: moves a running virtual machine whose devices are processes of their own.

Read docs/architecture.md first; imports run one way (tests/unit/test_house.py enforces the arrows).
"""

__version__ = "0.1.0"
