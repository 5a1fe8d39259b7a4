"""One script of vfio-user messages, for our server and for libvfio-user's, and what each answered.

script.py        the messages, good and bad
talk.py          plays it to a server
ours.py          the device behind our server
theirs.c         the same device behind libvfio-user
__main__.py      `python -m tests.interop.libvfio DIRECTORY`: records what libvfio-user answers (tests/data/libvfio-user.json)
differences.py   where we differ on purpose
"""
