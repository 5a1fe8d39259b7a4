"""For people who test that a device can be moved: the conformance run behind `ferry device check`, and the pytest plugin.

It stands on the bus and on states alone: what is tested may be written in any language, with or without the device kit.
"""
