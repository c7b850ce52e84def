"""Every private or undocumented name of another library that we touch, and its messages that we match: a file for each.

A name stands here with the reason why no public one will do; tests/utils/compat fails with the name that a release
moves. Only the library itself is imported, so whoever needs one file loads no other library.
"""
