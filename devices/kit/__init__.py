"""What a device author imports: Device and main. What the vCPU imports: Participant, argument_parser and run."""

from __future__ import annotations

from devices.kit.device import Device, RegionInfo
from devices.kit.irq import Irq
from devices.kit.participant import Participant
from devices.kit.pci_function import PciIdentity
from devices.kit.process import argument_parser, main, run

__all__ = ["Device", "Irq", "Participant", "PciIdentity", "RegionInfo", "argument_parser", "main", "run"]
