"""A conformance run against any process that exports org.qemu.VMState1 on a bus, and org.vmferry.Device1 where it has that.

findings.py is the table of all checks and what each means for a migration; process.py finds and asks the process; vmstate.py,
device1.py and fields.py are the checks; run.py puts them in order.
"""

from migrate.testing.conformance.findings import CHECKS, Finding, Verdict
from migrate.testing.conformance.run import conform

__all__ = ["CHECKS", "Finding", "Verdict", "conform"]
