"""Tools that the tests and the Makefile share."""
