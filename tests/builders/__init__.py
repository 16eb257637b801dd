"""Builders of inputs that the tests of several modules share."""
